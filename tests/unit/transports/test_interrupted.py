"""
Who presses Ctrl-C twice does not wait for a slow disk, and nothing is done then with the number of
a descriptor that the caller has closed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from statepool.model.progress import NoProgress
from statepool.testing.transport_names import pattern
from statepool.transports import behind, flushing
from statepool.transports.base import Transfer
from statepool.transports.copying import copy
from statepool.transports.flushing import flushed_beside

MIB = 1 << 20
SIZE = 8 * MIB


class Impatient(ThreadPoolExecutor):
    """Waiting for its thread is interrupted."""

    def shutdown(self, wait: bool = True, **options: Any) -> None:
        super().shutdown(wait=False, **options)
        raise KeyboardInterrupt("once more")


class Disk:
    """Takes its time, until it is told to go on."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self.begun = threading.Event()
        self.goes_on = threading.Event()
        self.seen: list[os.stat_result] = []

    def __call__(self, fd: int, *rest: Any) -> Any:
        self.begun.set()
        assert self.goes_on.wait(30)
        self.seen.append(os.fstat(fd))
        return self._call(fd, *rest)


class Interrupted(NoProgress):
    """Is interrupted as soon as the disk is busy."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def advance(self, count: int) -> None:
        assert self._disk.begun.wait(30)
        raise KeyboardInterrupt("the first time")


@pytest.fixture(autouse=True)
def nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(behind, "ThreadPoolExecutor", Impatient)
    monkeypatch.setattr(flushing, "ThreadPoolExecutor", Impatient)
    monkeypatch.setattr(flushing, "STEP", MIB)
    threads, descriptors = threading.enumerate(), os.listdir("/proc/self/fd")
    yield
    assert threading.enumerate() == threads
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def interrupted(work: Callable[[int], object], fd: int, disk: Disk, path: Path) -> None:
    """
    Let ``work`` be interrupted twice, close its descriptor, and let another file have the number
    before the disk goes on.
    """
    before = threading.enumerate()
    with pytest.raises(KeyboardInterrupt, match="once more"):
        work(fd)
    os.close(fd)
    other = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        assert other == fd
        disk.goes_on.set()
        for thread in set(threading.enumerate()) - set(before):
            thread.join(30)
        assert os.fstat(other).st_size == 0
        assert not [found for found in disk.seen if os.path.samestat(found, os.fstat(other))]
    finally:
        os.close(other)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "source").write_bytes(pattern(SIZE))
    with open(tmp_path / "source", "rb") as file:
        yield file.fileno()


@pytest.fixture
def target(tmp_path: Path) -> int:
    """A descriptor that the test closes."""
    return os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)


def test_a_write_that_is_under_way(
    source: int, target: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk = Disk(os.pwrite)
    monkeypatch.setattr(os, "pwrite", disk)
    interrupted(
        lambda fd: copy(source, fd, Transfer(SIZE, progress=Interrupted(disk)), reflink=False),
        target,
        disk,
        tmp_path / "other",
    )
    assert len(disk.seen) == 1


def test_a_flush_that_is_under_way(
    source: int, target: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk = Disk(os.fdatasync)
    monkeypatch.setattr(os, "fdatasync", disk)
    interrupted(
        lambda fd: copy(
            source, fd, Transfer(SIZE, progress=Interrupted(disk)), reflink=False, flush=True
        ),
        target,
        disk,
        tmp_path / "other",
    )
    assert len(disk.seen) == 1


def test_a_flush_beside(target: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = Disk(os.fsync)
    monkeypatch.setattr(os, "fsync", disk)

    def flush(fd: int) -> None:
        with flushed_beside(fd, MIB):
            assert disk.begun.wait(30)

    interrupted(flush, target, disk, tmp_path / "other")
    assert len(disk.seen) == 1
