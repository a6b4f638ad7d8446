"""
Going on with a transfer that was interrupted.

What has arrived lies in ``incoming/NONCE-part-DIGEST``, in order: its length tells how far it came.
While its writer is at work, its marker says so. Whoever needs the same bytes takes such a file over
by giving it a name of their own, which only one can do; nothing depends on a lock. What is in it is
held against the digest like all bytes that arrive, and a collector takes it away after a day. Where
the pieces are known that should be there, so much is gone on with as they prove.
"""

from __future__ import annotations

import os

from statepool.beneath import Beneath
from statepool.errors import MissingFile
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.model.pieces import PIECE, Pieces
from statepool.pools import layout
from statepool.pools.pieces import read_list
from statepool.pools.pool import Pool
from statepool.pools.staging import Marker, read_markers
from statepool.qcow2.files import open_regular
from statepool.transports.base import FileKind, Transport
from statepool.transports.resuming import matching


def take_over(pool: Pool, digest: Digest, nonce: str, *, alone: bool = False) -> int:
    """
    Give what an interrupted transfer left of some bytes the name that a writer's own transfer has.

    :param pool: where they were going to
    :param nonce: of the writer's marker, which is there
    :param alone: the writer holds the claim or lock of these bytes, so that writers of other hosts
        are not at work on them either
    :returns: how many bytes are there already, under the name :func:`~statepool.pools.layout.part`;
        0 if there is no such file
    """
    taken = 0
    for path, size in _left(pool, digest, nonce, alone):
        if taken or not size:
            pool.transport.remove(path)  # the one that we have is longer
            continue
        try:
            pool.transport.rename(path, layout.part(nonce, digest))
        except MissingFile:
            continue  # somebody else was faster
        taken = size
    return taken


def _left(pool: Pool, digest: Digest, nonce: str, alone: bool) -> list[tuple[str, int]]:
    """:returns: the files that nobody writes to any more, with their lengths, the longest first"""
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
    Whether a file is the beginning of what is wanted, as far as its length tells, and is this
    account's own.
    """
    with open_regular(path) as file:
        found = os.fstat(file)
        if found.st_uid != os.geteuid():
            return False
        os.fchmod(file, 0o600)
        return found.st_size <= size


def keep_proven(source: Transport, manifest: Manifest, descriptor: int, pieces: Pieces) -> int:
    """
    Cut what an interrupted transfer left of some bytes off where the source's list of their pieces
    does not prove it any more.

    :param source: where they come from
    :param descriptor: of our own file that has the beginning
    :param pieces: gets the digests of what was proven
    :returns: how many bytes there are to go on with: all, where there is no list; then the digest
        tells in the end
    """
    done = os.fstat(descriptor).st_size
    proof = (
        read_list(source, manifest.digest, manifest.size)
        if done and manifest.digest is not None
        else None
    )
    if proof is not None:
        # what is left has no digest in the list
        whole = done if done == manifest.size else done - done % PIECE
        done = matching(descriptor, whole, proof, pieces)
        os.ftruncate(descriptor, done)
    return done


def abandon(nonce: str) -> None:
    """
    From now on this process does not work any more on what a marker of its own speaks of; it could
    not remove it.
    """
    _abandoned.add(nonce)


_abandoned: set[str] = set()


def _is_gone(marker: Marker, alone: bool) -> bool:
    return (
        marker.writer.is_dead or marker.nonce in _abandoned or (alone and not marker.writer.is_here)
    )
