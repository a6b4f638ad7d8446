"""Flushing behind a writer's back: often enough, never far behind, and no error is lost."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statepool.errors import TransportError
from statepool.transports import flushing
from statepool.transports.base import Transfer
from statepool.transports.copying import copy
from statepool.transports.flushing import FlushBehind, flushed_beside


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushing, "STEP", 10)
    monkeypatch.setattr(flushing, "LEAD", 40)


class Disk:
    """Flushes when it is told to."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.goes_on = threading.Semaphore(0)
        self.flushes = 0
        self.busy = False

    def __call__(self) -> None:
        assert not self.busy, "it is flushed twice at a time"
        self.busy = True
        self.begun.release()
        assert self.goes_on.acquire(timeout=30)
        self.flushes += 1
        self.busy = False


def fail() -> None:
    raise OSError(errno.EIO, "in a test")


def test_little_is_left_to_the_flush_at_the_end() -> None:
    calls: list[str] = []
    with FlushBehind(lambda: lambda: calls.append(threading.current_thread().name)) as behind:
        for _ in range(3):
            behind.wrote(3)
    assert calls == []


def test_it_is_flushed_while_more_is_written() -> None:
    disk = Disk()
    with FlushBehind(lambda: disk) as behind:
        behind.wrote(10)
        assert disk.begun.acquire(timeout=30)
        behind.wrote(39)  # does not wait
        assert disk.flushes == 0
        disk.goes_on.release()
    assert disk.flushes == 1


def test_the_writer_does_not_get_too_far_ahead() -> None:
    disk = Disk()
    with FlushBehind(lambda: disk) as behind:
        behind.wrote(10)
        assert disk.begun.acquire(timeout=30)
        timer = threading.Timer(0.2, disk.goes_on.release, [2])
        timer.start()
        behind.wrote(40)
        assert disk.flushes >= 1, "the writer went on"
        timer.join()
    assert disk.flushes == 2


@pytest.mark.parametrize("more", [[], [1, 1, 1], [40], [10, 10, 10, 10, 10]])
def test_an_error_comes_out_once_at_least(more: list[int]) -> None:
    with pytest.raises(OSError, match="in a test"), FlushBehind(lambda: fail) as behind:
        behind.wrote(10)
        for count in more:
            behind.wrote(count)


def test_the_error_of_the_writer_comes_first() -> None:
    with pytest.raises(KeyboardInterrupt), FlushBehind(lambda: fail) as behind:
        behind.wrote(10)
        raise KeyboardInterrupt


@pytest.mark.parametrize("size", [9, 11])
def test_a_file_is_on_stable_storage_after_it_was_read(
    opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    flushed: list[os.stat_result] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd)))
    file = opened("a")
    with flushed_beside(file, size):
        pass
    assert [os.path.samestat(os.fstat(file), found) for found in flushed] == [True]


@pytest.mark.parametrize("size", [9, 11])
def test_a_file_that_cannot_be_flushed(
    opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: fail())
    with pytest.raises(OSError, match="in a test"), flushed_beside(opened("a"), size):
        pass


def test_a_disk_that_fails_on_the_way(
    opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The kernel tells an error once for a descriptor: the flush at the end would find nothing wrong.
    """
    source, target = opened("a", os.urandom(5 << 20)), opened("b")
    monkeypatch.setattr(os, "fdatasync", lambda fd: fail())
    with pytest.raises(TransportError, match="Input/output error"):
        copy(source, target, Transfer(5 << 20), reflink=False, flush=True)
    assert copy(source, target, Transfer(5 << 20), reflink=False).how == "copy"


def test_a_copy_is_flushed_on_the_way(
    opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flushed: list[os.stat_result] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: flushed.append(os.fstat(fd)))
    source, target = opened("a", os.urandom(5 << 20)), opened("b")
    copy(source, target, Transfer(5 << 20), reflink=False, flush=True)
    assert {os.path.samestat(os.fstat(target), found) for found in flushed} == {True}
