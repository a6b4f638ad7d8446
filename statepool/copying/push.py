"""
Store a cached state of an image or of a machine in another pool: parents first, existing states are
skipped, and nothing is visible before it is whole. The states of a machine's images, its RAM, and
the machine state that lists them are stored in one record.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from attrs import evolve

from statepool.cache.cache import Cache
from statepool.cache.gc_roots import gc_roots
from statepool.cache.space import require_space
from statepool.copying.resume import abandon, take_over
from statepool.errors import AccessDenied, IntegrityError, StatePoolError, TransportError
from statepool.model.digest import Digest
from statepool.model.manifest import MAX_EXTENTS, Kind, Manifest, Parent
from statepool.model.outcomes import Presence, StoredAt
from statepool.model.pieces import Pieces
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.fold import member_name
from statepool.pools.parts import chains_of
from statepool.pools.pool import Pool
from statepool.pools.refusals import mismatched, taken
from statepool.pools.staging import Staging
from statepool.qcow2.files import open_regular
from statepool.transports.base import Transfer
from statepool.transports.copying import data_extents
from statepool.transports.resuming import same_beginning


class Relation(enum.StrEnum):
    """The relation of a cached state of a chain to a pool."""

    SAME = "same"
    MISSING = "missing"
    """The pool does not have it."""
    DIFFERENT = "different"
    """The pool has other content under this name."""


def relations(chain: Sequence[Manifest], pool: Pool) -> list[tuple[Manifest, Relation]]:
    """
    :param chain: of the cache, tip first
    :returns: the relation of each state to the pool's content, by name and digest; no data is read
    """
    fold = pool.fold(chain[0].id.machine)
    result = []
    for manifest in chain:
        there = fold.states.get(manifest.id)
        if there is None:
            relation = Relation.MISSING
        else:
            relation = Relation.SAME if _same_content(manifest, there) else Relation.DIFFERENT
        result.append((manifest, relation))
    return result


def _same_content(cached: Manifest, there: Manifest) -> bool:
    """
    Tell whether a pool has the bytes of a cached state, or the bytes from which this cache rewrote
    it. An origin in the pool's log is only a claim.
    """
    return there.digest is not None and cached.is_content(there.digest)


class Push:
    """
    The storing of one cached state in a pool.

    :param cache: the origin
    :param pool: the destination
    :param progress: told of the bytes
    """

    def __init__(self, cache: Cache, pool: Pool, progress: Progress = SILENT) -> None:
        self._cache = cache
        self._pool = pool
        self._progress = progress
        self._bytes = 0
        self._resumed = 0
        self._again = 0

    def run(self, parts: Sequence[Manifest], *, replace: bool = False) -> StoredAt:
        """
        :param parts: the parts of a cached state, see :mod:`~statepool.pools.parts`
        :param replace: replace other content under the state's name, if no state depends on it
        :returns: the outcome
        :raises Conflict: a name exists there with other content
        :raises NoSpace: it does not fit; nothing was moved
        """
        self._pool.require(write=True)
        # Clear what a killed process of this host left here while it stored a state: perhaps no
        # other process comes by for long.
        Collector(self._pool).clear_incoming()
        chains, machine = (
            chains_of(parts, lambda manifest: manifest),
            parts[0] if parts[0].kind is Kind.MACHINE else None,
        )
        missing = [
            (chain, manifest) for chain in chains for manifest in self._missing(chain, replace)
        ]
        if not missing and (machine is None or self._is_there(machine, chains)):
            return self._answer(chains, Presence.PRESENT)
        lacking = {_digest(manifest): manifest for _, manifest in missing}
        require_space(
            self._pool,
            sum(
                manifest.data_size
                for digest, manifest in lacking.items()
                if not self._pool.has_bytes(digest)
            ),
        )
        alone = [
            (chain, manifest)
            for chain, manifest in missing
            if machine is None or manifest is not chain[0]
        ]
        together = [chain[0] for chain in chains] if machine is not None else []
        self._progress.begin(
            f"set {parts[0].id} in {self._pool}",
            sum(one.size for one in (*(manifest for _, manifest in alone), *together)),
        )
        try:
            for chain, manifest in alone:
                self._store(
                    [self._translated(chain, manifest)], replace=replace and manifest is chain[0]
                )
            if machine is not None:
                tips = [self._in_pool(chain) for chain in chains]
                self._store([*tips, evolve(machine, members=_members(tips))], replace=replace)
        finally:
            self._progress.end()
        return self._answer(chains, Presence.STORED)

    def attempt(self, parts: Sequence[Manifest], *, replace: bool = False) -> StoredAt:
        """
        Store a state as :meth:`run` does, but return an error of this pool as part of the answer,
        so that it does not hide what happened at other pools.
        """
        try:
            return self.run(parts, replace=replace)
        except StatePoolError as error:
            return StoredAt(str(self._pool), Presence.FAILED, durable=False, error=str(error))

    def _answer(self, chains: Iterable[Sequence[Manifest]], presence: Presence) -> StoredAt:
        # From now on the cache may evict them: they can be fetched again.
        for manifest in (manifest for chain in chains for manifest in chain):
            self._cache.trust.note_source(_digest(manifest), str(self._pool))
        return StoredAt(
            str(self._pool),
            presence,
            durable=self._durable,
            bytes=self._bytes,
            resumed=self._resumed,
            again=self._again,
        )

    @property
    def _durable(self) -> bool:
        return self._pool.transport.capabilities.durable

    def _missing(self, chain: Sequence[Manifest], replace: bool) -> list[Manifest]:
        """:returns: what has to be stored, root first"""
        found = relations(chain, self._pool)
        # A log can name bytes that were deleted by hand. Those that the cache has are put back.
        gone = self._pool.lacking(
            _digest(manifest)
            for manifest, relation in found
            if relation is Relation.SAME and self._is_copy(manifest)
        )
        missing = []
        for manifest, relation in reversed(found):
            if relation is Relation.DIFFERENT and not (replace and manifest is chain[0]):
                there = self._pool.find(manifest.id)
                raise taken(
                    manifest.id,
                    self._pool,
                    f"{there.digest if there else 'none'}, here {manifest.digest}",
                )
            if relation is not Relation.SAME or manifest.digest in gone:
                missing.append(manifest)
        return missing

    def _is_copy(self, manifest: Manifest) -> bool:
        """
        Tell whether the pool has, under the same name, the very bytes of our state, and not the
        bytes from which ours were rewritten.
        """
        there = self._pool.find(manifest.id)
        return there is not None and there.digest == manifest.digest

    def _translated(self, chain: Sequence[Manifest], manifest: Manifest) -> Manifest:
        """
        :returns: a cached manifest in the terms of the pool, whose copy of the parent may have
            different bytes with the same content
        """
        below = chain[list(chain).index(manifest) + 1] if manifest.parent is not None else None
        there = self._pool.find(below.id) if below is not None else None
        if (
            below is None
            or there is None
            or there.digest is None
            or not _same_content(below, there)
        ):
            return manifest
        return evolve(manifest, parent=Parent(below.state, there.digest))

    def _in_pool(self, chain: Sequence[Manifest]) -> Manifest:
        """:returns: the tip of a cached chain as the pool has it, or will have it"""
        there = self._pool.find(chain[0].id)
        return (
            there
            if there is not None and _same_content(chain[0], there)
            else self._translated(chain, chain[0])
        )

    def _is_there(self, machine: Manifest, chains: Iterable[Sequence[Manifest]]) -> bool:
        """
        Tell whether the pool has this machine state, given that it has all that the state lists.
        """
        there = self._pool.find(machine.id)
        return there is not None and dict(there.members) == _members(map(self._in_pool, chains))

    def _store(self, together: Sequence[Manifest], *, replace: bool) -> None:
        """Store states in one record."""
        old = [self._pool.find(manifest.id) for manifest in together]
        digests = [manifest.digest for manifest in together if manifest.digest is not None]
        with self._staged(digests) as staging, ExitStack() as alone:
            sent: list[Manifest] = []
            for manifest in together:
                if manifest.digest is not None:
                    alone.enter_context(self._alone(manifest.digest))
                sent += self._send_lacking([manifest], staging)
                # other writers that wait for these bytes can continue
                if manifest is not together[-1] and manifest.digest is not None:
                    staging.settle([manifest.digest])
                    alone.close()
            self._pool.publish(
                sent,
                staging,
                replace=replace,
                again=lambda renewed: self._send_lacking(together, renewed),
            )
        if gone := {
            there.digest for there in old if there is not None and there.digest is not None
        } - set(digests):
            Collector(self._pool, lambda: gc_roots(self._pool)).collect(gone)

    def _send_lacking(self, manifests: Iterable[Manifest], staging: Staging) -> list[Manifest]:
        """:returns: the manifests, with the extents of what was sent"""
        sent, found = [], []
        for manifest in manifests:
            if (
                manifest.digest is None
                or manifest.digest in sent
                or self._pool.has_bytes(manifest.digest)
            ):
                self._progress.advance(manifest.size)
                found.append(manifest)
            else:
                found.append(self._send(manifest, staging))
                sent.append(manifest.digest)
        return found

    @contextmanager
    def _staged(self, digests: Iterable[Digest]) -> Iterator[Staging]:
        """:returns: the staging in the pool, for the length of a ``with`` block"""
        staging = self._pool.stage(digests)
        resumes = self._pool.transport.capabilities.resumes
        try:
            yield staging
        except TransportError as error:
            if error.transient and resumes:
                # The pool cannot be told. The next writer resumes from what is there, or a
                # collector clears it away.
                abandon(staging.marker.nonce)
            else:
                staging.end()
            raise
        except BaseException:
            staging.end()
            raise
        staging.end()

    def _alone(self, digest: Digest) -> AbstractContextManager[None]:
        """
        Let one worker, of any host, send these bytes; the others wait meanwhile and then find them.
        """
        if self._pool.has_bytes(digest):
            return nullcontext()
        return self._pool.locks.hold(f"store-{digest.hex[:32]}", self._pool.lock_timeout)

    def _send(self, manifest: Manifest, staging: Staging) -> Manifest:
        """:returns: the manifest, with the extents of the file that was sent"""
        digest, transport = _digest(manifest), self._pool.transport
        resumes = transport.capabilities.resumes
        path = layout.part(staging.marker.nonce, digest) if resumes else staging.path(digest)
        with open_regular(
            self._cache.bytes(digest) or self._cache.file(layout.data(digest))
        ) as descriptor:
            extents = data_extents(descriptor, manifest.size, limit=MAX_EXTENTS)
            manifest = evolve(manifest, extents=extents if extents != ((0, manifest.size),) else ())
            pieces = Pieces()
            done = self._there_already(descriptor, manifest, staging, pieces) if resumes else 0
            transfer = Transfer(
                manifest.size, digest.algorithm, manifest.extents, self._progress, done, pieces
            )
            moved = transport.store(descriptor, path, transfer)
        if moved.digest != digest:
            transport.remove(path)
            raise mismatched(
                manifest,
                moved.digest,
                f"in the cache {self._cache.root}",
                promised=digest,
                pool=str(self._cache.pool),
                hint=f"look at the cache with: statepool verify {manifest.object} {manifest.state}",
            )
        staging.list_pieces(digest, manifest.size, pieces)
        if resumes:
            transport.rename(path, staging.path(digest))
        self._bytes += moved.sent
        self._resumed += done
        self._again += moved.again
        return manifest

    def _there_already(
        self, descriptor: int, manifest: Manifest, staging: Staging, pieces: Pieces
    ) -> int:
        """
        Check what an interrupted transfer left in the pool under the name that our part has now.

        :param pieces: gets the digests of those pieces that are there
        :returns: how many bytes at its beginning are correct
        """
        digest, nonce = _digest(manifest), staging.marker.nonce
        there = Transfer(take_over(self._pool, digest, nonce, alone=True), digest.algorithm)
        if not 0 < there.size <= manifest.size:
            return 0
        try:
            found = self._pool.transport.digest(layout.part(nonce, digest), there)
        except (AccessDenied, IntegrityError):
            return 0  # it belongs to another account, or still grows
        return same_beginning(descriptor, there, found, pieces)


def _members(tips: Iterable[Manifest]) -> dict[str, Digest]:
    """
    :returns: the members that a machine state lists, from their tips: in a pool their digests can
        differ for the same content
    """
    return {member_name(tip.id): _digest(tip) for tip in tips}


def _digest(manifest: Manifest) -> Digest:
    assert manifest.digest is not None
    return manifest.digest
