"""
The states of a pool according to its logs, and the only way to add a change to a log.

:class:`~statepool.pools.pool.Pool` decides which changes are allowed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence

from statepool.errors import (
    AccessDenied,
    FileExists,
    IntegrityError,
    MissingFile,
    NotAPool,
    NotFound,
    ReadOnlyPool,
    RefusedError,
)
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest, StateId
from statepool.model.names import is_name
from statepool.pools import layout
from statepool.pools.fold import Change, Fold
from statepool.pools.locks import Locks, locks_of, quick_locks_of
from statepool.pools.log import Clock, MachineLog, Nonce, fold_all, random_nonce
from statepool.pools.records import decode
from statepool.pools.refusals import absent
from statepool.pools.staging import Marker, Staging, restore
from statepool.pools.view import Unmanaged, View
from statepool.pools.writer import Writer
from statepool.transports.base import FileKind, Transport


class Ledger:
    """
    The states of a pool according to its logs, and the operation that changes them.

    :param transport: reaches the pool
    :param max_depth: longest chain that is accepted, in states
    :param locks: locks that save work; by default those of the place
    :param nonce: chooses names, for tests
    :param clock: returns the time for records, in seconds since the epoch
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
        self._in_place = False

    @property
    def location(self) -> Location:
        """The location of the pool."""
        return self.transport.location

    def __str__(self) -> str:
        return str(self.location)

    @property
    def locks(self) -> Locks:
        """Locks that save work in this pool."""
        if self._locks is None:
            self._locks = locks_of(self.transport)
        return self._locks

    @property
    def log_locks(self) -> Locks:
        """
        Locks for changes of a log. The changes are correct without them, and the locks cost no more
        than what they save: an append that came too late.
        """
        return (
            self._given_locks if self._given_locks is not None else quick_locks_of(self.transport)
        )

    # -- being a pool ------------------------------------------------------------------------------

    def create(self, *, dry_run: bool = False) -> bool:
        """
        Make the place a pool, if it is none.

        :param dry_run: only look, and change nothing
        :returns: whether anything had to be made
        :raises AccessDenied: the directory cannot be written
        """
        if self.is_managed:
            return False
        if dry_run:
            return True
        for directory in layout.DIRECTORIES:
            self.transport.make_directory(directory)
        form: dict[str, object] = (
            {"format": layout.FORMAT}
            if self.transport.capabilities.renames
            else {"format": layout.IN_PLACE, "renames": False}
        )
        content = (
            json.dumps({**form, "created": self.clock(), "creator": str(Writer.current())}).encode()
            + b"\n"
        )
        try:
            self.transport.create(layout.POOL_FILE, content)
        except FileExists:
            pass  # another process made it a pool at the same moment
        self.transport.flush(layout.OURS)
        self.transport.flush("")
        self._managed = None
        return True

    @property
    def is_managed(self) -> bool:
        """
        Whether the place is a pool of ours, and not only a directory with files of another tool.

        :raises UnsupportedFormat: the pool is of a newer format
        """
        self._require_known_format()
        return self._managed is True

    def _require_known_format(self) -> None:
        """
        Refuse a pool of a newer format: its files may mean something else, so nothing in it is
        read.
        """
        if self._managed is True:
            return
        try:
            content = self.transport.read(layout.POOL_FILE, 0, 1 << 16)
        except MissingFile:
            self._managed = False
        else:
            self._in_place = (
                decode(content, f"{self.location}/{layout.POOL_FILE}", known=layout.IN_PLACE).get(
                    "renames"
                )
                is False
            )
            if self._in_place and self.transport.capabilities.renames:
                raise RefusedError(
                    f"the pool {self.location} was made where files cannot be renamed, and is"
                    " reached here by a way on which they can",
                    pool=str(self.location),
                    hint=(
                        "reach it as it was made; if this is a copy that nobody else uses, remove"
                        f' "renames" from its {layout.POOL_FILE}'
                    ),
                )
            self._managed = True

    @property
    def in_place(self) -> bool:
        """
        Whether bytes are collected in place: the pool was made where files cannot be renamed. This
        is a property of the pool, so all writers agree about it.
        """
        self._require_known_format()
        return self._in_place

    def require(self, *, write: bool = False) -> None:
        """
        Check that this is a pool.

        :param write: also check that it can be written to
        :raises NotAPool: there is neither a pool nor a state of another tool
        :raises AccessDenied: there may be a state in a directory that this account may not read
        :raises ReadOnlyPool: it is a pool of another tool, and ``write`` is set
        :raises UnsupportedFormat: it is of a newer format
        """
        # look again: the pool may have vanished, since a file system that is not mounted any more
        # looks like an empty pool
        self._managed = None
        if self.is_managed:
            return
        found, closed = self.view.all_unmanaged(
            {machine: Fold(machine) for machine in self.view.machines()}
        )
        if not any(found.values()):
            if closed:
                raise closed[0]
            raise NotAPool(
                f"{self.location} is not a pool: there is no {layout.POOL_FILE} and no state in it",
                pool=str(self.location),
                hint=(
                    "mount what should be there, or make a pool with: statepool init"
                    f" {self.location}"
                ),
            )
        if write:
            raise ReadOnlyPool(
                f"{self.location} is a pool of another tool, and can only be read",
                pool=str(self.location),
                hint=f"allow writing to it with: statepool init {self.location}",
            )

    def now(self) -> float:
        """
        :returns: the time by the clock of the place, in seconds since the epoch: ages are never
            measured with the clocks of two hosts
        """
        try:
            return self.transport.now(f"{layout.INCOMING}/{self.nonce()}.clock")
        except AccessDenied:
            # where nothing can be written, nothing is removed because of its age either
            return self.clock()

    # -- looking -----------------------------------------------------------------------------------

    def log(self, machine: str) -> MachineLog:
        """:returns: the log of a machine, which may be empty"""
        if machine not in self._logs:
            self._logs[machine] = MachineLog(
                self.transport, machine, nonce=self.nonce, clock=self.clock
            )
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
        Fold several logs, as :meth:`fold`, in a number of round trips that does not grow with the
        number of logs.

        :returns: the managed states of the machines, by their ids
        :raises IntegrityError: one of the logs cannot be used
        """
        folds, damaged = self.usable_folds(machines)
        for error in damaged.values():
            raise error
        return folds

    def usable_folds(
        self, machines: Iterable[str]
    ) -> tuple[dict[str, Fold], dict[str, IntegrityError]]:
        """
        :returns: the folds of the logs that can be used, as :meth:`folds`; and the errors of the
            others. So a damaged log does not hide the other logs.
        """
        self._require_known_format()
        wanted = list(dict.fromkeys(machines))
        found = dict(
            zip(
                wanted,
                fold_all(self.transport, [self.log(machine) for machine in wanted]),
                strict=True,
            )
        )
        damaged = {
            machine: one for machine, one in found.items() if isinstance(one, IntegrityError)
        }
        return {machine: one for machine, one in found.items() if isinstance(one, Fold)}, damaged

    def logged_machines(self) -> list[str]:
        """:returns: the machines that have a log"""
        return sorted(
            entry.name
            for entry in self.transport.scan(layout.LOG)
            if entry.kind is FileKind.DIRECTORY and is_name(entry.name)
        )

    def machines(self) -> list[str]:
        """:returns: the machines that have a log, or a directory in the view"""
        return sorted({*self.logged_machines(), *self.view.machines()})

    def machines_of(self, object: str | None) -> list[str]:
        """:returns: the machine of an object; without an object, all machines"""
        return self.machines() if object is None else [object.partition("/")[0]]

    def unmanaged(self, machine: str) -> list[Unmanaged]:
        """:returns: the states of a machine that another tool put into the pool"""
        return self.view.unmanaged(machine, self.fold(machine))

    def find(self, state: StateId) -> Manifest | None:
        """:returns: the manifest of a managed state, or None"""
        return self.fold(state.machine).states.get(state)

    def chain(self, state: StateId) -> tuple[Manifest, ...]:
        """
        :returns: a managed state with all that backs it, tip first
        :raises NotFound: the pool does not have the state
        """
        fold = self.fold(state.machine)
        if state not in fold.states:
            raise self.missing(state)
        return fold.chain(fold.states[state])

    def chain_of(self, manifest: Manifest) -> tuple[Manifest, ...]:
        """
        :param manifest: of a state that was in the pool a moment ago, with or without a name
        :returns: the state with all that backs it, tip first
        :raises NotFound: another process has removed it meanwhile
        """
        fold = self.fold(manifest.id.machine)
        found = fold.holding(manifest)
        if found is None:
            raise self.missing(manifest.id)
        return fold.chain(found)

    def missing(self, state: StateId) -> NotFound:
        """:returns: the error that the pool does not have a state"""
        return absent(state, self.location)

    def has_bytes(self, digest: Digest) -> bool:
        """
        Return whether the pool has some bytes. If a collector had just moved them aside, bring them
        back.
        """
        return restore(self.transport, digest)

    def lacking(self, digests: Iterable[Digest]) -> set[Digest]:
        """
        :returns: those of some bytes whose files were deleted, whatever the logs say. As
            :meth:`has_bytes`, in one round trip.
        """
        wanted = list(dict.fromkeys(digests))
        stats = self.transport.stat_many([layout.data(digest) for digest in wanted])
        return {
            digest
            for digest, stat in zip(wanted, stats, strict=True)
            if stat is None and not self.has_bytes(digest)
        }

    # -- changing ----------------------------------------------------------------------------------

    def stage(self, digests: Iterable[Digest], **facts: str) -> Staging:
        """
        Begin to publish: from now on no collector removes these bytes. The caller ends it with
        :meth:`Staging.end`.

        :param facts: what the process that recovers after a crash must know
        """
        return Staging.begin(
            self.transport, Marker(self.nonce(), frozenset(digests), Writer.current(), facts)
        )

    def append(
        self, machine: str, plan: Callable[[Fold], Sequence[Change]], *, durable: bool = True
    ) -> bool:
        """
        Add one record to a log, and a checkpoint if one is due.

        :param plan: as for :meth:`MachineLog.append`
        :param durable: as for :meth:`MachineLog.append`
        :returns: whether a record was written
        """
        log = self.log(machine)
        fold, written = log.append(
            plan,
            alone=lambda: self.log_locks.hold(f"log-{machine}", self.lock_timeout),
            durable=durable,
        )
        if written and log.is_turn(fold):
            log.compact()
        return written
