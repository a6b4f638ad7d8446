"""
kill -9 at every system call of a get, a set and an unset that changes a file: never torn, never
half, and the next command goes on by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import statepool
from tests.support.crash import EVERY, SystemCall, changing_calls, kill_at

if TYPE_CHECKING:
    from conftest import Lab

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("strace", "alone"),
]

PARTS = 4
"""Each step's system calls are shared by so many tests, which can run side by side."""

ESSENTIAL = {
    "get": {"link", "mkdir", "pwrite64", "rename", "symlink", "open", "unlink", "write"},
    "get-over": {"rename", "open", "unlink", "write", "pwrite64"},
    "set": {"fchmod", "fsync", "link", "pwrite64", "rename", "symlink", "open", "unlink", "write"},
    "set-copied": {
        "fchmod",
        "fsync",
        "link",
        "pwrite64",
        "rename",
        "symlink",
        "open",
        "unlink",
        "write",
    },
    "set-replace": {"link", "pwrite64", "rename", "symlink", "unlink"},
    "unset": {"link", "rename", "unlink", "write"},
}
"""
What a step is known to do: a trace without these would show nothing, and all tests would pass.
"""

WORKING = {"set": "work", "set-copied": "linked", "set-replace": "work"}


def part_of(calls: list[SystemCall], part: int) -> list[SystemCall]:
    """
    Those that a kill makes a difference to: what is flushed or not only shows after a power cut.
    """
    telling = [call for call in calls if call.name not in ("fsync", "fdatasync")]
    return telling[part::PARTS][part % EVERY :: EVERY]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("step", list(ESSENTIAL))
def test_killed_at_every_call(lab: Lab, step: str, part: int) -> None:
    calls = changing_calls(lab.step(step), cwd=lab.root)
    assert {call.kind for call in calls} >= ESSENTIAL[step]
    failures = []
    for number, call in enumerate(part_of(calls, part)):
        lab.reset()
        kill_at(lab.step(step), call, cwd=lab.root)
        try:
            check_after(lab, step, by_another=bool(number % 2))
        except (AssertionError, statepool.StatePoolError) as error:
            failures.append(f"after {step} was killed at {call}: {type(error).__name__}: {error}")
    assert not failures, "\n\n".join(failures)


def check_after(lab: Lab, step: str, *, by_another: bool) -> None:
    """
    :param by_another: whether the next command is another one, and not the same again
    """
    lab.require_whole()
    for name in ("work", "linked", "linked-too", "spare"):
        assert (lab.root / f"{name}.qcow2").is_file(), f"{name}.qcow2 is gone"
    if step == "get-over":
        # at once, and not only after the next command
        lab.require_usable("spare.qcow2", "install", "customize")
    if by_another and step != "unset":
        lab.handle("cache").get("install")
        if step in WORKING:
            lab.require_usable(f"{WORKING[step]}.qcow2", WORKING[step])
    AGAIN[step](lab)
    lab.require_clean()
    lab.require_whole()
    for name in ("work", "linked"):
        lab.require_usable(f"{name}.qcow2", name)
    lab.require_usable("spare.qcow2", "customize" if step == "get-over" else "install")


def get_again(lab: Lab) -> None:
    try:
        lab.handle("other").get("customize", to=lab.root / "other.qcow2")
    except statepool.FileInTheWay:
        pass  # it was made before the end came
    lab.require_usable("other.qcow2", "customize")
    assert lab.digests("other") == {
        name: digest
        for name, digest in lab.digests("pool").items()
        if name in ("install", "customize")
    }


def get_over_again(lab: Lab) -> None:
    lab.handle("cache").get("customize", to=lab.root / "spare.qcow2", overwrite=True)


def set_again(lab: Lab, state: str, name: str, *, replace: bool = False) -> None:
    stored = lab.handle("cache").set(state, source=lab.root / f"{name}.qcow2", replace=replace)
    assert stored.complete
    for pool in ("cache", "pool"):
        assert lab.digests(pool)[state] == stored.digest
    assert lab.is_like(lab.root / f"pool/vm1/disk/{state}.qcow2", name)


def unset_again(lab: Lab) -> None:
    try:
        lab.handle("cache").unset("install", cascade=True, scope="all")
    except statepool.NotFound:
        pass  # it was done before the end came
    assert lab.digests("cache") == lab.digests("pool") == {}


AGAIN = {
    "get": get_again,
    "get-over": get_over_again,
    "set": lambda lab: set_again(lab, "connect", "work"),
    "set-copied": lambda lab: set_again(lab, "connect", "linked"),
    "set-replace": lambda lab: set_again(lab, "leaf", "work", replace=True),
    "unset": unset_again,
}
