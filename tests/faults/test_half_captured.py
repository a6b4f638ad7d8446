"""
What goes on after a set was cut off in the middle of taking a working image over, where that is not
simple.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from typing import TYPE_CHECKING

import pytest

import statepool
from statepool.capture import capture_journal
from statepool.pools import layout, writer
from statepool.pools.staging import LOCKING
from statepool.qcow2.header import read_header_file
from statepool.qcow2.tool import QemuImg
from tests.support.crash import changing_calls, kill_at

if TYPE_CHECKING:
    from conftest import Lab


@pytest.fixture
def half_set(lab: Lab, strace: None) -> None:
    """
    A set was killed after it had changed the header of the working image, and before the state was
    published.
    """
    calls = changing_calls(lab.step("set"), cwd=lab.root)
    header = next(number for number, call in enumerate(calls) if call.name == "pwrite64")
    lab.reset()
    kill_at(
        lab.step("set"),
        next(call for call in calls[header:] if call.name == "fchmod"),
        cwd=lab.root,
    )
    assert b"/" not in (read_header_file(lab.root / "work.qcow2").backing_name or b"/")


@pytest.mark.parametrize("number", [0, 1], ids=["before", "in the middle"])
@pytest.mark.parametrize("forwards", [True, False])
@pytest.mark.usefixtures("strace")
def test_header_half_changed(
    lab: Lab, number: int, forwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The length of the backing name is changed, and the name is not: both ways lead out of it,
    without qemu-img, which would wait for our lease.
    """

    def refuse(*arguments: object) -> None:
        raise AssertionError("qemu-img was asked")

    monkeypatch.setattr(QemuImg, "rebase_unsafe", refuse)
    call = [
        call for call in changing_calls(lab.step("set"), cwd=lab.root) if call.name == "pwrite64"
    ][number]
    lab.reset()
    before = (lab.root / "work.qcow2").read_bytes()
    kill_at(lab.step("set"), call, cwd=lab.root)
    assert ((lab.root / "work.qcow2").read_bytes() == before) == (number == 0)
    if not forwards:
        monkeypatch.setattr(capture_journal, "finish", refuse_to_publish)
    lab.handle("cache").get("install")
    assert ("connect" in lab.digests("cache")) == forwards
    assert forwards or (lab.root / "work.qcow2").read_bytes() == before
    lab.require_usable("work.qcow2", "work")
    lab.require_whole()
    lab.require_clean()


def refuse_to_publish(*arguments: object, **rest: object) -> None:
    raise statepool.Conflict("somebody else was faster")


@pytest.mark.usefixtures("half_set")
def test_image_that_is_open_waits(lab: Lab) -> None:
    with open(lab.root / "work.qcow2", "rb"):
        lab.handle("cache").get("install")
        lab.state_pool("cache").gc(everywhere=True)
    lab.handle("cache").get("install")
    lab.require_usable("work.qcow2", "work")
    lab.require_clean()


@pytest.mark.usefixtures("half_set")
@pytest.mark.parametrize("boot", [True, False], ids=["and booted", "only"])
def test_host_was_renamed_meanwhile(lab: Lab, boot: bool) -> None:
    """As a container is that has another name each time, and perhaps no id of a machine."""
    for path in (lab.root / "cache" / layout.INCOMING).glob("*.json"):
        marker = json.loads(path.read_bytes())
        marker["writer"] |= {"host": "its-old-name"} | (
            {"machine": "0" * 32, "boot": "another", "space": 1} if boot else {}
        )
        path.write_text(json.dumps(marker))
    lab.handle("cache").get("install")
    assert "connect" in lab.digests("cache")
    lab.require_usable("work.qcow2", "work")
    lab.require_clean()


@pytest.mark.usefixtures("half_set")
def test_it_was_in_another_container(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes cannot be seen from this one, and the kernel has let go of its lock."""
    monkeypatch.setattr(writer, "_FIRST_SPACE", 0)
    (path,) = (lab.root / "cache" / layout.INCOMING).glob("*.json")
    marker = json.loads(path.read_bytes())
    marker["writer"] |= {"host": "container-1", "machine": "0" * 32, "space": 1}
    path.write_text(json.dumps(marker))
    lab.handle("cache").get("install")
    assert "connect" not in lab.digests("cache"), "it may just be about to lock its marker"
    os.utime(path, (time.time() - LOCKING - 10,) * 2)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        lab.handle("cache").get("install")
        assert "connect" not in lab.digests("cache"), "it lives"
    lab.handle("cache").get("install")
    assert "connect" in lab.digests("cache")
    lab.require_usable("work.qcow2", "work")
    lab.require_clean()


@pytest.mark.usefixtures("half_set")
def test_other_state_of_the_name_came_first(lab: Lab) -> None:
    """Nobody can go forward, so the image becomes again what it was."""
    other = lab.pool("other")
    other.create()
    elsewhere = statepool.StatePool(cache=lab.root / "other", sources=[lab.root / "pool"]).image(
        "vm1/disk"
    )
    elsewhere.get("customize", to=lab.root / "rival.qcow2")
    elsewhere.set("connect", source=lab.root / "rival.qcow2")
    # It is in the cache before the next command: what its own process would have done, had it not
    # been killed meanwhile.
    manifest = lab.pool("pool").find(statepool_id("connect"))
    assert manifest is not None
    cache = lab.pool("cache")
    staging = cache.stage([manifest.digest] if manifest.digest is not None else [])
    assert manifest.digest is not None
    (lab.root / "cache" / staging.path(manifest.digest)).write_bytes(
        (lab.root / "pool/vm1/disk/connect.qcow2").read_bytes()
    )
    cache.publish([manifest], staging)
    staging.end()

    lab.handle("cache").get("install")
    lab.require_usable("work.qcow2", "work")
    lab.require_clean()
    lab.require_whole()
    assert lab.digests("cache")["connect"] == str(manifest.digest)
    stored = lab.handle("cache").set("connect-too", source=lab.root / "work.qcow2")
    assert stored.complete
    lab.require_usable("work.qcow2", "work")


def statepool_id(state: str) -> statepool.StateId:
    return statepool.StateId("vm1/disk", state)
