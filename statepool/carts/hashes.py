"""Hash types that the list of a cart can name: every type of :mod:`hashlib`, and BLAKE3."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable
from typing import Protocol

import blake3

from statepool import UsageError

OWN = "blake3"
"""The type that the service keeps of every file: its own digest of the bytes."""


_LONGEST = 200
"""The most characters of a type, or of a sum in hexadecimal."""


class Hash(Protocol):
    """The common interface of :mod:`hashlib` and :mod:`blake3`."""

    @property
    def hexdigest(self) -> Callable[..., str]:
        """
        The method that returns the sum in hexadecimal; SHAKE needs the length of the sum, in bytes.
        """

    def update(self, data: bytes, /) -> object:
        """Add bytes."""


def new_hash(kind: str) -> Hash:
    """:returns: a hash of a type that :func:`check_hash` has accepted"""
    return blake3.blake3() if kind == OWN else hashlib.new(kind, usedforsecurity=False)


def hex_of(hasher: Hash, like: str = "") -> str:
    """
    :param like: the sum to compare with: SHAKE has sums of any length
    :returns: the sum, in hexadecimal
    """
    if getattr(hasher, "name", "").startswith("shake_"):
        return hasher.hexdigest(len(like) // 2)
    return hasher.hexdigest()


def check_hash(kind: str, value: str) -> tuple[str, str]:
    """
    Check the hash that the list of a cart gives for a file.

    :param kind: the type, such as ``md5``, ``sha256`` or ``blake3``
    :param value: the sum in hexadecimal; empty: there is nothing to compare with
    :returns: both, in lower case
    :raises UsageError: the type is unknown, or no hash of this type has such a sum
    """
    kind, value = kind.lower(), value.lower()
    if len(kind) > _LONGEST or len(value) > _LONGEST or not kind.isprintable():
        hint = f"neither has more than {_LONGEST} characters"
        raise UsageError(f"hashtype {kind[:40]!r} with its hashsum cannot be used", hint=hint)
    if not value:
        return kind, value
    if kind != OWN and kind not in hashlib.algorithms_available:
        known = ", ".join(sorted({OWN, *hashlib.algorithms_guaranteed}))
        raise UsageError(f"unknown hashtype {kind[:40]!r}", hint=f"known types are {known}")
    length = len(hex_of(new_hash(kind), value))
    if set(value) - set(string.hexdigits) or len(value) % 2 or len(value) != length:
        raise UsageError(
            f"hashsum {value[:80]!r} is not one of type {kind}",
            hint=f"write {length} hexadecimal digits, or nothing to have no hash checked",
        )
    return kind, value
