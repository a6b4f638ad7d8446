"""
Resume an interrupted transfer.

The bytes that have arrived lie in ``incoming/NONCE-part-DIGEST``. If they came from one source,
they are in order, and the length shows the progress. While the writer is at work, its marker says
so. Another writer that needs the same bytes takes such a file over by an atomic rename to a name of
its own. Only one writer can succeed, and no lock is needed. The content is checked against the
digest like all bytes that arrive, and a collector removes the file after a day. Where the digests
of the pieces are known, they tell which pieces are right; these can be in any order then, and only
the others are fetched.
"""

from __future__ import annotations

import os

from statepool.beneath import Beneath
from statepool.errors import MissingFile
from statepool.model.digest import Digest
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.pools.staging import Marker, read_markers
from statepool.qcow2.files import open_regular
from statepool.transports.base import FileKind


def take_over(pool: Pool, digest: Digest, nonce: str, *, alone: bool = False) -> int:
    """
    Rename what an interrupted transfer left of some bytes to the name of this writer's own
    transfer.

    :param pool: the destination of the bytes
    :param nonce: of the writer's marker, which exists
    :param alone: the writer holds the claim or lock of these bytes, so that writers of other hosts
        do not work on them either
    :returns: the number of bytes that have arrived, under the name
        :func:`~statepool.pools.layout.part`; 0 if there is no such file
    """
    taken = 0
    for path, size in _left(pool, digest, nonce, alone):
        if taken or not size:
            pool.transport.remove(path)  # ours is longer
            continue
        try:
            pool.transport.rename(path, layout.part(nonce, digest))
        except MissingFile:
            continue  # another writer was faster
        taken = size
    return taken


def _left(pool: Pool, digest: Digest, nonce: str, alone: bool) -> list[tuple[str, int]]:
    """
    :returns: the files that no process writes to any more, with their lengths, the longest first
    """
    names = [
        entry.name
        for entry in pool.transport.scan(layout.INCOMING)
        if entry.kind is FileKind.FILE and layout.part_of(entry.name) == digest
    ]
    if not names:
        return []
    markers = {marker.nonce: marker for marker in read_markers(pool.transport)}
    free = [
        f"{layout.INCOMING}/{name}"
        for name in names
        if (owner := layout.nonce_of(name)) != nonce
        and (owner not in markers or _is_gone(markers[owner], alone))
    ]
    stats = zip(free, pool.transport.stat_many(free), strict=True)
    found = [
        (path, stat.size) for path, stat in stats if stat is not None and stat.kind is FileKind.FILE
    ]
    return sorted(found, key=lambda one: one[1], reverse=True)


def can_go_on(path: Beneath, size: int) -> bool:
    """
    Tell whether a file belongs to this account and may be, by its length, the beginning of the
    wanted bytes.
    """
    with open_regular(path) as file:
        found = os.fstat(file)
        if found.st_uid != os.geteuid():
            return False
        os.fchmod(file, 0o600)
        return found.st_size <= size


def abandon(nonce: str) -> None:
    """
    Note that this process has given up the transfer of one of its own markers, because it could not
    remove the marker.
    """
    _abandoned.add(nonce)


_abandoned: set[str] = set()


def _is_gone(marker: Marker, alone: bool) -> bool:
    return (
        marker.writer.is_dead or marker.nonce in _abandoned or (alone and not marker.writer.is_here)
    )
