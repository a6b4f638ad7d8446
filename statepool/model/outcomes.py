"""What operations answer. Values only: they can be compared, printed and pickled."""

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
    """What stands behind the bytes of a state that was got."""

    ARRIVED = "arrived"
    """Every byte was hashed as it arrived."""
    TRUSTED = "trusted"
    """They were hashed before, and the file has not changed since."""
    REHASHED = "rehashed"
    """They were here, and were hashed once more."""
    UNMANAGED = "unmanaged"
    """
    They came from files without a digest: what arrived is what lay there, and nobody can say more.
    """


class Presence(enum.StrEnum):
    """What a set did at one pool."""

    STORED = "stored"
    PRESENT = "present"
    FAILED = "failed"


class WaitFor(enum.StrEnum):
    """
    Which pools must have a state before a set counts as done. All are tried in any case, before the
    set returns.
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
        :param text: the value of one of them
        :raises UsageError: it is none
        """
        try:
            return cls(text)
        except ValueError as error:
            raise UsageError(f"wait_for cannot be {text!r}", hint=", ".join(cls)) from error


@frozen
class GetResult:
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
    :param how: how the bytes were moved: ``reflink``, ``copy``, ``stream``, ``link``, ``hardlink``
        or ``none``
    :param warnings: what the user should know: which sources failed, or had something wrong
    :param images: of a machine: the working images that were made, by the names of its images;
        ``working`` is the directory then
    :param resumed: how many bytes an interrupted transfer had left here, and were not moved again
    :param again: how many of ``bytes`` had been moved before, in vain
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
    What became of a state at one pool.

    :param pool: its location
    :param result: stored now, present before, or failed
    :param durable: whether a power cut cannot take it from there any more
    :param bytes: how many bytes were moved there
    :param error: why it failed
    :param resumed: how many bytes an interrupted transfer had left there, and were not moved again
    :param again: how many of ``bytes`` had been moved before, in vain
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
    A state was set.

    :param object: what it is a state of
    :param state: its name
    :param digest: of its bytes
    :param pools: what became of it at each pool, the cache first
    :param warnings: what the user should know
    :param wait_for: which pools had to have it
    """

    object: str
    state: str
    digest: str
    pools: tuple[StoredAt, ...] = ()
    warnings: tuple[str, ...] = ()
    wait_for: WaitFor = WaitFor.ALL

    @property
    def complete(self) -> bool:
        """Whether every pool has it now that had to have it."""
        there = [at.result is not Presence.FAILED for at in self.pools]
        if self.wait_for is WaitFor.ALL:
            return all(there)
        return all(there[:1]) and (self.wait_for is WaitFor.OWN or len(there) < 2 or any(there[1:]))


@frozen
class Ensured:
    """
    A state is there, and if need be was built.

    :param state: the name that was asked for
    :param name: the name that it is kept under, with its key
    :param built: whether it had to be built
    :param got: how it came into the cache
    :param stored: what became of it at each pool, if it was built
    :param superseded: of a state that was built anew: the names of those in whose place it is used
        from now on, and of what was built on these, tips first; all of them are still there
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
    States were removed.

    :param object: what they were states of
    :param states: their names, by the location of the pool they were removed from
    :param errors: why it failed, by the location of the pool
    """

    object: str
    states: Mapping[str, tuple[str, ...]] = field(factory=dict)
    errors: Mapping[str, str] = field(factory=dict)


@frozen(slots=False)  # made by the thousand, which is quicker so
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
        """:returns: a state; a part of the listing keeps its warnings"""
        return (
            Listing(super().__getitem__(index), self.warnings)
            if isinstance(index, slice)
            else super().__getitem__(index)
        )


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
    :param damaged: offsets and lengths of the pieces that are not what they should be, in bytes;
        nothing where that is not known
    :param note: what else there is to say, or None
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
    :param problem: why the pool was left alone, in which case nothing else is said; or None
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
    Bytes that no state needs, and that nevertheless stay.

    :param pool: the location of the pool
    :param states: the names that they have in the chain of a working image
    :param bytes: how much room they take
    :param by: for whose sake they stay: the path of a working image, or the location of a cache
    :param until: when they can go, in seconds since the epoch, if the working image is gone and
        does not come back; None: once nothing stands on them
    """

    pool: str
    states: tuple[str, ...]
    bytes: int
    by: str
    until: float | None = None


class Collection(list[Collected]):
    """
    What was removed since nobody needs it.

    :param collected: that
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
        """:returns: what was removed; a part of the collection keeps what stays"""
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


@frozen
class SourceStatus:
    """
    A source in its place among those that would be asked for a state, and what is known of it.
    Nobody was contacted for this.

    :param name: what the user calls it
    :param location: where it is
    :param scope: how far the user says that it is
    :param proximity: how far it is by its address: ``this host``, ``this network`` or ``elsewhere``
    :param latency: how long it took to answer, in seconds, or None if that was never measured
    :param rate: how many bytes came from it in a second, or None if that was never measured
    :param rest: for how many seconds more it is left alone, being asked only if no other source has
        a state; 0 if it is not
    :param failures: how often in a row it failed
    :param failed: when it failed last, in seconds since the epoch; 0 if it did well since
    :param problem: what went wrong then, or None
    :param corrupt: whether it then delivered something that was wrong
    :param why: what decided about its place, for people
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
    """What became of one state when pools were synchronised."""

    COPIED = "copied"
    PRESENT = "present"
    REMOVED = "removed"
    FAILED = "failed"


@frozen
class SyncedState:
    """
    One state, when pools were synchronised.

    :param object: what it is a state of
    :param state: its name
    :param kind: what its bytes are: ``image``, ``ram`` or ``machine``
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
    The states of one pool were copied to another.

    :param origin: the location they came from
    :param target: the location they went to
    :param states: what became of each
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
