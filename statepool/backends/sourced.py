"""
Backends whose own operations are combined with the sources of the cache.

A derived class defines how an object's states are named in a pool, how a working image is made from
a cached state, and how one is captured into the cache. This module decides where states come from
and where they are stored:

- *show*: which states are available, and where;
- *get*: a cached state that is trusted and fresh is used as it is; otherwise the best source that
  has it whole; if that fails or delivers wrong bytes, the next one;
- *set* and *unset*: all pools that the scope permits. A pool that fails does not hide the results
  of the others, and a retry completes the rest.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from attrs import evolve

from statepool.backends.answers import cached as in_cache
from statepool.backends.answers import digests_of, got, planned
from statepool.backends.base import DEFAULTS, Context, Options, StateBackend, Target
from statepool.cache.check_cached import check_cached, damaged, discard
from statepool.cache.gc_roots import gc_roots
from statepool.cache.linked import refuse_linked
from statepool.capture.capture import Capture, CaptureResult
from statepool.capture.capture_journal import recover
from statepool.copying.fetch import Fetch
from statepool.copying.push import Push
from statepool.copying.supply import Found, Supply
from statepool.errors import HasDependants, NotFound, ReadOnlyPool, StatePoolError, UsageError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest, StateId
from statepool.model.outcomes import (
    GetResult,
    Listing,
    Presence,
    Removed,
    SetResult,
    SourceStatus,
    StoredAt,
    Verified,
    WaitFor,
)
from statepool.model.scope import Scope
from statepool.pools.collect import Collector
from statepool.pools.fold import member_ids
from statepool.pools.parts import parts_of
from statepool.pools.pool import Pool
from statepool.pools.refusals import taken
from statepool.sources.merge import merged
from statepool.sources.mirrors import Mirrors
from statepool.sources.pool_source import Place, PoolSource, listing, listings, open_pool
from statepool.sources.probe import ask_all
from statepool.sources.reconcile import content_of
from statepool.sources.source import Source
from statepool.transports.failures import Subject, translate_os_errors


class SourcedStateBackend(StateBackend):
    """
    The states of the cache and its sources. A derived class defines its own part in the methods
    whose names begin with ``own_``.

    :param context: the cache, the sources and the other parts to work with
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._cache = context.cache

    # -- listings ----------------------------------------------------------------------------------

    def show(self, target: Target, options: Options = DEFAULTS) -> Listing:
        """
        :param options: its scope
        :returns: the states of an object, or of all images of a machine, each with the pools that
            have it
        """
        wanted, machine = str(target.object), target.object.machine
        supply = self._supply(options)
        own = [listing(self._cache.pool, machine)] if supply.own else []
        found, warnings = supply.mirrors.listings(lambda source: source.states(machine))
        shown = self._shown([*own, *found], warnings)
        return Listing(
            (one for one in shown if wanted in (machine, one.manifest.object)), shown.warnings
        )

    def show_all(self, options: Options = DEFAULTS) -> Listing:
        """Show the states of all objects, as :meth:`show` does for one."""
        supply = self._supply(options)
        own = [listings(self._cache.pool)] if supply.own else []
        found, warnings = supply.mirrors.listings(lambda source: source.states())
        return self._shown([*own, *found], warnings)

    def _shown(self, found: Sequence[Listing], warnings: Iterable[str]) -> Listing:
        return Listing(
            merged(found, str(self._cache.pool)),
            (*self._unasked, *warnings, *(warning for one in found for warning in one.warnings)),
        )

    # -- what a backend writes ---------------------------------------------------------------------

    @abstractmethod
    def own_state(self, target: Target, state: str) -> StateId:
        """
        :returns: the state that a target and a state's name mean in a pool
        :raises InvalidName: no state can have this name
        :raises UsageError: this backend does not keep states of such an object
        """

    @abstractmethod
    def own_places(self, target: Target, options: Options) -> Mapping[str, Path]:
        """
        Check whether a get can do what the target asks for, and change nothing.

        :returns: the absolute paths of the working images to make, by the names of the images
        """

    @abstractmethod
    def own_get(
        self,
        target: Target,
        chain: tuple[Manifest, ...],
        places: Mapping[str, Path],
        options: Options,
    ) -> Path | None:
        """
        Do what the target asks for with a state that is in the cache now.

        :param chain: the state and what it needs, see :mod:`~statepool.pools.parts`
        :returns: the working image that was made, or None
        """

    @abstractmethod
    def own_set(self, target: Target, wanted: StateId, options: Options) -> CaptureResult:
        """
        Capture the target's working image, or a machine, into the cache as a state.

        :raises Conflict: the name exists with other content
        """

    def _capture(self, wanted: StateId, files: Mapping[StateId, Path], options: Options) -> Capture:
        return Capture(
            self._cache,
            wanted,
            files,
            replace=options.replace,
            labels=options.labels,
            creator=self.context.creator,
            copying=options.copying,
            progress=self.context.progress,
        )

    def own_unset(self, wanted: StateId, options: Options) -> tuple[str, ...]:
        """
        Remove a state from the cache.

        :returns: the names of the removed states
        :raises NotFound: there is no such state
        """
        pool = self._cache.pool
        if options.dry_run:
            return tuple(gone.state for gone in pool.plan_removal(wanted, cascade=options.cascade))
        removed = pool.remove(
            wanted, cascade=options.cascade, allowed=lambda digests: refuse_linked(pool, digests)
        )
        self._cache.drop(digests_of(removed))
        for manifest in removed:
            self._cache.lookups.forget(manifest.id)
        return tuple(manifest.state for manifest in removed)

    # -- the sources -------------------------------------------------------------------------------

    def permitted(self, options: Options = DEFAULTS) -> tuple[Source, ...]:
        """
        :returns: the sources that may be used, in the order in which they are configured
        :raises UsageError: neither a source nor the cache is permitted; or a named source does not
            exist
        """
        for name in options.sources:
            if not any(source.is_called(name) for source in self.context.sources):
                known = ", ".join(source.name for source in self.context.sources)
                raise UsageError(
                    f"there is no source {name!r}",
                    hint=f"sources are {known}" if known else "no source is configured",
                )
        named = [
            source
            for source in self.context.sources
            if not options.sources or any(source.is_called(name) for name in options.sources)
        ]
        found = tuple(source for source in named if source.scope in options.scope)
        if not found and (Scope.OWN not in options.scope or options.sources):
            scopes = ", ".join(f"{source.name} is {source.scope}" for source in named)
            asked = " ".join(scope for scope in Scope if scope in options.scope)
            raise UsageError(
                f"no pool is in this scope: {asked or 'none'}" + (f" ({scopes})" if scopes else ""),
                hint="scopes are " + ", ".join(Scope),
            )
        return () if self._cache.settings.offline else found

    @property
    def _unasked(self) -> tuple[str, ...]:
        """The warning of an answer that was given without the sources, although there are some."""
        if self._cache.settings.offline and self.context.sources:
            return ("offline: no source was asked",)
        return ()

    def status(self, options: Options = DEFAULTS) -> list[SourceStatus]:
        """
        :returns: the sources that may be used, in the order in which they would be asked, and why;
            no source is contacted
        """
        sources = tuple(source for source in self.context.sources if source.scope in options.scope)
        return self._mirrors(sources).status()

    def _mirrors(self, sources: tuple[Source, ...]) -> Mirrors:
        return Mirrors(sources, self.context.stats, self._cache.settings)

    def _supply(self, options: Options = DEFAULTS) -> Supply:
        # A user who names a source wants the state from there, whatever the cache has under this
        # name.
        own = Scope.OWN in options.scope and not options.sources
        mirrors = self._mirrors(self.permitted(options))
        return Supply(
            self._cache, mirrors, own or self._cache.settings.offline, self.context.progress
        )

    def _translate_os_errors(self, doing: str) -> AbstractContextManager[None]:
        return translate_os_errors(doing, Subject(f"from or into the cache {self._cache.root}"))

    # -- looking -----------------------------------------------------------------------------------

    def check(self, target: Target, state: str, options: Options = DEFAULTS) -> bool:
        """
        :returns: whether the cache or a source that the scope permits has a state, with its whole
            chain
        """
        wanted = self.own_state(target, state)
        supply = self._supply(options)
        if supply.own and self._cache.pool.find(wanted) is not None:
            return True
        return supply.mirrors.has(wanted)

    # -- getting -----------------------------------------------------------------------------------

    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> GetResult:
        """
        Bring a state into the cache, if it is not there or has been replaced in its source; and do
        with it what the target asks for.

        :raises NotFound: neither the cache nor a source has it
        :raises Conflict: the sources disagree about it
        """
        wanted = self.own_state(target, state)
        supply = self._supply(options)
        with self._translate_os_errors(f"get {wanted}"):
            if not options.dry_run:
                recover(self._cache)
            places = self.own_places(target, options)
            try:
                return self._get_from(supply, target, wanted, places, options)
            finally:
                if not options.dry_run:
                    self.context.stats.save()

    def _get_from(
        self,
        supply: Supply,
        target: Target,
        wanted: StateId,
        places: Mapping[str, Path],
        options: Options,
    ) -> GetResult:
        found = supply.look(wanted)
        if options.dry_run:
            plan = (
                planned(found.offers[0], Fetch(self._cache, found.offers[0]))
                if found.offers
                else in_cache(self._parts(found.cached), Verified.TRUSTED)
            )
            return evolve(
                plan,
                working=next(iter(places.values()), None),
                warnings=(*self._unasked, *found.warnings),
            )
        result, chain = self._bring(supply, wanted, found)
        digests = [manifest.digest for manifest in chain if manifest.digest is not None]
        self._cache.trust.touch(digests)
        self._cache.renew_uses(digests)
        working = self.own_get(target, chain, places, options)
        return evolve(result, working=working, warnings=(*self._unasked, *result.warnings))

    def _bring(
        self, supply: Supply, wanted: StateId, found: Found
    ) -> tuple[GetResult, tuple[Manifest, ...]]:
        warnings, mended = found.warnings, []
        if not found.offers:
            chain = self._parts(found.cached)
            checked = check_cached(
                self._cache,
                [link for link in chain if link.digest is not None],
                self.context.progress,
            )
            if not checked.bad:
                return evolve(in_cache(chain, checked.verified), warnings=warnings), chain
            found = supply.mend(wanted)
            warnings = tuple(dict.fromkeys((*warnings, *found.warnings)))
            if not found.offers:
                raise damaged(self._cache, checked.bad[0])
            keep = not found.offers[0].source.location.is_local
            for manifest in checked.bad:
                mended.append(discard(self._cache, manifest, keep=keep))
        brought = supply.bring(wanted, found.offers, found.failed)
        self._cache.lookups.note(
            wanted,
            str(brought.offer.source),
            brought.offer.token,
            content_of(brought.fetched.chain[0]),
        )
        answer = got(brought.offer, brought.fetched)
        return evolve(
            answer,
            warnings=tuple(
                dict.fromkeys((*warnings, *brought.warnings, *mended, *brought.fetched.warnings))
            ),
        ), brought.fetched.chain

    def _parts(self, cached: Manifest | None) -> tuple[Manifest, ...]:
        assert cached is not None
        return parts_of(self._cache.pool, cached)

    # -- setting -----------------------------------------------------------------------------------

    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> SetResult:
        """Make the target a state, in the cache and in the sources that the scope permits."""
        wanted = self.own_state(target, state)
        sources = self.permitted(options)
        with self._translate_os_errors(f"set {wanted}"):
            if not options.dry_run:
                recover(self._cache)
            self._refuse_taken_there(sources, target, wanted, options)
            old = self._bytes_of(wanted)
            taken = self.own_set(target, wanted, options)
            if not options.dry_run and (
                gone := old - digests_of(taken.members or (taken.manifest,))
            ):
                self._cache.drop({*gone})
            presence = Presence.STORED if taken.written else Presence.PRESENT
            own = StoredAt(
                str(self._cache.pool), presence, bytes=taken.bytes if taken.written else 0
            )
            others = [self._store(taken, source, options) for source in sources]
            if not options.dry_run:
                self.context.stats.save()
        return SetResult(
            wanted.object,
            wanted.state,
            str(taken.manifest.digest),
            (own, *others),
            (*self._unasked, *taken.warnings),
            options.wait_for,
        )

    def _bytes_of(self, wanted: StateId) -> AbstractSet[Digest]:
        """
        :returns: the bytes of the cached state of a name, or those of all members of a machine
            state
        """
        fold = self._cache.pool.fold(wanted.machine)
        manifest = fold.states.get(wanted)
        return (
            digests_of([manifest, *(fold.states[member] for member in member_ids(manifest))])
            if manifest is not None
            else set()
        )

    def _refuse_taken_there(
        self, sources: tuple[Source, ...], target: Target, wanted: StateId, options: Options
    ) -> None:
        """
        Check before an image is captured whether the sources can take the state. Otherwise the user
        would be left with a state in the cache that no source can take. A source that does not
        answer is checked later.

        :raises Conflict: the name exists in a source with other content, which may not be replaced
        """
        if options.replace or options.squash or options.wait_for is not WaitFor.ALL:
            return
        cached = self._cache.pool.find(wanted)
        asked = ask_all(
            sources,
            lambda source: source.to_change().find(wanted),
            patient=lambda source: self._cache.settings.probe_timeout,
        )
        there = [
            (one.source, one.value)
            for one in asked
            if one.value is not None and (cached is None or not _is_same(one.value, cached))
        ]
        if not there:
            return
        planned = self.own_set(target, wanted, evolve(options, dry_run=True)).manifest
        for source, manifest in there:
            # the content of a state of a running machine is not known yet
            if not (planned.digest or planned.members) or not _is_same(manifest, planned):
                raise taken(wanted, source)

    def _store(self, captured: CaptureResult, source: Source, options: Options) -> StoredAt:
        manifest = captured.manifest
        if options.dry_run:
            return self._would_store(captured, source, options)
        at = self._push(manifest, source, options)
        if at.result is not Presence.FAILED:
            self.context.stats.did_well(source)
            offer = source.resolve(manifest.id)
            if offer is not None:
                self._cache.lookups.note(
                    manifest.id, str(source), offer.token, content_of(manifest)
                )
        return at

    def _push(self, manifest: Manifest, source: Source, options: Options) -> StoredAt:
        """:returns: the result of storing a cached state in a source; errors are part of it"""
        try:
            pool, chain = source.to_change(), parts_of(self._cache.pool, manifest)
        except (NotFound, ReadOnlyPool) as error:
            return StoredAt(str(source), Presence.FAILED, durable=False, error=str(error))
        return Push(self._cache, pool, self.context.progress).attempt(
            chain, replace=options.replace or options.squash
        )

    def _would_store(self, captured: CaptureResult, source: Source, options: Options) -> StoredAt:
        manifest, size = (
            captured.manifest,
            sum(one.data_size for one in captured.members or (captured.manifest,)),
        )
        try:
            pool = source.to_change()
            pool.require(write=True)
            there = pool.find(manifest.id)
        except StatePoolError as error:
            return StoredAt(str(source), Presence.FAILED, durable=False, error=str(error))
        same = there is not None and _is_same(there, manifest)
        if there is not None and not same and not options.replace and not options.squash:
            return StoredAt(
                str(source), Presence.FAILED, durable=False, error=str(taken(manifest.id, source))
            )
        return StoredAt(
            str(source), Presence.PRESENT if same else Presence.STORED, bytes=0 if same else size
        )

    def store(
        self, target: Target, state: str, to: Place, options: Options = DEFAULTS
    ) -> SetResult:
        """
        Store a state that is in the cache in a pool, with all that it depends on.

        :param to: the name of a source, or the location of a pool
        :raises NotFound: the cache does not have it
        :raises UsageError: the pool is the cache itself
        """
        wanted, cache = self.own_state(target, state), self._cache.pool
        source = self._source(to)
        with self._translate_os_errors(f"store {wanted}"):
            manifest = cache.find(wanted)
            if manifest is None:
                raise cache.missing(wanted)
            at = self._store(CaptureResult(manifest, parts_of(cache, manifest)), source, options)
            if not options.dry_run:
                self.context.stats.save()
        return SetResult(wanted.object, wanted.state, str(manifest.digest or ""), (at,))

    def _source(self, place: Place) -> Source:
        name = os.fsdecode(place) if not isinstance(place, Location) else str(place)
        for source in self.context.sources:
            if source.is_called(name):
                return source
        pool = open_pool(place, self._cache.settings)
        if pool.transport.identity == self._cache.pool.transport.identity:
            raise UsageError(f"{pool} is the cache itself", hint="name another pool")
        return PoolSource(pool, str(pool))

    # -- unsetting ---------------------------------------------------------------------------------

    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        """
        Remove a state from the pools that the scope permits: ``own`` is the cache. The bytes that
        back a working image stay until the image is removed.
        """
        wanted = self.own_state(target, state)
        sources = self.permitted(options)
        with self._translate_os_errors(f"unset {wanted}"):
            if not options.dry_run:
                recover(self._cache)
            return self._unset_from(sources, wanted, options)

    def _unset_from(
        self, sources: tuple[Source, ...], wanted: StateId, options: Options
    ) -> Removed:
        if not options.dry_run:
            self._refuse_half(sources, wanted, evolve(options, dry_run=True))
        states: dict[str, tuple[str, ...]] = {}
        errors: dict[str, str] = {}
        absent: list[NotFound] = []
        for source in sources:
            try:
                states[str(source)] = _remove(source.to_change(), wanted, options)
            except NotFound as error:
                absent.append(error)
            except StatePoolError as error:
                if len(sources) == 1:
                    raise
                errors[str(source)] = str(error)
        if Scope.OWN in options.scope and not errors:
            try:
                states[str(self._cache.pool)] = self.own_unset(wanted, options)
            except NotFound as error:
                absent.append(error)
            except StatePoolError as error:
                if not states:
                    raise
                # another process set a child of it meanwhile; the sources have removed it already
                errors[str(self._cache.pool)] = str(error)
        if not states and not errors:
            raise absent[0]
        return Removed(wanted.object, states, errors)

    def _refuse_half(self, sources: tuple[Source, ...], wanted: StateId, plan: Options) -> None:
        """
        Check a removal in all pools before it is done in any: a state that must stay in one pool
        stays in all.

        :param plan: the options, as those of a dry run
        :raises HasDependants: other states depend on it in one of the pools
        """
        for source in sources:
            try:
                _remove(source.to_change(), wanted, plan)
            except HasDependants:
                raise
            except StatePoolError:
                # the removal itself meets this error again, and reports it beside the results of
                # the others
                continue
        if Scope.OWN in plan.scope:
            with suppress(NotFound):
                self.own_unset(wanted, plan)


def _is_same(there: Manifest, manifest: Manifest) -> bool:
    """
    Tell whether a pool has the same state as the cache has, or will have; machine states are the
    same if they list the same members.
    """
    return (
        manifest.is_content(there.digest)
        if there.digest is not None
        else dict(there.members) == dict(manifest.members)
    )


def _remove(pool: Pool, wanted: StateId, options: Options) -> tuple[str, ...]:
    """
    Remove a state from a source.

    :returns: the names of the removed states
    """
    pool.require(write=True)
    if options.dry_run:
        return tuple(gone.state for gone in pool.plan_removal(wanted, cascade=options.cascade))
    removed = pool.remove(
        wanted, cascade=options.cascade, allowed=lambda digests: refuse_linked(pool, digests)
    )
    Collector(pool, lambda: gc_roots(pool)).collect(digests_of(removed))
    return tuple(manifest.state for manifest in removed)
