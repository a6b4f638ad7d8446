"""
The cache of lookups: when which source was asked for a state, and what it had. So a get within a
minute asks no source, and a later get asks a small question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen

from statepool.model.digest import Digest
from statepool.model.manifest import StateId
from statepool.pools.json_files import Notes

DIRECTORY = "fresh"
"""The directory of these notes."""


@frozen
class Answer:
    """
    An answer of a source.

    :param source: its location
    :param token: changes when what the source has of this machine changes
    :param at: when it was asked, in seconds since the epoch by this host's clock
    :param digest: of the state's bytes as they are in the cache, or None if the source did not have
        the state
    """

    source: str
    token: str
    at: float
    digest: Digest | None


class LookupCache:
    """
    The last answers of sources.

    :param notes: where they are kept: one small file for each state
    :param period: for how long an answer is fresh, in seconds
    :param clock: returns the time, in seconds since the epoch
    """

    def __init__(self, notes: Notes, period: float, clock: Callable[[], float]) -> None:
        self._notes = notes
        self._period = period
        self._clock = clock

    @staticmethod
    def _file(state: StateId) -> str:
        # A dot, and the kind after it: so no names of images and states can give two states the
        # same file.
        return f"{DIRECTORY}/{state.object}/{state.state}.{state.kind}.json"

    def answers(self, state: StateId) -> dict[str, Answer]:
        """:returns: the last answers about a state, by the sources' locations"""
        answers: Any = self._notes.read(self._file(state)).get("answers", {})
        try:
            return {
                source: Answer(
                    source,
                    str(entry["token"]),
                    float(entry["at"]),
                    Digest.parse(entry["digest"]) if entry["digest"] else None,
                )
                for source, entry in answers.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # torn by a power cut: the source is asked again

    def is_fresh(self, answer: Answer) -> bool:
        """:returns: whether an answer is fresh; an answer from the future is not"""
        return 0 <= self._clock() - answer.at < self._period

    def note(self, state: StateId, source: str, token: str, digest: Digest | None) -> None:
        """Note the answer of a source that has just been asked."""
        answers = self.answers(state)
        answers[source] = Answer(source, token, self._clock(), digest)
        data = {
            "format": 1,
            "answers": {
                name: {
                    "token": answer.token,
                    "at": answer.at,
                    "digest": str(answer.digest) if answer.digest else None,
                }
                for name, answer in answers.items()
            },
        }
        self._notes.write(self._file(state), data)

    def forget(self, state: StateId) -> None:
        """Forget the answers about a state, so that the sources are asked next time."""
        self._notes.remove(self._file(state))
