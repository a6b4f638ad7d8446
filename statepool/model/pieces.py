"""
Digests by pieces, the algorithm ``blake3p``: see ``docs/formats.rst``.

Bytes are divided into pieces of 4 MiB, and each piece has a BLAKE3 digest. The digest of the bytes
is computed from the digests of the pieces, in their order, and from the size. So several threads
can hash, and a piece of zeros need not be read. The digest of the bytes proves a list of the
digests of the pieces, so the writer of the list need not be trusted. The list tells which pieces of
a damaged or unfinished file are right.
"""

from __future__ import annotations

import blake3

PIECES = "blake3p"
"""The name of the algorithm."""

PIECE = 4 << 20
"""Bytes of one piece; the last one may be shorter."""

LENGTH = 32
"""Bytes of the digest of a piece."""

CONTEXT = "statepool pieces 1"
"""
The context of BLAKE3's key derivation. It keeps digests of lists apart from all other digests.
"""

ZEROS = bytes.fromhex("04e52cd2da6a0e1f338b0078369130d96585c1de65057da5dd1283b12fb853e1")
"""The digest of a piece that is all zeros."""

_NOTHING = memoryview(bytes(PIECE))

Extent = tuple[int, int]


def count(size: int) -> int:
    """
    :param size: in bytes
    :returns: the number of pieces of a file of this size
    """
    return -(-size // PIECE)


class Pieces:
    """
    The digests of the first pieces of some bytes, as far as they are known.

    :param raw: the digests, one after the other
    """

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes | bytearray = b"") -> None:
        self._raw = bytearray(raw)

    def __len__(self) -> int:
        return len(self._raw) // LENGTH

    def __bytes__(self) -> bytes:
        return bytes(self._raw)

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._raw[index * LENGTH : (index + 1) * LENGTH])

    def append(self, digest: bytes, times: int = 1) -> None:
        """Add the digest of the next piece, or of the next ``times`` equal pieces."""
        self._raw += digest * times

    def cut(self, length: int) -> None:
        """Keep at most ``length`` digests."""
        del self._raw[length * LENGTH :]

    def become(self, raw: bytes | bytearray) -> None:
        """Replace these digests by others."""
        self._raw[:] = raw

    def hexdigest(self, size: int) -> str:
        """
        :param size: of the bytes whose pieces these are
        :returns: the digest of the bytes, in hexadecimal
        """
        whole = blake3.blake3(derive_key_context=CONTEXT)
        whole.update(self._raw)
        whole.update(size.to_bytes(8, "little"))
        return whole.hexdigest()

    def differing(self, other: Pieces, size: int) -> tuple[Extent, ...]:
        """
        :param other: the digests of other bytes of the same size
        :returns: offset and length of the extents that differ, in bytes; adjacent pieces are one
            extent
        """
        found: list[Extent] = []
        for index in range(count(size)):
            if self[index] == other[index]:
                continue
            start, end = index * PIECE, min((index + 1) * PIECE, size)
            if found and sum(found[-1]) == start:
                start = found.pop()[0]
            found.append((start, end - start))
        return tuple(found)


class PieceHasher:
    """
    A hasher of bytes that come in their order.

    :param pieces: receives the digest of each piece when the piece is complete. Its digests of the
        first ``done`` bytes are kept: an earlier attempt hashed them.
    :param done: bytes of which digests in ``pieces`` may be kept
    """

    def __init__(self, pieces: Pieces, done: int = 0) -> None:
        pieces.cut(done // PIECE)
        self._pieces = pieces
        self._piece: blake3.blake3 | None = None
        self._filled = 0
        self.hashed = len(pieces) * PIECE

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Hash the next bytes."""
        rest = memoryview(data)
        while rest:
            some = rest[: PIECE - self._filled]
            if self._piece is None:
                self._piece = blake3.blake3(_NOTHING[: self._filled])
            self._piece.update(some)
            self._advance(len(some))
            rest = rest[len(some) :]

    def zeros(self, length: int) -> None:
        """Hash ``length`` zeros. Whole pieces of zeros are not hashed: their digest is known."""
        while length:
            if not self._filled and (whole := length // PIECE):
                self._pieces.append(ZEROS, whole)
                self.hashed += whole * PIECE
                length -= whole * PIECE
                continue
            some = min(length, PIECE - self._filled)
            if self._piece is not None:
                self._piece.update(_NOTHING[:some])
            self._advance(some)
            length -= some

    def _advance(self, length: int) -> None:
        self._filled += length
        self.hashed += length
        if self._filled == PIECE:
            self._end_piece()

    def _end_piece(self) -> None:
        if self._piece is not None:
            self._pieces.append(self._piece.digest())
        else:
            self._pieces.append(hash_zeros(self._filled))
        self._piece, self._filled = None, 0

    def hexdigest(self) -> str:
        """
        :returns: the digest of all bytes, in hexadecimal. After this call, no more bytes can be
            hashed.
        """
        if self._filled:
            self._end_piece()
        return self._pieces.hexdigest(self.hashed)


def hash_zeros(length: int) -> bytes:
    """:returns: the digest of a piece of ``length`` zeros"""
    return ZEROS if length == PIECE else blake3.blake3(_NOTHING[:length]).digest()
