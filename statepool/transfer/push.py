"""
Storing a cached chain in another pool: parents first, what is there is skipped, and nothing is visible before it is whole.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

from attrs import evolve

from statepool.errors import AccessDenied, DigestMismatch, IntegrityError, StatePoolError, TransportError
from statepool.model.digest import Digest
from statepool.model.manifest import MAX_EXTENTS, Manifest, Parent
from statepool.model.outcomes import Presence, StoredAt
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.pool import Pool
from statepool.pools.refusals import taken
from statepool.pools.staging import Staging
from statepool.qcow2.files import open_regular
from statepool.transfer.cache import Cache
from statepool.transfer.held import held_in
from statepool.transfer.resume import abandon, take_over
from statepool.transfer.space import require_space
from statepool.transports.copying import data_extents
from statepool.transports.reading import hash_beginning


class Relation(enum.StrEnum):
    """How a state of a chain in the cache relates to the pool."""

    SAME = "same"
    MISSING = "missing"
    """The pool does not have it."""
    DIFFERENT = "different"
    """The pool has other content under this name."""


def relations(chain: Sequence[Manifest], pool: Pool) -> list[tuple[Manifest, Relation]]:
    """
    :param chain: of the cache, tip first
    :returns: how each state of it relates to what the pool has, by name and digest; no data is read
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
    """Tell whether a pool has the bytes of a cached state, or those that this cache rewrote. What the pool's log calls an origin is a claim."""
    return there.digest is not None and cached.is_content(there.digest)


class Push:
    """
    Stores one cached chain in a pool.

    :param cache: where from
    :param pool: where to
    :param progress: told of the bytes
    """

    def __init__(self, cache: Cache, pool: Pool, progress: Progress = SILENT) -> None:
        self._cache = cache
        self._pool = pool
        self._progress = progress
        self._bytes = 0
        self._resumed = 0
        self._again = 0

    def run(self, chain: Sequence[Manifest], *, replace: bool = False) -> StoredAt:
        """
        :param chain: tip first
        :param replace: other content under the tip's name gives way, if nothing stands on it
        :returns: what became of it
        :raises Conflict: a name exists with other content
        :raises NoSpace: it does not fit; nothing was moved
        """
        self._pool.require(write=True)
        # What a process of this host left behind that was killed while it did this: nobody else may come by for long.
        Collector(self._pool).clear_incoming()
        missing = self._missing(chain, replace)
        if not missing:
            self._note(chain)
            return StoredAt(str(self._pool), Presence.PRESENT, durable=self._durable)
        require_space(self._pool, sum(manifest.data_size for manifest in missing if not self._pool.has_bytes(_digest(manifest))))
        self._progress.begin(f"set {chain[0].id} in {self._pool}", sum(manifest.size for manifest in missing))
        try:
            for manifest in missing:
                self._store(self._translated(chain, manifest), replace=replace and manifest is chain[0])
        finally:
            self._progress.end()
        self._note(chain)
        return StoredAt(str(self._pool), Presence.STORED, durable=self._durable, bytes=self._bytes, resumed=self._resumed, again=self._again)

    def attempt(self, chain: Sequence[Manifest], *, replace: bool = False) -> StoredAt:
        """As :meth:`run`, but what goes wrong at this pool is part of the answer, so that it does not hide what happened at others."""
        try:
            return self.run(chain, replace=replace)
        except StatePoolError as error:
            return StoredAt(str(self._pool), Presence.FAILED, durable=False, error=str(error))

    @property
    def _durable(self) -> bool:
        return self._pool.transport.capabilities.durable

    def _missing(self, chain: Sequence[Manifest], replace: bool) -> list[Manifest]:
        """:returns: what has to be stored, root first"""
        found = relations(chain, self._pool)
        # A log can name bytes that somebody has deleted: those that we have are put back.
        gone = self._pool.lacking(_digest(manifest) for manifest, relation in found if relation is Relation.SAME and self._is_copy(manifest))
        missing = []
        for manifest, relation in reversed(found):
            if relation is Relation.DIFFERENT and not (replace and manifest is chain[0]):
                there = self._pool.find(manifest.id)
                raise taken(manifest.id, self._pool, f"{there.digest if there else 'none'}, here {manifest.digest}")
            if relation is not Relation.SAME or manifest.digest in gone:
                missing.append(manifest)
        return missing

    def _is_copy(self, manifest: Manifest) -> bool:
        """Whether the pool has a state under its name with the very bytes of ours, and not with those that ours were rewritten from."""
        there = self._pool.find(manifest.id)
        return there is not None and there.digest == manifest.digest

    def _translated(self, chain: Sequence[Manifest], manifest: Manifest) -> Manifest:
        """:returns: a cached manifest in the terms of the pool, whose copy of the parent may have other bytes around the same content"""
        below = chain[list(chain).index(manifest) + 1] if manifest.parent is not None else None
        there = self._pool.find(below.id) if below is not None else None
        if below is None or there is None or there.digest is None or not _same_content(below, there):
            return manifest
        return evolve(manifest, parent=Parent(below.state, there.digest))

    def _store(self, manifest: Manifest, *, replace: bool) -> None:
        digest = _digest(manifest)
        old = self._pool.find(manifest.id)
        with self._staged([digest]) as staging, self._alone(digest):
            if not self._pool.has_bytes(digest):
                manifest = self._send(manifest, staging)
            else:
                self._progress.advance(manifest.size)
            self._pool.publish([manifest], staging, replace=replace, again=lambda renewed: self._send(manifest, renewed))
        if old is not None and old.digest not in (None, digest):
            Collector(self._pool, lambda: held_in(self._pool)).collect([_digest(old)])

    @contextmanager
    def _staged(self, digests: Iterable[Digest]) -> Iterator[Staging]:
        """:returns: what is under way in the pool, as long as a ``with`` block lasts"""
        staging = self._pool.stage(digests)
        resumes = self._pool.transport.capabilities.resumes
        try:
            yield staging
        except TransportError as error:
            if error.transient and resumes:
                # The pool cannot be told. Whoever comes next goes on with what is there, or clears it away.
                abandon(staging.marker.nonce)
            else:
                staging.end()
            raise
        except BaseException:
            staging.end()
            raise
        staging.end()

    def _alone(self, digest: Digest) -> AbstractContextManager[None]:
        """One worker, of whatever host, sends these bytes there; the others wait while it does, and then find them."""
        if self._pool.has_bytes(digest):
            return nullcontext()
        return self._pool.locks.hold(f"store-{digest.hex[:32]}", self._pool.lock_timeout)

    def _send(self, manifest: Manifest, staging: Staging) -> Manifest:
        """:returns: the manifest, with the extents of the file that was sent"""
        digest, transport = _digest(manifest), self._pool.transport
        resumes = transport.capabilities.resumes
        path = layout.part(staging.marker.nonce, digest) if resumes else staging.path(digest)
        with open_regular(self._cache.bytes(digest) or self._cache.file(layout.data(digest))) as descriptor:
            extents = data_extents(descriptor, manifest.size, limit=MAX_EXTENTS)
            manifest = evolve(manifest, extents=extents if extents != ((0, manifest.size),) else ())
            done = self._there_already(descriptor, manifest, staging) if resumes else 0
            moved = transport.store(
                descriptor, path, manifest.size, algorithm=digest.algorithm, extents=manifest.extents, progress=self._progress, done=done
            )
        if moved.digest != digest:
            transport.remove(path)
            raise DigestMismatch(
                f"the bytes of {manifest.id} in the cache {self._cache.root} are {moved.digest}, not {digest}",
                expected=str(digest),
                actual=str(moved.digest),
                object=manifest.object,
                state=manifest.state,
                pool=str(self._cache.pool),
                hint=f"look at the cache with: statepool verify {manifest.object} {manifest.state}",
            )
        if resumes:
            transport.rename(path, staging.path(digest))
        self._bytes += moved.sent
        self._resumed += done
        self._again += moved.again
        return manifest

    def _there_already(self, descriptor: int, manifest: Manifest, staging: Staging) -> int:
        """:returns: how many bytes an interrupted transfer has left there, under the name that ours has: they are what they should be"""
        digest, nonce = _digest(manifest), staging.marker.nonce
        done = take_over(self._pool, digest, nonce, alone=True)
        if not done:
            return 0
        try:
            there = self._pool.transport.digest(layout.part(nonce, digest), done, algorithm=digest.algorithm)
        except (AccessDenied, IntegrityError):
            return 0  # it is another account's, or still grows
        return done if done <= manifest.size and there == hash_beginning(descriptor, done, digest.algorithm) else 0

    def _note(self, chain: Sequence[Manifest]) -> None:
        """From now on the cache may evict these states: they can be had again."""
        for manifest in chain:
            self._cache.trust.note_source(_digest(manifest), str(self._pool))


def _digest(manifest: Manifest) -> Digest:
    assert manifest.digest is not None
    return manifest.digest
