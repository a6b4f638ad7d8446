"""A server whose answers contradict each other, without end: whoever asks it comes to an end."""

from __future__ import annotations

import fnmatch
import itertools
import json
from collections.abc import Callable

import pytest

from statepool.errors import BadRecord, FileExists, IntegrityError, LockTimeout, MissingFile
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.pools import claims, layout, staging, view
from statepool.pools import log as log_module
from statepool.pools.claims import Claims, epochs
from statepool.pools.fold import Publish
from statepool.pools.log import MachineLog
from statepool.pools.pool import Pool
from statepool.pools.records import Record
from statepool.pools.staging import read_markers, restore
from statepool.pools.view import View
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports import base
from statepool.transports.base import Entry, FileKind

State = Callable[..., Manifest]

DIGEST = Digest.of(b"bytes")


class Liar(MemoryTransport):
    """
    A server that says of some files what is not so.

    :ivar exist: patterns of paths that cannot be created, since they are said to be there
    :ivar listed: names that are listed in a directory besides those that are there
    """

    exist: str = ""
    listed: tuple[str, str] = ("", "")

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        if fnmatch.fnmatch(path, self.exist):
            raise FileExists(f"{path} is there", path=path)
        super().create(path, data, flush=flush)

    def scan(self, directory: str) -> list[Entry]:
        found = super().scan(directory)
        return (
            [*found, Entry(self.listed[1], FileKind.FILE)] if directory == self.listed[0] else found
        )


class Endless(MemoryTransport):
    """A server that has a record for each number that is asked for after the first one."""

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        try:
            return super().read(path, offset, size)
        except MissingFile:
            name = path.rpartition("/")[2]
            number = int(name.partition(".")[0]) if name[0].isdigit() else 0
            if not number:
                raise
            manifest = Manifest("vm1/disk", f"s{number}", size=1, digest=Digest.of(b"x"))
            return Record(number, "nonce", 0.0, "by", (Publish(manifest),)).to_bytes()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits, small ones."""
    for module in (claims, log_module, staging, view):
        monkeypatch.setattr(module, "VAIN", 20)
    monkeypatch.setattr(log_module, "MOST_RECORDS", 200)


def open_log(transport: MemoryTransport) -> MachineLog:
    transport.make_directory(layout.log("vm1"))
    numbers = itertools.count(1)
    return MachineLog(transport, "vm1", nonce=lambda: f"n{next(numbers)}", clock=lambda: 1000.0)


def test_a_record_that_is_said_to_be_there_and_cannot_be_read(state: State) -> None:
    transport = Liar(MemoryStore())
    log = open_log(transport)
    transport.exist = f"{layout.log('vm1')}/*"
    with pytest.raises(BadRecord, match="record 1 is said to be there each time"):
        log.append(lambda fold: [Publish(state("install"))])


def test_a_checkpoint_that_is_listed_and_cannot_be_read(state: State) -> None:
    transport = Liar(MemoryStore())
    log = open_log(transport)
    log.append(lambda fold: [Publish(state("install"))])
    transport.listed = (layout.log("vm1"), layout.checkpoint("vm1", 99).rpartition("/")[2])
    with pytest.raises(BadRecord, match="checkpoint 99 is listed"):
        log.append(lambda fold: [Publish(state("customize"))])


def test_checkpoints_that_make_each_record_void(state: State) -> None:
    class Ahead(MemoryTransport):
        """A checkpoint that does not know a record is there as soon as the record is."""

        def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
            super().create(path, data, flush=flush)
            if path.startswith(layout.log("vm1")) and "checkpoint" not in path:
                number = int(path.rpartition("/")[2].partition(".")[0]) + 1
                content = {
                    "format": 1,
                    "number": number,
                    "nonces": {str(number): "other", str(number - 1): "other"},
                    "states": [],
                    "superseded": [],
                }
                super().create(layout.checkpoint("vm1", number), json.dumps(content).encode())

    transport = Ahead(MemoryStore())
    with pytest.raises(BadRecord, match="each new record of ours is said to have come too late"):
        open_log(transport).append(lambda fold: [Publish(state("install"))])


def test_records_without_end(state: State) -> None:
    store = MemoryStore()
    open_log(MemoryTransport(store)).append(lambda fold: [Publish(state("install"))])
    log = MachineLog(Endless(store), "vm1")
    log.fold()  # what is listed
    with pytest.raises(BadRecord, match="more than 200 records came while it was read"):
        log.fold()


def test_bytes_that_are_said_to_lie_aside_and_cannot_be_brought_back(pool: Pool) -> None:
    assert isinstance(pool.transport, MemoryTransport)
    transport = Liar(pool.transport.memory)
    transport.listed = (layout.TRASH, layout.trash("nonce", DIGEST).rpartition("/")[2])
    assert not restore(transport, DIGEST)


def test_a_claim_that_is_said_to_be_there_and_is_not_listed(pool: Pool) -> None:
    assert isinstance(pool.transport, MemoryTransport)
    transport = Liar(pool.transport.memory)
    transport.exist = f"{layout.LOCKS}/*"
    with pytest.raises(LockTimeout), Claims(transport).hold("fetch-x", 60):
        pytest.fail("there was no claim")


def test_a_log_that_grows_each_time_it_is_looked_at(pool: Pool, state: State) -> None:
    numbers = itertools.count(1)

    def fold() -> object:
        found = pool.fold("vm1").copy()
        found.number = next(numbers)
        return found

    View(pool.transport).update([state("install").id], fold)  # type: ignore[arg-type]
    assert next(numbers) < 100


def test_markers_that_are_longer_than_any(
    transport: MemoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Each may be as long as a record, and be a hole: they are not read without end, nor one after the
    other.
    """
    transport.make_directory(layout.INCOMING)
    for number in range(3):
        transport.create(layout.marker(f"{number:016x}"), bytes(40))
    assert len(read_markers(transport)) == 3
    monkeypatch.setattr(base, "MOST_TOGETHER", 100)
    with pytest.raises(IntegrityError, match=r"has more than"):
        read_markers(transport)


def test_beats_in_any_number_are_looked_through_once() -> None:
    names = [f"fetch-x.1.{number}" for number in range(1, 100_001)]
    (epoch,) = epochs(names)["fetch-x"]
    assert len(epoch.files) == len(epoch.beats) == 100_000
    assert not epoch.ended


def test_the_last_claim_of_all(pool: Pool) -> None:
    """The greatest number that a claim can have is no end of all claims."""
    last = f"{layout.LOCKS}/fetch-x.{'9' * 19}"
    pool.transport.create(f"{last}.end", b"")
    with Claims(pool.transport).hold("fetch-x", 1):
        pass
