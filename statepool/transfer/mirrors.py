"""
Where a state is to be had from, and bringing it from there: the best source that has it whole, or else the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from attrs import evolve, field, frozen

from statepool.errors import IntegrityError, LockTimeout, MissingFile, NoSpace, NotFound, RefusedError, StatePoolError, TransportError
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.outcomes import SourceStatus
from statepool.model.progress import SILENT, Progress
from statepool.model.scope import Scope
from statepool.transfer.agree import agree, content_of
from statepool.transfer.cache import Cache
from statepool.transfer.choose import ALIKE, Chosen, choose
from statepool.transfer.fetch import Fetch, Fetched
from statepool.transfer.known import SLOW, surroundings
from statepool.transfer.offers import Offer, Source, find_offer, is_unchanged
from statepool.transfer.probe import Asked, ask_all, patience
from statepool.transfer.watch import TooSlow, Watch

SAMPLE = 256 << 10
"""Bytes that are read of a source whose speed nobody knows, before more is fetched from it while another source has it too."""

MUCH = 1 << 20
"""Bytes that are worth a sample: fewer come soon enough even from a source that is slow."""

LISTING = 10
"""How many times the timeout of one answer a whole listing may take, where other sources have answered."""

T = TypeVar("T")


@frozen
class Failed:
    """A source that could not be used, and why."""

    source: Source
    error: StatePoolError

    def __str__(self) -> str:
        wrong = "is corrupt" if isinstance(self.error, IntegrityError) else "could not be used"
        return f"the source {self.source} {wrong}: {self.error.message}"


@frozen
class Found:
    """
    Where a state is.

    :param cached: what the cache has of it, or None
    :param offers: what is to be fetched, best source first; nothing if what is cached is current
    :param warnings: what the user should know: which sources could not be used
    :param failed: those sources
    """

    cached: Manifest | None
    offers: tuple[Offer, ...] = ()
    warnings: tuple[str, ...] = ()
    failed: tuple[Failed, ...] = ()


@frozen
class Brought:
    """
    A state came from a source.

    :param offer: which one it was
    :param fetched: what is in the cache now
    :param warnings: which sources failed before
    """

    offer: Offer
    fetched: Fetched
    warnings: tuple[str, ...] = ()


@frozen
class _Reply:
    """What a source has of a state: nothing, an offer, or the same as the cache."""

    offer: Offer | None = None
    same: bool = False
    token: str = ""


def _find_chain(cache: Cache, manifest: Manifest) -> tuple[Manifest, ...]:
    return cache.pool.chain_of(manifest)


@frozen
class Mirrors:
    """
    The sources that an operation may use, with the cache that they fill.

    :param cache: the cache
    :param sources: those that are permitted, in the order in which they are configured
    :param own: whether the cache's own states count, too
    :param progress: told of every transfer
    :param find: what a source has of a state
    :param parts: what a cached state consists of, tip first
    :param fetch: brings an offer into the cache
    """

    cache: Cache
    sources: tuple[Source, ...]
    own: bool = True
    progress: Progress = SILENT
    find: Callable[[Source, StateId], Offer | None] = find_offer
    parts: Callable[[Cache, Manifest], tuple[Manifest, ...]] = _find_chain
    fetch: Callable[[Cache, Offer, Progress], Fetched] = field(default=lambda cache, offer, progress: Fetch(cache, offer, progress).run())

    # -- asking ------------------------------------------------------------------------------------------------------------------------------------

    def order(self) -> list[Chosen]:
        """:returns: the sources, best first; nobody is contacted"""
        known = self.cache.known
        return choose(known.candidates(self.sources), scope=frozenset(Scope), now=known.now(), here=surroundings())

    def ordered(self) -> list[Source]:
        """:returns: the sources themselves, best first"""
        sources = {str(source): source for source in self.sources}
        return [sources[str(chosen.candidate.location)] for chosen in self.order()] if len(sources) > 1 else list(self.sources)

    def status(self) -> list[SourceStatus]:
        """:returns: the sources, best first, with what is known of them; nobody is contacted"""
        authorities = {str(source) for source in self.sources if source.authority}
        return [
            SourceStatus(
                name=chosen.candidate.name,
                location=str(chosen.candidate.location),
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
                authority=str(chosen.candidate.location) in authorities,
            )
            for chosen in self.order()
        ]

    def ask(self, sources: Sequence[Source], question: Callable[[Source], T], good: Callable[[T], bool]) -> list[Asked[T]]:
        """As :func:`~statepool.transfer.probe.ask_all`, and remember how they answered."""
        known, deadline = self.cache.known, self.cache.settings.probe_timeout
        times = {str(source): patience(known.of(source).latency, deadline) for source in sources} if len(sources) > 1 else {}
        asked = ask_all(sources, question, patient=lambda source: times[str(source)], good=good)
        for one in asked:
            if one.error is None:
                known.answered(one.source, one.seconds)
            else:
                known.failed(one.source, one.error)
        return asked

    def ask_rested(self, question: Callable[[Source], T], good: Callable[[T], bool]) -> list[Asked[T]]:
        """
        As :meth:`ask`, best first; sources that are left alone for a while are asked only if no other one gives a good answer, or if they are the
        authority.
        """
        order = self.ordered()
        resting = [source for source in order if len(order) > 1 and not source.authority and self.cache.known.rest(source)]
        asked = self.ask([source for source in order if source not in resting], question, good)
        if resting and not any(one.error is None and one.value is not None and good(one.value) for one in asked):
            asked += self.ask(resting, question, good)
        return asked

    def has(self, wanted: StateId) -> bool:
        """
        :returns: whether a source has a state, with its whole chain
        :raises TransportError: those that could be asked do not have it, and others could not be asked
        """

        def question(source: Source) -> bool:
            offer = self.find(source, wanted)
            if offer is not None:
                self._require_whole(offer)
            return offer is not None

        asked = self.ask_rested(question, bool)
        if any(one.value for one in asked):
            return True
        failed = _failed(asked)
        if failed:
            raise _failure(f"nobody knows whether {wanted} can be had", failed, [one.source for one in asked if one.error is None])
        return False

    def listings(self, question: Callable[[Source], T]) -> tuple[list[T], tuple[str, ...]]:
        """
        Ask all sources for something that may take long where there is much. A small question comes first: who does not answer that is left out.

        :returns: the answers, in the order in which the sources are configured, and which sources could not be asked
        :raises StatePoolError: none of them could be asked
        """
        known = self.cache.known
        first = self.ask(self.sources, _is_there, bool)
        there = [one.source for one in first if one.error is None]
        asked = ask_all(there, question, patient=lambda source: LISTING * self.cache.settings.timeout)
        later = _failed(asked)
        for one in later:
            known.failed(one.source, one.error)
        failed = (*_failed(first), *later)
        found = [one.value for one in asked if one.value is not None]
        if failed and not found:
            raise _failure("no source could be asked", failed, [])
        return found, tuple(map(str, failed))

    # -- looking for a state -----------------------------------------------------------------------------------------------------------------------

    def look(self, wanted: StateId) -> Found:
        """
        Where a state is to be had from. Nobody is asked if what is cached is known to be current.

        :raises NotFound: nobody has it
        :raises Conflict: the sources disagree about it
        :raises TransportError: it is not cached, and the sources that may have it could not be asked
        """
        cached = self.cache.pool.find(wanted)
        if cached is not None and self.is_settled(wanted, cached):
            return Found(cached)
        return self._judge(wanted, cached, self._replies(wanted, cached))

    def mend(self, wanted: StateId) -> Found:
        """As :meth:`look`, for a state whose cached bytes are damaged. No offers: nobody has it."""
        asked = self._replies(wanted, None)
        offers = [one.value.offer for one in asked if one.value is not None and one.value.offer is not None]
        failed = _failed(asked)
        if not offers and failed:
            raise _failure(f"{wanted} cannot be had", failed, [one.source for one in asked if one.error is None])
        agreed = agree(wanted, offers).offers if offers else ()
        return Found(None, agreed, tuple(map(str, failed)), failed)

    def is_settled(self, wanted: StateId, cached: Manifest) -> bool:
        """:returns: whether what is cached of a state is known to be current, by what the sources answered not long ago"""
        if not self.sources:
            return self.own
        fresh = self.cache.fresh
        answers = [answer for name, answer in fresh.answers(wanted).items() if fresh.is_fresh(answer) and any(name == str(s) for s in self.sources)]
        if any(answer.digest is not None and answer.digest == content_of(cached) for answer in answers):
            return True
        return self.own and len(answers) == len(self.sources) and all(answer.digest is None for answer in answers)

    def _replies(self, wanted: StateId, cached: Manifest | None) -> list[Asked[_Reply]]:
        answers = self.cache.fresh.answers(wanted) if cached is not None else {}

        def question(source: Source) -> _Reply:
            answer = answers.get(str(source))
            known = answer is not None and cached is not None and answer.digest is not None and answer.digest == content_of(cached)
            if answer is not None and known and is_unchanged(source, wanted, answer.token):
                return _Reply(None, same=True, token=answer.token)
            offer = self.find(source, wanted)
            if offer is None:
                return _Reply()
            same = cached is not None and self._is_cached(offer, cached)
            if not same:
                self._require_whole(offer)
            if not same and len(self.sources) > 1:
                self._sample(offer)
            return _Reply(offer, same, offer.token)

        return self.ask_rested(question, lambda reply: reply.same or reply.offer is not None)

    def _is_cached(self, offer: Offer, cached: Manifest) -> bool:
        """Whether an offered chain is the one in the cache. Without digests nobody knows, and what has changed since the last answer is fetched."""
        try:
            parts = self.parts(self.cache, cached)
        except NotFound:
            return False  # another process has just removed it
        return len(parts) == len(offer.members) and all(_is_part(part, member.manifest) for part, member in zip(parts, offer.members, strict=True))

    def _require_whole(self, offer: Offer) -> None:
        """
        A log can say that a state is there whose bytes somebody has deleted. Another source may still have them.

        :raises MissingFile: it is so
        """
        if not offer.managed:
            return  # its chain was walked, file by file
        pool = offer.source.pool
        stats = pool.transport.stat_many([member.path for member in offer.members])
        for member, stat in zip(offer.members, stats, strict=True):
            digest = member.manifest.digest
            if stat is None and digest is not None and not self._is_moved_aside(offer.source, member.manifest):
                raise MissingFile(
                    f"{pool} does not have the bytes of {member.manifest.id}, on which {offer.members[0].manifest.id} stands",
                    object=member.manifest.object,
                    state=member.manifest.state,
                    pool=str(pool),
                    path=member.path,
                    hint=f"look at the pool with: statepool --source {pool} doctor",
                )

    @staticmethod
    def _is_moved_aside(source: Source, manifest: Manifest) -> bool:
        """Whether a collector had just moved the bytes aside; they are back then."""
        try:
            return manifest.digest is not None and source.pool.has_bytes(manifest.digest)
        except TransportError:
            return False  # only who may write there can bring them back

    def _sample(self, offer: Offer) -> None:
        """Find out whether a source that nobody knows is slow, before hundreds of megabytes are under way from there."""
        source, known = offer.source, self.cache.known
        largest = max(offer.members, key=lambda member: member.manifest.data_size)
        much = sum(member.manifest.data_size for member in offer.members) >= MUCH
        if not much or known.of(source).rate is not None or source.pool.transport.capabilities.refers:
            return
        begun = time.monotonic()
        count = len(source.pool.transport.read(largest.path, 0, SAMPLE))
        known.delivered(source, count, time.monotonic() - begun)

    def _judge(self, wanted: StateId, cached: Manifest | None, asked: list[Asked[_Reply]]) -> Found:
        failed = _failed(asked)
        has = [(one.source, one.value) for one in asked if one.value is not None and (one.value.same or one.value.offer is not None)]
        lacks = [one.source for one in asked if one.error is None and one.value == _Reply()]
        warnings = tuple(map(str, failed))
        if not has:
            # Whoever lacks it says nothing of what is cached, which was perhaps never stored elsewhere. If nobody could be asked, nothing is known.
            if failed and (cached is None or not lacks or not self.own):
                raise _failure(f"{wanted} cannot be had", failed, lacks)
            if cached is None or not self.own:
                raise self.nowhere(wanted)
            self._note_lacking(wanted, lacks)
            return Found(cached, (), warnings)
        if cached is not None and all(reply.same for _, reply in has):
            self._note_lacking(wanted, lacks)
            self._note_same(wanted, cached, has)
            return Found(cached, (), warnings)
        silent = [source for source in self.sources if not any(one.source is source and one.error is None for one in asked)]
        return evolve(self._settle(wanted, cached, has, warnings, silent), failed=failed)

    def _settle(
        self, wanted: StateId, cached: Manifest | None, has: list[tuple[Source, _Reply]], warnings: tuple[str, ...], silent: list[Source]
    ) -> Found:
        brief = [source for source, reply in has if reply.offer is None]  # those that were only asked whether anything has changed
        more = self.ask(brief, lambda source: self.find(source, wanted), bool)
        offers = [*(reply.offer for _, reply in has), *(one.value for one in more)]
        agreed = agree(wanted, self._best_first([offer for offer in offers if offer is not None]))
        warnings += agreed.warnings
        if cached is not None and agreed.offers and self._is_cached(agreed.offers[0], cached):
            self._note_same(
                wanted, cached, [(offer.source, _Reply(offer, token=offer.token)) for offer in agreed.offers if self._is_cached(offer, cached)]
            )
            return Found(cached, (), warnings)
        if cached is not None and not agreed.offers[0].source.authority and (other := self._last_said(wanted, cached, silent)) is not None:
            # What is cached is what that source had. That it cannot be asked now gives nobody else the right to replace it.
            warning = f"{agreed.offers[0].source} has other content of {wanted} than {other}, which cannot be asked: what is cached stays"
            return Found(cached, (), (*warnings, warning))
        return Found(cached, agreed.offers, warnings)

    def _last_said(self, wanted: StateId, cached: Manifest, silent: list[Source]) -> Source | None:
        """:returns: a source of which nothing was heard now, and which had what is cached when it was last asked"""
        answers = self.cache.fresh.answers(wanted)
        return next((source for source in silent if (answer := answers.get(str(source))) is not None and answer.digest == content_of(cached)), None)

    def _best_first(self, offers: list[Offer]) -> list[Offer]:
        """As much was learnt while they were asked, in the order of now."""
        places = {str(source): place for place, source in enumerate(self.ordered())}
        return sorted(offers, key=lambda offer: places[str(offer.source)])

    def _note_same(self, wanted: StateId, cached: Manifest, has: Iterable[tuple[Source, _Reply]]) -> None:
        for source, reply in has:
            if not self.cache.known.of(source).corrupt:
                self.cache.known.did_well(source)
            self.cache.fresh.note(wanted, str(source), reply.token, content_of(cached))

    def _note_lacking(self, wanted: StateId, lacks: Iterable[Source]) -> None:
        for source in lacks:
            self.cache.fresh.note(wanted, str(source), "none", None)

    # -- bringing it -------------------------------------------------------------------------------------------------------------------------------

    def bring(self, wanted: StateId, offers: Sequence[Offer], already: Sequence[Failed] = ()) -> Brought:
        """
        Fetch the first of these offers that turns out to be what it says. What has arrived of a chain whole stays, wherever the rest comes from.

        :param offers: of the same content, best first
        :param already: sources that failed before
        :raises StatePoolError: none of them does; if there are several, the error names them all
        """
        warnings: list[str] = []
        failed = list(already)
        slow: list[tuple[float, Offer]] = []
        left = list(offers)
        while left or slow:
            watched = bool(left)
            if not left:
                slow.sort(key=lambda pair: pair[0])
            offer = left.pop(0) if left else slow.pop()[1]
            watch = Watch(self.progress, self._pace(left) if watched else None)
            try:
                fetched = self._fetch(offer, watch)
            except TooSlow as error:
                slow.append((error.rate, offer))
                warnings.append(f"{offer.source} was left for another source: only {error.rate / (1 << 20):.1f} MiB came from it in a second")
            except StatePoolError as error:
                # How much room a state takes is what its source says, until all of it has been hashed: another one may say less.
                smaller = [other for other in left if _claimed(other) < _claimed(offer)] if isinstance(error, NoSpace) else []
                if smaller:
                    left = smaller
                elif self._is_ours(error):
                    raise
                else:
                    self.cache.known.failed(offer.source, error)
                failed.append(Failed(offer.source, error))
                warnings.append(str(failed[-1]))
            else:
                self.cache.known.did_well(offer.source)
                return Brought(offer, fetched, tuple(warnings))
        raise _failure(f"{wanted} cannot be had", failed, [])

    def _fetch(self, offer: Offer, watch: Watch) -> Fetched:
        begun = time.monotonic()
        try:
            fetched = self.fetch(self.cache, offer, watch)
        except TooSlow as error:
            self.cache.known.delivered(offer.source, error.done, time.monotonic() - begun)
            raise
        self.cache.known.delivered(offer.source, fetched.bytes, time.monotonic() - begun)
        return fetched

    def _pace(self, others: Sequence[Offer]) -> float | None:
        """:returns: how many bytes a second must come at least for us to stay with a source, while there are others; None without others"""
        if not others:
            return None
        return max(known.rate or SLOW * ALIKE for known in (self.cache.known.of(offer.source) for offer in others))

    def _is_ours(self, error: StatePoolError) -> bool:
        """Whether it is the cache, not the source, that failed, so that the next source would not help."""
        ours = (None, str(self.cache.pool), str(self.cache.root))
        return isinstance(error, NoSpace) or error.pool in ours[1:] or (isinstance(error, RefusedError | LockTimeout) and error.pool in ours)

    # -- what went wrong ---------------------------------------------------------------------------------------------------------------------------

    def nowhere(self, wanted: StateId) -> NotFound:
        """:returns: the error that says that nobody has a state"""
        asked = [*([str(self.cache.pool)] if self.own else []), *map(str, self.sources)]
        return NotFound(
            f"there is no state {wanted.state} of {wanted.object} in {', '.join(asked)}",
            object=wanted.object,
            state=wanted.state,
            hint="statepool show lists what there is" + ("; the sources were not asked, being offline" if self.cache.settings.offline else ""),
        )


def _claimed(offer: Offer) -> int:
    """:returns: how many bytes would be moved at most, as the source says"""
    return sum(member.manifest.data_size for member in offer.members)


def _failed(asked: Iterable[Asked[T]]) -> tuple[Failed, ...]:
    return tuple(Failed(one.source, one.error) for one in asked if one.error is not None)


def _failure(what: str, failed: Sequence[Failed], lacks: Sequence[Source]) -> StatePoolError:
    """:returns: one error for all; that of the source itself if there is only one"""
    errors = [one.error for one in failed]
    if len(errors) == 1 and not lacks:
        return errors[0]
    told = [f"{one.source}: {one.error.message}" for one in failed]
    told += [f"{source}: does not have it" for source in lacks]
    kind = IntegrityError if all(isinstance(error, IntegrityError) for error in errors) else TransportError
    error = kind(f"{what}: {'; '.join(told)}", object=errors[-1].object, state=errors[-1].state, hint="statepool sources shows what is known of them")
    error.__cause__ = errors[-1]
    return error


def _is_part(part: Manifest, promised: Manifest) -> bool:
    """Whether a cached state is what a source promises. A machine state has no bytes of its own: it is the same if it lists the same."""
    if part.id != promised.id:
        return False
    if promised.kind is Kind.MACHINE:
        return set(part.members) == set(promised.members)
    return promised.digest is not None and part.is_content(promised.digest)


def _is_there(source: Source) -> bool:
    source.pool.require()
    return True
