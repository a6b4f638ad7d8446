"""
Storing a cached machine state in another pool: what backs its members first, and then the members and the machine state in one record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from attrs import evolve

from statepool.errors import StatePoolError
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Presence, StoredAt
from statepool.pools.collect import Collector
from statepool.pools.staging import Staging
from statepool.transfer.held import held_in
from statepool.transfer.machine_fetch import chains_of
from statepool.transfer.push import Push, Relation, relations
from statepool.transfer.space import require_space

Chains = Mapping[str, tuple[Manifest, ...]]


class MachinePush(Push):
    """As for the chain of one image."""

    def attempt_machine(self, machine: Manifest, *, replace: bool = False) -> StoredAt:
        """As :meth:`run_machine`, but what goes wrong at this pool is part of the answer."""
        try:
            return self.run_machine(machine, replace=replace)
        except StatePoolError as error:
            return StoredAt(str(self._pool), Presence.FAILED, durable=False, error=str(error))

    def run_machine(self, machine: Manifest, *, replace: bool = False) -> StoredAt:
        """
        :param machine: a machine state of the cache
        :param replace: other content under its name gives way, if nothing stands on it
        :returns: what became of it
        :raises Conflict: a name exists with other content
        :raises NoSpace: it does not fit; nothing was moved
        """
        self._pool.require(write=True)
        Collector(self._pool).clear_incoming()
        chains = chains_of(self._cache.pool, machine)
        missing = {name: self._missing(chain, replace) for name, chain in chains.items()}
        if not any(missing.values()) and self._is_there(machine, chains):
            return self._answer(chains, Presence.PRESENT)
        wanted = {manifest.digest: manifest for found in missing.values() for manifest in found}
        require_space(self._pool, sum(manifest.data_size for digest, manifest in wanted.items() if digest and not self._pool.has_bytes(digest)))
        self._progress.begin(f"set {machine.id} in {self._pool}", sum(manifest.size for found in missing.values() for manifest in found))
        try:
            for name, chain in chains.items():
                for manifest in missing[name]:
                    if manifest is not chain[0]:
                        self._store(self._translated(chain, manifest), replace=False)
            self._store_together(machine, chains, replace)
        finally:
            self._progress.end()
        return self._answer(chains, Presence.STORED)

    def _is_there(self, machine: Manifest, chains: Chains) -> bool:
        """Whether the pool has this machine state, given that it has all that it lists."""
        there = self._pool.find(machine.id)
        return there is not None and dict(there.members) == self._members(chains)

    def _members(self, chains: Chains) -> dict[str, Digest]:
        """:returns: the digests that the members have in the pool, where their copies may be other bytes around the same content"""
        tips = {name: self._in_pool(chain) for name, chain in chains.items()}
        return {name: tip.digest for name, tip in tips.items() if tip.digest is not None}

    def _in_pool(self, chain: Sequence[Manifest]) -> Manifest:
        """:returns: the tip of a cached chain as the pool has it, or will have it"""
        ((_, relation),) = relations(chain[:1], self._pool)
        there = self._pool.find(chain[0].id)
        return there if there is not None and relation is Relation.SAME else self._translated(chain, chain[0])

    def _store_together(self, machine: Manifest, chains: Chains, replace: bool) -> None:
        tips = {name: self._in_pool(chain) for name, chain in chains.items()}
        digests = self._members(chains)
        old = [self._pool.find(tip.id) for tip in tips.values()]
        with self._staged(digests.values()) as staging:
            for name, tip in tips.items():
                with self._alone(digests[name]):
                    if self._pool.has_bytes(digests[name]):
                        continue
                    self._send(tip, staging)
                    staging.settle([digests[name]])
            together = [*tips.values(), evolve(machine, members=digests)]
            self._pool.publish(together, staging, replace=replace, again=partial(self._send_lacking, together))
        gone = {there.digest for there in old if there is not None and there.digest is not None} - set(digests.values())
        if gone:
            Collector(self._pool, lambda: held_in(self._pool)).collect(gone)

    def _send_lacking(self, manifests: Iterable[Manifest], staging: Staging) -> None:
        for digest, manifest in {manifest.digest: manifest for manifest in manifests}.items():
            if digest is not None and not self._pool.has_bytes(digest):
                self._send(manifest, staging)

    def _answer(self, chains: Chains, presence: Presence) -> StoredAt:
        for chain in chains.values():
            self._note(chain)
        return StoredAt(str(self._pool), presence, durable=self._durable, bytes=self._bytes, resumed=self._resumed, again=self._again)
