"""
Bringing a machine state from a source into the cache: the chains of all its images, and its RAM.

What backs its members comes as it does for single images. The members themselves, and the machine state that lists them, become visible in one
record: all or none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from attrs import frozen

from statepool.beneath import Beneath
from statepool.model.digest import Digest
from statepool.model.manifest import MAX_EXTENTS, Kind, Manifest, StateId
from statepool.model.outcomes import Verified
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.fold import member_id, member_ids
from statepool.pools.pool import Pool
from statepool.pools.staging import Staging
from statepool.qcow2.files import open_regular
from statepool.transfer.cache import Cache
from statepool.transfer.fetch import READ_ONLY, Fetch, Fetched
from statepool.transfer.offers import Member, Offer, Source, log_token, require_proportion
from statepool.transfer.ready import clear_place
from statepool.transfer.space import make_room, require_place
from statepool.transports.base import Moved
from statepool.transports.copying import data_extents


@frozen
class MachineOffer(Offer):
    """
    A machine state that a source has. Its members are the machine state itself, which has no file, and then the chains of what it lists.

    :param chains: of what it lists, tip first, by the names in its manifest
    """

    chains: Mapping[str, tuple[Member, ...]]

    @property
    def machine(self) -> Manifest:
        """What the source knows of the machine state."""
        return self.members[0].manifest


def find_machine_offer(source: Source, wanted: StateId) -> MachineOffer | None:
    """
    :param wanted: a machine state
    :returns: what a source has of it, or None if it does not have it
    :raises NotAPool: the source is none
    """
    fold = source.pool.fold(wanted.machine)
    manifest = fold.states.get(wanted)
    if manifest is None:
        source.pool.require()
        return None
    chains = {name: tuple(map(_member, fold.chain(fold.states[member_id(manifest, name)]))) for name in sorted(manifest.members)}
    members = (Member(manifest, ""), *(member for chain in chains.values() for member in chain))
    return MachineOffer(source, members, managed=True, token=log_token(fold), chains=chains)


def _member(manifest: Manifest) -> Member:
    assert manifest.digest is not None
    return Member(manifest, layout.data(manifest.digest))


def machine_parts(cache: Cache, manifest: Manifest) -> tuple[Manifest, ...]:
    """
    :returns: a machine state of the cache, and the chains of all that it lists, in the order of an offer
    :raises NotFound: it has been removed meanwhile
    """
    return (manifest, *(link for chain in chains_of(cache.pool, manifest).values() for link in chain))


def chains_of(pool: Pool, manifest: Manifest) -> dict[str, tuple[Manifest, ...]]:
    """
    :param manifest: of a machine state that was in the pool a moment ago
    :returns: the chains of all that it lists, tip first, by their names, which are sorted
    :raises NotFound: it has been removed meanwhile
    """
    fold = pool.fold(manifest.object)
    if any(member not in fold.states for member in member_ids(manifest)):
        raise pool.missing(manifest.id)
    return {name: fold.chain(fold.states[member_id(manifest, name)]) for name in sorted(manifest.members)}


class MachineFetch:
    """
    Brings one offered machine state into a cache.

    :param cache: where to
    :param offer: what
    :param progress: told of the bytes
    """

    def __init__(self, cache: Cache, offer: MachineOffer, progress: Progress = SILENT) -> None:
        self._cache = cache
        self._offer = offer
        self._keep = {member.manifest.digest for member in offer.members if member.manifest.digest is not None}
        self._parts: dict[str, _PartFetch] = {}
        for name, chain in offer.chains.items():
            part = Offer(offer.source, chain, offer.managed, offer.token)
            kind = _RamFetch if chain[0].manifest.kind is Kind.RAM else _PartFetch
            self._parts[name] = kind(cache, part, progress, self._keep)

    def missing(self) -> list[Member]:
        """:returns: what would have to be moved, as far as can be told without reading it"""
        found = {member.path: member for part in self._parts.values() for member in part.missing()}
        return list(found.values())

    def run(self) -> Fetched:
        """
        :returns: the machine state and the chains of what it lists, in the order of the offer
        :raises DigestMismatch: what arrived is not what the source's manifest promises
        :raises UnsafeImage: what arrived is not fit to be used
        :raises Conflict: the cache has a state of one of these names that nobody else has
        :raises NoSpace: it does not fit; nothing was moved
        """
        missing = self.missing()
        transport = self._offer.source.pool.transport
        if not self._cache.pool.is_managed and transport.capabilities.local:
            require_place(self._cache, [member.manifest for member in missing], transport)
            for part in self._parts.values():
                part.look_first()
        self._cache.prepare()
        for member in missing:  # before anything is evicted for their sake
            require_proportion(self._offer.source.pool, member.manifest, member.path)
        make_room(self._cache, [member.manifest for member in missing], transport, keep=self._keep)
        before = self._named()
        try:
            fetched = {name: part.run() for name, part in self._parts.items()}
            machine = self._publish({name: result.chain[0] for name, result in fetched.items()})
        finally:
            for part in self._parts.values():
                part.let_go()
        chain = (machine, *(link for result in fetched.values() for link in result.chain))
        if gone := before - {manifest.digest for manifest in chain if manifest.digest is not None}:
            self._cache.drop(gone)
        how = dict.fromkeys(way for result in fetched.values() for way in result.how.split("+") if way != "none")
        return Fetched(
            chain,
            sum(result.bytes for result in fetched.values()),
            "+".join(how) or "none",
            _together(fetched),
            sum(result.resumed for result in fetched.values()),
            sum(result.again for result in fetched.values()),
            tuple(dict.fromkeys(warning for result in fetched.values() for warning in result.warnings)),
        )

    def _named(self) -> set[Digest]:
        """:returns: the bytes that the names of its members lead to now"""
        machine = self._offer.machine
        found = (self._cache.pool.find(member_id(machine, name)) for name in machine.members)
        return {manifest.digest for manifest in found if manifest is not None and manifest.digest is not None}

    def _publish(self, tips: Mapping[str, Manifest]) -> Manifest:
        members = {name: tip.digest for name, tip in tips.items() if tip.digest is not None}
        machine = self._offer.machine.derived(size=0, members=members)
        staging = self._cache.pool.stage(members.values())
        try:
            self._cache.pool.publish([*tips.values(), machine], staging, supersede=True, durable=False)
        finally:
            staging.end()
        return machine


def _together(fetched: Mapping[str, Fetched]) -> Verified:
    found = {result.verified for result in fetched.values()}
    return next((verified for verified in (Verified.UNMANAGED, Verified.ARRIVED, Verified.REHASHED) if verified in found), Verified.TRUSTED)


class _PartFetch(Fetch):
    """As for a single image, but the tip does not become visible yet: a marker keeps its bytes."""

    def __init__(self, cache: Cache, offer: Offer, progress: Progress, keep: set[Digest]) -> None:
        super().__init__(cache, offer, progress)
        self._keep = keep
        self._held: list[Staging] = []

    def _digests(self) -> set[Digest]:
        return self._keep

    def _show(self, manifest: Manifest, staging: Staging) -> None:
        if manifest.id != self._offer.members[0].manifest.id:
            super()._show(manifest, staging)
            return
        assert manifest.digest is not None
        self._held.append(self._cache.pool.stage([manifest.digest]))
        staging.settle([manifest.digest])

    def look_first(self) -> None:
        """Refuse what is certain to be refused, before a cache is made for it."""
        self._look_first(self.missing())

    def let_go(self) -> None:
        """The tip is visible, or will not be."""
        for staging in self._held:
            staging.end()
        self._held.clear()


class _RamFetch(_PartFetch):
    """RAM: bytes without a header, on which nothing stands."""

    def _look_first(self, missing: Sequence[Member]) -> None:
        require_place(self._cache, [member.manifest for member in missing], self._source.transport)

    def _reuse(self, member: Member, parent: Manifest | None) -> Manifest | None:
        promised = member.manifest
        if promised.digest is None or not clear_place(self._cache, promised):
            return None
        if (here := self._cache.bytes(promised.digest)) is None:
            return None
        with open_regular(here) as descriptor:
            manifest = _ram(promised, promised.digest, descriptor)
        self._publish(manifest)
        self._cache.trust.note_source(promised.digest, str(self._source))
        return manifest

    def _gather(self, member: Member, parent: Manifest | None, path: Beneath) -> tuple[Manifest, Moved, os.stat_result]:
        promised = member.manifest
        with self._copy(member, path) as (descriptor, moved):
            os.fchmod(descriptor, READ_ONLY)
            status = os.fstat(descriptor)
            manifest = _ram(promised, moved.digest, descriptor)
        return manifest, moved, status

    def _refer(self, member: Member, parent: Manifest | None) -> Manifest | None:
        promised = member.manifest
        target = self._source.transport.local_path(member.path)
        if promised.digest is None or target is None or target.is_symlink():
            return None
        with self._opened_there(member) as descriptor:
            hashed = self._hash_there(promised, descriptor)
            manifest = promised.derived(size=os.fstat(descriptor).st_size, digest=hashed.digest)
        self._place_link(manifest, hashed.digest, target)
        self._arrived(manifest, Moved(digest=hashed.digest, how="link", sent=0), hashed.status)
        return manifest


def _ram(promised: Manifest, digest: Digest, descriptor: int) -> Manifest:
    """:returns: a source's manifest of RAM in the terms of the cache, whose file is open"""
    size = os.fstat(descriptor).st_size
    return promised.derived(size=size, digest=digest, extents=data_extents(descriptor, size, limit=MAX_EXTENTS))
