"""
Power cuts: a file system of its own is shut down without its journal, so that everything is lost
that was not flushed, and mounted again.

What a set has promised is there. What was under way is there whole or not at all; a cache may have
lost what a get brought, and brings it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from attrs import evolve, frozen

import statepool
from statepool.pools import writer
from tests.support.crash import EVERY, changing_calls, kill_at
from tests.support.power import Disk, between, disk_with

if TYPE_CHECKING:
    from conftest import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@frozen
class LabDisk:
    """
    A disk with the lab on it.

    :param lab: on the disk, while it is mounted
    """

    lab: Lab
    disk: Disk


@pytest.fixture
def lab_disk(tmp_path: Path, new_lab: Callable[[Path], Lab]) -> Iterator[LabDisk]:
    labs: list[Lab] = []
    with disk_with(tmp_path, lambda place: labs.append(new_lab(place / "lab"))) as disk:
        yield LabDisk(labs[0], disk)


@pytest.fixture
def rebooted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on the host has been started anew, and all writers of before are dead."""
    real = writer._current

    def reboot() -> None:
        monkeypatch.setattr(writer, "_current", lambda pid: evolve(real(pid), boot="after-the-cut"))

    return reboot


def test_what_a_set_promised(lab_disk: LabDisk, rebooted: Callable[[], None]) -> None:
    lab, disk = lab_disk.lab, lab_disk.disk
    disk.renew()
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


def test_what_a_get_brought(lab_disk: LabDisk, rebooted: Callable[[], None]) -> None:
    """It was not flushed, so it is hashed once more or fetched again, but never believed."""
    lab, disk = lab_disk.lab, lab_disk.disk
    disk.renew()
    lab.handle("other").get("customize", to=lab.root / "far.qcow2")
    disk.cut()
    rebooted()
    got = lab.handle("other").get("customize", to=lab.root / "again.qcow2")
    assert got.verified is not statepool.Verified.TRUSTED
    lab.require_usable("again.qcow2", "customize")
    lab.require_whole()


@pytest.mark.parametrize("step", ["set", "set-copied", "get", "unset"])
@pytest.mark.usefixtures("strace", "alone")
def test_cut_in_the_middle(lab_disk: LabDisk, step: str, rebooted: Callable[[], None]) -> None:
    lab, disk = lab_disk.lab, lab_disk.disk
    disk.renew()
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
