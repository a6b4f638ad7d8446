"""Scopes: how far a source is."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from statepool.errors import UsageError

Scopes = str | Iterable[str]
"""
The scopes that a caller names: one text with blanks between the names, or several texts. ``all``
stands for every scope.
"""

_EVERY = "all"


class Scope(enum.StrEnum):
    """How far a source is from this host, nearest first."""

    OWN = "own"
    """The cache of this host."""
    SWARM = "swarm"
    """Other workers of this host or network."""
    CLUSTER = "cluster"
    """Other networks."""
    SHARED = "shared"
    """The common pool."""

    @classmethod
    def parse(cls, scopes: Scopes) -> frozenset[Scope]:
        """
        :param scopes: one or more scopes
        :raises UsageError: no scope is named, or one that does not exist
        """
        given: object = scopes  # whatever the types say
        words = (
            given.split()
            if isinstance(given, str)
            else [*given]
            if isinstance(given, Iterable)
            else [given]
        )
        if not all(isinstance(word, str) for word in words):
            hint = (
                f'write them in one text, as in "own swarm": any of {", ".join(cls)}; or {_EVERY}'
            )
            raise UsageError(f"{scopes!r} is not how scopes are written", hint=hint)
        if not words:
            raise UsageError("no scope is named", hint="scopes are " + ", ".join(cls))
        for word in words:
            if word != _EVERY and word not in cls.__members__.values():
                raise UsageError(f"there is no scope {word!r}", hint="scopes are " + ", ".join(cls))
        return frozenset(cls) if _EVERY in words else frozenset(map(cls, words))

    @classmethod
    def permitted(cls, scopes: Scopes | None) -> frozenset[Scope]:
        """:returns: as :meth:`parse`; all scopes if the caller names none"""
        return frozenset(cls) if scopes is None else cls.parse(scopes)
