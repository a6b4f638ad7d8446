"""
Free space: the check, before a byte is moved, whether something fits; and the eviction of states to
make it fit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from statepool.cache.cache import Cache
from statepool.errors import HasDependants, NoSpace, NotFound
from statepool.model.digest import Digest
from statepool.model.manifest import Key, Manifest, StateId
from statepool.pools.fold import Fold, member_ids
from statepool.pools.pool import Pool
from statepool.qcow2.opened import is_open
from statepool.transports.base import Transport
from statepool.transports.copying import can_share_blocks

SLACK = 1 << 20
"""Bytes that every transfer needs in addition to the data: records, markers and links."""


_WHOLE = 1 << 30
"""The assumed chain length of a machine state, so that it is evicted before what it lists."""


def require_space(pool: Pool, needed: int, *, keep_free: int = 0) -> None:
    """
    :param needed: bytes that will be written
    :param keep_free: bytes that must be free afterwards
    :raises NoSpace: the bytes do not fit
    """
    free = pool.transport.free_space()
    if needed and free is not None and needed + SLACK + keep_free > free:
        raise _does_not_fit(pool, needed, free, keep_free)


def _does_not_fit(pool: Pool, needed: int, free: int, keep_free: int) -> NoSpace:
    return NoSpace(
        f"{needed} bytes do not fit into {pool.location}: {free} are free"
        + (f", and {keep_free} must stay so" if keep_free else ""),
        needed=needed + SLACK,
        available=max(0, free - keep_free),
        pool=str(pool.location),
        hint="remove states that nobody needs, or run: statepool gc",
    )


def make_room(
    cache: Cache, manifests: Sequence[Manifest], source: Transport, *, keep: set[Digest]
) -> None:
    """
    Evict states until a fetch fits and ``min-free`` bytes stay free.

    :param manifests: what will be fetched
    :param source: the transport of the source: references to a link pool, and shared blocks, take
        no space
    :param keep: bytes that must not be evicted
    :raises NoSpace: the fetch does not fit even then
    """
    if source.capabilities.refers:
        return
    needed = sum(manifest.data_size for manifest in manifests)
    if not needed or (not _fits(cache, needed) and _shares_blocks(cache.root, source)):
        return
    keep_free = cache.settings.min_free
    if keep_free and not _fits(cache, needed + keep_free):
        # if eviction could not make enough room for a size that is perhaps only claimed, nothing is
        # evicted
        require_space(cache.pool, needed - _evictable_size(cache, keep))
        for victim in _victims(cache, keep):
            _evict(cache, victim)
            if _fits(cache, needed + keep_free):
                break
    require_space(cache.pool, needed, keep_free=keep_free)


def require_place(cache: Cache, manifests: Sequence[Manifest], source: Transport) -> None:
    """
    Check the free space, as :func:`make_room`, for a cache that does not exist yet: if the fetch
    does not fit, the cache is not made.

    :raises NoSpace: the fetch does not fit where the cache would be
    """
    place = next(path for path in (cache.root, *cache.root.parents) if path.is_dir())
    needed = sum(manifest.data_size for manifest in manifests)
    left = os.statvfs(place)
    free = left.f_bavail * left.f_frsize
    if not left.f_blocks:
        return  # the file system does not tell its size
    if (
        source.capabilities.refers
        or needed + SLACK + cache.settings.min_free <= free
        or _shares_blocks(place, source)
    ):
        return
    raise _does_not_fit(cache.pool, needed, free, cache.settings.min_free)


def _shares_blocks(place: Path, source: Transport) -> bool:
    """
    Return whether a fetch from a source takes no room, since the file system shares the blocks of
    both files.
    """
    root = source.local_path("")
    return (
        root is not None and root.stat().st_dev == place.stat().st_dev and can_share_blocks(place)
    )


def _fits(cache: Cache, size: int) -> bool:
    free = cache.pool.transport.free_space()
    return free is None or size + SLACK <= free


def _victims(cache: Cache, keep: set[Digest]) -> Iterator[StateId]:
    """
    Yield states that can be fetched again and are not in use, the least recently used first, and
    each after its dependants.
    """
    roots = cache.gc_roots()
    for state, _ in sorted(_evictable(cache, keep | roots), key=lambda found: found[1]):
        if not _is_open(cache, state):
            yield state


def _is_open(cache: Cache, state: StateId) -> bool:
    """Return whether a process has the bytes of a state open, without a known working image."""
    manifest = cache.pool.find(state)
    if manifest is None or manifest.digest is None or cache.is_link(manifest.digest):
        return False
    file = cache.bytes(manifest.digest)
    return file is not None and is_open(file)


def _evictable(cache: Cache, keep: Iterable[Digest]) -> Iterator[tuple[StateId, tuple[float, int]]]:
    kept = set(keep)
    for machine in cache.pool.logged_machines():
        fold = cache.pool.fold(machine)
        last = _last_used(cache, fold, kept)
        for state, manifest in fold.states.items():
            # A machine state is removed with all that it lists, and each of those states with its
            # dependants.
            used = (
                [last[fold.states[member].key] for member in member_ids(manifest)]
                if manifest.key is None
                else [last[manifest.key]]
            )
            if max(used) < math.inf and (
                manifest.key is not None or _is_elsewhere(cache, manifest)
            ):
                yield (
                    state,
                    (max(used), -fold.depth(manifest) if manifest.key is not None else -_WHOLE),
                )


def _last_used(cache: Cache, fold: Fold, kept: set[Digest]) -> dict[Key | None, float]:
    """
    :returns: for each state, when it or one of its dependants was last used; infinity if it must
        not be evicted
    """
    last: dict[Key | None, float] = {}
    for manifest in fold.tips_first():
        used = last.get(manifest.key, 0.0)
        if fold.is_named(manifest):
            listing = fold.machine_listing(manifest.id)
            free = manifest.digest not in kept and _is_elsewhere(cache, manifest)
            free = free and (listing is None or _is_elsewhere(cache, fold.states[listing]))
            used = (
                max(used, cache.trust.last_used(manifest.digest))
                if free and manifest.digest is not None
                else math.inf
            )
        last[manifest.key] = used
        if manifest.parent_key is not None:
            last[manifest.parent_key] = max(used, last.get(manifest.parent_key, 0.0))
    return last


def _evictable_size(cache: Cache, keep: set[Digest]) -> int:
    """:returns: bytes that would become free if all evictable states were evicted"""
    found: dict[Digest, int] = {}
    for state, _ in _evictable(cache, keep | cache.gc_roots()):
        fold = cache.pool.fold(state.machine)
        for manifest in (fold.states[one] for one in (state, *member_ids(fold.states[state]))):
            if manifest.digest is not None:
                found[manifest.digest] = manifest.data_size
    return sum(found.values())


def _is_elsewhere(cache: Cache, manifest: Manifest) -> bool:
    if manifest.digest is None:
        return any(
            answer.token.startswith("log:")
            for answer in cache.lookups.answers(manifest.id).values()
        )
    return cache.trust.source(manifest.digest) is not None


def _evict(cache: Cache, state: StateId) -> None:
    try:
        gone = cache.pool.remove(state)
    except (NotFound, HasDependants):
        return  # another process evicted it, or made a dependant of it
    cache.drop({manifest.digest for manifest in gone if manifest.digest is not None})
