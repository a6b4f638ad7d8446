"""Taking away everything that nobody needs: in the cache, and in other pools."""

from __future__ import annotations

import time
from pathlib import Path

from statepool.model.digest import Digest
from statepool.model.outcomes import Collected
from statepool.pools import layout
from statepool.pools.collect import PASSING, Collector
from statepool.pools.locks import FileLocks
from statepool.pools.pool import Pool
from statepool.transfer.cache import Cache
from statepool.transfer.linked import held_by_links
from statepool.transfer.takeover import recover


def tidy_cache(cache: Cache, *, dry_run: bool = False) -> list[Collected]:
    """
    :param dry_run: only say what would go
    :returns: what went
    """
    if not cache.pool.is_managed:
        return []
    gone = [] if dry_run else recover(cache)
    idle = cache.chains.idle(cache.pool.needed())
    gone += [Collected(str(cache.pool), "a chain that no working image stands on", str(cache.chains.directory_of(key))) for key in idle]
    if not dry_run:
        cache.chains.prune_all(cache.pool.needed())
    gone += cache.collector.sweep(dry_run=dry_run)
    gone += _stray_notes(cache, dry_run)
    gone += _half_written_notes(cache, dry_run)
    if not dry_run and isinstance(cache.pool.locks, FileLocks):
        cache.pool.locks.tidy("fetch-")
    return gone


def _stray_notes(cache: Cache, dry_run: bool) -> list[Collected]:
    """What we remember about bytes that are gone."""
    found = []
    for path in sorted((cache.root / ".statepool/trust").glob("*.json")):
        digest = Digest.from_file_name(path.name.removesuffix(".json"))
        if digest is None or not _is_there(cache.data(digest)):
            found.append(Collected(str(cache.pool), "a note on bytes that are gone", str(path), path.stat().st_size))
            if not dry_run:
                path.unlink(missing_ok=True)
    return found


def _half_written_notes(cache: Cache, dry_run: bool) -> list[Collected]:
    """What a crash left of notes that were being written. They do not say by whom, and each lives for a moment: so their age tells."""
    found = []
    for pattern in ("trust/*.tmp", "fresh/**/*.tmp", "chains/*/.uses/*.tmp"):
        for path in sorted((cache.root / layout.OURS).glob(pattern)):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue  # it has its name by now
            if time.time() - stat.st_mtime > PASSING:
                found.append(Collected(str(cache.pool), "a note that was being written", str(path), stat.st_size))
                if not dry_run:
                    path.unlink(missing_ok=True)
    return found


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def tidy_pool(pool: Pool, *, dry_run: bool = False) -> list[Collected]:
    """
    :param dry_run: only say what would go
    :returns: what went
    """
    if not pool.is_managed:
        return []
    return Collector(pool, lambda: held_by_links(pool)).sweep(dry_run=dry_run)
