"""
A run that is killed leaves no machine running, no lock, and after the next start no working image.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool

TESTS = """
import json, time, statepool

@pytest.fixture
def vm_config():
    return statepool.MachineConfig(memory=32 << 20)

@pytest.mark.vm_state("vm1/disk", "customize")
@pytest.mark.parametrize("number", range(2))
def test_it(vm, vm_state, number):
    started = Path(f"{os.getpid()}-{number}.part")
    started.write_text(json.dumps([os.getpid(), vm.pid, str(vm_state.path)]))
    os.rename(started, f"{number}.started")
    while not os.path.exists("go"):
        time.sleep(0.02)
"""


def wait_for(done: Callable[[], bool], what: str, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def locked(place: Path) -> list[Path]:
    """:returns: the files that somebody has locked"""
    found = []
    for path in place.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append(path)
    return found


@pytest.mark.parametrize(
    ("arguments", "victim"),
    [
        ((), "controller"),
        (("-n", "2"), "controller"),
        (("-n", "2"), "worker"),
        (("-n", "2"), "all"),
    ],
)
def test_nothing_stays(
    suite: Any, guests_programs: None, arguments: tuple[str, ...], victim: str
) -> None:
    suite.write(TESTS)
    run = subprocess.Popen(
        suite.command(*arguments),
        cwd=suite.root,
        env=suite.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        count = 2 if arguments else 1
        wait_for(lambda: len(list(suite.root.glob("*.started"))) == count, "the tests do not start")
        started = [json.loads(path.read_text()) for path in sorted(suite.root.glob("*.started"))]
        machines = [machine for _, machine, _ in started]
        images = [Path(image) for _, _, image in started]
        assert all(map(is_there, machines))
        assert all(image.exists() for image in images)
        if victim == "worker":
            worker, machine, _ = started[0]
            os.kill(worker, signal.SIGKILL)
            wait_for(lambda: not is_there(machine), "QEMU outlives its worker")
            # Another worker takes the place of the one that died, and the run goes on.
            (suite.root / "go").touch()
            assert run.wait(90) == 1
        else:
            (
                os.kill(run.pid, signal.SIGKILL)
                if victim == "controller"
                else os.killpg(run.pid, signal.SIGKILL)
            )
            run.wait()
        wait_for(
            lambda: not any(map(is_there, [*machines, *(worker for worker, _, _ in started)])),
            "QEMU or a worker outlives the run",
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert locked(suite.root / "cache") == []
    (suite.root / "go").touch()
    suite.run(*arguments)
    assert suite.images() == []
    assert not any(image.exists() for image in images)
    assert os.listdir(suite.root / "cache/.statepool/working") == []
    # Nothing says any more that the state is in use.
    statepool.StatePool(suite.root / "cache").image("vm1/disk").unset("customize")
