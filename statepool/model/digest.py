"""
Digests: what bytes are called.

BLAKE3 is the digest of every state we store: on the machines we measured it hashes at the speed of memory, four times as fast as SHA-256 with
hardware support (see ``docs/measurements.rst``), so that checking every byte costs next to nothing beside copying it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import blake3
from attrs import frozen

from statepool.errors import BadRecord


class Hasher(Protocol):
    """What :mod:`hashlib` and :mod:`blake3` have in common."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def _sha256() -> Hasher:
    import hashlib  # brings all of OpenSSL with it, for digests that only other programs make

    return hashlib.sha256()


_ALGORITHMS: dict[str, tuple[int, Callable[[], Hasher]]] = {
    "blake3": (64, blake3.blake3),
    "sha256": (64, _sha256),
}

DEFAULT_ALGORITHM = "blake3"

_HEX = {name: re.compile(rf"[0-9a-f]{{{length}}}\Z") for name, (length, _) in _ALGORITHMS.items()}


def check_algorithm(value: str) -> None:
    """
    :raises BadRecord: this version does not know the algorithm
    """
    if value not in _ALGORITHMS:
        raise BadRecord(f"unknown digest algorithm {value[:40]!r}", hint="this version knows " + ", ".join(_ALGORITHMS))


@frozen(order=True, cache_hash=True)
class Digest:
    """
    The name of some bytes, written ``algorithm:hex``.

    :param algorithm: ``blake3`` or ``sha256``
    :param hex: the value, in lower-case hexadecimal
    """

    algorithm: str
    hex: str

    def __attrs_post_init__(self) -> None:
        form = _HEX.get(self.algorithm)
        if form is None:
            check_algorithm(self.algorithm)
        elif form.match(self.hex) is None:
            raise BadRecord(f"not a {self.algorithm} digest: {self.hex[:80]!r}")

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @property
    def file_name(self) -> str:
        """The name of a file with these bytes. A dash, since QEMU takes what stands before a colon for a protocol."""
        return f"{self.algorithm}-{self.hex}"

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
        algorithm, colon, value = text.partition(":")
        if not colon:
            raise BadRecord(f"not a digest: {text[:80]!r}")
        return cls(algorithm, value)

    @classmethod
    def from_file_name(cls, name: str) -> Digest | None:
        """:returns: the digest that ``name`` stands for as a file in ``data/``, or None if it is not such a name"""
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


def new_hasher(algorithm: str = DEFAULT_ALGORITHM, *, threads: int = 1) -> Hasher:
    """
    :param threads: how many threads may work on large updates together, where the algorithm can be divided
    :raises BadRecord: the algorithm is unknown
    """
    check_algorithm(algorithm)
    if algorithm == "blake3" and threads > 1:
        # Threads of the hasher's own, which end with it. Never blake3.AUTO: its threads are the process's, and are not there after a fork.
        return blake3.blake3(max_threads=threads)
    return _ALGORITHMS[algorithm][1]()
