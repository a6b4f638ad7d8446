"""The file system in memory, where the contract of transports does not reach."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from statepool.errors import NoSpace, TransportError, UnsafeImage
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.base import Transfer


def test_transports_with_one_store_see_the_same() -> None:
    store = MemoryStore()
    here, there = MemoryTransport(store), MemoryTransport(store)
    here.create("a", b"1")
    assert there.read("a") == b"1"
    assert here.identity == there.identity
    assert MemoryTransport(MemoryStore()).identity != here.identity
    assert MemoryTransport(MemoryStore()).scan("") == []


def test_the_clock_is_the_one_that_is_given() -> None:
    times = iter(range(1000, 2000))
    transport = MemoryTransport(MemoryStore(clock=lambda: next(times)))
    transport.create("a", b"1")
    transport.create("b", b"1")
    first, second = transport.stat("a"), transport.stat("b")
    assert first is not None
    assert second is not None
    assert 1000 <= first.mtime_ns < second.mtime_ns


def test_a_store_can_be_full(tmp_path: Path) -> None:
    transport = MemoryTransport(MemoryStore(capacity=100))
    transport.create("a", b"x" * 60)
    transport.link("a", "b")
    assert transport.free_space() == 40
    with pytest.raises(NoSpace):
        transport.create("c", b"x" * 41)
    (tmp_path / "source").write_bytes(b"x" * 41)
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    try:
        with pytest.raises(NoSpace):
            transport.store(fd, "c", Transfer(41))
    finally:
        os.close(fd)
    transport.remove("a")
    assert transport.free_space() == 40
    transport.remove("b")
    assert transport.free_space() == 100
    assert transport.scan("") == []


def test_links_are_not_followed() -> None:
    transport = MemoryTransport(MemoryStore())
    transport.make_directory("a/b")
    transport.create("a/b/c", b"1")
    transport.symlink("a/b", "d")
    transport.symlink("../b/../b/./c", "a/b/l")
    for name in ("d/c", "a/b/l"):
        with pytest.raises(UnsafeImage):
            transport.read(name)
    assert transport.read("a/b/c") == b"1"


def test_a_directory_gives_way_to_nothing() -> None:
    transport = MemoryTransport(MemoryStore())
    transport.make_directory("a/b")
    transport.make_directory("c")
    transport.create("f", b"1")
    for use in (
        lambda: transport.rename("f", "a"),
        lambda: transport.rename("a", "c"),
        lambda: transport.rename("a", "f"),
        lambda: transport.link("a", "x"),
        lambda: transport.remove_directory("f"),
        lambda: transport.flush("f"),
    ):
        with pytest.raises(TransportError):
            use()
    transport.rename("a", "x")
    assert [entry.name for entry in transport.scan("x")] == ["b"]
