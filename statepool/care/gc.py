"""Garbage collection: in the cache, and in other pools."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from statepool.cache import trust
from statepool.cache.cache import Cache
from statepool.cache.chains import GRACE
from statepool.cache.gc_roots import gc_roots
from statepool.cache.linked import users
from statepool.capture.capture_journal import recover
from statepool.capture.scratch import clear_scratch
from statepool.errors import HasDependants, NoSpace, NotFound, StatePoolError
from statepool.model.digest import Digest
from statepool.model.keys import LABEL_KEY, LABEL_STATE
from statepool.model.manifest import Key, Manifest, StateId
from statepool.model.outcomes import Collected, Kept
from statepool.pools import layout
from statepool.pools.collect import PASSING, Collector
from statepool.pools.fold import Fold
from statepool.pools.locks import FileLocks
from statepool.pools.pool import Pool
from statepool.transports.failures import Subject, translate_os_errors


def gc_cache(cache: Cache, *, now: bool = False, dry_run: bool = False) -> list[Collected]:
    """
    :param now: do not wait for working images that have vanished: they were not moved
    :param dry_run: only report what would be removed
    :returns: what was removed
    """
    if not cache.pool.is_managed:
        return []
    try:
        released = _release(cache, dry_run) if now else []
        return released + _gc_cache(cache, dry_run)
    except NoSpace:
        # Ending interrupted work takes some room, which may be free once the garbage is removed.
        gone = cache.collector.sweep(dry_run=dry_run)
    try:
        return gone + _gc_cache(cache, dry_run)
    except NoSpace as error:
        error.hint = (
            "what no state needs is gone already: unset states, or remove something else there"
        )
        raise


def _release(cache: Cache, dry_run: bool) -> list[Collected]:
    return [
        Collected(str(cache.pool), "the use by a working image that is gone", path)
        for path in cache.chains.release_vanished(dry_run=dry_run)
    ]


def _gc_cache(cache: Cache, dry_run: bool) -> list[Collected]:
    gone = [] if dry_run else recover(cache)
    gone += clear_scratch(cache, dry_run=dry_run)
    idle = cache.chains.idle(cache.pool.needed())
    gone += [
        Collected(
            str(cache.pool),
            "a chain that no working image stands on",
            str(cache.chains.directory_of(key)),
        )
        for key in idle
    ]
    if not dry_run:
        cache.chains.prune_all(cache.pool.needed())
    gone += cache.collector.sweep(dry_run=dry_run)
    gone += _stray_notes(cache, dry_run)
    gone += _half_written_notes(cache, dry_run)
    if not dry_run and isinstance(cache.pool.locks, FileLocks):
        cache.pool.locks.tidy("fetch-")
        cache.pool.locks.tidy("ensure-")
    return gone


def kept_in(cache: Cache) -> list[Kept]:
    """
    :returns: what no state of the cache needs, but working images, or caches that refer to it,
        still use
    """
    if not cache.pool.is_managed:
        return []
    where, needed, found = str(cache.pool), cache.pool.needed(), []
    for links, use in cache.chains.uses():
        sizes = {
            name.removesuffix(".qcow2"): _size(cache, digest)
            for name, digest in links.items()
            if digest not in needed
        }
        until = use.missing_since + GRACE if use.missing_since is not None else None
        if any(sizes.values()):
            found.append(Kept(where, tuple(sizes), sum(sizes.values()), use.working, until))
    for digest, others in users(cache.pool).items():
        if digest not in needed:
            found += [Kept(where, (), _size(cache, digest), other) for other in others]
    return found


def _size(cache: Cache, digest: Digest) -> int:
    """:returns: the space that some bytes take in the cache; 0 if they are not there"""
    status = cache.file(layout.data(digest)).stat()
    return status.st_blocks * 512 if status is not None else 0


def _stray_notes(cache: Cache, dry_run: bool) -> list[Collected]:
    """Remove notes about bytes that are no longer there."""
    found = []
    for name in cache.notes.names(trust.DIRECTORY):
        digest = Digest.from_file_name(name.removesuffix(".json"))
        path = f"{trust.DIRECTORY}/{name}"
        status = cache.notes.status(path)
        if not name.endswith(".json") or status is None:  # another process removes it, too
            continue
        if digest is None or cache.file(layout.data(digest)).stat() is None:
            found.append(
                Collected(
                    str(cache.pool),
                    "a note on bytes that are gone",
                    cache.notes.where(path),
                    status.st_size,
                )
            )
            if not dry_run:
                if digest is not None:
                    cache.forget(digest)
                cache.notes.remove(path)
    return found


def _half_written_notes(cache: Cache, dry_run: bool) -> list[Collected]:
    """
    Remove unfinished notes that a crash left. They do not name their writer, and a live one exists
    only for a moment: so their age decides.
    """
    found = []
    for file in [*cache.notes.unfinished(), *cache.chains.unfinished()]:
        status = file.stat()  # None if it was renamed to its final name by now
        if status is not None and time.time() - status.st_mtime > PASSING:
            found.append(
                Collected(
                    str(cache.pool), "a note that was being written", str(file), status.st_size
                )
            )
            if not dry_run:
                file.remove()
    return found


def gc_source(pool: Pool, keep: int | None, *, dry_run: bool = False) -> list[Collected]:
    """
    Run :func:`thin_keys` and :func:`gc_pool` on a pool that may belong to another account: one that
    cannot be changed is left alone, and the result says why.

    :param keep: how many old versions of each built state stay; None: all
    :param dry_run: only report what would be removed
    :returns: what was removed
    """
    try:
        with translate_os_errors("tidy up", Subject(f"the pool {pool}")):
            gone = thin_keys(pool, keep, dry_run=dry_run) if keep is not None else []
            return gone + gc_pool(pool, dry_run=dry_run)
    except StatePoolError as error:
        return [Collected(str(pool), "", "", problem=str(error), code=error.exit_code)]


def gc_pool(pool: Pool, *, dry_run: bool = False) -> list[Collected]:
    """
    :param dry_run: only report what would be removed
    :returns: what was removed
    """
    if not pool.is_managed:
        return []
    gone = Collector(pool, lambda: gc_roots(pool)).sweep(dry_run=dry_run)
    if not dry_run and isinstance(pool.locks, FileLocks):
        pool.locks.tidy("store-")
    return gone


def thin_keys(pool: Pool, keep: int, *, dry_run: bool = False) -> list[Collected]:
    """
    Remove old versions of built states: keep the newest few of each, and those on which other
    states depend or which are in use.

    :param keep: how many of each state stay
    :param dry_run: only report what would be removed
    :returns: what was removed; the next sweep removes the bytes
    """
    if not pool.is_managed:
        return []
    roots = gc_roots(pool)
    return [
        gone
        for machine in pool.logged_machines()
        for gone in _thin_machine(pool, machine, keep, roots, dry_run)
    ]


def _thin_machine(
    pool: Pool, machine: str, keep: int, roots: frozenset[Digest], dry_run: bool
) -> Iterator[Collected]:
    fold = pool.fold(machine)
    old = {
        manifest.id: manifest for manifest in _old_keys(fold, keep) if manifest.digest not in roots
    }
    for manifest in _needless(fold, old):
        if not dry_run:
            try:
                pool.remove(manifest.id)
            except (NotFound, HasDependants):
                continue  # another process removed it, or set a child of it
        yield Collected(
            str(pool),
            f"an old key of {manifest.labels[LABEL_STATE]}",
            layout.view(manifest.id),
            manifest.data_size,
        )


def _needless(fold: Fold, old: Mapping[StateId, Manifest]) -> Iterator[Manifest]:
    """
    :returns: those of the old states on which only other old states depend, tips first; machine
        states, which take their members, come last
    """
    needed: set[Key] = set()
    for manifest in fold.tips_first():
        assert manifest.key is not None
        stays = fold.is_named(manifest) and (
            manifest.id not in old or fold.machine_listing(manifest.id) is not None
        )
        if manifest.key in needed or stays:
            needed |= {manifest.parent_key} if manifest.parent_key is not None else set()
        elif fold.is_named(manifest):
            yield manifest
    yield from (manifest for manifest in old.values() if manifest.key is None)


def _old_keys(fold: Fold, keep: int) -> Iterator[Manifest]:
    groups: dict[tuple[str, str], list[Manifest]] = {}
    for manifest in fold.states.values():
        if LABEL_KEY in manifest.labels and LABEL_STATE in manifest.labels:
            groups.setdefault((manifest.object, manifest.labels[LABEL_STATE]), []).append(manifest)
    for manifests in groups.values():
        yield from sorted(manifests, key=lambda manifest: -manifest.created)[keep:]
