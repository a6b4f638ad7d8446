"""The command line, with real machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from statepool.machine.running import RunningMachine, wait_until
from statepool.qcow2.tool import QemuImg
from statepool.testing.guest import talking_to
from tests.support.machines import Lab

if TYPE_CHECKING:
    from conftest import World

POOLS = ("--cache", "cache", "--source", "pool")


def test_set_while_a_machine_runs(
    world: World, guests: Lab, run_statepool: Callable[..., Any]
) -> None:
    images = world.images("install")
    sources = [f"{name}={path}" for name, path in images.items()]
    with guests.foreign(images) as guest:
        guest.machine.close()
        guest.console.write("one")
        told = run_statepool(
            *POOLS, "set", "vm1/disk", "one", "--from", images["disk"], "--monitor", guest.monitor
        )
        assert "vm1/disk one: stored" in told.out
        guest.console.write("two")
        told = run_statepool(
            *POOLS,
            "set",
            "vm1",
            "two",
            "--from",
            sources[0],
            "--from",
            sources[1],
            "--monitor",
            guest.monitor,
            "--compress",
        )
        assert "vm1 two: stored" in told.out
        run_statepool(*POOLS, "set", "vm1/disk", "three", "--from", images["disk"], code=4)
        told = run_statepool(
            *POOLS,
            "set",
            "vm1/disk",
            "three",
            "--from",
            images["disk"],
            "--monitor",
            "nowhere",
            code=3,
        )
        assert "there is no socket" in told.err
        for wrong in (["--agent", "x"], ["--compress"]):
            run_statepool(
                *POOLS, "set", "vm1/disk", "three", "--from", images["disk"], *wrong, code=2
            )
        before = guest.console.tick()
        assert guest.console.tick() > before
        with RunningMachine.connect(guest.monitor) as machine:
            assert machine.status() == "running"
    assert world.states.machine("vm1").check("two")


def run_in_background(world: World, guests: Lab, *arguments: str) -> subprocess.Popen[str]:
    kernel = ["--", *guests.guest.arguments]
    command = [
        sys.executable,
        "-m",
        "statepool",
        *POOLS,
        "run",
        *arguments,
        "--memory",
        "128",
        *kernel,
    ]
    return subprocess.Popen(
        command,
        cwd=world.place,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    assert process.stderr is not None
    raise AssertionError(f"{text!r} never came; {process.stderr.read()}")


def test_a_person_boots_a_state_and_keeps_it(world: World, guests: Lab) -> None:
    with run_in_background(world, guests, "vm1/disk", "install", "--set", "kept") as process:
        assert process.stdin is not None
        wait_for(process, "tick 1")
        process.stdin.write("write vda 0 marker\n")
        process.stdin.flush()
        wait_for(process, "done marker")
        process.stdin.write("off\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "vm1/disk kept: stored" in out
    world.states.image("vm1/disk").get("kept", to=world.place / "copy.qcow2")
    QemuImg().convert(world.place / "copy.qcow2", world.place / "raw", target_format="raw")
    assert (world.place / "raw").read_bytes().startswith(b"marker")
    assert os.listdir(world.cache.root / ".statepool/working") == []


def test_what_a_machine_writes_is_not_mixed_with_json(world: World, guests: Lab) -> None:
    with run_in_background(
        world, guests, "vm1/disk", "install", "--set", "kept", "--json"
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        assert any("tick 1" in line for line in process.stderr)
        process.stdin.write("off\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert json.loads(out)["stored"]["complete"] is True


def test_a_source_that_does_not_take_what_a_person_keeps_is_told(world: World, guests: Lab) -> None:
    with run_in_background(world, guests, "vm1/disk", "install", "--set", "kept") as process:
        assert process.stdin is not None
        wait_for(process, "tick 1")
        (world.place / "pool/.statepool").rename(world.place / "elsewhere")
        process.stdin.write("off\n")
        process.stdin.flush()
        out, err = process.communicate(timeout=120)
        assert process.returncode == 7
        assert "vm1/disk kept is not in " in err
        assert "in cache" in out
    assert os.listdir(world.cache.root / ".statepool/working") == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, None])
def test_a_terminal_is_as_it_was(world: World, how: signal.Signals | None) -> None:
    """Also if we are ended, or QEMU is killed, which has set it up for itself."""
    master, terminal = os.openpty()
    before = termios.tcgetattr(terminal)
    command = [
        sys.executable,
        "-m",
        "statepool",
        *POOLS,
        "run",
        "vm1/disk",
        "install",
        "--memory",
        "64",
    ]
    with subprocess.Popen(
        command,
        cwd=world.place,
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            assert wait_until(lambda: termios.tcgetattr(terminal) != before, timeout=60)
            (machine,) = map(int, children(process.pid))
            if how is None:
                os.kill(machine, signal.SIGKILL)
            else:
                process.send_signal(how)
            # 1 if QEMU had not greeted us yet
            assert process.wait(timeout=60) in ((0, 1) if how is None else (-how,))
            assert termios.tcgetattr(terminal) == before
            assert os.get_blocking(terminal)
            assert not Path(f"/proc/{machine}").exists()
        finally:
            process.kill()
            os.close(master)
            os.close(terminal)
    assert os.listdir(world.cache.root / ".statepool/working") == []


def children(pid: int) -> list[str]:
    """:returns: what any thread of a process has started"""
    return [
        child
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def test_what_cannot_be_run(world: World, run_statepool: Callable[..., Any]) -> None:
    told = run_statepool(*POOLS, "run", "vm1/disk", "install", "--set", "install", code=4)
    assert "vm1/disk install exists" in told.err
    assert "no state nope" in run_statepool(*POOLS, "run", "vm1/disk", "nope", code=3).err
    told = run_statepool(*POOLS, "run", "vm1/disk", "install", "--", "-no-such-option", code=1)
    assert "did not start" in told.err
    assert "invalid option" in told.err
    run_statepool(*POOLS, "run", "vm1/disk", "install", "--memory", "0", code=2)
    assert os.listdir(world.cache.root / ".statepool/working") == []


def test_a_state_with_ram_goes_on_for_a_person(world: World, guests: Lab) -> None:
    with guests.running(world.images("install")) as guest:
        world.states.machine("vm1").set_running("loggedin", guest.machine)
        then = guest.console.tick()
    with guests.directory() as directory:
        extra: list[str] = []
        for name in ("serial", "agent"):
            extra += [
                "-chardev",
                f"socket,id={name},path={directory / name},server=on,wait=off",
                "-serial",
                f"chardev:{name}",
            ]
        command = [
            sys.executable,
            "-m",
            "statepool",
            *POOLS,
            "run",
            "vm1",
            "loggedin",
            "--memory",
            "128",
            "--vnc",
            f"unix:{directory / 'vnc'}",
            "--",
        ]
        with subprocess.Popen(
            [*command, *extra, *guests.guest.arguments],
            cwd=world.place,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                wait_for_socket(directory / "serial", process)
                with talking_to(directory / "serial") as console:
                    assert console.tick() <= then + 100
                    console.ask("off", ".*")
                assert process.wait(timeout=60) == 0
            finally:
                process.kill()
    assert os.listdir(world.cache.root / ".statepool/working") == []


def wait_for_socket(path: Path, process: subprocess.Popen[str]) -> None:
    assert wait_until(lambda: path.exists() or process.poll() is not None, timeout=60)
    assert process.poll() is None, process.stderr.read() if process.stderr else ""
