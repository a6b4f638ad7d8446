"""Faults do what they are told, to the calls they are told, and to no others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from statepool.errors import NoSpace, TransportError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.testing.faults import (
    ALWAYS,
    Call,
    Fault,
    FaultyTransport,
    Flip,
    Full,
    Slow,
    Stop,
    Truncate,
    on,
)
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.testing.transport_names import pattern
from statepool.testing.transports import Counter
from statepool.transports.base import Transfer, Transport
from statepool.transports.local import LocalTransport

MIB = 1 << 20
DATA = pattern(12 * MIB)


@pytest.fixture(params=["memory", "local"])
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Transport:
    (tmp_path / "pool").mkdir()
    return (
        MemoryTransport(MemoryStore())
        if request.param == "memory"
        else LocalTransport(Location("file", str(tmp_path / "pool")))
    )


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "source").write_bytes(DATA)
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


FLIPPED = DATA[:70_000] + bytes([DATA[70_000] ^ 0xFF]) + DATA[70_001:]


@pytest.mark.parametrize(
    ("fault", "arrives"),
    [(Flip(offset=70_000), FLIPPED), (Truncate(keep=MIB), DATA[:MIB])],
    ids=["flip", "truncate"],
)
def test_spoilt_bytes_arrive_and_are_what_the_digest_names(
    inner: Transport, source: int, target: int, fault: Fault, arrives: bytes
) -> None:
    inner.store(source, "good", Transfer(len(DATA)))
    faulty = FaultyTransport(inner, fault)
    assert faulty.fetch("good", target, Transfer(len(DATA))).digest == Digest.of(arrives)
    assert os.pread(target, len(DATA) + 1, 0) == arrives
    assert inner.read("good") == DATA, "the file at the other end is as it was"
    assert faulty.store(source, "bad", Transfer(len(DATA))).digest == Digest.of(arrives)
    assert inner.read("bad") == arrives
    assert faulty.read("good", 69_999, 3) == arrives[69_999:70_002]
    faulty.create("small", DATA[:80_000])
    assert inner.read("small") == arrives[:80_000]


@pytest.mark.parametrize("after", [0, 5 * MIB])
def test_stop_in_the_middle(inner: Transport, source: int, target: int, after: int) -> None:
    counter = Counter()
    with pytest.raises(TransportError, match="broke in call 1, store 'a'"):
        FaultyTransport(inner, Stop(after=after)).store(
            source, "a", Transfer(len(DATA), progress=counter)
        )
    assert after - 3 * MIB <= counter.done <= after
    assert inner.stat("a") is None


def test_stop_before_anything_is_done(inner: Transport) -> None:
    faulty = FaultyTransport(inner, Stop(matches=on("create")))
    with pytest.raises(TransportError):
        faulty.create("a", b"1")
    assert inner.scan("") == []


def test_the_second_and_third_call(inner: Transport) -> None:
    faulty = FaultyTransport(inner, Stop(matches=on("stat", path="*.json"), first=2, times=2))
    went_well = []
    for _ in range(5):
        faulty.stat("other")
        try:
            faulty.stat("log/1.json")
            went_well.append(True)
        except TransportError:
            went_well.append(False)
    assert went_well == [True, False, False, True, True]
    assert [call for call in faulty.calls if call.path == "other"][:2] == [
        Call("stat", "other", 1),
        Call("stat", "other", 3),
    ]


def test_another_error(inner: Transport) -> None:
    with pytest.raises(KeyboardInterrupt):
        FaultyTransport(inner, Stop(error=lambda call: KeyboardInterrupt(call.operation))).scan("")


def test_slow_waits_for_every_byte(inner: Transport, source: int) -> None:
    waited: list[float] = []
    FaultyTransport(inner, Slow(rate=MIB, sleep=waited.append)).store(
        source, "a", Transfer(len(DATA))
    )
    assert sum(waited) == pytest.approx(12)


def test_full_counts_over_all_calls(inner: Transport, source: int) -> None:
    faulty = FaultyTransport(inner, Full(matches=on("store", "create"), after=20 * MIB))
    faulty.store(source, "a", Transfer(len(DATA)))
    with pytest.raises(NoSpace):
        faulty.store(source, "b", Transfer(len(DATA)))
    with pytest.raises(NoSpace):
        faulty.create("c", b"1")
    assert [entry.name for entry in inner.scan("")] == ["a"]


def test_several_work_together(inner: Transport) -> None:
    inner.create("a", bytes(10))
    faulty = FaultyTransport(inner, Flip(offset=2), Truncate(keep=4), Flip(offset=3, mask=1))
    assert faulty.read("a") == b"\0\0\xff\1"


def test_predicates() -> None:
    call = Call("fetch", ".statepool/data/blake3-00", 1)
    assert ALWAYS(call)
    assert on("fetch", "store")(call)
    assert not on("store")(call)
    assert on(path="*/data/*")(call)
    assert not on("fetch", path="*/log/*")(call)
