"""
The log of one machine: records in one order, each created exclusively, and checkpoints, each of
which stands for all records before it.

The rules (``docs/design.rst`` says why they suffice):

* Record N+1 is created only by a writer that has folded N, and only if it does not exist yet.
* After creating N+1 its writer looks for a checkpoint at or after N+1. If that checkpoint does not
  know this record, the record came too late and is void: its writer removes it and begins again.
* Records behind a checkpoint are deleted oldest first, and the last hundred stay. So a reader that
  has seen N, sees N+1, and still sees *the same* N after that, knows that N+1 counts. The nonce
  tells whether N is the same: where N was deleted, a late writer may have created another N and not
  have taken it back yet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from statepool.errors import BadRecord, FileExists, IntegrityError
from statepool.pools import layout
from statepool.pools.fold import KEEP_NONCES, Change, Fold
from statepool.pools.records import RESTORE_LOG, Checkpoint, Record, apply, decode
from statepool.pools.talks import MAX_SMALL_FILE, VAIN, Ask, Question, Talk, hold, hold_all
from statepool.pools.writer import Writer
from statepool.transports.base import Entry, Transport

CHECKPOINT_EVERY = 32
"""Records between checkpoints of a small log."""

FIRST_CHECKPOINT = 8
"""
Records before the first checkpoint of a small log. The next checkpoint follows when the log is
twice as long, so that no reader reads many small files.
"""

RELIEF = 8
"""Records after which another writer makes a checkpoint that was due and is still missing."""

KEEP_RECORDS = 100
"""Records that are kept behind a checkpoint."""

KEEP_CHECKPOINTS = 2
"""Checkpoints that are kept, so that a listing made while they change still shows one."""

MAX_RECORD = MAX_SMALL_FILE
"""Longest record or checkpoint that is read, in bytes."""

MAX_AHEAD = 64
"""Most records that are requested together before it is known that so many exist."""

MOST_RECORDS = 1 << 16
"""
Most records after the last checkpoint that are read. Writers make a checkpoint after at most a few
hundred records.
"""

_ATTEMPTS = 8
"""
How often a fold begins again because records were deleted while it read them. Each deletion means
that dozens of records were written meanwhile.
"""

PATIENCE = 3
"""
Failed attempts to create the next record, after which a writer takes the lock that keeps other
writers back.
"""

Nonce = Callable[[], str]
Clock = Callable[[], float]
Alone = Callable[[], AbstractContextManager[None]]
Plan = Callable[[Fold], Sequence[Change]]


def random_nonce() -> str:
    """:returns: a random name that no other process chooses"""
    return os.urandom(8).hex()


class MachineLog:
    """
    Reads and extends the log of one machine.

    :param transport: reaches the pool
    :param machine: the machine of the log
    :param nonce: chooses names, for tests
    :param clock: returns the time for records, in seconds since the epoch
    """

    def __init__(
        self,
        transport: Transport,
        machine: str,
        *,
        nonce: Nonce = random_nonce,
        clock: Clock = time.time,
    ) -> None:
        self._transport = transport
        self._machine = machine
        self._directory = layout.log(machine)
        self._nonce = nonce
        self._clock = clock
        self._last: Fold | None = None
        self._checkpoint = 0

    def _where(self, path: str) -> str:
        return f"{self._transport.location}/{path}"

    # -- reading -----------------------------------------------------------------------------------

    def fold(self) -> Fold:
        """
        :returns: the states of the machine, as of a moment during this call
        :raises BadRecord: the log is damaged
        """
        return hold(self._transport, self.folding())

    def folding(self) -> Talk[Fold]:
        """Fold the log, as :meth:`fold`, in a talk that can be held together with others."""
        last = self._last
        newer = (yield from self._extending(last)) if last is not None and last.number else None
        self._last = newer if newer is not None else (yield from self._reading_all())
        return self._last

    def _extending(self, last: Fold) -> Talk[Fold | None]:
        """
        Extend the fold ``last`` by the records after it. The result is None if so many came that
        the fold has to begin again.

        The order of the questions matters. Records are deleted oldest first: if ``last`` is still
        there, then what was found before, or not found, counts.
        """
        fold = last
        try:
            ahead, missing = 1, False
            while not missing:
                numbers = range(fold.number + 1, fold.number + 1 + ahead)
                contents = yield self._read(numbers)
                missing = None in contents
                if contents[0] is not None:
                    fold = fold.copy() if fold is last else fold
                    self._apply_all(
                        fold, numbers, contents[: contents.index(None)] if missing else contents
                    )
                # a reader that is far behind catches up in few steps
                ahead = min(fold.number - last.number, MAX_AHEAD)
                if fold.number - last.number > MOST_RECORDS:
                    raise self._endless(f"more than {MOST_RECORDS} records came while it was read")
        except BadRecord:
            if (yield from self._vouching(last.number, last.nonces)):
                raise
            return None
        return fold if (yield from self._vouching(last.number, last.nonces)) else None

    def _vouching(self, number: int, nonces: Mapping[int, str]) -> Talk[bool]:
        """
        Find out whether the records that were read after record ``number`` count: they do if that
        record is still there.
        """
        if not number:
            # There is no record before the first one that could vouch for it. But without a
            # checkpoint, no record was ever deleted.
            (entries,) = yield Question(Ask.SCAN, [self._directory])
            return not _numbers(entries)[0]
        (content,) = yield self._read([number])
        return content is not None and self._is_same(content, number, nonces)

    def _is_same(self, content: bytes, number: int, nonces: Mapping[int, str]) -> bool:
        return decode(content, self._where(layout.record(self._machine, number)), RESTORE_LOG).get(
            "nonce"
        ) == nonces.get(number)

    def _reading_all(self) -> Talk[Fold]:
        for _ in range(_ATTEMPTS):
            found = yield from self._trying_to_read_all()
            if found is not None:
                return found
        raise BadRecord(
            f"the log of {self._machine} in {self._transport.location} has a gap: records are"
            " missing between those that are there",
            object=self._machine,
            pool=str(self._transport.location),
            hint=RESTORE_LOG,
        )

    def _trying_to_read_all(self) -> Talk[Fold | None]:
        """
        Read the whole log once. The result is the fold, or None if the listing and the contents do
        not fit together.
        """
        (entries,) = yield Question(Ask.SCAN, [self._directory])
        checkpoints, records = _numbers(entries)
        newest = checkpoints[-1] if checkpoints else 0
        numbers = [number for number in records if number > newest]
        if numbers and numbers[-1] - newest > len(numbers):
            return None  # a gap; a single number can be far from all others
        if len(numbers) > MOST_RECORDS:
            raise BadRecord(
                f"the log of {self._machine} in {self._transport.location} has {len(numbers)}"
                f" records after its last checkpoint, more than the {MOST_RECORDS} that are read",
                object=self._machine,
                pool=str(self._transport.location),
                hint=RESTORE_LOG,
            )
        paths = [layout.checkpoint(self._machine, newest)] if checkpoints else []
        paths += [layout.record(self._machine, number) for number in numbers]
        contents = (yield Question(Ask.READ, paths)) if paths else []
        if None in contents:
            return None
        fold = (
            self._checkpoint_in(contents.pop(0), newest).fold()
            if checkpoints
            else Fold(self._machine)
        )
        if contents and not (yield from self._vouching(newest, fold.nonces)):
            return None
        self._apply_all(fold, numbers, contents)
        return fold

    def entries(self) -> tuple[list[int], list[int]]:
        """:returns: the numbers of the checkpoints and of the records in the log, each in order"""
        return _numbers(self._transport.scan(self._directory))

    def _read(self, numbers: Sequence[int]) -> Question:
        return Question(Ask.READ, [layout.record(self._machine, number) for number in numbers])

    def _apply_all(self, fold: Fold, numbers: Sequence[int], contents: Sequence[bytes]) -> None:
        for number, content in zip(numbers, contents, strict=False):
            where = self._where(layout.record(self._machine, number))
            apply(fold, Record.from_bytes(content, number, where), where)

    def _record(self, number: int, content: bytes) -> Record:
        return Record.from_bytes(content, number, self._where(layout.record(self._machine, number)))

    def records(self) -> list[Record]:
        """:returns: the records that still exist and count, oldest first"""
        fold = self.fold()
        numbers = [number for number in self.entries()[1] if number <= fold.number]
        contents = self._transport.read_many(self._read(numbers).paths, MAX_RECORD)
        found = [
            self._record(number, content)
            for number, content in zip(numbers, contents, strict=True)
            if content is not None
        ]
        return [
            record
            for record in found
            if fold.nonces.get(record.number, record.nonce) == record.nonce
        ]

    # -- writing -----------------------------------------------------------------------------------

    def append(
        self, plan: Plan, *, alone: Alone | None = None, durable: bool = True
    ) -> tuple[Fold, bool]:
        """
        Add one record.

        :param plan: returns the changes, given the current fold; called again each time another
            writer was faster. It raises an error if the change is not allowed any more, and returns
            nothing if there is nothing to do.
        :param alone: a lock that keeps other writers away; held by a writer that was too late
            several times
        :param durable: also fsync the directory, for the name of the record. If False, a power cut
            can remove the record, and all later records that are not durable either; the next
            durable record brings those before it to stable storage as well.
        :returns: the fold with the change, and whether a record was written
        """
        nonce = self._nonce()
        fold, changes = self._planned(plan)
        attempts = 0
        while changes:
            if (attempts := attempts + 1) > VAIN:
                raise self._endless("each new record of ours is said to have come too late")
            if not fold.number:
                self._transport.make_directory(self._directory)
            content = self._readable(
                Record(0, nonce, self._clock(), str(Writer.current()), changes)
            )
            # The content is on stable storage before the record has a number, so that no other
            # writer has to wait for it. A writer that is too late then only takes another number.
            with self._transport.draft(self._directory, content) as place:
                drafted = changes
                fold, changes, extended = self._place(place, fold, nonce, drafted, plan, alone)
            if extended is not None:
                if durable:
                    self._transport.flush(self._directory)
                if not self._is_void(nonce, extended.number):
                    self._last = extended
                    return extended, True
                self._last = None
                fold, changes = self._planned(plan)
        return fold, False

    def _readable(self, record: Record) -> bytes:
        """
        :returns: the content of the file of a record
        :raises BadRecord: no reader could read the record, and so nothing of this machine any more
        """
        content, what = (
            record.to_bytes(),
            f"a change of {self._machine} in {self._transport.location}",
        )
        if len(content) > MAX_RECORD:
            raise BadRecord(
                f"{what} is too long: {len(content)} bytes",
                object=self._machine,
                hint="make it in several steps",
            )
        Record.from_bytes(content, record.number, what)
        return content

    def _planned(self, plan: Plan) -> tuple[Fold, tuple[Change, ...]]:
        fold = self.fold()
        return fold, tuple(plan(fold))

    def _place(
        self,
        place: Callable[[str], None],
        fold: Fold,
        nonce: str,
        drafted: tuple[Change, ...],
        plan: Plan,
        alone: Alone | None,
    ) -> tuple[Fold, tuple[Change, ...], Fold | None]:
        """
        Give a draft the next number, as long as the plan still gives the changes in the draft.

        :returns: the last fold; the changes that are planned for it; and the fold after the draft,
            or None if the planned changes are not those of the draft any more
        """
        failures, changes = 0, drafted
        while True:
            with alone() if alone is not None and failures >= PATIENCE else nullcontext():
                if failures:
                    fold, changes = self._planned(plan)
                    if changes != drafted:
                        return fold, changes, None
                extended = fold.after(fold.number + 1, nonce, changes)
                try:
                    place(layout.record(self._machine, extended.number))
                except FileExists as error:
                    if (failures := failures + 1) > VAIN:
                        raise self._endless(
                            f"record {extended.number} is said to be there each time, and is not to"
                            " be read"
                        ) from error
                else:
                    return fold, changes, extended

    def _is_void(self, nonce: str, number: int) -> bool:
        """
        Find out whether our record came too late. If so, it is removed when this returns, or so old
        that the next compaction removes it.
        """
        for _ in range(VAIN):
            checkpoints, _ = self.entries()
            self._checkpoint = checkpoints[-1] if checkpoints else 0
            if self._checkpoint < number:
                return False
            newest = self._read_checkpoint(self._checkpoint)
            if newest is None:
                continue  # newer checkpoints replaced it
            if newest.nonces.get(number) == nonce:
                return False
            if number > newest.number - KEEP_NONCES:
                # The record that counted is remembered by its nonce, so this file is certainly not
                # it. The removal of that record would leave a gap.
                self._transport.remove(layout.record(self._machine, number))
            return True
        raise self._endless(f"checkpoint {self._checkpoint} is listed, and is not to be read")

    def _endless(self, problem: str) -> BadRecord:
        return BadRecord(
            f"the log of {self._machine} in {self._transport.location} cannot be followed:"
            f" {problem}",
            object=self._machine,
            pool=str(self._transport.location),
            hint="look at the pool on its own host; if other writers really are so many, try again",
        )

    # -- checkpoints -------------------------------------------------------------------------------

    def is_checkpoint_due(self, fold: Fold) -> bool:
        """:returns: whether a checkpoint is due, as far as this object has seen"""
        return self._overdue(fold) >= 0

    def is_turn(self, fold: Fold) -> bool:
        """
        :returns: whether the writer of the last record is the one to write a checkpoint, among
            several writers that see at once that it is due
        """
        overdue = self._overdue(fold)
        return overdue >= 0 and overdue % min(RELIEF, CHECKPOINT_EVERY) == 0

    def _overdue(self, fold: Fold) -> int:
        """
        Return how many records ago a checkpoint became due; negative if it is not due. Large logs
        have fewer checkpoints, and small logs have their first ones earlier.
        """
        every = max(CHECKPOINT_EVERY, min(256, len(fold.states) // 32))
        if every == CHECKPOINT_EVERY:
            every = min(every, max(FIRST_CHECKPOINT, self._checkpoint))
        return fold.number - self._checkpoint - every

    def compact(self) -> list[str]:
        """
        Write a checkpoint if one is due, and delete records and checkpoints far behind the newest
        checkpoint, oldest first.

        :returns: the paths of the deleted files
        """
        fold = self.fold()
        checkpoints, _ = self.entries()
        self._checkpoint = checkpoints[-1] if checkpoints else 0
        if self.is_checkpoint_due(fold):
            self._write_checkpoint(fold)
        checkpoints, records = self.entries()
        if not checkpoints:
            return []
        behind = [
            layout.record(self._machine, number)
            for number in records
            if number <= checkpoints[-1] - KEEP_RECORDS
        ]
        behind += [
            layout.checkpoint(self._machine, number) for number in checkpoints[:-KEEP_CHECKPOINTS]
        ]
        return [path for path in behind if self._transport.remove(path)]

    def _write_checkpoint(self, fold: Fold) -> None:
        content = Checkpoint.of(fold)
        if len(content) > MAX_RECORD:
            content = Checkpoint.of(fold, extents=False)
        if len(content) > MAX_RECORD:
            return  # no reader would read all of it; the records say the same
        try:
            self._transport.create(layout.checkpoint(self._machine, fold.number), content)
        except FileExists:
            return  # another process wrote it: all checkpoints of one number say the same
        self._transport.flush(self._directory)

    def _read_checkpoint(self, number: int) -> Checkpoint | None:
        (content,) = self._transport.read_many(
            [layout.checkpoint(self._machine, number)], MAX_RECORD
        )
        return self._checkpoint_in(content, number) if content is not None else None

    def _checkpoint_in(self, content: bytes, number: int) -> Checkpoint:
        return Checkpoint.from_bytes(
            content, self._machine, number, self._where(layout.checkpoint(self._machine, number))
        )


def fold_all(transport: Transport, logs: Sequence[MachineLog]) -> list[Fold | IntegrityError]:
    """
    Fold several logs, as :meth:`MachineLog.fold`, in a number of round trips that does not grow
    with the number of logs.

    :returns: the folds; in place of a fold, the error if that log cannot be used: it is damaged, or
        of a newer format
    """
    return hold_all(transport, [_or_damage(log.folding()) for log in logs])


def _or_damage(talk: Talk[Fold]) -> Talk[Fold | IntegrityError]:
    try:
        return (yield from talk)
    except IntegrityError as error:
        return error


def _numbers(entries: Iterable[Entry]) -> tuple[list[int], list[int]]:
    checkpoints: list[int] = []
    records: list[int] = []
    for entry in entries:
        if (found := layout.log_entry(entry.name)) is not None:
            (checkpoints if found[0] else records).append(found[1])
    return sorted(checkpoints), sorted(records)
