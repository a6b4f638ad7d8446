"""
When which source was asked for a state, and what it had: so that a get within a minute asks nobody, and one after it asks a small question.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from statepool.model.digest import Digest
from statepool.model.manifest import StateId
from statepool.transfer.notes import make_directory, write_note


@frozen
class Answer:
    """
    What a source had.

    :param source: its location
    :param token: changes when what the source has of this machine changes
    :param at: when it was asked, in seconds since the epoch by this host's clock
    :param digest: of the state's bytes as they are in the cache, or None if the source did not have the state
    """

    source: str
    token: str
    at: float
    digest: Digest | None


class Freshness:
    """
    Remembers the answers of sources.

    :param directory: where: one small file for each state
    :param period: for how long an answer is as good as asking, in seconds
    :param clock: tells the time, in seconds since the epoch
    """

    def __init__(self, directory: Path, period: float, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._period = period
        self._clock = clock

    def _file(self, state: StateId) -> Path:
        # A dot and a name after it: image and state names cannot make two states meet in one file.
        return self._directory / state.object / f"{state.state}.{state.kind}.json"

    def answers(self, state: StateId) -> dict[str, Answer]:
        """:returns: the last answers about a state, by the sources' locations"""
        try:
            with open(self._file(state), "rb") as file:
                data = json.loads(file.read())
            return {
                source: Answer(source, str(entry["token"]), float(entry["at"]), Digest.parse(entry["digest"]) if entry["digest"] else None)
                for source, entry in data["answers"].items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # torn by a power cut: asking again settles it

    def is_fresh(self, answer: Answer) -> bool:
        """:returns: whether an answer is young enough; one from the future is not"""
        return 0 <= self._clock() - answer.at < self._period

    def note(self, state: StateId, source: str, token: str, digest: Digest | None) -> None:
        """A source has just been asked."""
        answers = self.answers(state)
        answers[source] = Answer(source, token, self._clock(), digest)
        data = {
            "format": 1,
            "answers": {
                name: {"token": answer.token, "at": answer.at, "digest": str(answer.digest) if answer.digest else None}
                for name, answer in answers.items()
            },
        }
        path = self._file(state)
        make_directory(path.parent)
        write_note(path, data)

    def forget(self, state: StateId) -> None:
        """Ask again next time."""
        self._file(state).unlink(missing_ok=True)
