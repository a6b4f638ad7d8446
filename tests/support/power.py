"""Power cuts: a file system of its own is shut down without its journal, and mounted again."""

from __future__ import annotations

import fcntl
import gc
import itertools
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import frozen

from tests.support.crash import SystemCall

EXT4_IOC_SHUTDOWN = 0x8004587D
"""``_IOR('X', 125, __u32)`` in ``fs/ext4/ext4.h``."""

NO_LOG_FLUSH = 2
"""``EXT4_GOING_FLAGS_NOLOGFLUSH``: not even what the journal has in memory is written."""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@frozen
class Disk:
    """
    A disk of its own.

    :param image: the file that is the disk
    :param new: what it was when all had just been made
    :param place: where it is mounted
    """

    image: Path
    new: Path
    place: Path

    def mount(self) -> None:
        # Nothing is written of its own accord for five minutes.
        assert run("mount", "-o", "loop,commit=300", self.image, self.place).returncode == 0

    def unmount(self) -> None:
        gc.collect()  # a pool that an error refers to has its directory open
        assert run("umount", self.place).returncode == 0

    def renew(self) -> None:
        shutil.copyfile(self.new, self.image)
        self.mount()

    def cut(self) -> None:
        """The power goes, and comes back."""
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(descriptor)
        self.unmount()
        self.mount()


@contextmanager
def disk_with(place: Path, fill: Callable[[Path], None]) -> Iterator[Disk]:
    """
    Yield a disk, which is not mounted yet.

    :param place: a directory for it
    :param fill: is given the directory where it is mounted, and puts there what is to be on it
    """
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk and cut its power")
    image, new, mounted = place / "disk.img", place / "new.img", place / "mounted"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (Debian: e2fsprogs)")
    assert run("mkfs.ext4", "-q", image).returncode == 0
    if (done := run("mount", "-o", "loop", image, mounted)).returncode != 0:
        pytest.skip(f"a loop device cannot be mounted here: {done.stderr.strip()}")
    try:
        fill(mounted)
    finally:
        run("umount", mounted)
    shutil.copyfile(image, new)
    yield Disk(image, new, mounted)
    run("umount", "-l", mounted)


def between(calls: list[SystemCall]) -> list[SystemCall]:
    """
    The moments after something was flushed, and after names have changed: what else is there is
    lost in any case.
    """
    return [
        call
        for last, call in itertools.pairwise(calls)
        if last.kind in ("fsync", "link", "rename", "unlink", "pwrite64")
    ]
