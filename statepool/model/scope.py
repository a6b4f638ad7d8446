"""How far a source is."""

from __future__ import annotations

import enum

from statepool.errors import UsageError


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
    def parse(cls, text: str) -> frozenset[Scope]:
        """
        :param text: one or more scopes, separated by blanks
        :raises UsageError: there is none, or one that does not exist
        """
        if not isinstance(text, str):
            raise UsageError(f"{text!r} is not how scopes are written", hint=f'write them in one text, as in "own swarm": any of {", ".join(cls)}')
        words = text.split()
        if not words:
            raise UsageError("no scope is named", hint="scopes are " + ", ".join(cls))
        for word in words:
            if word not in cls.__members__.values():
                raise UsageError(f"there is no scope {word!r}", hint="scopes are " + ", ".join(cls))
        return frozenset(cls(word) for word in words)

    @classmethod
    def permitted(cls, text: str | None) -> frozenset[Scope]:
        """As :meth:`parse`; all of them where nobody says which."""
        return frozenset(cls) if text is None else cls.parse(text)
