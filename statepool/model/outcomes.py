"""The results of operations. Values only: they can be compared, printed and pickled."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex, overload

from attrs import field, frozen

from statepool.errors import UsageError
from statepool.model.manifest import Manifest
from statepool.model.scope import Scope


class Verified(enum.StrEnum):
    """How the bytes of a state that was got were verified."""

    ARRIVED = "arrived"
    """Every byte was hashed as it arrived."""
    TRUSTED = "trusted"
    """The bytes were hashed before, and the file has not changed since."""
    REHASHED = "rehashed"
    """The bytes were in the cache, and were hashed again."""
    UNMANAGED = "unmanaged"
    """
    The bytes came from files without a digest. They are what the files held; no more can be
    verified.
    """


class Presence(enum.StrEnum):
    """The result of a set at one pool."""

    STORED = "stored"
    PRESENT = "present"
    FAILED = "failed"


class WaitFor(enum.StrEnum):
    """
    Which pools must have a state for a set to count as done. The set tries all pools in any case
    before it returns.
    """

    ALL = "all"
    """The cache and every source that the scope permits."""
    ANY = "any"
    """The cache, and one source if there are any."""
    OWN = "own"
    """The cache."""

    @classmethod
    def parse(cls, text: str) -> WaitFor:
        """
        :param text: the value of a member
        :raises UsageError: there is no such member
        """
        try:
            return cls(text)
        except ValueError as error:
            raise UsageError(f"wait_for cannot be {text!r}", hint=", ".join(cls)) from error


@frozen
class GetResult:
    """
    The result of a get.

    :param object: what it is a state of
    :param state: its name
    :param chain: the names of the states of its chain, tip first
    :param digest: of the tip
    :param source: the location it came from, or None if the cache had all of it
    :param bytes: how many bytes were moved
    :param verified: how the bytes were verified
    :param working: the working image that was made, if the caller asked for one
    :param how: how the bytes were moved: ``reflink``, ``copy``, ``stream``, ``link``, ``hardlink``
        or ``none``
    :param warnings: what the user should know: which sources failed, or delivered wrong data
    :param images: for a machine: the working images that were made, by the names of its images;
        ``working`` is then the directory
    :param resumed: how many bytes an interrupted transfer had left in the cache, and were not moved
        again
    :param again: how many of ``bytes`` had been moved before, in an attempt that failed
    """

    object: str
    state: str
    chain: tuple[str, ...]
    digest: str
    source: str | None = None
    bytes: int = 0
    verified: Verified = Verified.TRUSTED
    working: Path | None = None
    how: str = "none"
    warnings: tuple[str, ...] = ()
    images: Mapping[str, Path] = field(factory=dict)
    resumed: int = 0
    again: int = 0


@frozen
class StoredAt:
    """
    The result for a state at one pool.

    :param pool: its location
    :param result: stored now, present before, or failed
    :param durable: whether the state survives a power cut there
    :param bytes: how many bytes were moved there
    :param error: why it failed
    :param resumed: how many bytes an interrupted transfer had left in that pool, and were not moved
        again
    :param again: how many of ``bytes`` had been moved before, in an attempt that failed
    """

    pool: str
    result: Presence
    durable: bool = True
    bytes: int = 0
    error: str | None = None
    resumed: int = 0
    again: int = 0


@frozen
class SetResult:
    """
    The result of a set.

    :param object: what it is a state of
    :param state: its name
    :param digest: of its bytes
    :param pools: the result at each pool, the cache first
    :param warnings: what the user should know
    :param wait_for: which pools were required to have it
    """

    object: str
    state: str
    digest: str
    pools: tuple[StoredAt, ...] = ()
    warnings: tuple[str, ...] = ()
    wait_for: WaitFor = WaitFor.ALL

    @property
    def complete(self) -> bool:
        """Whether every required pool has the state now."""
        there = [at.result is not Presence.FAILED for at in self.pools]
        if self.wait_for is WaitFor.ALL:
            return all(there)
        return all(there[:1]) and (self.wait_for is WaitFor.OWN or len(there) < 2 or any(there[1:]))


@frozen
class Ensured:
    """
    The result of an ensure: the state exists, and was built if it was missing.

    :param state: the name that was asked for
    :param name: the name under which it is kept, with its key
    :param built: whether it had to be built
    :param got: how it came into the cache
    :param stored: the result at each pool, if it was built
    :param superseded: for a state that was built anew: the names of the states that it replaces in
        use, and of the states that were built on these, tips first; all of them still exist
    """

    state: str
    name: str
    built: bool
    got: GetResult
    stored: SetResult | None = None
    superseded: tuple[str, ...] = ()


@frozen
class Removed:
    """
    The result of a removal of states.

    :param object: what they were states of
    :param states: their names, by the location of the pool from which they were removed
    :param errors: why a removal failed, by the location of the pool
    """

    object: str
    states: Mapping[str, tuple[str, ...]] = field(factory=dict)
    errors: Mapping[str, str] = field(factory=dict)


@frozen(slots=False)  # faster to create: there are thousands of them
class Listed:
    """
    One state in a listing.

    :param manifest: the manifest of the state
    :param pools: the locations of the pools that have it, the cache first
    :param managed: whether a pool's log knows it
    :param problem: why it cannot be used, or None
    """

    manifest: Manifest
    pools: tuple[str, ...]
    managed: bool = True
    problem: str | None = None


class Listing(list[Listed]):
    """
    The states that were found.

    :param states: the states
    :param warnings: what the user should know: which sources could not be asked
    """

    def __init__(self, states: Iterable[Listed] = (), warnings: Sequence[str] = ()) -> None:
        super().__init__(states)
        self.warnings = tuple(warnings)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Listed: ...

    @overload
    def __getitem__(self, index: slice) -> Listing: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Listed | Listing:
        """:returns: one state; or a slice, which keeps the warnings"""
        return (
            Listing(super().__getitem__(index), self.warnings)
            if isinstance(index, slice)
            else super().__getitem__(index)
        )


@frozen
class Checked:
    """
    The result of a check of a state, which was read again.

    :param pool: the location of the pool
    :param object: what it is a state of
    :param state: its name
    :param digest: the digest in its manifest, or that of its bytes if the manifest has none
    :param bytes: how many bytes were read
    :param problem: what is wrong with it, or None
    :param damaged: offsets and lengths of the damaged pieces, in bytes; empty if that is not known
    :param note: a further remark, or None
    """

    pool: str
    object: str
    state: str
    digest: str | None = None
    bytes: int = 0
    problem: str | None = None
    damaged: tuple[tuple[int, int], ...] = ()
    note: str | None = None


@frozen
class Adopted:
    """
    The result of an adoption of an unmanaged state.

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
    Garbage in a pool that was removed.

    :param pool: the location of the pool
    :param what: a description of it
    :param path: its name in the pool
    :param bytes: how much space it took
    :param problem: why the pool was left alone, or None; if it is set, only ``pool`` and ``code``
        mean something
    :param code: the exit code of that error; 0 without one
    """

    pool: str
    what: str
    path: str
    bytes: int = 0
    problem: str | None = None
    code: int = 0


@frozen
class Kept:
    """
    Bytes that no state needs, but that must stay.

    :param pool: the location of the pool
    :param states: the names that they have in the chain of a working image
    :param bytes: how much space they take
    :param by: what needs them: the path of a working image, or the location of a cache
    :param until: when they can be removed, in seconds since the epoch, if the working image has
        vanished and does not come back; None: as soon as nothing is backed by them
    """

    pool: str
    states: tuple[str, ...]
    bytes: int
    by: str
    until: float | None = None


class Collection(list[Collected]):
    """
    The result of a garbage collection.

    :param collected: what was removed
    :param kept: what stays in the cache although no state needs it
    """

    def __init__(self, collected: Iterable[Collected] = (), kept: Sequence[Kept] = ()) -> None:
        super().__init__(collected)
        self.kept = tuple(kept)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Collected: ...

    @overload
    def __getitem__(self, index: slice) -> Collection: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Collected | Collection:
        """:returns: one removed thing; or a slice, which keeps ``kept``"""
        return (
            Collection(super().__getitem__(index), self.kept)
            if isinstance(index, slice)
            else super().__getitem__(index)
        )


@frozen
class Logged:
    """
    One record of a machine's log.

    :param pool: the location of the pool
    :param machine: the machine of the log
    :param number: its position in the log
    :param time: when it was written, in seconds since the epoch by the writer's clock
    :param by: the writer
    :param changes: descriptions of its changes
    """

    pool: str
    machine: str
    number: int
    time: float
    by: str
    changes: tuple[str, ...]


class Level(enum.StrEnum):
    """The severity of a finding."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@frozen
class Finding:
    """
    A result of an examination of this host or of a pool.

    :param level: its severity
    :param where: the host, or the location of a pool
    :param what: what was found
    :param cure: what to do about it, or None
    """

    level: Level
    where: str
    what: str
    cure: str | None = None


@frozen
class SourceStatus:
    """
    A source in the order in which sources are asked, and what is known of it. No source was
    contacted for this.

    :param name: what the user calls it
    :param location: where it is
    :param scope: how far it is, as the user configured it
    :param proximity: how far it is by its address: ``this host``, ``this network`` or ``elsewhere``
    :param latency: how long it took to answer, in seconds, or None if that was never measured
    :param rate: its throughput in bytes per second, or None if that was never measured
    :param rest: for how many more seconds it is asked only if no other source has a state; 0 if it
        is asked normally
    :param failures: how often in a row it failed
    :param failed: when it failed last, in seconds since the epoch; 0 if it has worked since
    :param problem: what went wrong then, or None
    :param corrupt: whether it then delivered wrong data
    :param why: what determined its position, for people
    :param authority: whether it is right where sources have different content under one name
    """

    name: str
    location: str
    scope: Scope
    proximity: str
    latency: float | None = None
    rate: float | None = None
    rest: float = 0.0
    failures: int = 0
    failed: float = 0.0
    problem: str | None = None
    corrupt: bool = False
    why: str = ""
    authority: bool = False


class SyncAction(enum.StrEnum):
    """The result for one state when pools were synchronised."""

    COPIED = "copied"
    PRESENT = "present"
    REMOVED = "removed"
    FAILED = "failed"


@frozen
class SyncedState:
    """
    One state in a synchronisation of pools.

    :param object: what it is a state of
    :param state: its name
    :param kind: the kind of its bytes: ``image``, ``ram`` or ``machine``
    :param action: what was done, or would be done
    :param bytes: how many bytes were moved
    :param error: why it failed
    """

    object: str
    state: str
    kind: str
    action: SyncAction
    bytes: int = 0
    error: str | None = None


@frozen
class Synced:
    """
    The result of a copy of the states of one pool to another.

    :param origin: the location of the pool that was read
    :param target: the location of the pool that was written
    :param states: the result for each state
    """

    origin: str
    target: str
    states: tuple[SyncedState, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing failed."""
        return all(synced.action is not SyncAction.FAILED for synced in self.states)

    @property
    def bytes(self) -> int:
        """How many bytes were moved."""
        return sum(synced.bytes for synced in self.states)
