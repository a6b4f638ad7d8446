"""
No space, or a failing disk, at the system calls of a get and a set that can say so: an error of
ours, nothing half, and the rest as it was.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

import statepool
from tests.support.crash import EVERY, changing_calls, fail_at

if TYPE_CHECKING:
    from conftest import Lab

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("strace", "alone"),
]

NAMES = (
    "write",
    "pwrite64",
    "ioctl",
    "link",
    "fsync",
    "ftruncate",
    "fchmod",
    "rename",
    "symlink",
    "mkdir",
    "open",
    "utimens",
)
"""What can fail for want of space, or by an error of the disk."""

WORKING = {"get": None, "set": "work", "set-copied": "linked"}

CLASSES = {errno.ENOSPC: statepool.NoSpace, errno.EIO: statepool.TransportError}


SAMPLE = {errno.ENOSPC: slice(0, None, 2 * EVERY), errno.EIO: slice(1, None, 4 * EVERY)}
"""
Not all of them: neighbours are handled by the same few lines, and each costs a second. A crash at
every one of them is tested elsewhere.
"""


@pytest.mark.parametrize("step", list(WORKING))
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["no-space", "broken-disk"])
def test_failing_call(lab: Lab, step: str, error: int) -> None:
    calls = [call for call in changing_calls(lab.step(step), cwd=lab.root) if call.kind in NAMES]
    assert {call.kind for call in calls} >= {"write", "pwrite64", "fsync", "rename", "link"}
    failures = []
    for call in calls[SAMPLE[error]]:
        lab.reset()
        before = lab.digests("cache")
        done = fail_at(lab.step(step), call, error, cwd=lab.root)
        try:
            check_failed(error, done.returncode, done.stderr)
            check_after(lab, step, before)
        except (AssertionError, statepool.StatePoolError) as found:
            failures.append(
                f"after {step} had {errno.errorcode[error]} at {call} ({done.returncode},"
                f" {done.stderr.strip()}): {type(found).__name__}: {found}"
            )
    assert not failures, "\n\n".join(failures)


def check_failed(error: int, code: int, text: str) -> None:
    """
    The command may do without what failed, or have stored the state where it could: otherwise the
    error has its class; of an image of the user, which is in no pool, a broken disk is no matter of
    a transport.
    """
    assert "Traceback" not in text, text
    permitted = {0, CLASSES[error].exit_code} | (
        {1} if ".qcow2: " in text and error == errno.EIO else set()
    )
    assert code in permitted, f"ended with {code}: {text}"


def check_after(lab: Lab, step: str, before: dict[str, str]) -> None:
    lab.require_whole()
    # If the state was stored and its overlay could not be made, the next command makes it.
    lab.handle("cache").get("install")
    left = [
        path
        for name in lab.pools()
        for path in (lab.root / name / ".statepool/incoming").glob("*-*")
    ]
    for name in ("work", "linked", "spare"):
        lab.require_usable(f"{name}.qcow2", "install" if name == "spare" else name)
    assert not left, f"left over: {left}"
    if step == "get":
        assert not (lab.root / "other.qcow2").exists() or lab.is_like(
            lab.root / "other.qcow2", "customize"
        )
    after = lab.digests("cache")
    assert {name: digest for name, digest in after.items() if name != "connect"} == before
