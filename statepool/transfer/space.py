"""
Whether something fits, before a byte is moved; and what the cache throws away to make it fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from statepool.errors import HasDependants, NoSpace, NotFound
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, StateId
from statepool.pools.pool import Pool
from statepool.qcow2.opened import is_open
from statepool.transfer.cache import Cache
from statepool.transports.base import Transport
from statepool.transports.copying import can_share_blocks

SLACK = 1 << 20
"""Bytes that every transfer needs beside the data: records, markers and links."""


def require_space(pool: Pool, needed: int, *, keep_free: int = 0) -> None:
    """
    :param needed: bytes that will be written
    :param keep_free: bytes that must be free afterwards
    :raises NoSpace: they do not fit
    """
    free = pool.transport.free_space()
    if needed and free is not None and needed + SLACK + keep_free > free:
        raise NoSpace(
            f"{needed} bytes do not fit into {pool.location}: {free} are free" + (f", and {keep_free} must stay so" if keep_free else ""),
            needed=needed + SLACK,
            available=max(0, free - keep_free),
            pool=str(pool.location),
            hint="remove states that nobody needs, or run: statepool gc",
        )


def make_room(cache: Cache, manifests: Sequence[Manifest], source: Transport, *, keep: set[Digest]) -> None:
    """
    Evict states until a fetch fits and ``min-free`` bytes stay free.

    :param manifests: what will be fetched
    :param source: from where: a link pool, and blocks that can be shared, take no space
    :param keep: what must not be evicted
    :raises NoSpace: even then it does not fit
    """
    if source.capabilities.refers:
        return
    needed = sum(manifest.data_size for manifest in manifests)
    if not needed or (not _fits(cache, needed) and _shares_blocks(cache, source)):
        return
    keep_free = cache.settings.min_free
    if keep_free and not _fits(cache, needed + keep_free):
        for victim in _victims(cache, keep):
            _evict(cache, victim)
            if _fits(cache, needed + keep_free):
                break
    require_space(cache.pool, needed, keep_free=keep_free)


def _shares_blocks(cache: Cache, source: Transport) -> bool:
    """Whether what comes from a source takes no room, since the file system lets both have the same blocks."""
    root = source.local_path("")
    return root is not None and root.stat().st_dev == cache.root.stat().st_dev and can_share_blocks(cache.root)


def _fits(cache: Cache, size: int) -> bool:
    free = cache.pool.transport.free_space()
    return free is None or size + SLACK <= free


def _victims(cache: Cache, keep: set[Digest]) -> Iterator[StateId]:
    """States that can be fetched again and that nobody uses, the least recently used first; each when nothing stands on it any more."""
    held = cache.held()
    for state, _ in sorted(_evictable(cache, keep | held), key=lambda found: found[1]):
        if not _is_open(cache, state):
            yield state


def _is_open(cache: Cache, state: StateId) -> bool:
    """Whether some process has the bytes of a state open, without a working image that we know of."""
    manifest = cache.pool.find(state)
    path = cache.data(manifest.digest) if manifest is not None and manifest.digest is not None else None
    return path is not None and path.is_file() and not path.is_symlink() and is_open(path)


def _evictable(cache: Cache, keep: Iterable[Digest]) -> Iterator[tuple[StateId, tuple[float, int]]]:
    kept = set(keep)
    for machine in cache.pool.logged_machines():
        fold = cache.pool.fold(machine)
        for state, manifest in fold.states.items():
            if manifest.digest is None:
                continue
            above = [fold.states[child] for child in fold.dependants([state])]
            if all(link.digest not in kept and _is_elsewhere(cache, link) for link in (manifest, *above)):
                last = max(cache.trust.last_used(link.digest) for link in (manifest, *above) if link.digest is not None)
                yield state, (last, -len(fold.chain(manifest)))


def _is_elsewhere(cache: Cache, manifest: Manifest) -> bool:
    return manifest.digest is not None and cache.trust.source(manifest.digest) is not None


def _evict(cache: Cache, state: StateId) -> None:
    try:
        gone = cache.pool.remove(state)
    except (NotFound, HasDependants):
        return  # another process evicted it, or made something stand on it
    cache.drop({manifest.digest for manifest in gone if manifest.digest is not None})
