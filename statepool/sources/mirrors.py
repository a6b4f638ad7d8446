"""
The sources that an operation may use, as mirrors of each other: their order, questions to all of
them at once, and reports of those that fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from attrs import frozen

from statepool.errors import IntegrityError, StatePoolError, TransportError
from statepool.model.manifest import StateId
from statepool.model.outcomes import SourceStatus
from statepool.model.scope import Scope
from statepool.model.settings import Settings
from statepool.sources.probe import Asked, ask_all, patience
from statepool.sources.ranking import Ranked, is_alike, rank
from statepool.sources.source import RemoteChain, Source
from statepool.sources.source_stats import SourceStats, surroundings

SAMPLE = 256 << 10
"""
Bytes that are read from a source of unknown speed, before more is fetched from it, if another
source has the state, too.
"""

MUCH = 1 << 20
"""
Bytes of a transfer from which a sample is worthwhile: fewer bytes arrive soon enough even from a
slow source.
"""

LISTING = 10
"""
How many times the timeout of one answer a whole listing may take, if other sources have answered.
"""

T = TypeVar("T")


@frozen
class Failed:
    """A source that could not be used, and the error."""

    source: Source
    error: StatePoolError

    def __str__(self) -> str:
        wrong = "is corrupt" if isinstance(self.error, IntegrityError) else "could not be used"
        return f"the source {self.source} {wrong}: {self.error.message}"


@frozen
class Mirrors:
    """
    The sources that an operation may use.

    :param sources: the permitted sources, in the order in which they are configured
    :param stats: what is known of their speed and health
    :param settings: the settings, among them the timeouts
    """

    sources: tuple[Source, ...]
    stats: SourceStats
    settings: Settings

    def order(self) -> list[Ranked]:
        """:returns: the sources, best first; no source is contacted"""
        known = self.stats
        return rank(
            known.candidates(self.sources),
            scope=frozenset(Scope),
            now=known.now(),
            here=surroundings(),
        )

    def ordered(self) -> list[Source]:
        """:returns: the sources themselves, best first"""
        sources = {str(source): source for source in self.sources}
        return (
            [sources[str(chosen.candidate.location)] for chosen in self.order()]
            if len(sources) > 1
            else list(self.sources)
        )

    def equals(self, source: Source) -> list[Source]:
        """
        :returns: the other sources that are as good as this one: they do not rest, and are neither
            farther nor of another class of speed
        """
        order = self.order()
        this = next(one for one in order if str(one.candidate.location) == str(source))
        alike = {str(one.candidate.location) for one in order if is_alike(one, this)}
        return [one for one in self.sources if one is not source and str(one) in alike]

    def status(self) -> list[SourceStatus]:
        """:returns: the sources, best first, with what is known of them; no source is contacted"""
        authorities = {str(source) for source in self.sources if source.authority}
        return [
            SourceStatus(
                name=chosen.candidate.name,
                location=(location := str(chosen.candidate.location)),
                scope=chosen.candidate.scope,
                proximity=str(chosen.proximity),
                latency=chosen.candidate.known.latency,
                rate=chosen.candidate.known.rate,
                rest=chosen.rest,
                failures=chosen.candidate.known.failures,
                failed=chosen.candidate.known.failed,
                problem=chosen.candidate.known.problem,
                corrupt=chosen.candidate.known.corrupt,
                why=chosen.why,
                authority=location in authorities,
            )
            for chosen in self.order()
        ]

    def ask(
        self, sources: Sequence[Source], question: Callable[[Source], T], good: Callable[[T], bool]
    ) -> list[Asked[T]]:
        """
        Ask sources, as :func:`~statepool.sources.probe.ask_all`, and remember how they answered.
        """
        known, deadline = self.stats, self.settings.probe_timeout
        times = (
            {str(source): patience(known.of(source).latency, deadline) for source in sources}
            if len(sources) > 1
            else {}
        )
        asked = ask_all(sources, question, patient=lambda source: times[str(source)], good=good)
        for one in asked:
            if one.error is None:
                known.answered(one.source, one.seconds)
            else:
                known.failed(one.source, one.error)
        return asked

    def ask_rested(
        self, question: Callable[[Source], T], good: Callable[[T], bool]
    ) -> list[Asked[T]]:
        """
        Ask all sources, as :meth:`ask`, best first. Sources that failed recently are asked only if
        no other source gives a good answer, or if they are the authority.
        """
        order = self.ordered()
        resting = [
            source
            for source in order
            if len(order) > 1 and not source.authority and self.stats.rest(source)
        ]
        asked = self.ask([source for source in order if source not in resting], question, good)
        if resting and not any(
            one.error is None and one.value is not None and good(one.value) for one in asked
        ):
            asked += self.ask(resting, question, good)
        return asked

    def has(self, wanted: StateId) -> bool:
        """
        :returns: whether a source has a state, with its whole chain
        :raises TransportError: the sources that could be asked do not have the state, and other
            sources could not be asked
        """

        def question(source: Source) -> bool:
            offer = source.resolve(wanted)
            if offer is not None:
                source.require_whole(offer)
            return offer is not None

        asked = self.ask_rested(question, bool)
        if any(one.value for one in asked):
            return True
        failed = failed_of(asked)
        if failed:
            raise failure(
                f"nobody knows whether {wanted} can be had",
                failed,
                [one.source for one in asked if one.error is None],
            )
        return False

    def listings(self, question: Callable[[Source], T]) -> tuple[list[T], tuple[str, ...]]:
        """
        Ask all sources a question that may take long if a source has much. A small question comes
        first; a source that does not answer it is left out.

        :returns: the answers, in the order in which the sources are configured, and which sources
            could not be asked
        :raises StatePoolError: no source could be asked
        """
        known = self.stats
        first = self.ask(self.sources, _is_there, bool)
        there = [one.source for one in first if one.error is None]
        asked = ask_all(there, question, patient=lambda source: LISTING * self.settings.timeout)
        later = failed_of(asked)
        for one in later:
            known.failed(one.source, one.error)
        failed = (*failed_of(first), *later)
        found = [one.value for one in asked if one.value is not None]
        if failed and not found:
            raise failure("no source could be asked", failed, [])
        return found, tuple(map(str, failed))

    def sample(self, offer: RemoteChain) -> None:
        """
        Measure the speed of a source for which it is unknown, before hundreds of megabytes are
        fetched from it.
        """
        source, known = offer.source, self.stats
        largest = max(offer.members, key=lambda member: member.manifest.data_size)
        much = sum(member.manifest.data_size for member in offer.members) >= MUCH
        if not much or known.of(source).rate is not None or source.transport.capabilities.refers:
            return
        begun = time.monotonic()
        count = len(source.transport.read(largest.path, 0, SAMPLE))
        known.delivered(source, count, time.monotonic() - begun)


def failed_of(asked: Iterable[Asked[T]]) -> tuple[Failed, ...]:
    """:returns: the sources that did not answer, and the errors"""
    return tuple(Failed(one.source, one.error) for one in asked if one.error is not None)


def failure(what: str, failed: Sequence[Failed], lacks: Sequence[Source]) -> StatePoolError:
    """:returns: one error for all failures; the error of the source itself if there is only one"""
    errors = [one.error for one in failed]
    if len(errors) == 1 and not lacks:
        return errors[0]
    told = [f"{one.source}: {one.error.message}" for one in failed]
    told += [f"{source}: does not have it" for source in lacks]
    kind = (
        IntegrityError
        if all(isinstance(error, IntegrityError) for error in errors)
        else TransportError
    )
    error = kind(
        f"{what}: {'; '.join(told)}",
        object=errors[-1].object,
        state=errors[-1].state,
        hint="statepool sources shows what is known of them",
    )
    error.__cause__ = errors[-1]
    return error


def _is_there(source: Source) -> bool:
    source.require()
    return True
