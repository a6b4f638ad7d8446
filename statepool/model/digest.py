"""
Digests: what bytes are called.

BLAKE3 is the digest of every state we store: on the machines we measured it hashes at the speed of
memory, four times as fast as SHA-256 with hardware support (see ``docs/measurements.rst``), so that
checking every byte costs next to nothing beside copying it. New states have theirs by pieces
(:mod:`statepool.model.pieces`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol, Self

import blake3

from statepool.errors import BadRecord
from statepool.model.pieces import PIECES, PieceHasher, Pieces


class Hasher(Protocol):
    """Makes a digest of bytes that come in their order."""

    hashed: int
    """How many bytes need not come any more: an earlier attempt hashed them."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object:
        """Hash the next bytes."""

    def zeros(self, length: int) -> None:
        """Hash so many zeros."""

    def hexdigest(self) -> str:
        """:returns: the digest of all bytes, in hexadecimal"""


class _Inner(Protocol):
    """What :mod:`hashlib` and :mod:`blake3` have in common."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


class _Whole:
    """Hashes all bytes one after the other."""

    hashed = 0

    def __init__(self, inner: _Inner) -> None:
        self.update = inner.update
        self.hexdigest = inner.hexdigest

    def zeros(self, length: int) -> None:
        """Hash so many zeros."""
        for start in range(0, length, len(_ZEROS)):
            self.update(_ZEROS[: length - start])


_ZEROS = memoryview(bytes(2 << 20))


def _blake3(threads: int) -> _Inner:
    # Threads of the hasher's own, which end with it. Never blake3.AUTO: its threads are the
    # process's, and are not there after a fork.
    return blake3.blake3(max_threads=threads)


def _sha256() -> _Inner:
    import hashlib  # brings all of OpenSSL with it, for digests that only other programs make

    return hashlib.sha256()


_ALGORITHMS: dict[str, Callable[[int, Pieces, int], Hasher]] = {
    PIECES: lambda threads, pieces, done: PieceHasher(pieces, done),
    "blake3": lambda threads, pieces, done: _Whole(_blake3(threads)),
    "sha256": lambda threads, pieces, done: _Whole(_sha256()),
}

ALGORITHMS = tuple(_ALGORITHMS)
"""Their names."""

DEFAULT_ALGORITHM = PIECES
"""Of the states that are made from now on."""

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
    The name of some bytes, written ``algorithm:hex``: a text, so that thousands of them are read,
    compared and looked up at the speed of texts.

    :param algorithm: ``blake3p``, ``blake3`` or ``sha256``
    :param hex: the value, in lower-case hexadecimal
    """

    __slots__ = ()

    def __new__(cls, algorithm: str, hex: str) -> Self:
        check_algorithm(algorithm)
        if _HEX.match(hex) is None:
            raise BadRecord(f"not a {algorithm} digest: {hex[:80]!r}")
        return super().__new__(cls, f"{algorithm}:{hex}")

    # a text is made of one argument, this of two
    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return self.algorithm, self.hex

    def __repr__(self) -> str:
        return f"Digest(algorithm={self.algorithm!r}, hex={self.hex!r})"

    @property
    def algorithm(self) -> str:
        """How the bytes were hashed."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The value, in lower-case hexadecimal."""
        return self.partition(":")[2]

    @property
    def file_name(self) -> str:
        """
        The name of a file with these bytes. A dash, since QEMU takes what stands before a colon for
        a protocol.
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
        :returns: the digest that ``name`` stands for as a file in ``data/``, or None if it is not
            such a name
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
        :returns: the BLAKE3 digest of a text that is no state: what names of files and keys are
            made of, whatever new states are named by
        """
        return cls.of(text.encode() if isinstance(text, str) else text, "blake3")

    @classmethod
    def of_pieces(cls, pieces: Pieces, size: int) -> Digest:
        """:returns: the digest of so many bytes with these pieces"""
        return cls(PIECES, pieces.hexdigest(size))


def new_hasher(
    algorithm: str = DEFAULT_ALGORITHM,
    *,
    threads: int = 1,
    pieces: Pieces | None = None,
    done: int = 0,
) -> Hasher:
    """
    :param threads: how many threads may work on large updates together, where the algorithm can be
        divided so
    :param pieces: gets the digests of the pieces, where the algorithm has some
    :param done: bytes at the beginning whose digests in ``pieces`` may be kept
    :raises BadRecord: the algorithm is unknown
    """
    check_algorithm(algorithm)
    return _ALGORITHMS[algorithm](threads, pieces if pieces is not None else Pieces(), done)
