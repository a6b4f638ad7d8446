"""
Digests: the names of bytes.

Every state that we store has a BLAKE3 digest. On the machines we measured, BLAKE3 hashes at the
speed of memory, four times as fast as SHA-256 with hardware support (see
``docs/measurements.rst``). So the check of every byte costs almost nothing compared with the copy.
New states have a digest by pieces (:mod:`statepool.model.pieces`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol, Self

import blake3

from statepool.errors import BadRecord
from statepool.model.pieces import PIECES, PieceHasher, Pieces


class Hasher(Protocol):
    """Computes a digest of bytes that come in their order."""

    hashed: int
    """How many bytes at the beginning need not be given: an earlier attempt hashed them."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object:
        """Hash the next bytes."""

    def zeros(self, length: int) -> None:
        """Hash ``length`` zeros."""

    def hexdigest(self) -> str:
        """:returns: the digest of all bytes, in hexadecimal"""


class _Inner(Protocol):
    """The common interface of :mod:`hashlib` and :mod:`blake3`."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


class _Whole:
    """A hasher that hashes all bytes in sequence, without pieces."""

    hashed = 0

    def __init__(self, inner: _Inner) -> None:
        self.update = inner.update
        self.hexdigest = inner.hexdigest

    def zeros(self, length: int) -> None:
        """Hash ``length`` zeros."""
        for start in range(0, length, len(_ZEROS)):
            self.update(_ZEROS[: length - start])


_ZEROS = memoryview(bytes(2 << 20))


def _blake3(threads: int) -> _Inner:
    # The hasher has its own threads, which end with it. Never use blake3.AUTO: its threads belong
    # to the process, and do not exist after a fork.
    return blake3.blake3(max_threads=threads)


def _sha256() -> _Inner:
    import hashlib  # loads all of OpenSSL, for digests that only other programs make

    return hashlib.sha256()


_ALGORITHMS: dict[str, Callable[[int, Pieces, int], Hasher]] = {
    PIECES: lambda threads, pieces, done: PieceHasher(pieces, done),
    "blake3": lambda threads, pieces, done: _Whole(_blake3(threads)),
    "sha256": lambda threads, pieces, done: _Whole(_sha256()),
}

ALGORITHMS = tuple(_ALGORITHMS)
"""The names of the algorithms that this version knows."""

DEFAULT_ALGORITHM = PIECES
"""The algorithm for new states."""

_WHOLE = re.compile(f"(?:{'|'.join(ALGORITHMS)})" + r":[0-9a-f]{64}\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")


def check_algorithm(value: str) -> None:
    """
    :raises BadRecord: this version does not know the algorithm
    """
    if value not in _ALGORITHMS:
        raise BadRecord(
            f"unknown digest algorithm {value[:40]!r}",
            hint="this version knows " + ", ".join(ALGORITHMS),
        )


class Digest(str):
    """
    The name of some bytes, written ``algorithm:hex``. It is a string, so that thousands of digests
    are read, compared and looked up at the speed of strings.

    :param algorithm: ``blake3p``, ``blake3`` or ``sha256``
    :param hex: the value, in lower-case hexadecimal
    """

    __slots__ = ()

    def __new__(cls, algorithm: str, hex: str) -> Self:
        check_algorithm(algorithm)
        if _HEX.match(hex) is None:
            raise BadRecord(f"not a {algorithm} digest: {hex[:80]!r}")
        return super().__new__(cls, f"{algorithm}:{hex}")

    # a string is made of one argument, a digest of two
    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return self.algorithm, self.hex

    def __repr__(self) -> str:
        return f"Digest(algorithm={self.algorithm!r}, hex={self.hex!r})"

    @property
    def algorithm(self) -> str:
        """The algorithm by which the bytes were hashed."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The value, in lower-case hexadecimal."""
        return self.partition(":")[2]

    @property
    def file_name(self) -> str:
        """
        The name of a file with these bytes. It has a dash in place of the colon: QEMU takes the
        text before a colon for a protocol.
        """
        return self.replace(":", "-")

    @property
    def short(self) -> str:
        """The first twelve characters, for people."""
        return self.hex[:12]

    @classmethod
    def parse(cls, text: str) -> Digest:
        """
        :param text: ``algorithm:hex``
        :raises BadRecord: it is not a digest that this version knows
        """
        if _WHOLE.match(text) is not None:
            return str.__new__(cls, text)
        algorithm, colon, value = text.partition(":")
        if not colon:
            raise BadRecord(f"not a digest: {text[:80]!r}")
        return cls(algorithm, value)

    @classmethod
    def from_file_name(cls, name: str) -> Digest | None:
        """
        :returns: the digest of the file ``name`` in ``data/``, or None if it is not the name of
            such a file
        """
        algorithm, _, value = name.partition("-")
        try:
            return cls(algorithm, value)
        except BadRecord:
            return None

    @classmethod
    def of(cls, data: bytes, algorithm: str = DEFAULT_ALGORITHM) -> Digest:
        """:returns: the digest of ``data``"""
        hasher = new_hasher(algorithm)
        hasher.update(data)
        return cls(algorithm, hasher.hexdigest())

    def hasher(self) -> Hasher:
        """:returns: what hashes bytes as those were that this is the digest of"""
        return new_hasher(self.algorithm)

    @classmethod
    def of_text(cls, text: str | bytes) -> Digest:
        """
        :returns: the BLAKE3 digest of a text, from which names of files and keys are made. It does
            not depend on the algorithm for new states.
        """
        data = text.encode() if isinstance(text, str) else text
        return str.__new__(cls, f"blake3:{blake3.blake3(data).hexdigest()}")

    @classmethod
    def of_pieces(cls, pieces: Pieces, size: int) -> Digest:
        """:returns: the digest of ``size`` bytes with these pieces"""
        return cls(PIECES, pieces.hexdigest(size))


def new_hasher(
    algorithm: str = DEFAULT_ALGORITHM,
    *,
    threads: int = 1,
    pieces: Pieces | None = None,
    done: int = 0,
) -> Hasher:
    """
    :param threads: how many threads may share a large update, if the algorithm permits it
    :param pieces: receives the digests of the pieces, if the algorithm has pieces
    :param done: bytes at the beginning whose digests in ``pieces`` may be kept
    :raises BadRecord: the algorithm is unknown
    """
    check_algorithm(algorithm)
    return _ALGORITHMS[algorithm](threads, pieces if pieces is not None else Pieces(), done)
