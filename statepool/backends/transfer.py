"""Transfers of whole chains between the cache and one pool."""

from __future__ import annotations

from statepool.backends.answers import digests_of, got, image_state, planned
from statepool.backends.base import DEFAULTS, Context, Options, StateBackend, Target
from statepool.cache.gc_roots import gc_roots
from statepool.cache.linked import refuse_linked
from statepool.copying.fetch import Fetch, Fetched
from statepool.copying.push import Push, Relation, relations
from statepool.errors import UsageError
from statepool.model.manifest import Manifest, StateId
from statepool.model.objects import Image
from statepool.model.outcomes import GetResult, Listed, Presence, Removed, SetResult, StoredAt
from statepool.pools.collect import Collector
from statepool.pools.refusals import absent
from statepool.sources.source import RemoteChain, Source


class QCOW2ImageTransfer(StateBackend):
    """
    The transfer of chains of QCOW2 images between the cache and one pool. Its states are those of
    that pool: ``get`` brings one into the cache, ``set`` stores a cached one, and neither makes or
    captures a working image.

    :param context: the cache, the sources and the other parts to work with
    :param source: the pool; the first source if not given
    :raises UsageError: there is no source
    """

    def __init__(self, context: Context, source: Source | None = None) -> None:
        super().__init__(context)
        if source is None and not context.sources:
            raise UsageError("there is no pool to transfer from or to", hint="name a source")
        self.source = source or context.sources[0]

    # -- chains ------------------------------------------------------------------------------------

    def compare_chain(self, target: Target, state: str) -> list[tuple[Manifest, Relation]]:
        """
        :returns: the relation of each state of a cached chain to the pool's content, tip first; no
            image data is read
        :raises NotFound: the cache does not have the state
        """
        return relations(self._cached_chain(image_state(target, state)), self.source.to_change())

    def transfer_chain(
        self, target: Target, state: str, *, up: bool, replace: bool = False
    ) -> Fetched | StoredAt:
        """
        Transfer the missing members of a chain, root first.

        :param up: True: from the cache to the pool; False: the other way
        :param replace: up: replace other content under the name of the tip, if no state depends on
            it
        :raises NotFound: the state does not exist at the origin
        """
        wanted = image_state(target, state)
        if up:
            chain = self._cached_chain(wanted)
            return Push(self.context.cache, self.source.to_change(), self.context.progress).run(
                chain, replace=replace
            )
        return Fetch(self.context.cache, self.require_offer(wanted), self.context.progress).run()

    def _cached_chain(self, wanted: StateId) -> tuple[Manifest, ...]:
        return self.context.cache.pool.chain(wanted)

    def require_offer(self, wanted: StateId) -> RemoteChain:
        """
        :returns: the pool's offer of a state
        :raises NotFound: the pool does not have it
        """
        offer = self.source.resolve(wanted)
        if offer is None:
            raise absent(wanted, self.source)
        return offer

    # -- the operations on this pool ---------------------------------------------------------------

    def show(self, target: Target) -> list[Listed]:
        """:returns: the states of an object in this pool"""
        self.source.require()
        wanted = str(target.object)
        machine = target.object.machine
        return [
            listed
            for listed in self.source.states(machine)
            if not isinstance(target.object, Image) or listed.manifest.object == wanted
        ]

    def check(self, target: Target, state: str) -> bool:
        """:returns: whether this pool has the whole chain of a state"""
        return self.source.resolve(image_state(target, state)) is not None

    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> GetResult:
        """Bring a chain into the cache."""
        offer = self.require_offer(image_state(target, state))
        fetch = Fetch(self.context.cache, offer, self.context.progress)
        if options.dry_run:
            return planned(offer, fetch)
        return got(offer, fetch.run())

    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> SetResult:
        """Store a cached chain in this pool."""
        chain = self._cached_chain(image_state(target, state))
        if options.dry_run:
            missing = [
                manifest
                for manifest, relation in relations(chain, self.source.to_change())
                if relation is not Relation.SAME
            ]
            presence = Presence.STORED if missing else Presence.PRESENT
            at = StoredAt(
                str(self.source), presence, bytes=sum(manifest.data_size for manifest in missing)
            )
        else:
            at = Push(self.context.cache, self.source.to_change(), self.context.progress).run(
                chain, replace=options.replace
            )
        return SetResult(str(target.object), state, str(chain[0].digest), (at,))

    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        """Remove a state from this pool."""
        wanted, pool = image_state(target, state), self.source.to_change()
        pool.require(write=True)
        if options.dry_run:
            names = tuple(gone.state for gone in pool.plan_removal(wanted, cascade=options.cascade))
        else:
            removed = pool.remove(
                wanted,
                cascade=options.cascade,
                allowed=lambda digests: refuse_linked(pool, digests),
            )
            Collector(pool, lambda: gc_roots(pool)).collect(digests_of(removed))
            names = tuple(manifest.state for manifest in removed)
        return Removed(str(target.object), {str(pool): names})
