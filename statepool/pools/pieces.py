"""
The list of the pieces of some bytes, in a file beside them: ``data/DIGEST.pieces``.

It can be made from the bytes at any time, so nothing depends on it, and it may be missing. The
digest of the bytes proves it: a list that is torn, or belongs to other bytes, is ignored.
"""

from __future__ import annotations

from statepool.errors import AccessDenied, FileExists, MissingFile, UnsafeImage
from statepool.model.digest import Digest
from statepool.model.pieces import LENGTH, Pieces, count
from statepool.pools import layout
from statepool.transports.base import FileKind, Transport


def read_list(transport: Transport, digest: Digest, size: int) -> Pieces | None:
    """
    Read the list of pieces that a pool has for some bytes.

    :param transport: reaches the pool
    :param size: of the bytes
    :returns: the list, proven by the digest; None if there is no list, or a wrong one
    """
    if not layout.has_pieces(digest, size):
        return None
    try:
        content = transport.read(layout.list_of(layout.data(digest)), 0, count(size) * LENGTH + 1)
    except (MissingFile, AccessDenied, UnsafeImage):
        return None  # missing, closed to this account, or no regular file
    pieces = Pieces(content)
    return (
        pieces if len(content) == len(pieces) * LENGTH and is_proven(pieces, digest, size) else None
    )


def is_proven(pieces: Pieces, digest: Digest, size: int) -> bool:
    """:returns: whether these are the pieces of ``size`` bytes with this digest"""
    return len(pieces) == count(size) and Digest.of_pieces(pieces, size) == digest


def create_list(transport: Transport, digest: Digest, content: bytes, *, flush: bool) -> None:
    """Put a list beside bytes; an existing list stays."""
    try:
        transport.create(layout.list_of(layout.data(digest)), content, flush=flush)
    except FileExists:
        # another writer of the same bytes was faster, or the existing list is wrong, which its
        # readers detect
        pass


def mend_list(transport: Transport, digest: Digest, size: int, pieces: Pieces) -> None:
    """
    Put a list beside bytes if there is no list, or a wrong one.

    :param size: of the bytes
    :param pieces: the pieces of the bytes, as they are known now
    """
    if (
        not layout.has_pieces(digest, size)
        or not is_proven(pieces, digest, size)
        or read_list(transport, digest, size) is not None
    ):
        return
    path = layout.list_of(layout.data(digest))
    found = transport.stat(path)
    if found is None or found.kind is not FileKind.DIRECTORY:  # our writers make none there
        transport.remove(path)
        create_list(transport, digest, bytes(pieces), flush=False)


def is_list_wrong(transport: Transport, digest: Digest, size: int) -> bool:
    """:returns: whether the list beside some bytes is wrong"""
    return (
        transport.stat(layout.list_of(layout.data(digest))) is not None
        and read_list(transport, digest, size) is None
    )
