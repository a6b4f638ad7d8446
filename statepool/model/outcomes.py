"""What operations answer. Values only: they can be compared, printed and pickled."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from attrs import field, frozen

from statepool.model.manifest import Manifest


class Verified(enum.StrEnum):
    """What stands behind the bytes of a state that was got."""

    ARRIVED = "arrived"
    """Every byte was hashed as it arrived."""
    TRUSTED = "trusted"
    """They were hashed before, and the file has not changed since."""
    REHASHED = "rehashed"
    """They were here, and were hashed once more."""
    UNMANAGED = "unmanaged"
    """They came from files without a digest: what arrived is what lay there, and nobody can say more."""


class Presence(enum.StrEnum):
    """What a set did at one pool."""

    STORED = "stored"
    PRESENT = "present"
    FAILED = "failed"


@frozen
class Got:
    """
    A state is here.

    :param object: what it is a state of
    :param state: its name
    :param chain: the names of the states of its chain, tip first
    :param digest: of the tip
    :param source: the location it came from, or None if all of it was here
    :param bytes: how many bytes were moved
    :param verified: what stands behind the bytes
    :param working: the working image that was made, if one was asked for
    :param how: how the bytes were moved: ``reflink``, ``copy``, ``link``, ``hardlink`` or ``none``
    """

    object: str
    state: str
    chain: tuple[str, ...]
    digest: str
    source: str | None = None
    bytes: int = 0
    verified: Verified = Verified.TRUSTED
    working: str | None = None
    how: str = "none"


@frozen
class StoredAt:
    """
    What became of a state at one pool.

    :param pool: its location
    :param result: stored now, present before, or failed
    :param durable: whether a power cut cannot take it from there any more
    :param bytes: how many bytes were moved there
    :param error: why it failed
    """

    pool: str
    result: Presence
    durable: bool = True
    bytes: int = 0
    error: str | None = None


@frozen
class Stored:
    """
    A state was set.

    :param object: what it is a state of
    :param state: its name
    :param digest: of its bytes
    :param pools: what became of it at each pool, the cache first
    :param warnings: what the user should know
    """

    object: str
    state: str
    digest: str
    pools: tuple[StoredAt, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every pool has it now."""
        return all(at.result is not Presence.FAILED for at in self.pools)


@frozen
class Removed:
    """
    States were removed.

    :param object: what they were states of
    :param states: their names, by the location of the pool they were removed from
    :param errors: why it failed, by the location of the pool
    """

    object: str
    states: Mapping[str, tuple[str, ...]] = field(factory=dict)
    errors: Mapping[str, str] = field(factory=dict)


@frozen
class Listed:
    """
    One state in a listing.

    :param manifest: what is known of it
    :param pools: the locations of the pools that have it, the cache first
    :param managed: whether a pool's log knows it
    :param problem: why it cannot be used, or None
    """

    manifest: Manifest
    pools: tuple[str, ...]
    managed: bool = True
    problem: str | None = None


@frozen
class Checked:
    """
    A state was read once more.

    :param pool: the location of the pool
    :param object: what it is a state of
    :param state: its name
    :param digest: that of its manifest, or of its bytes where it has none
    :param bytes: how many were read
    :param problem: what is wrong with it, or None
    """

    pool: str
    object: str
    state: str
    digest: str | None = None
    bytes: int = 0
    problem: str | None = None


@frozen
class Adopted:
    """
    An unmanaged state is managed now.

    :param pool: the location of the pool
    :param object: what it is a state of
    :param state: its name
    :param digest: of its bytes
    :param relocated: whether an absolute backing name in it was rewritten
    :param problem: why it was left alone, or None
    """

    pool: str
    object: str
    state: str
    digest: str | None = None
    relocated: bool = False
    problem: str | None = None


@frozen
class Collected:
    """
    Something that nobody needs was removed.

    :param pool: the location of the pool
    :param what: what it was, in words
    :param path: its name in the pool
    :param bytes: how much room it took
    """

    pool: str
    what: str
    path: str
    bytes: int = 0


@frozen
class Logged:
    """
    One record of a machine's log.

    :param pool: the location of the pool
    :param machine: whose log
    :param number: its place in the order
    :param time: when it was written, in seconds since the epoch by the writer's clock
    :param by: who wrote it
    :param changes: what it did, in words
    """

    pool: str
    machine: str
    number: int
    time: float
    by: str
    changes: tuple[str, ...]


class Level(enum.StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@frozen
class Finding:
    """
    Something that a look at this host or at a pool found.

    :param level: how much it matters
    :param where: the host, or the location of a pool
    :param what: what was found
    :param cure: what to do about it, or None
    """

    level: Level
    where: str
    what: str
    cure: str | None = None
