"""
Blocks are asked for where that helps, and a file system that has none to give says so before
anything is written.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.transports.reserving import WORTH, Reserver

MIB = 1 << 20


@pytest.fixture
def on_a_disk(opened: Callable[..., int], disk: Path) -> int:
    """A file of a file system that is on a block device of its own."""
    return opened("file", b"before", disk)


def blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def test_blocks_are_there_before_anything_is_written(on_a_disk: int) -> None:
    had = blocks(on_a_disk)
    Reserver(on_a_disk).reserve(MIB, 3 * MIB)
    assert 3 * MIB <= blocks(on_a_disk) - had < 4 * MIB
    assert os.pread(on_a_disk, 100, 0) == b"before", "neither its bytes nor its length have changed"


def test_little_is_not_worth_it(on_a_disk: int) -> None:
    had = blocks(on_a_disk)
    Reserver(on_a_disk).reserve(MIB, WORTH - 1)
    assert blocks(on_a_disk) == had


def test_a_file_in_memory_has_no_blocks_to_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: pytest.fail("it was asked"))
    fd = os.memfd_create("test")
    try:
        Reserver(fd).reserve(0, MIB)
    finally:
        os.close(fd)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EPERM])
def test_a_file_system_that_cannot_is_asked_once(
    on_a_disk: int, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    asked = []

    def refuse(*arguments: object) -> int:
        asked.append(arguments)
        raise OSError(code, "in a test")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    reserver = Reserver(on_a_disk)
    reserver.reserve(0, MIB)
    reserver.reserve(MIB, MIB)
    assert len(asked) == 1


def test_no_room(on_a_disk: int) -> None:
    had = blocks(on_a_disk)
    free = os.fstatvfs(on_a_disk)
    with pytest.raises(OSError, match=r"No space|too large") as caught:
        Reserver(on_a_disk).reserve(0, free.f_blocks * free.f_frsize + MIB)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    os.ftruncate(on_a_disk, 0)
    assert blocks(on_a_disk) <= had
