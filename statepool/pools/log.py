"""
The log of one machine: records in their one order, each created exclusively, and checkpoints that stand for all before them.

The rules (``docs/design.rst`` says why they suffice):

* Record N+1 is created only by a writer that has folded N, and only if nobody created it before.
* After creating N+1 its writer looks for a checkpoint at or after N+1. If there is one that does not know this record, the record came too late,
  counts for nothing, and its writer removes it and begins again.
* Records behind a checkpoint are deleted oldest first, and the last hundred stay. So whoever has seen N, sees N+1, and still sees *the same* N after
  that, knows that N+1 is a record that counts. The same by its nonce: where N was deleted, a writer that came too late may be about to take back
  another N.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from attrs import frozen

from statepool.errors import BadRecord, FileExists, MissingFile, UnsupportedFormat
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools import layout
from statepool.pools.fold import KEEP_NONCES, Change, Fold, Publish, Remove
from statepool.pools.writer import Writer
from statepool.transports.base import Transport

CHECKPOINT_EVERY = 32
"""Records between checkpoints of a small log."""

KEEP_RECORDS = 100
"""Records that stay behind a checkpoint."""

KEEP_CHECKPOINTS = 2
"""Checkpoints that stay, so that a directory being listed while they change still shows one."""

MAX_RECORD = 64 << 20
"""Longest record or checkpoint that is read, in bytes."""

_ATTEMPTS = 8
"""How often a fold begins again because records were deleted under it. Each deletion stands for dozens of records written meanwhile."""

Nonce = Callable[[], str]
Clock = Callable[[], float]


def random_nonce() -> str:
    """:returns: a name that nobody else chooses"""
    return os.urandom(8).hex()


@frozen
class Record:
    """
    One change to the states of a machine.

    :param number: its place in the order, from 1
    :param nonce: what its writer knows it by
    :param time: seconds since the epoch, by the writer's clock; for people only
    :param by: the writer
    :param changes: what it did
    """

    number: int
    nonce: str
    time: float
    by: str
    changes: tuple[Change, ...]

    def to_bytes(self) -> bytes:
        """:returns: the content of its file"""
        return _encode(
            {
                "format": layout.FORMAT,
                "number": self.number,
                "nonce": self.nonce,
                "time": self.time,
                "by": self.by,
                "changes": [change.to_json() for change in self.changes],
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes, number: int, where: str) -> Record:
        """
        :param content: what is in the file
        :param number: what the file's name says
        :param where: the file, for messages
        :raises BadRecord: it is not a record, or not this one
        """
        data = decode(content, where)
        changes = data.get("changes")
        if data.get("number") != number or not isinstance(changes, list) or not changes:
            raise BadRecord(f"{where} is not record {number}", path=where)
        return cls(number, _text(data, "nonce", where), _number(data, "time", where), _text(data, "by", where), tuple(_changes(changes, where)))


def _changes(changes: list[Any], where: str) -> list[Change]:
    result: list[Change] = []
    for change in changes:
        if not isinstance(change, dict) or ("publish" in change) == ("remove" in change):
            raise BadRecord(f"a change in {where} neither publishes nor removes", path=where)
        try:
            if "publish" in change:
                supersedes = change.get("supersedes")
                result.append(Publish(Manifest.from_json(change["publish"]), Digest.parse(str(supersedes)) if supersedes is not None else None))
            else:
                result.append(_remove(change["remove"]))
        except BadRecord as error:
            raise BadRecord(f"{error.message}, in {where}", path=where) from error
    return result


def _remove(data: Any) -> Remove:
    if not isinstance(data, dict) or not isinstance(data.get("object"), str) or not isinstance(data.get("state"), str):
        raise BadRecord("a removal does not say of what")
    if data.get("kind", "image") not in Kind.__members__.values():
        raise BadRecord("a removal has an unknown kind")
    digest = data.get("digest")
    return Remove(StateId(data["object"], data["state"], Kind(data.get("kind", "image"))), Digest.parse(str(digest)) if digest is not None else None)


def _encode(data: dict[str, Any]) -> bytes:
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def decode(content: bytes, where: str) -> dict[str, Any]:
    """
    :param content: what is in a file of ours
    :param where: the file, for messages
    :returns: the JSON object in it
    :raises BadRecord: it is not one
    :raises UnsupportedFormat: it is of a format we do not know
    """
    try:
        data = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{where} is not JSON", path=where, hint="restore the file, or remove the pool's damage with a copy of it") from error
    if not isinstance(data, dict):
        raise BadRecord(f"{where} is not a JSON object", path=where)
    version = data.get("format")
    if type(version) is not int or version < 1:
        raise BadRecord(f"{where} does not say its format", path=where)
    if version > layout.FORMAT:
        raise UnsupportedFormat(f"{where} is of format {version}, this version knows {layout.FORMAT}", path=where, hint="install a newer statepool")
    return data


def _text(data: dict[str, Any], name: str, where: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise BadRecord(f"{where} has no {name}", path=where)
    return value


def _number(data: dict[str, Any], name: str, where: str) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord(f"{where} has no {name}", path=where)
    return float(value)


class MachineLog:
    """
    Reads and extends the log of one machine.

    :param transport: the pool's
    :param machine: whose log
    :param nonce: chooses names, for tests
    :param clock: tells the time that records carry, in seconds since the epoch
    """

    def __init__(self, transport: Transport, machine: str, *, nonce: Nonce = random_nonce, clock: Clock = time.time) -> None:
        self._transport = transport
        self._machine = machine
        self._directory = layout.log(machine)
        self._nonce = nonce
        self._clock = clock
        self._last: Fold | None = None
        self._checkpoint = 0

    def _where(self, path: str) -> str:
        return f"{self._transport.location}/{path}"

    # -- reading -----------------------------------------------------------------------------------------------------------------------------------

    def fold(self) -> Fold:
        """
        :returns: the states of the machine, as of a moment during this call
        :raises BadRecord: the log is damaged
        """
        last = self._last
        if last is not None and last.number:
            if self._is_newest(last):
                return last
            extended = self._extend(last)
            if extended is not None:
                self._last = extended
                return extended
        self._last = self._fold_all()
        return self._last

    def _is_newest(self, last: Fold) -> bool:
        """Whether there is nothing after ``last``. The order of the two questions matters: records are deleted oldest first."""
        return self._transport.stat(layout.record(self._machine, last.number + 1)) is None and self._vouches(last)

    def _vouches(self, base: Fold) -> bool:
        """Whether the records that were read after ``base`` count, because its last one is still there."""
        if not base.number:
            # Before the first record there is none that could vouch for it: without a checkpoint none was ever deleted.
            return not self.entries()[0]
        path = layout.record(self._machine, base.number)
        try:
            content = self._transport.read(path, 0, MAX_RECORD)
        except MissingFile:
            return False
        return decode(content, self._where(path)).get("nonce") == base.nonces.get(base.number)

    def _extend(self, last: Fold) -> Fold | None:
        """:returns: ``last`` and what came after it, or None if too much has come to tell"""
        fold = last.copy()
        try:
            while (record := self._read(fold.number + 1)) is not None:
                self._apply(fold, record)
        except BadRecord:
            if self._vouches(last):
                raise
            return None
        return fold if self._vouches(last) else None

    def _fold_all(self) -> Fold:
        for _ in range(_ATTEMPTS):
            fold = self._try_fold_all()
            if fold is not None:
                return fold
        raise BadRecord(
            f"the log of {self._machine} in {self._transport.location} has a gap: records are missing between those that are there",
            object=self._machine,
            pool=str(self._transport.location),
            hint="restore the missing files; nothing of this machine is used until then",
        )

    def _try_fold_all(self) -> Fold | None:
        """:returns: the fold, or None if what was listed and what was read do not fit together"""
        checkpoints, records = self.entries()
        if checkpoints:
            base = self._read_checkpoint(checkpoints[-1])
            if base is None:
                return None
        else:
            base = Fold(self._machine)
        fold = base.copy()
        try:
            for number in range(base.number + 1, (records[-1] if records else 0) + 1):
                record = self._read(number)
                if record is None:
                    return None
                self._apply(fold, record)
        except BadRecord:
            if self._vouches(base):
                raise
            return None
        return fold if fold.number == base.number or self._vouches(base) else None

    def entries(self) -> tuple[list[int], list[int]]:
        """:returns: the numbers of the checkpoints and of the records that are there, each in order"""
        found = [entry for entry in (layout.log_entry(entry.name) for entry in self._transport.scan(self._directory)) if entry is not None]
        return sorted(number for is_checkpoint, number in found if is_checkpoint), sorted(
            number for is_checkpoint, number in found if not is_checkpoint
        )

    def _read(self, number: int) -> Record | None:
        path = layout.record(self._machine, number)
        try:
            content = self._transport.read(path, 0, MAX_RECORD)
        except MissingFile:
            return None
        return Record.from_bytes(content, number, self._where(path))

    def _apply(self, fold: Fold, record: Record) -> None:
        try:
            fold.apply(record.number, record.nonce, record.changes)
        except BadRecord as error:
            where = self._where(layout.record(self._machine, record.number))
            raise BadRecord(f"{error.message}: {where} cannot be believed", object=self._machine, path=where) from error

    def records(self) -> list[Record]:
        """:returns: the records that are still there and count, oldest first"""
        fold = self.fold()
        found = []
        for number in self.entries()[1]:
            record = self._read(number) if number <= fold.number else None
            if record is not None and fold.nonces.get(number, record.nonce) == record.nonce:
                found.append(record)
        return found

    # -- writing -----------------------------------------------------------------------------------------------------------------------------------

    def append(self, plan: Callable[[Fold], Sequence[Change]]) -> tuple[Fold, bool]:
        """
        Add one record.

        :param plan: what to change, given what is there; called again whenever somebody else was faster. Raises if the change is not allowed any
            more; answers nothing if there is nothing to do.
        :returns: the fold with the change, and whether a record was written
        """
        nonce = self._nonce()
        while True:
            fold = self.fold()
            changes = tuple(plan(fold))
            if not changes:
                return fold, False
            record = Record(fold.number + 1, nonce, self._clock(), str(Writer.current()), changes)
            extended = fold.after(record.number, nonce, changes)
            if self._create(record) and not self._is_void(record):
                self._last = extended
                return extended, True
            self._last = None

    def _create(self, record: Record) -> bool:
        path = layout.record(self._machine, record.number)
        if record.number == 1:
            self._transport.make_directory(self._directory)
        try:
            self._transport.create(path, record.to_bytes())
        except FileExists:
            return False
        self._transport.flush(self._directory)
        return True

    def _is_void(self, record: Record) -> bool:
        """Whether our record came too late; if so, it is gone when this returns, or so old that the next compaction takes it."""
        while True:
            checkpoints, _ = self.entries()
            self._checkpoint = checkpoints[-1] if checkpoints else 0
            if self._checkpoint < record.number:
                return False
            newest = self._read_checkpoint(self._checkpoint)
            if newest is None:
                continue  # newer ones took its place
            if newest.nonces.get(record.number) == record.nonce:
                return False
            if record.number > newest.number - KEEP_NONCES:
                # Surely not the one that counted: that one is remembered, and taking it away would leave a gap.
                self._transport.remove(layout.record(self._machine, record.number))
            return True

    # -- checkpoints -------------------------------------------------------------------------------------------------------------------------------

    def is_checkpoint_due(self, fold: Fold) -> bool:
        """:returns: whether it is time for another checkpoint, as far as this object saw; a large one is written more seldom"""
        return fold.number - self._checkpoint >= max(CHECKPOINT_EVERY, min(256, len(fold.states) // 32))

    def compact(self) -> list[str]:
        """
        Write a checkpoint of what is there, if one is due, and delete records and checkpoints far behind the newest, oldest first.

        :returns: what was deleted
        """
        fold = self.fold()
        checkpoints, _ = self.entries()
        self._checkpoint = checkpoints[-1] if checkpoints else 0
        if self.is_checkpoint_due(fold):
            self._write_checkpoint(fold)
        checkpoints, records = self.entries()
        if not checkpoints:
            return []
        behind = [layout.record(self._machine, number) for number in records if number <= checkpoints[-1] - KEEP_RECORDS]
        behind += [layout.checkpoint(self._machine, number) for number in checkpoints[:-KEEP_CHECKPOINTS]]
        return [path for path in behind if self._transport.remove(path)]

    def _write_checkpoint(self, fold: Fold) -> None:
        content = _encode(
            {
                "format": layout.FORMAT,
                "number": fold.number,
                "nonces": {str(number): nonce for number, nonce in fold.nonces.items()},
                "states": [manifest.to_json() for manifest in fold.states.values()],
                "superseded": [manifest.to_json() for manifest in fold.superseded],
            }
        )
        try:
            self._transport.create(layout.checkpoint(self._machine, fold.number), content)
        except FileExists:
            return  # somebody else wrote it: all checkpoints of one number say the same
        self._transport.flush(self._directory)

    def _read_checkpoint(self, number: int) -> Fold | None:
        path = layout.checkpoint(self._machine, number)
        where = self._where(path)
        try:
            data = decode(self._transport.read(path, 0, MAX_RECORD), where)
        except MissingFile:
            return None
        nonces = data.get("nonces")
        states, superseded = data.get("states"), data.get("superseded")
        if data.get("number") != number or not isinstance(nonces, dict) or not isinstance(states, list) or not isinstance(superseded, list):
            raise BadRecord(f"{where} is not checkpoint {number}", path=where)
        kept = {int(key): str(nonce) for key, nonce in nonces.items() if key.isascii() and key.isdigit() and int(key) > number - KEEP_NONCES}
        return Fold.restore(self._machine, number, kept, map(Manifest.from_json, states), map(Manifest.from_json, superseded))
