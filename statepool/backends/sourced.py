"""
Backends whose own operations are combined with the sources of the cache.

The author of such a backend writes what is its own: what an object's states are called in a pool, how a working image is made of a cached state, and
how one is taken into the cache. Where states come from and where they go to is settled here:

- *show*: what can be had, and from where;
- *get*: a cached state that is trusted and fresh is used as it is; else the best source that has it whole; when that fails, or delivers something
  wrong, the next;
- *set* and *unset*: all pools that the scope permits. One that fails does not hide what the others did, and doing it again completes the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from attrs import evolve

from statepool.backends.answers import cached as in_cache
from statepool.backends.answers import digests_of, got, planned
from statepool.backends.base import DEFAULTS, Context, Options, StateBackend, Target
from statepool.errors import HasDependants, InvalidLocation, NotFound, StatePoolError, UsageError
from statepool.model.location import Location
from statepool.model.manifest import Manifest, StateId
from statepool.model.outcomes import Got, Listing, Presence, Removed, SourceStatus, Stored, StoredAt, Verified, WaitFor
from statepool.model.progress import Progress
from statepool.model.scope import Scope
from statepool.pools.collect import Collector
from statepool.pools.pool import Pool
from statepool.pools.refusals import taken
from statepool.transfer.agree import content_of
from statepool.transfer.cache import Cache
from statepool.transfer.fetch import Fetch, Fetched
from statepool.transfer.held import held_in
from statepool.transfer.intake import Taken
from statepool.transfer.linked import refuse_linked
from statepool.transfer.merge import merged
from statepool.transfer.mirrors import Found, Mirrors
from statepool.transfer.offers import Offer, Source, find_offer, listing, listings
from statepool.transfer.probe import ask_all
from statepool.transfer.push import Push
from statepool.transfer.ready import damaged, discard, examine
from statepool.transfer.takeover import recover
from statepool.transports.failures import Subject, in_our_words


class RootSourcedStateBackend(StateBackend):
    """
    Root states, of the cache and its sources. A derived class says what is its own, in the methods whose names begin with ``own_``.

    :param context: what it works with
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._cache = context.cache

    # -- what a backend writes ---------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def own_root(self, target: Target) -> StateId:
        """
        :returns: what the root state of a target's object is kept as
        :raises UsageError: this backend keeps no states of such an object
        """

    @abstractmethod
    def own_places(self, target: Target, options: Options) -> Mapping[str, Path]:
        """
        Look whether a get can do what the target says, and change nothing.

        :returns: where working images are to be made, absolute, by the names of images
        """

    @abstractmethod
    def own_get(self, target: Target, chain: tuple[Manifest, ...], places: Mapping[str, Path], options: Options) -> str | None:
        """
        Do what the target says with a state that is in the cache now.

        :param chain: the state and what it needs, as :meth:`own_parts` gave it
        :returns: the working image that was made, or None
        """

    @abstractmethod
    def own_set(self, target: Target, wanted: StateId, options: Options) -> Taken:
        """
        Take the target's working image, or whatever it is, into the cache as a state.

        :raises Conflict: the name exists with other content
        """

    def own_check_root(self, target: Target) -> None:
        """Look whether what the target names can be a root state. Raises if it cannot."""
        return None

    def own_unset(self, wanted: StateId, options: Options) -> tuple[str, ...]:
        """
        Remove a state from the cache.

        :returns: the names of the states that are gone
        :raises NotFound: it is not there
        """
        pool = self._cache.pool
        if options.dry_run:
            return tuple(gone.state for gone in pool.plan_removal(wanted, cascade=options.cascade))
        removed = pool.remove(wanted, cascade=options.cascade, allowed=lambda digests: refuse_linked(pool, digests))
        self._cache.drop(digests_of(removed))
        for manifest in removed:
            self._cache.fresh.forget(manifest.id)
        return tuple(manifest.state for manifest in removed)

    # -- what a backend may write, whose states are more than chains of images -----------------------------------------------------------------------

    def own_parts(self, cache: Cache, manifest: Manifest) -> tuple[Manifest, ...]:
        """
        :returns: what a cached state consists of, tip first
        :raises NotFound: it has been removed meanwhile
        """
        return cache.pool.chain_of(manifest)

    def own_find(self, source: Source, wanted: StateId) -> Offer | None:
        """:returns: what a source has of a state, or None"""
        return find_offer(source, wanted)

    def own_fetch(self, cache: Cache, offer: Offer, progress: Progress) -> Fetched:
        """:returns: a state, in the cache now"""
        return Fetch(cache, offer, progress).run()

    def own_plan(self, offer: Offer) -> Got:
        """:returns: what :meth:`own_fetch` would do"""
        return planned(offer, Fetch(self._cache, offer))

    def own_push(self, manifest: Manifest, pool: Pool, options: Options) -> StoredAt:
        """:returns: what became of a cached state at a source; errors are part of it"""
        try:
            chain = self.own_parts(self._cache, manifest)
        except NotFound as error:
            return StoredAt(str(pool), Presence.FAILED, durable=False, error=str(error))
        return Push(self._cache, pool, self.context.progress).attempt(chain, replace=options.replace or options.squash)

    # -- the sources -------------------------------------------------------------------------------------------------------------------------------

    def permitted(self, options: Options = DEFAULTS) -> tuple[Source, ...]:
        """
        :returns: the sources that may be used, in the order in which they are configured
        :raises UsageError: there is none, and the cache is not permitted either; or a source that is named does not exist
        """
        for name in options.sources:
            if not any(_is_called(source, name) for source in self.context.sources):
                known = ", ".join(source.name for source in self.context.sources)
                raise UsageError(f"there is no source {name!r}", hint=f"sources are {known}" if known else "no source is configured")
        named = [source for source in self.context.sources if not options.sources or any(_is_called(source, name) for name in options.sources)]
        found = tuple(source for source in named if source.scope in options.scope)
        if not found and (Scope.OWN not in options.scope or options.sources):
            scopes = ", ".join(f"{source.name} is {source.scope}" for source in named)
            asked = " ".join(scope for scope in Scope if scope in options.scope)
            raise UsageError(
                f"no pool is in this scope: {asked or 'none'}" + (f" ({scopes})" if scopes else ""), hint="scopes are " + ", ".join(Scope)
            )
        return () if self._cache.settings.offline else found

    @property
    def _unasked(self) -> tuple[str, ...]:
        """What an answer has to say that was given without the sources, although there are some."""
        if self._cache.settings.offline and self.context.sources:
            return ("offline: no source was asked",)
        return ()

    def status(self, options: Options = DEFAULTS) -> list[SourceStatus]:
        """:returns: the sources that may be used, in the order in which they would be asked, and why; nobody is contacted"""
        return Mirrors(self._cache, tuple(source for source in self.context.sources if source.scope in options.scope)).status()

    def _mirrors(self, options: Options = DEFAULTS) -> Mirrors:
        # Who names a source wants it from there, whatever the cache has of this name.
        own = Scope.OWN in options.scope and not options.sources
        sources = self.permitted(options)
        return Mirrors(
            self._cache, sources, own or self._cache.settings.offline, self.context.progress, self.own_find, self.own_parts, self.own_fetch
        )

    def _in_our_words(self, doing: str) -> AbstractContextManager[None]:
        return in_our_words(doing, Subject(f"from or into the cache {self._cache.root}"))

    # -- looking -----------------------------------------------------------------------------------------------------------------------------------

    def _check(self, wanted: StateId, options: Options = DEFAULTS) -> bool:
        mirrors = self._mirrors(options)
        if mirrors.own and self._cache.pool.find(wanted) is not None:
            return True
        return mirrors.has(wanted)

    # -- getting -----------------------------------------------------------------------------------------------------------------------------------

    def _get(self, target: Target, wanted: StateId, options: Options) -> Got:
        mirrors = self._mirrors(options)
        with self._in_our_words(f"get {wanted}"):
            if not options.dry_run:
                recover(self._cache)
            places = self.own_places(target, options)
            try:
                return self._get_from(mirrors, target, wanted, places, options)
            finally:
                if not options.dry_run:
                    self._cache.known.save()

    def _get_from(self, mirrors: Mirrors, target: Target, wanted: StateId, places: Mapping[str, Path], options: Options) -> Got:
        found = mirrors.look(wanted)
        if options.dry_run:
            plan = self.own_plan(found.offers[0]) if found.offers else in_cache(self._parts(found.cached), Verified.TRUSTED)
            return evolve(plan, working=next(map(str, places.values()), None), warnings=(*self._unasked, *found.warnings))
        result, chain = self._bring(mirrors, wanted, found)
        for manifest in chain:
            if manifest.digest is not None:
                self._cache.trust.touch(manifest.digest)
        self._cache.renew_uses(manifest.digest for manifest in chain if manifest.digest is not None)
        working = self.own_get(target, chain, places, options)
        return evolve(result, working=working, warnings=(*self._unasked, *result.warnings))

    def _bring(self, mirrors: Mirrors, wanted: StateId, found: Found) -> tuple[Got, tuple[Manifest, ...]]:
        warnings, mended = found.warnings, []
        if not found.offers:
            chain = self._parts(found.cached)
            readiness = examine(self._cache, [link for link in chain if link.digest is not None], self.context.progress)
            if not readiness.bad:
                return evolve(in_cache(chain, readiness.verified), warnings=warnings), chain
            found = mirrors.mend(wanted)
            warnings = tuple(dict.fromkeys((*warnings, *found.warnings)))
            if not found.offers:
                raise damaged(self._cache, readiness.bad[0])
            for manifest in readiness.bad:
                mended.append(discard(self._cache, manifest))
        brought = mirrors.bring(wanted, found.offers, found.failed)
        self._cache.fresh.note(wanted, str(brought.offer.source), brought.offer.token, content_of(brought.fetched.chain[0]))
        answer = got(brought.offer, brought.fetched)
        return evolve(
            answer, warnings=tuple(dict.fromkeys((*warnings, *brought.warnings, *mended, *brought.fetched.warnings)))
        ), brought.fetched.chain

    def _parts(self, cached: Manifest | None) -> tuple[Manifest, ...]:
        assert cached is not None
        return self.own_parts(self._cache, cached)

    # -- setting -----------------------------------------------------------------------------------------------------------------------------------

    def _set(self, target: Target, wanted: StateId, options: Options) -> Stored:
        sources = self.permitted(options)
        with self._in_our_words(f"set {wanted}"):
            if not options.dry_run:
                recover(self._cache)
            self._refuse_taken_there(sources, target, wanted, options)
            old = self._cache.pool.find(wanted)
            taken = self.own_set(target, wanted, options)
            if old is not None and old.digest not in (None, taken.manifest.digest) and not options.dry_run:
                self._cache.drop(digests_of([old]))
            presence = Presence.STORED if taken.written else Presence.PRESENT
            own = StoredAt(str(self._cache.pool), presence, bytes=taken.manifest.data_size if taken.how != "hardlink" and taken.written else 0)
            others = [self._store(taken.manifest, source, options) for source in sources]
            if not options.dry_run:
                self._cache.known.save()
        return Stored(wanted.object, wanted.state, str(taken.manifest.digest), (own, *others), (*self._unasked, *taken.warnings), options.wait_for)

    def _refuse_taken_there(self, sources: tuple[Source, ...], target: Target, wanted: StateId, options: Options) -> None:
        """
        Before an image is taken: whoever has it as a state of the cache that no source can take is stuck with it. A source that does not answer is
        left for later.

        :raises Conflict: the name exists in a source with other content, which is not to give way
        """
        if options.replace or options.squash or options.wait_for is not WaitFor.ALL:
            return
        cached = self._cache.pool.find(wanted)
        asked = ask_all(sources, lambda source: source.pool.find(wanted), patient=lambda source: self._cache.settings.probe_timeout)
        there = [(one.source, one.value) for one in asked if one.value is not None and (cached is None or not _is_same(one.value, cached))]
        if not there:
            return
        planned = self.own_set(target, wanted, evolve(options, dry_run=True)).manifest
        for source, manifest in there:
            if not (planned.digest or planned.members) or not _is_same(manifest, planned):  # what a running machine will be nobody knows yet
                raise taken(wanted, source)

    def _store(self, manifest: Manifest, source: Source, options: Options) -> StoredAt:
        if options.dry_run:
            return self._would_store(manifest, source, options)
        at = self.own_push(manifest, source.pool, options)
        if at.result is not Presence.FAILED:
            self._cache.known.did_well(source)
            offer = self.own_find(source, manifest.id)
            if offer is not None:
                self._cache.fresh.note(manifest.id, str(source), offer.token, content_of(manifest))
        return at

    def _would_store(self, manifest: Manifest, source: Source, options: Options) -> StoredAt:
        try:
            source.pool.require(write=True)
            there = source.pool.find(manifest.id)
        except StatePoolError as error:
            return StoredAt(str(source), Presence.FAILED, durable=False, error=str(error))
        same = there is not None and _is_same(there, manifest)
        if there is not None and not same and not options.replace and not options.squash:
            return StoredAt(str(source), Presence.FAILED, durable=False, error=str(taken(manifest.id, source)))
        return StoredAt(str(source), Presence.PRESENT if same else Presence.STORED, bytes=0 if same else manifest.data_size)

    # -- unsetting ---------------------------------------------------------------------------------------------------------------------------------

    def _unset(self, wanted: StateId, options: Options) -> Removed:
        sources = self.permitted(options)
        with self._in_our_words(f"unset {wanted}"):
            if not options.dry_run:
                recover(self._cache)
            return self._unset_from(sources, wanted, options)

    def _unset_from(self, sources: tuple[Source, ...], wanted: StateId, options: Options) -> Removed:
        if not options.dry_run:
            self._refuse_half(sources, wanted, evolve(options, dry_run=True))
        states: dict[str, tuple[str, ...]] = {}
        errors: dict[str, str] = {}
        absent: list[NotFound] = []
        for source in sources:
            try:
                states[str(source)] = _remove(source.pool, wanted, options)
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
                errors[str(self._cache.pool)] = str(error)  # somebody made something stand on it meanwhile; the sources have lost it already
        if not states and not errors:
            raise absent[0]
        return Removed(wanted.object, states, errors)

    def _refuse_half(self, sources: tuple[Source, ...], wanted: StateId, plan: Options) -> None:
        """
        Before it is removed anywhere: if it must stay in one of the pools, it stays in all.

        :param plan: the options, as those of a dry run
        :raises HasDependants: something stands on it in one of them
        """
        for source in sources:
            try:
                _remove(source.pool, wanted, plan)
            except HasDependants:
                raise
            except StatePoolError:
                continue  # the removal itself meets that again, and reports it beside what became of the others
        if Scope.OWN in plan.scope:
            with suppress(NotFound):
                self.own_unset(wanted, plan)

    # -- root states -------------------------------------------------------------------------------------------------------------------------------

    def check_root(self, target: Target) -> bool:
        """:returns: whether the cache or a source has the root state"""
        return self._check(self.own_root(target))

    def get_root(self, target: Target, options: Options = DEFAULTS) -> Got:
        """Bring the root state into the cache, and do with it what the target says."""
        return self._get(target, self.own_root(target), options)

    def set_root(self, target: Target, options: Options = DEFAULTS) -> Stored:
        """Make what the target names the root state, in the cache and in the sources that the scope permits."""
        wanted = self.own_root(target)
        self.own_check_root(target)
        return self._set(target, wanted, options)

    def unset_root(self, target: Target, options: Options = DEFAULTS) -> Removed:
        """Remove the root state from the pools that the scope permits."""
        return self._unset(self.own_root(target), options)


class SourcedStateBackend(RootSourcedStateBackend):
    """
    States of the cache and its sources, besides root states.

    :param context: what it works with
    """

    @abstractmethod
    def own_state(self, target: Target, state: str) -> StateId:
        """
        :returns: what a target and a state's name stand for in a pool
        :raises InvalidName: no state can have this name
        :raises UsageError: this backend keeps no states of such an object
        """

    def show(self, target: Target, options: Options = DEFAULTS) -> Listing:
        """
        :param options: its scope
        :returns: the states of an object, or of all images of a machine, each with where it is
        """
        wanted, machine = str(target.object), target.object.machine
        mirrors = self._mirrors(options)
        own = [listing(self._cache.pool, machine)] if mirrors.own else []
        found, warnings = mirrors.listings(lambda source: listing(source.pool, machine))
        shown = self._shown([*own, *found], warnings)
        return Listing((one for one in shown if wanted in (machine, one.manifest.object)), shown.warnings)

    def show_all(self, options: Options = DEFAULTS) -> Listing:
        """As :meth:`show`, of all objects."""
        mirrors = self._mirrors(options)
        own = [listings(self._cache.pool)] if mirrors.own else []
        found, warnings = mirrors.listings(lambda source: listings(source.pool))
        return self._shown([*own, *found], warnings)

    def _shown(self, found: Sequence[Listing], warnings: Iterable[str]) -> Listing:
        return Listing(merged(found, str(self._cache.pool)), (*self._unasked, *warnings, *(warning for one in found for warning in one.warnings)))

    def check(self, target: Target, state: str, options: Options = DEFAULTS) -> bool:
        """:returns: whether the cache or a source that the scope permits has a state, with its whole chain"""
        return self._check(self.own_state(target, state), options)

    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> Got:
        """
        Bring a state into the cache, if it is not there or has been replaced in its source; and do with it what the target says.

        :raises NotFound: nobody has it
        :raises Conflict: the sources disagree about it
        """
        return self._get(target, self.own_state(target, state), options)

    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> Stored:
        """Make what the target names a state, in the cache and in the sources that the scope permits."""
        return self._set(target, self.own_state(target, state), options)

    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        """Remove a state from the pools that the scope permits: ``own`` is the cache. What a working image stands on stays until it is gone."""
        return self._unset(self.own_state(target, state), options)


def _is_same(there: Manifest, manifest: Manifest) -> bool:
    """Whether a pool has the same as the cache has, or will have; a machine state is what it lists."""
    return manifest.is_content(there.digest) if there.digest is not None else dict(there.members) == dict(manifest.members)


def _is_called(source: Source, name: str) -> bool:
    """Whether a user who says ``name`` means this source: as it is called, or where it is."""
    if name in (source.name, str(source)):
        return True
    try:
        return Location.parse(name) == source.location
    except InvalidLocation:
        return False


def _remove(pool: Pool, wanted: StateId, options: Options) -> tuple[str, ...]:
    """Remove a state from a source. :returns: the names of the states that are gone"""
    pool.require(write=True)
    if options.dry_run:
        return tuple(gone.state for gone in pool.plan_removal(wanted, cascade=options.cascade))
    removed = pool.remove(wanted, cascade=options.cascade, allowed=lambda digests: refuse_linked(pool, digests))
    Collector(pool, lambda: held_in(pool)).collect(digests_of(removed))
    return tuple(manifest.state for manifest in removed)
