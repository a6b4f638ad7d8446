"""Local files to copy, and file systems of a kind that the machine's own may not be."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """
    ``opened("a", b"data", directory)``: a descriptor of a new file, open for reading and writing.
    """
    fds: list[int] = []

    def make(name: str, data: bytes = b"", directory: Path = tmp_path) -> int:
        (directory / name).write_bytes(data)
        fds.append(os.open(directory / name, os.O_RDWR))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def mounted(where: Path, *options: str | Path) -> Iterator[Path]:
    """A mounted file system, or a skipped test."""
    where.mkdir()
    done = subprocess.run(["mount", *options, where], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")


def made(where: Path, kind: str) -> Iterator[Path]:
    """A new file system of 400 MB, or a skipped test."""
    needs_root()
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"mkfs.{kind} is not installed (Debian: e2fsprogs, xfsprogs, btrfs-progs)")
    image = where / "disk"
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True, capture_output=True)
    yield from mounted(where / "mounted", "-o", "loop", image)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """
    A directory of a file system that is on a block device of its own, wherever temporary files are.
    """
    if os.major(tmp_path.stat().st_dev):
        yield tmp_path
    else:
        yield from made(tmp_path, "ext4")


@pytest.fixture(params=["xfs", "btrfs"])
def reflinks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory whose files can share blocks."""
    yield from made(tmp_path, str(request.param))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    needs_root()
    yield from mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=8m", "none")
