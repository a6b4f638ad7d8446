"""
One pool: states by name, published whole or not at all, and removed without leaving others behind.

Everything here holds whatever other writers do at the same moment, with or without locks: see ``docs/design.rst`` for the argument and
``tests/races`` for every interleaving of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence

from statepool.errors import (
    AccessDenied,
    Conflict,
    FileExists,
    IntegrityError,
    MissingFile,
    NotAPool,
    NotFound,
    ReadOnlyPool,
    UnsafeImage,
)
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.names import is_name
from statepool.pools import layout
from statepool.pools.fold import Change, Fold, Publish, Remove, member_id, member_ids
from statepool.pools.lastlook import Again, LastLook, published_anew
from statepool.pools.locks import Locks, locks_of, quick_locks_of
from statepool.pools.log import Clock, MachineLog, Nonce, fold_all, random_nonce
from statepool.pools.records import decode
from statepool.pools.refusals import lost_ram, refuse_dependants, refuse_listed, refuse_long_texts, refuse_moved, taken
from statepool.pools.staging import Marker, Staging, read_markers, restore
from statepool.pools.view import Unmanaged, View
from statepool.pools.writer import Writer
from statepool.transports.base import FileKind, Transport

Held = Callable[[], frozenset[Digest]]
"""Tells which bytes must stay although no record needs them: those under working images, or that other caches refer to."""


class Pool:
    """
    A place that holds states.

    :param transport: reaches it
    :param max_depth: longest chain that is accepted, in states
    :param locks: save work; those of the place if not given
    :param nonce: chooses names, for tests
    :param clock: tells the time that records carry, in seconds since the epoch
    """

    def __init__(
        self,
        transport: Transport,
        *,
        max_depth: int = 256,
        locks: Locks | None = None,
        lock_timeout: float = 3600.0,
        nonce: Nonce = random_nonce,
        clock: Clock = time.time,
    ) -> None:
        self.transport = transport
        self.view = View(transport)
        self.max_depth = max_depth
        self.nonce = nonce
        self.clock = clock
        self.lock_timeout = lock_timeout
        self._given_locks = self._locks = locks
        self._logs: dict[str, MachineLog] = {}
        self._managed: bool | None = None

    @property
    def location(self) -> Location:
        """Where it is."""
        return self.transport.location

    def __str__(self) -> str:
        return str(self.location)

    @property
    def locks(self) -> Locks:
        """Locks that save work here."""
        if self._locks is None:
            self._locks = locks_of(self.transport)
        return self._locks

    @property
    def log_locks(self) -> Locks:
        """Locks for changes of a log, which are right without, and cost no more than what they save: an append that came too late."""
        return self._given_locks if self._given_locks is not None else quick_locks_of(self.transport)

    # -- being a pool ------------------------------------------------------------------------------------------------------------------------------

    def create(self, *, dry_run: bool = False) -> bool:
        """
        Make it a pool, if it is none.

        :param dry_run: look at what is there, and change nothing
        :returns: whether anything had to be made
        :raises AccessDenied: the directory cannot be written
        """
        if self.is_managed:
            return False
        if dry_run:
            return True
        for directory in layout.DIRECTORIES:
            self.transport.make_directory(directory)
        content = json.dumps({"format": layout.FORMAT, "created": self.clock(), "creator": str(Writer.current())}).encode() + b"\n"
        try:
            self.transport.create(layout.POOL_FILE, content)
        except FileExists:
            pass  # somebody else made it a pool at the same moment
        self.transport.flush(layout.OURS)
        self.transport.flush("")
        self._managed = None
        return True

    @property
    def is_managed(self) -> bool:
        """
        Whether there is a log here, and not only files of another tool.

        :raises UnsupportedFormat: the pool is of a newer format
        """
        self._require_known_format()
        return self._managed is True

    def _require_known_format(self) -> None:
        """Nothing in a pool of a newer format is read: who wrote it may mean something else by it."""
        if self._managed is True:
            return
        try:
            content = self.transport.read(layout.POOL_FILE, 0, 1 << 16)
        except MissingFile:
            self._managed = False
        else:
            decode(content, f"{self.location}/{layout.POOL_FILE}")
            self._managed = True

    def require(self, *, write: bool = False) -> None:
        """
        Make sure that this is a pool.

        :param write: also that it can be written to
        :raises NotAPool: there is neither a pool nor a state of another tool
        :raises AccessDenied: there may be one, where we may not look
        :raises ReadOnlyPool: it is a pool of another tool, and should be written to
        :raises UnsupportedFormat: it is of a newer format
        """
        self._managed = None  # what was there may be gone: a file system that is not mounted any more looks like an empty pool
        if self.is_managed:
            return
        found, closed = self.view.all_unmanaged({machine: Fold(machine) for machine in self.view.machines()})
        if not any(found.values()):
            if closed:
                raise closed[0]
            raise NotAPool(
                f"{self.location} is not a pool: there is no {layout.POOL_FILE} and no state in it",
                pool=str(self.location),
                hint=f"mount what should be there, or make a pool with: statepool init {self.location}",
            )
        if write:
            raise ReadOnlyPool(
                f"{self.location} is a pool of another tool, and can only be read",
                pool=str(self.location),
                hint=f"allow writing to it with: statepool init {self.location}",
            )

    def now(self) -> float:
        """:returns: the time of the place's own clock, in seconds since the epoch: ages are never measured with the clocks of two hosts"""
        try:
            return self.transport.now(f"{layout.INCOMING}/{self.nonce()}.clock")
        except AccessDenied:
            return self.clock()  # where nothing can be written, nothing is removed for its age either

    # -- looking -----------------------------------------------------------------------------------------------------------------------------------

    def log(self, machine: str) -> MachineLog:
        """:returns: the log of a machine, which may be empty"""
        if machine not in self._logs:
            self._logs[machine] = MachineLog(self.transport, machine, nonce=self.nonce, clock=self.clock)
        return self._logs[machine]

    def fold(self, machine: str) -> Fold:
        """
        :returns: the managed states of a machine
        :raises UnsupportedFormat: the pool is of a newer format
        """
        self._require_known_format()
        return self.log(machine).fold()

    def folds(self, machines: Iterable[str]) -> dict[str, Fold]:
        """
        As :meth:`fold` of each, in a number of round trips that does not grow with their number.

        :returns: the managed states of the machines, by their ids
        :raises IntegrityError: one of the logs cannot be used
        """
        folds, damaged = self.usable_folds(machines)
        for error in damaged.values():
            raise error
        return folds

    def usable_folds(self, machines: Iterable[str]) -> tuple[dict[str, Fold], dict[str, IntegrityError]]:
        """:returns: as :meth:`folds`, of the logs that can be used; and why the others cannot: one that is damaged does not hide the others"""
        self._require_known_format()
        wanted = list(dict.fromkeys(machines))
        found = dict(zip(wanted, fold_all(self.transport, [self.log(machine) for machine in wanted]), strict=True))
        damaged = {machine: one for machine, one in found.items() if isinstance(one, IntegrityError)}
        return {machine: one for machine, one in found.items() if isinstance(one, Fold)}, damaged

    def logged_machines(self) -> list[str]:
        """:returns: the machines that have a log"""
        return sorted(entry.name for entry in self.transport.scan(layout.LOG) if entry.kind is FileKind.DIRECTORY and is_name(entry.name))

    def machines(self) -> list[str]:
        """:returns: the machines that have a log, or a directory in the view"""
        return sorted({*self.logged_machines(), *self.view.machines()})

    def unmanaged(self, machine: str) -> list[Unmanaged]:
        """:returns: the states of a machine that another tool put here"""
        return self.view.unmanaged(machine, self.fold(machine))

    def find(self, state: StateId) -> Manifest | None:
        """:returns: what is known of a managed state"""
        return self.fold(state.machine).states.get(state)

    def chain(self, state: StateId) -> tuple[Manifest, ...]:
        """
        :returns: a managed state with all that backs it, tip first
        :raises NotFound: it is not there
        """
        fold = self.fold(state.machine)
        if state not in fold.states:
            raise self.missing(state)
        return fold.chain(fold.states[state])

    def chain_of(self, manifest: Manifest) -> tuple[Manifest, ...]:
        """
        :param manifest: of a state that was here a moment ago, with or without a name
        :returns: it with all that backs it, tip first
        :raises NotFound: somebody has removed it meanwhile
        """
        fold = self.fold(manifest.id.machine)
        found = fold.holding(manifest)
        if found is None:
            raise self.missing(manifest.id)
        return fold.chain(found)

    def missing(self, state: StateId) -> NotFound:
        """:returns: the error that says so"""
        return NotFound(
            f"there is no state {state.state} of {state.object} in {self.location}",
            object=state.object,
            state=state.state,
            pool=str(self.location),
            hint=f"statepool show {state.object} lists what is there",
        )

    def has_bytes(self, digest: Digest) -> bool:
        """:returns: whether these bytes are here, after bringing them back if a collector had just moved them aside"""
        return restore(self.transport, digest)

    def lacking(self, digests: Iterable[Digest]) -> set[Digest]:
        """:returns: which of these bytes are not here, whatever the logs say: somebody has deleted them. As :meth:`has_bytes`, in one round trip."""
        wanted = list(dict.fromkeys(digests))
        stats = self.transport.stat_many([layout.data(digest) for digest in wanted])
        return {digest for digest, stat in zip(wanted, stats, strict=True) if stat is None and not self.has_bytes(digest)}

    # -- publishing --------------------------------------------------------------------------------------------------------------------------------

    def stage(self, digests: Iterable[Digest], **facts: str) -> Staging:
        """
        Begin to publish: from now on no collector takes these bytes away. End it with :meth:`Staging.end`.

        :param facts: what whoever comes after a crash must know
        """
        return Staging.begin(self.transport, Marker(self.nonce(), frozenset(digests), Writer.current(), facts))

    def check_publishable(self, manifests: Sequence[Manifest], *, replace: bool = False, supersede: bool = False, in_place: bool = False) -> bool:
        """
        Look whether :meth:`publish` would succeed now, and change nothing. Raises what it would raise.

        :returns: whether there is anything to do
        """
        fold = self.fold(manifests[0].id.machine)
        planned = self._plan(fold, manifests, replace, supersede)
        for manifest in manifests:
            if not in_place:
                self._require_free(manifest.id, fold.states.get(manifest.id))
        return bool(planned)

    def publish(
        self,
        manifests: Sequence[Manifest],
        staging: Staging,
        *,
        replace: bool = False,
        supersede: bool = False,
        in_place: bool = False,
        durable: bool = True,
        again: Again | None = None,
    ) -> bool:
        """
        Make states visible, all in one record. Their bytes have been gathered in ``staging``, or are here.

        :param manifests: what is known of them, parents first, all of one machine
        :param replace: other content under a name gives way, if nothing stands on it
        :param supersede: as replace, and what stands on it keeps it, without its name: for caches
        :param in_place: the files in their places in the view are the states themselves: they are being adopted
        :param durable: also flush the names of the bytes and of the record; a cache that hashes its files after a reboot does without
        :param again: gathers the bytes once more, if they are gone since a collector took this writer for dead
        :returns: whether anything had to be changed; False if the same was there before
        :raises Conflict: a name exists with other content, or a parent has changed
        :raises HasDependants: something stands on what should be replaced
        :raises IntegrityError: the bytes are gone
        """
        machine = manifests[0].id.machine
        ids = [manifest.id for manifest in manifests]
        digests = [manifest.digest for manifest in manifests if manifest.digest is not None]
        self.check_publishable(manifests, replace=replace, supersede=supersede, in_place=in_place)
        look = LastLook(self, staging, digests, again)
        look.settle()
        if durable:
            self.transport.flush(layout.DATA)
        changes: list[Change] = []

        def plan(fold: Fold, *, anew: bool = False) -> list[Change]:
            changes[:] = self._plan(fold, manifests, replace, supersede) or (published_anew(fold, manifests) if anew else [])
            if not in_place:
                self.view.reclaim(fold.states[change.id] for change in changes if change.id in fold.states)
            return changes

        written = self.append(machine, plan, durable=durable)
        # A collector may have moved the bytes aside before it could see the record. We still have them: one last look.
        look.settle_or_take_back(machine, changes)
        if not written and digests:
            # The record is that of another writer. One that takes its record back has done so by now, or has left a marker.
            anew = look.is_doubted()
            if written := self.append(machine, lambda fold: plan(fold, anew=anew), durable=durable):
                look.settle_or_take_back(machine, changes)
        self.view.update(ids, lambda: self.fold(machine))
        return written

    def append(self, machine: str, plan: Callable[[Fold], Sequence[Change]], *, durable: bool = True) -> bool:
        """
        Add one record to a log, and a checkpoint if it is time for one.

        :param plan: as :meth:`MachineLog.append` has it
        :param durable: likewise
        :returns: whether a record was written
        """
        log = self.log(machine)
        fold, written = log.append(plan, alone=lambda: self.log_locks.hold(f"log-{machine}", self.lock_timeout), durable=durable)
        if written and log.is_turn(fold):
            log.compact()
        return written

    def _plan(self, fold: Fold, manifests: Sequence[Manifest], replace: bool, supersede: bool) -> list[Change]:
        changes: list[Change] = []
        coming = {manifest.id: manifest for manifest in manifests}
        for manifest in manifests:
            old = fold.states.get(manifest.id)
            if old is not None and fold.holds(manifest):
                if supersede and manifest.origin not in (None, old.origin):
                    changes.append(Publish(manifest, supersedes=old.digest))  # the cache has found out what these bytes are rewritten from
                continue
            self._check_parent(fold, manifest, coming)
            refuse_long_texts(self.location, fold, manifest)
            refuse_moved(self.location, fold, manifest)
            if old is None:
                changes.append(Publish(manifest))
            elif supersede and old.digest is not None and not (old.digest == manifest.digest and fold.has_children(old)):
                refuse_listed(self.location, fold, old, set(coming))
                changes.append(Publish(manifest, supersedes=old.digest))
            elif replace or supersede:
                refuse_dependants(self.location, fold, [old.id], set(coming), "replaced")
                changes += [Remove(old.id, old.digest), *lost_ram(fold, old, manifest), Publish(manifest)]
            else:
                raise taken(manifest.id, self.location)
        return changes

    def _check_parent(self, fold: Fold, manifest: Manifest, coming: dict[StateId, Manifest]) -> None:
        for name, digest in manifest.members.items():
            member = coming.get(member_id(manifest, name)) or fold.states.get(member_id(manifest, name))
            if member is None or member.digest != digest:
                raise Conflict(
                    f"{manifest.id} lists {name}, which is not in {self.location} as it was", object=manifest.object, pool=str(self.location)
                )
        if manifest.parent is None:
            return
        parent = fold.find(manifest.object, manifest.parent)
        if parent is not None:
            depth = fold.depth(parent) + 1
            if depth <= self.max_depth and fold.has_below(parent, manifest.id):
                raise Conflict(
                    f"{manifest.id} stands on {parent.state}, whose chain has a state of that name",
                    object=manifest.object,
                    state=manifest.state,
                    pool=str(self.location),
                    hint="choose another name",
                )
            if depth > self.max_depth:
                raise UnsafeImage(
                    f"the chain of {manifest.id} has {depth} states, more than {self.max_depth}",
                    check="depth",
                    object=manifest.object,
                    state=manifest.state,
                    hint="set a state without a backing file, or raise max-depth",
                )
            return
        wanted = StateId(manifest.object, manifest.parent.state)
        if wanted in coming and coming[wanted].digest == manifest.parent.digest:
            return
        there = fold.states.get(wanted)
        what = f"is there with the digest {there.digest}" if there is not None else "is not there"
        raise Conflict(
            f"{manifest.id} stands on {manifest.parent.state} with the digest {manifest.parent.digest}, which {what} in {self.location}",
            object=manifest.object,
            state=manifest.state,
            pool=str(self.location),
            hint="get the parent again and make the state from that",
        )

    def _require_free(self, state: StateId, known: Manifest | None) -> None:
        if not self.view.is_free(state, known):
            raise Conflict(
                f"{layout.view(state)} in {self.location} is a file of another tool",
                object=state.object,
                state=state.state,
                pool=str(self.location),
                hint=f"make it managed with: statepool adopt {self.location}",
            )

    # -- removing ----------------------------------------------------------------------------------------------------------------------------------

    def plan_removal(self, state: StateId, *, cascade: bool = False) -> list[StateId]:
        """
        :param cascade: also what stands on it
        :returns: what a removal would remove now, tips first
        :raises NotFound: it is not there
        :raises HasDependants: something stands on it
        """
        return [change.id for change in self._plan_removal(self.fold(state.machine), state, cascade)]

    def _plan_removal(self, fold: Fold, state: StateId, cascade: bool) -> list[Remove]:
        if state not in fold.states:
            raise self.missing(state)
        together = [state, *member_ids(fold.states[state])]  # a machine state goes with all that it lists
        if not cascade:
            refuse_dependants(self.location, fold, together, set(), "removed")
        ids = [*fold.dependants(together), *together]
        # The RAM of a machine state is of no use without it.
        machines = [gone for gone in ids if gone.kind is Kind.MACHINE]
        going = set(ids)
        ids += [ram for ram in (StateId(gone.object, gone.state, Kind.RAM) for gone in machines) if ram in fold.states and ram not in going]
        return [Remove(gone, fold.states[gone].digest) for gone in ids]

    def remove(self, state: StateId, *, cascade: bool = False, allowed: Callable[[set[Digest]], None] = lambda digests: None) -> list[Manifest]:
        """
        Remove a state, in one record with whatever else goes: a machine state takes its members along. The bytes stay until a collector takes them.

        :param cascade: also remove what stands on it
        :param allowed: raises if one of these bytes must stay
        :returns: what is known of the states that are gone, tips first
        :raises NotFound: it is not there
        :raises HasDependants: something stands on it
        """
        gone: list[Manifest] = []

        def plan(fold: Fold) -> list[Remove]:
            if gone and state not in fold.states:
                return []  # our own record counted after all
            changes = self._plan_removal(fold, state, cascade)
            allowed({change.digest for change in changes if change.digest is not None})
            gone[:] = [fold.states[change.id] for change in changes]
            self.view.reclaim(gone)
            return changes

        self.append(state.machine, plan)
        self.view.update([manifest.id for manifest in gone], lambda: self.fold(state.machine))
        return gone

    # -- what is needed ----------------------------------------------------------------------------------------------------------------------------

    def needed(self, *, besides: Marker | None = None) -> set[Digest]:
        """
        :param besides: a marker that does not count
        :returns: the bytes that a marker or a record needs. Markers first: their writers remove them only after the record is there.
        """
        ignored = besides.nonce if besides is not None else None
        digests = {digest for marker in read_markers(self.transport) if marker.nonce != ignored for digest in marker.digests}
        return digests.union(*(fold.digests for fold in self.folds(self.logged_machines()).values()))
