"""
Find the sources that have a state, and fetch it: from the best source that has it whole, or else
from the next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from attrs import evolve, frozen

from statepool.cache.cache import Cache
from statepool.copying.fetch import Fetch, Fetched
from statepool.errors import LockTimeout, NoSpace, NotFound, RefusedError, StatePoolError
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.progress import SILENT, Progress
from statepool.pools.parts import parts_of
from statepool.sources.mirrors import Failed, Mirrors, failed_of, failure
from statepool.sources.probe import Asked
from statepool.sources.ranking import ALIKE
from statepool.sources.reconcile import content_of, reconcile
from statepool.sources.slow_source import TooSlow, Watch
from statepool.sources.source import RemoteChain, Source
from statepool.sources.source_stats import SLOW

TOGETHER = 4
"""The most sources from which a file is fetched at once."""


@frozen
class Found:
    """
    The places where a state was found.

    :param cached: the cache's manifest of it, or None
    :param offers: what can be fetched, best source first; empty if the cached state is current
    :param warnings: what the user should know: which sources could not be used
    :param failed: those sources
    """

    cached: Manifest | None
    offers: tuple[RemoteChain, ...] = ()
    warnings: tuple[str, ...] = ()
    failed: tuple[Failed, ...] = ()


@frozen
class BringResult:
    """
    The result of fetching a state from a source.

    :param offer: the offer that was fetched
    :param fetched: what is in the cache now
    :param warnings: the sources that failed before
    """

    offer: RemoteChain
    fetched: Fetched
    warnings: tuple[str, ...] = ()


@frozen
class _Reply:
    """The reply of a source about a state: nothing, an offer, or the same as the cache."""

    offer: RemoteChain | None = None
    same: bool = False
    token: str = ""


@frozen
class Supply:
    """
    A cache with the sources that fill it.

    :param cache: the cache
    :param mirrors: the sources
    :param own: whether a state that only the cache has counts, too
    :param progress: told of every transfer
    """

    cache: Cache
    mirrors: Mirrors
    own: bool = True
    progress: Progress = SILENT

    # -- looking for a state -----------------------------------------------------------------------

    def look(self, wanted: StateId) -> Found:
        """
        Find where a state can be fetched from. No source is asked if the cached state is known to
        be current.

        :raises NotFound: neither the cache nor any source has it
        :raises Conflict: the sources disagree about it
        :raises TransportError: it is not cached, and the sources that may have it could not be
            asked
        """
        cached = self.cache.pool.find(wanted)
        if cached is not None and self.is_settled(wanted, cached):
            return Found(cached)
        return self._judge(wanted, cached, self._replies(wanted, cached))

    def mend(self, wanted: StateId) -> Found:
        """
        Find offers, as :meth:`look`, for a state whose cached bytes are damaged.

        :returns: without offers if no source has it
        """
        asked = self._replies(wanted, None)
        offers = [
            one.value.offer
            for one in asked
            if one.value is not None and one.value.offer is not None
        ]
        failed = failed_of(asked)
        if not offers and failed:
            raise failure(
                f"{wanted} cannot be had",
                failed,
                [one.source for one in asked if one.error is None],
            )
        agreed = reconcile(wanted, offers).offers if offers else ()
        return Found(None, agreed, tuple(map(str, failed)), failed)

    def is_settled(self, wanted: StateId, cached: Manifest) -> bool:
        """
        :returns: whether the cached state is known to be current, from recent answers of the
            sources
        """
        if not self.mirrors.sources:
            return self.own
        lookups, sources = self.cache.lookups, set(map(str, self.mirrors.sources))
        answers = [
            answer
            for source, answer in lookups.answers(wanted).items()
            if source in sources and lookups.is_fresh(answer)
        ]
        if any(
            answer.digest is not None and answer.digest == content_of(cached) for answer in answers
        ):
            return True
        return (
            self.own
            and len(answers) == len(self.mirrors.sources)
            and all(answer.digest is None for answer in answers)
        )

    def _replies(self, wanted: StateId, cached: Manifest | None) -> list[Asked[_Reply]]:
        answers = self.cache.lookups.answers(wanted) if cached is not None else {}

        def question(source: Source) -> _Reply:
            answer = answers.get(str(source))
            known = (
                answer is not None
                and cached is not None
                and answer.digest is not None
                and answer.digest == content_of(cached)
            )
            if answer is not None and known and source.is_unchanged(wanted, answer.token):
                return _Reply(None, same=True, token=answer.token)
            offer = source.resolve(wanted)
            if offer is None:
                return _Reply()
            same = cached is not None and self._is_cached(offer, cached)
            if not same:
                source.require_whole(offer)
            if not same and len(self.mirrors.sources) > 1:
                self.mirrors.sample(offer)
            return _Reply(offer, same, offer.token)

        return self.mirrors.ask_rested(
            question, lambda reply: reply.same or reply.offer is not None
        )

    def _is_cached(self, offer: RemoteChain, cached: Manifest) -> bool:
        """
        Tell whether an offered chain is the one in the cache. Without digests this is unknown: then
        a state that has changed since the last answer is fetched.
        """
        try:
            parts = parts_of(self.cache.pool, cached)
        except NotFound:
            return False  # another process has just removed it
        return len(parts) == len(offer.members) and all(
            _is_part(part, member.manifest)
            for part, member in zip(parts, offer.members, strict=True)
        )

    def _judge(self, wanted: StateId, cached: Manifest | None, asked: list[Asked[_Reply]]) -> Found:
        failed = failed_of(asked)
        has = [
            (one.source, one.value)
            for one in asked
            if one.value is not None and (one.value.same or one.value.offer is not None)
        ]
        lacks = [one.source for one in asked if one.error is None and one.value == _Reply()]
        warnings = tuple(map(str, failed))
        if not has:
            # That a source lacks the state says nothing about the cached one, which was perhaps
            # never stored elsewhere. If no source could be asked, nothing is known.
            if failed and (cached is None or not lacks or not self.own):
                raise failure(f"{wanted} cannot be had", failed, lacks)
            if cached is None or not self.own:
                raise self.nowhere(wanted)
            self._note_lacking(wanted, lacks)
            return Found(cached, (), warnings)
        if cached is not None and all(reply.same for _, reply in has):
            self._note_lacking(wanted, lacks)
            self._note_same(wanted, cached, has)
            return Found(cached, (), warnings)
        silent = [
            source
            for source in self.mirrors.sources
            if not any(one.source is source and one.error is None for one in asked)
        ]
        return evolve(self._settle(wanted, cached, has, warnings, silent), failed=failed)

    def _settle(
        self,
        wanted: StateId,
        cached: Manifest | None,
        has: list[tuple[Source, _Reply]],
        warnings: tuple[str, ...],
        silent: list[Source],
    ) -> Found:
        # the sources that were only asked whether anything has changed
        brief = [source for source, reply in has if reply.offer is None]
        more = self.mirrors.ask(brief, lambda source: source.resolve(wanted), bool)
        offers = [*(reply.offer for _, reply in has), *(one.value for one in more)]
        agreed = reconcile(
            wanted, self._best_first([offer for offer in offers if offer is not None])
        )
        warnings += agreed.warnings
        if cached is not None and agreed.offers and self._is_cached(agreed.offers[0], cached):
            self._note_same(
                wanted,
                cached,
                [
                    (offer.source, _Reply(offer, token=offer.token))
                    for offer in agreed.offers
                    if self._is_cached(offer, cached)
                ],
            )
            return Found(cached, (), warnings)
        if (
            cached is not None
            and not agreed.offers[0].source.authority
            and (other := self._last_said(wanted, cached, silent)) is not None
        ):
            # The cached state came from that source. That it cannot be asked now does not allow
            # another source to replace the state.
            warning = (
                f"{agreed.offers[0].source} has other content of {wanted} than {other}, which"
                " cannot be asked: what is cached stays"
            )
            return Found(cached, (), (*warnings, warning))
        return Found(cached, agreed.offers, warnings)

    def _last_said(self, wanted: StateId, cached: Manifest, silent: list[Source]) -> Source | None:
        """
        :returns: a source that did not answer now, and that had the cached content when it was last
            asked
        """
        answers = self.cache.lookups.answers(wanted)
        return next(
            (
                source
                for source in silent
                if (answer := answers.get(str(source))) is not None
                and answer.digest == content_of(cached)
            ),
            None,
        )

    def _best_first(self, offers: list[RemoteChain]) -> list[RemoteChain]:
        """Sort the offers again, by what was learnt about the sources while they were asked."""
        places = {str(source): place for place, source in enumerate(self.mirrors.ordered())}
        return sorted(offers, key=lambda offer: places[str(offer.source)])

    def _note_same(
        self, wanted: StateId, cached: Manifest, has: Iterable[tuple[Source, _Reply]]
    ) -> None:
        for source, reply in has:
            if not self.mirrors.stats.of(source).corrupt:
                self.mirrors.stats.did_well(source)
            self.cache.lookups.note(wanted, str(source), reply.token, content_of(cached))

    def _note_lacking(self, wanted: StateId, lacks: Iterable[Source]) -> None:
        for source in lacks:
            self.cache.lookups.note(wanted, str(source), "none", None)

    # -- bringing it -------------------------------------------------------------------------------

    def bring(
        self, wanted: StateId, offers: Sequence[RemoteChain], already: Sequence[Failed] = ()
    ) -> BringResult:
        """
        Fetch the first of these offers that proves correct. Members of a chain that have arrived
        whole stay, even if the rest comes from another source.

        :param offers: of the same content, best first
        :param already: sources that failed before
        :raises StatePoolError: no offer does; if there are several, the error names them all
        """
        warnings: list[str] = []
        failed = list(already)
        slow: list[tuple[float, RemoteChain]] = []
        left = list(offers)
        while left or slow:
            watched = bool(left)
            if not left:
                slow.sort(key=lambda pair: pair[0])
            offer = left.pop(0) if left else slow.pop()[1]
            others = self._as_good(offer, left)
            watch = Watch(self.progress, self._pace(left) if watched else None)
            fetch = Fetch(self.cache, offer, watch, others=others)
            try:
                fetched = self._fetch(fetch, offer)
            except TooSlow as error:
                slow.append((error.rate, offer))
                warnings.append(
                    f"{offer.source} was left for another source: only {error.rate / (1 << 20):.1f}"
                    " MiB came from it in a second"
                )
            except StatePoolError as error:
                # How much room a state takes is only the claim of its source until all of it has
                # been hashed: another source may claim less.
                smaller = (
                    [other for other in left if _claimed(other) < _claimed(offer)]
                    if isinstance(error, NoSpace)
                    else []
                )
                if smaller:
                    left = smaller
                elif self._is_ours(error):
                    raise
                else:
                    self.mirrors.stats.failed(offer.source, error)
                failed.append(Failed(offer.source, error))
                warnings.append(str(failed[-1]))
                gone = self._given_up(fetch, failed, warnings)
                left = [other for other in left if other.source not in gone]
            else:
                gone = self._given_up(fetch, failed, warnings)
                if offer.source not in gone:
                    self.mirrors.stats.did_well(offer.source)
                return BringResult(offer, fetched, tuple(warnings))
        raise failure(f"{wanted} cannot be had", failed, [])

    def _fetch(self, fetch: Fetch, offer: RemoteChain) -> Fetched:
        begun = time.monotonic()
        try:
            fetched = fetch.run()
        except TooSlow as error:
            self.mirrors.stats.delivered(offer.source, error.done, time.monotonic() - begun)
            raise
        for one in fetch.deliveries:
            self.mirrors.stats.delivered(one.source, one.bytes, one.seconds)
        if not fetch.deliveries:
            self.mirrors.stats.delivered(offer.source, fetched.bytes, time.monotonic() - begun)
        return fetched

    def _as_good(self, offer: RemoteChain, others: Sequence[RemoteChain]) -> list[RemoteChain]:
        """
        :returns: the offers that can be fetched at the same time as this one: they are of other
            hosts, and their sources are neither farther nor much slower
        """
        if not others or offer.source.location.is_local:
            return []
        equals = [one for one in self.mirrors.equals(offer.source) if not one.location.is_local]
        return [other for other in others if other.source in equals][: TOGETHER - 1]

    def _given_up(self, fetch: Fetch, failed: list[Failed], warnings: list[str]) -> list[Source]:
        """
        Note the sources that failed while several were used at once.

        :returns: these sources
        """
        known = [one.source for one in failed]
        found = [Failed(one.source, one.error) for one in fetch.deliveries if one.error is not None]
        for one in found:
            if one.source not in known:
                self.mirrors.stats.failed(one.source, one.error)
                failed.append(one)
                warnings.append(str(one))
        return [one.source for one in found]

    def _pace(self, others: Sequence[RemoteChain]) -> float | None:
        """
        :returns: the minimum throughput, in bytes per second, at which we stay with a source while
            there are others; None if there are none
        """
        if not others:
            return None
        return max(
            known.rate or SLOW * ALIKE
            for known in (self.mirrors.stats.of(offer.source) for offer in others)
        )

    def _is_ours(self, error: StatePoolError) -> bool:
        """
        Tell whether the cache failed, and not the source, so that the next source would not help.
        """
        ours = (None, str(self.cache.pool), str(self.cache.root))
        return (
            isinstance(error, NoSpace)
            or error.pool in ours[1:]
            or (isinstance(error, RefusedError | LockTimeout) and error.pool in ours)
        )

    # -- what went wrong ---------------------------------------------------------------------------

    def nowhere(self, wanted: StateId) -> NotFound:
        """:returns: the error for a state that no source has"""
        asked = [*([str(self.cache.pool)] if self.own else []), *map(str, self.mirrors.sources)]
        return NotFound(
            f"there is no state {wanted.state} of {wanted.object} in {', '.join(asked)}",
            object=wanted.object,
            state=wanted.state,
            hint="statepool show lists what there is"
            + (
                "; the sources were not asked, being offline" if self.cache.settings.offline else ""
            ),
        )


def _claimed(offer: RemoteChain) -> int:
    """:returns: how many bytes would be moved at most, as the source claims"""
    return sum(member.manifest.data_size for member in offer.members)


def _is_part(part: Manifest, promised: Manifest) -> bool:
    """
    Tell whether a cached state is what a source promises. A machine state has no bytes of its own:
    it is the same if it lists the same members.
    """
    if part.id != promised.id:
        return False
    if promised.kind is Kind.MACHINE:
        return set(part.members) == set(promised.members)
    return promised.digest is not None and part.is_content(promised.digest)
