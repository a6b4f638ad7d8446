from __future__ import annotations

import gc
import json
import os
import time
from pathlib import Path

import pytest
from attrs import evolve

from statepool.errors import BadRecord, FileExists, IntegrityError, UnsupportedFormat
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.pools.staging import LOCKING, Marker, Staging, is_let_go, read_markers, restore
from statepool.pools.writer import Writer
from statepool.testing.memory import MemoryTransport
from statepool.transports.local import LocalTransport

DIGEST = Digest.of(b"x")


def names(transport: MemoryTransport, directory: str) -> list[str]:
    return sorted(entry.name for entry in transport.scan(directory))


def test_a_marker_is_there_first_and_goes_last(pool: Pool, transport: MemoryTransport) -> None:
    staging = pool.stage([DIGEST], path="/work.qcow2")
    assert read_markers(transport) == [
        Marker("n1", frozenset([DIGEST]), Writer.current(), {"path": "/work.qcow2"})
    ]
    transport.create(staging.path(DIGEST), b"x")
    staging.end()
    assert names(transport, layout.INCOMING) == []


def test_gathered_bytes_get_their_name(pool: Pool, transport: MemoryTransport) -> None:
    staging = pool.stage([DIGEST])
    transport.create(staging.path(DIGEST), b"x")
    staging.settle([DIGEST])
    assert transport.read(layout.data(DIGEST)) == b"x"
    transport.remove(layout.data(DIGEST))
    staging.settle([DIGEST])
    assert transport.read(layout.data(DIGEST)) == b"x"


def test_bytes_that_are_there_are_used(pool: Pool, transport: MemoryTransport) -> None:
    transport.create(layout.data(DIGEST), b"x")
    pool.stage([DIGEST]).settle([DIGEST])


def test_bytes_in_the_trash_are_brought_back(pool: Pool, transport: MemoryTransport) -> None:
    transport.create(layout.trash("someone", DIGEST), b"x")
    pool.stage([DIGEST]).settle([DIGEST])
    assert transport.read(layout.data(DIGEST)) == b"x"
    assert names(transport, layout.TRASH) == []


def test_bytes_that_are_nowhere(pool: Pool, transport: MemoryTransport) -> None:
    transport.create(layout.trash("someone", Digest.of(b"else")), b"else")
    with pytest.raises(IntegrityError, match=DIGEST.hex):
        pool.stage([DIGEST]).settle([DIGEST])
    assert not restore(transport, DIGEST)


def test_bytes_that_are_moved_about_by_two_collectors_are_found(
    pool: Pool, transport: MemoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, one, two = layout.data(DIGEST), layout.trash("one", DIGEST), layout.trash("two", DIGEST)
    transport.create(one, b"x")
    moves = iter([(one, data), (data, two), (two, data)])
    scan, stat = MemoryTransport.scan, MemoryTransport.stat

    def move(transport: MemoryTransport) -> None:
        if step := next(moves, None):
            transport.rename(*step)

    def stat_then_move(self: MemoryTransport, path: str) -> object:
        found = stat(self, path)
        move(self)
        return found

    def scan_then_move(self: MemoryTransport, path: str) -> object:
        found = scan(self, path)
        move(self)
        return found

    monkeypatch.setattr(MemoryTransport, "stat", stat_then_move)
    monkeypatch.setattr(MemoryTransport, "scan", scan_then_move)
    assert restore(transport, DIGEST)


def test_a_nonce_is_used_once(transport: MemoryTransport, pool: Pool) -> None:
    marker = Marker("same", frozenset(), Writer.current())
    Staging.begin(transport, marker)
    with pytest.raises(FileExists):
        Staging.begin(transport, marker)


def test_files_without_the_form_of_a_marker_are_none(
    transport: MemoryTransport, pool: Pool
) -> None:
    transport.create(f"{layout.INCOMING}/n-bytes", b"")
    transport.create(f"{layout.INCOMING}/n.clock", b"")
    assert read_markers(transport) == []


@pytest.mark.parametrize(
    "lie",
    [{"digests": "x"}, {"digests": ["x"]}, {"writer": None}, {"facts": []}, {"format": None}],
    ids=str,
)
def test_a_marker_that_lies(transport: MemoryTransport, pool: Pool, lie: dict[str, object]) -> None:
    data = json.loads(Marker("n", frozenset([DIGEST]), Writer.current()).to_bytes())
    transport.create(layout.marker("n"), json.dumps({**data, **lie}).encode())
    with pytest.raises(BadRecord):
        read_markers(transport)


def test_a_marker_of_a_newer_format(transport: MemoryTransport, pool: Pool) -> None:
    transport.create(layout.marker("n"), b'{"format": 2}')
    with pytest.raises(UnsupportedFormat):
        read_markers(transport)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"[" * 100_000], ids=["empty", "zeros", "deep"]
)
def test_a_marker_that_nobody_can_read_speaks_for_nobody(
    transport: MemoryTransport, content: bytes
) -> None:
    transport.make_directory(layout.INCOMING)
    transport.create(layout.marker("n1"), content)
    (found,) = read_markers(transport)
    assert found.writer.is_dead


# -- writers in other containers of one host -------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> LocalTransport:
    transport = LocalTransport(Location("file", str(tmp_path)))
    transport.make_directory(layout.INCOMING)
    return transport


def test_whoever_holds_the_lock_of_its_marker_lives(here: LocalTransport) -> None:
    staging = Staging.begin(
        here, Marker("n1", frozenset([DIGEST]), Writer.current(), {"intent": "set"})
    )
    (marker,) = read_markers(here)
    assert marker.locked
    later = time.time() + LOCKING + 10
    assert not is_let_go(here, marker, later)
    del staging  # as the kernel does with all that a process has when that is killed
    gc.collect()
    assert is_let_go(here, marker, later)
    assert not is_let_go(here, marker, time.time()), "it may just be about to be locked"
    assert not is_let_go(
        here, evolve(marker, writer=evolve(marker.writer, boot="another")), later
    ), "locks say nothing of other hosts"
    assert not is_let_go(here, evolve(marker, locked=False), later), "an older version has none"


def test_a_lock_ends_with_the_staging(here: LocalTransport) -> None:
    before = len(os.listdir("/proc/self/fd"))
    Staging.begin(
        here, Marker("n1", frozenset([DIGEST]), Writer.current(), {"intent": "set"})
    ).end()
    assert len(os.listdir("/proc/self/fd")) == before
    assert read_markers(here) == []
