"""
Power cuts: a file system of its own is shut down without its journal, so that everything is lost
that was not flushed, and mounted again.

What a set has promised is there. What was under way is there whole or not at all; a cache may have
lost what a get brought, and brings it again.
"""

from __future__ import annotations

import fcntl
import gc
import itertools
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from attrs import evolve, frozen

import statepool
from statepool.pools import writer
from tests.support.crash import EVERY, SystemCall, changing_calls, kill_at

if TYPE_CHECKING:
    from conftest import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

EXT4_IOC_SHUTDOWN = 0x8004587D
"""``_IOR('X', 125, __u32)`` in ``fs/ext4/ext4.h``."""

NO_LOG_FLUSH = 2
"""``EXT4_GOING_FLAGS_NOLOGFLUSH``: not even what the journal has in memory is written."""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@frozen
class Disk:
    """
    A disk with the lab on it.

    :param lab: on the disk, while it is mounted
    :param image: the file that is the disk
    :param new: what it was when the lab had just been made
    """

    lab: Lab
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


@pytest.fixture
def disk(tmp_path: Path, new_lab: Callable[[Path], Lab]) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk and cut its power")
    image, new, place = tmp_path / "disk.img", tmp_path / "new.img", tmp_path / "mounted"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (Debian: e2fsprogs)")
    assert run("mkfs.ext4", "-q", image).returncode == 0
    if (done := run("mount", "-o", "loop", image, place)).returncode != 0:
        pytest.skip(f"a loop device cannot be mounted here: {done.stderr.strip()}")
    try:
        lab = new_lab(place / "lab")
    finally:
        run("umount", place)
    shutil.copyfile(image, new)
    yield Disk(lab, image, new, place)
    run("umount", "-l", place)


@pytest.fixture
def rebooted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on the host has been started anew, and all writers of before are dead."""
    real = writer._current

    def reboot() -> None:
        monkeypatch.setattr(writer, "_current", lambda pid: evolve(real(pid), boot="after-the-cut"))

    return reboot


def test_what_a_set_promised(disk: Disk, rebooted: Callable[[], None]) -> None:
    disk.renew()
    lab = disk.lab
    stored = lab.handle("cache").set("connect", source=lab.root / "work.qcow2")
    assert stored.complete
    assert all(at.durable for at in stored.pools)
    disk.cut()
    rebooted()
    lab.require_whole()
    for pool in ("cache", "pool"):
        assert lab.digests(pool)["connect"] == stored.digest
    lab.require_usable("work.qcow2", "work")  # at once
    lab.handle("other").get("connect", to=lab.root / "far.qcow2")
    lab.require_usable("far.qcow2", "work")
    lab.require_clean()
    assert lab.is_like(lab.root / "pool/vm1/disk/connect.qcow2", "work")


def test_what_a_get_brought(disk: Disk, rebooted: Callable[[], None]) -> None:
    """It was not flushed, so it is hashed once more or fetched again, but never believed."""
    disk.renew()
    lab = disk.lab
    lab.handle("other").get("customize", to=lab.root / "far.qcow2")
    disk.cut()
    rebooted()
    got = lab.handle("other").get("customize", to=lab.root / "again.qcow2")
    assert got.verified is not statepool.Verified.TRUSTED
    lab.require_usable("again.qcow2", "customize")
    lab.require_whole()


@pytest.mark.parametrize("step", ["set", "set-copied", "get", "unset"])
@pytest.mark.usefixtures("strace", "alone")
def test_cut_in_the_middle(disk: Disk, step: str, rebooted: Callable[[], None]) -> None:
    disk.renew()
    lab = disk.lab
    calls = between(changing_calls(lab.step(step), cwd=lab.root))
    disk.unmount()
    assert len(calls) > 10
    rebooted()
    failures = []
    for call in calls[::EVERY]:
        disk.renew()
        kill_at(lab.step(step), call, cwd=lab.root)
        disk.cut()
        try:
            check_after(lab, step)
        except (AssertionError, statepool.StatePoolError, OSError) as error:
            failures.append(f"after a cut of {step} at {call}: {type(error).__name__}: {error}")
        disk.unmount()
    assert not failures, "\n\n".join(failures)


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


def check_after(lab: Lab, step: str) -> None:
    for name in ("work", "linked", "spare"):
        assert (lab.root / f"{name}.qcow2").is_file(), f"{name}.qcow2 is gone"
    if step != "unset":
        lab.handle("cache").get("install")
    for name in ("work", "linked"):
        lab.require_usable(f"{name}.qcow2", name)
    if step == "get":
        lab.handle("other").get("customize", to=lab.root / "far.qcow2", overwrite=True)
        lab.require_usable("far.qcow2", "customize")
    elif step == "unset":
        try:
            lab.handle("cache").unset("install", cascade=True, scope="all")
        except statepool.NotFound:
            pass  # it was done before the cut
    else:
        name = "work" if step == "set" else "linked"
        assert lab.handle("cache").set("connect", source=lab.root / f"{name}.qcow2").complete
        lab.require_usable(f"{name}.qcow2", name)
        assert lab.is_like(lab.root / "pool/vm1/disk/connect.qcow2", name)
    lab.require_clean()
    lab.require_whole()
