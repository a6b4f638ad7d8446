"""kill -9 of us, or of QEMU, at random moments of a set and of a get of a running machine."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from statepool.api import StatePool, init
from statepool.errors import MachineError, StatePoolError
from statepool.machine.running import RunningMachine, wait_until
from statepool.model.objects import Machine
from statepool.qcow2.tool import QemuImg
from tests.support.machines import IMAGES, Lab, Talking

ROUNDS = int(os.environ.get("KILLS", "5"))
"""
Of each test; the seed is fixed, and the moments are not, since no two runs take the same time.
"""

MACHINE = Machine("vm1", tuple(IMAGES))


@pytest.fixture
def states(guests: Lab, tmp_path: Path) -> StatePool:
    init(tmp_path / "pool")
    states = StatePool(cache=tmp_path / "cache", sources=[tmp_path / "pool"])
    states.machine(MACHINE).set("install", source=guests.copies(tmp_path / "first"))
    return states


def working(states: StatePool, place: Path) -> dict[str, Path]:
    states.machine(MACHINE).get("install", to=place)
    return {name: place / f"{name}.qcow2" for name in IMAGES}


def command(tmp_path: Path, guest: Talking, state: str, *, ram: bool) -> list[str]:
    sources = (
        [f"{name}={path}" for name, path in guest.images.items()]
        if ram
        else [str(guest.images["disk"])]
    )
    words = [
        sys.executable,
        "-m",
        "statepool",
        "--cache",
        str(tmp_path / "cache"),
        "--source",
        str(tmp_path / "pool"),
    ]
    words += ["set", "vm1" if ram else "vm1/disk", state, "--monitor", str(guest.monitor)]
    return [*words, *(word for source in sources for word in ("--from", source))]


def check_whole(states: StatePool) -> None:
    found = states.verify("vm1")
    assert [checked for checked in found if checked.problem is not None] == []
    for listed in states.show():
        assert listed.problem is None


def is_running(monitor: Path) -> bool:
    try:
        with RunningMachine.connect(monitor, timeout=5) as machine:
            return machine.status() == "running"
    except StatePoolError:
        return False  # who makes it run again has the monitor


@pytest.mark.slow
@pytest.mark.parametrize("ram", [False, True], ids=["disk", "ram"])
def test_we_are_killed(states: StatePool, guests: Lab, tmp_path: Path, ram: bool) -> None:
    chance = random.Random(7)
    longest = 0.0
    for number in range(ROUNDS):
        images = working(states, tmp_path / f"run{number}")
        with guests.foreign(images) as guest:
            guest.machine.close()
            if number == 0:
                began = time.monotonic()
                subprocess.run(command(tmp_path, guest, "whole", ram=ram), check=True)
                longest = time.monotonic() - began
                continue
            guest.console.write(f"before-{number}")
            with subprocess.Popen(
                command(tmp_path, guest, f"s{number}", ram=ram), stderr=subprocess.DEVNULL
            ) as setter:
                time.sleep(longest * chance.uniform(0.2, 1.0))
                setter.kill()
            assert wait_until(lambda: is_running(guest.monitor), timeout=60)
            before = guest.console.tick()
            guest.console.write(f"after-{number}")
            assert guest.console.tick() > before
            check_whole(states)
        # The image has all that was written, and becomes a state as ever.
        states.image("vm1/disk").set(f"later{number}", source=images["disk"])
        check_whole(states)
        states.image("vm1/disk").get(f"later{number}", to=tmp_path / f"copy{number}")
        QemuImg().convert(tmp_path / f"copy{number}", tmp_path / "raw", target_format="raw")
        assert (tmp_path / "raw").read_bytes().startswith(f"after-{number}".encode())
        assert os.listdir(images["disk"].parent).count("disk.qcow2") == 1
        assert [name for name in os.listdir(images["disk"].parent) if "disk.qcow2." in name] == []


def test_a_machine_that_we_had_stopped_goes_on(guests: Lab, tmp_path: Path) -> None:
    """The moment that matters, held for as long as it takes to be killed in it."""
    program = (
        "import sys\n"
        "from statepool.machine.running import RunningMachine\n"
        "with RunningMachine.connect(sys.argv[1]) as machine, machine.held():\n"
        "    machine.pause()\n"
        "    print(machine.status(), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with guests.foreign(guests.copies(tmp_path)) as guest:
        guest.machine.close()
        for _ in range(3):
            with subprocess.Popen(
                [sys.executable, "-c", program, str(guest.monitor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as child:
                assert child.stdout is not None
                assert child.stdout.readline() == "paused\n"
                child.kill()
            assert wait_until(lambda: is_running(guest.monitor), timeout=60)
            before = guest.console.tick()
            assert guest.console.tick() > before
        # One that somebody else had stopped stays so.
        with RunningMachine.connect(guest.monitor) as machine:
            machine.pause()
        with subprocess.Popen(
            [sys.executable, "-c", program, str(guest.monitor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "paused\n"
            child.kill()
        assert not wait_until(lambda: is_running(guest.monitor), timeout=1)


@pytest.mark.slow
def test_qemu_is_killed(states: StatePool, guests: Lab, tmp_path: Path) -> None:
    chance = random.Random(7)
    longest = 1.0
    for number in range(ROUNDS):
        images = working(states, tmp_path / f"run{number}")
        with guests.foreign(images) as guest:
            assert guest.process is not None
            guest.console.write(f"before-{number}")
            machine = states.machine(MACHINE)
            killer = subprocess.Popen(
                [
                    "sh",
                    "-c",
                    f"sleep {longest * chance.uniform(0, 1):.3f}; kill -9 {guest.process.pid}",
                ]
            )
            began = time.monotonic()
            try:
                machine.set_running(f"s{number}", guest.machine, images=images)
                longest = max(0.1, time.monotonic() - began)
            except MachineError as error:
                assert "has ended" in error.message or "hung up" in error.message
            finally:
                killer.wait()
        check_whole(states)
        states.image("vm1/disk").set(f"later{number}", source=images["disk"])
        check_whole(states)
        states.image("vm1/disk").get(f"later{number}", to=tmp_path / f"copy{number}")
        QemuImg().convert(tmp_path / f"copy{number}", tmp_path / "raw", target_format="raw")
        assert (tmp_path / "raw").read_bytes().startswith(f"before-{number}".encode())


@pytest.mark.slow
def test_we_are_killed_while_a_state_is_loaded(
    states: StatePool, guests: Lab, tmp_path: Path
) -> None:
    """What we started is gone with us, and the cache is whole."""
    with guests.running(working(states, tmp_path / "run")) as guest:
        states.machine(MACHINE).set_running("loggedin", guest.machine)
    chance = random.Random(7)
    kernel = ["--memory", "128", "--", *guests.guest.arguments]
    run = [
        sys.executable,
        "-m",
        "statepool",
        "--cache",
        str(tmp_path / "cache"),
        "run",
        "vm1",
        "loggedin",
        "--vnc",
        f"unix:{tmp_path}/v",
        "--force",
    ]
    for _ in range(ROUNDS):
        with subprocess.Popen(
            [*run, *kernel], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as runner:
            time.sleep(chance.uniform(0.3, 1.5))
            children = descendants(runner.pid)
            runner.send_signal(signal.SIGKILL)
        assert wait_until(lambda children=children: not any(map(is_alive, children)), timeout=30)
        check_whole(states)


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
