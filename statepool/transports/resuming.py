"""
Finding out how much of a file is the same at the other end, so that a transfer can resume from
there.
"""

from __future__ import annotations

from statepool.model.digest import Digest
from statepool.model.pieces import PIECE, PIECES, Pieces, count
from statepool.transports.base import Transfer
from statepool.transports.reading import hash_part


def same_beginning(descriptor: int, there: Transfer, digest: Digest, known: Pieces) -> int:
    """
    Compare the beginning of a local file with all bytes of a shorter one.

    :param there: the transfer with which the other file was hashed
    :param digest: the resulting digest
    :param known: digests of pieces of the local file; missing ones are added
    :returns: how many bytes are the same: by pieces if there are digests of pieces, else all or
        none
    """
    size = there.size
    if there.algorithm == PIECES and len(there.pieces) == count(size):
        return matching(descriptor, size, there.pieces, known)
    return size if hash_part(descriptor, 0, size, there.algorithm) == digest else 0


def matching(descriptor: int, length: int, wanted: Pieces, known: Pieces) -> int:
    """
    Compare the beginning of a local file with digests of its pieces.

    :param length: how many bytes of it to look at
    :param wanted: the digests
    :param known: those of the local file, as far as they are known; missing ones are added, and
        those that do not match are cut off
    :returns: how many bytes match
    """
    known.cut(length // PIECE)
    for index in range(count(length)):
        start, end = index * PIECE, min((index + 1) * PIECE, length)
        is_known = index < len(known)
        mine = (
            known[index]
            if is_known
            else bytes.fromhex(hash_part(descriptor, start, end, "blake3").hex)
        )
        if mine != wanted[index]:
            known.cut(index)
            return start
        if not is_known and end - start == PIECE:
            known.append(mine)
    return length
