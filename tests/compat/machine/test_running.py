"""A real QEMU with a real guest in it: its run state, its jobs, its snapshots and its RAM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from statepool.errors import (
    Conflict,
    IntegrityError,
    InUse,
    MachineError,
    NoSpace,
    NotFound,
    RefusedError,
)
from statepool.machine.description import MachineConfig
from statepool.machine.disks import disk_of, disks
from statepool.machine.monitor import Monitor
from statepool.machine.ram import load_ram, save_ram
from statepool.machine.running import RunningMachine, wait_until
from statepool.machine.snapshots import delete_snapshot, load_snapshot, save_snapshot, snapshots
from tests.support.machines import Lab

EMPTY = MachineConfig(memory=64 << 20, machine="none")
"""A machine without anything in it, which starts at once."""


# -- time goes back --------------------------------------------------------------------------------


def test_a_snapshot_brings_ram_and_disks_back(guests: Lab, tmp_path: Path) -> None:
    with guests.running(guests.copies(tmp_path)) as guest:
        machine, console = guest.machine, guest.console
        console.write("before")
        console.write("before", disk="vdb")
        then = console.tick()
        save_snapshot(machine, "loggedin")
        console.write("after")
        console.write("after", disk="vdb")
        while console.tick() <= then + 20:
            continue
        load_snapshot(machine, "loggedin")
        assert machine.status() == "running"
        assert console.tick() <= then + 20
        assert console.read() == console.read(disk="vdb") == "before"
        assert list(snapshots(machine)) == ["loggedin"]
        with pytest.raises(Conflict, match="has a snapshot loggedin already"):
            save_snapshot(machine, "loggedin")
        with pytest.raises(NotFound, match="no snapshot nope"):
            load_snapshot(machine, "nope")
        assert machine.status() == "running"
        machine.pause()
        load_snapshot(machine, "loggedin")
        assert machine.status() == "paused"
        delete_snapshot(machine, "loggedin")
        assert snapshots(machine) == {}
        with pytest.raises(NotFound):
            delete_snapshot(machine, "loggedin")


def test_ram_in_a_file_brings_ram_back(guests: Lab, tmp_path: Path) -> None:
    """What the guests itself does: the counter goes on from where it was, in another process."""
    ticks = []
    for place in ("one", "two"):
        with guests.running(guests.copies(tmp_path / place)) as guest:
            ticks.append(guest.console.tick())
            guest.console.write(place)
            assert guest.console.read() == place
    assert max(ticks) < 60


# -- in the run state that it was in before --------------------------------------------------------


def test_a_failed_load_inside_of_qemu_leaves_the_machine_running(
    guests: Lab, tmp_path: Path
) -> None:
    """QEMU itself leaves a machine stopped whose load failed."""
    with guests.running(guests.copies(tmp_path)) as guest:
        before = guest.console.tick()
        with pytest.raises(MachineError, match="boom"), guest.machine.held():
            guest.machine.execute(
                "snapshot-load", job_id="x", tag="nope", vmstate="disk0", devices=["disk0", "disk1"]
            )
            assert wait_until(lambda: guest.machine.status() != "running", timeout=30)
            raise MachineError("boom")
        assert guest.machine.status() == "running"
        assert guest.console.tick() > before


def test_no_room_for_ram(guests: Lab, tmp_path: Path) -> None:
    with guests.running(guests.copies(tmp_path)) as guest:
        before = guest.console.tick()
        with (
            open("/dev/full", "wb") as full,
            pytest.raises(NoSpace, match="no room for the RAM"),
            guest.machine.held(),
        ):
            guest.machine.pause()
            save_ram(guest.machine, full.fileno())
        assert guest.machine.status() == "running"
        assert guest.console.tick() > before


@pytest.mark.parametrize("damage", ["short", "foreign", "empty"])
def test_ram_that_is_not_what_it_should_be(guests: Lab, tmp_path: Path, damage: str) -> None:
    images = guests.copies(tmp_path)
    data = {
        "short": guests.ram.read_bytes()[: 1 << 20],
        "foreign": b"#!/bin/sh\n" * 1000,
        "empty": b"",
    }[damage]
    (tmp_path / "ram").write_bytes(data)
    with (
        guests.directory() as directory,
        RunningMachine.start(
            guests.config(images, directory), arguments=("-incoming", "defer")
        ) as machine,
        open(tmp_path / "ram", "rb") as file,
        pytest.raises(IntegrityError, match="could not be loaded"),
    ):
        load_ram(machine, file.fileno())


def test_ram_for_a_machine_that_runs(guests: Lab, tmp_path: Path) -> None:
    with guests.running(guests.copies(tmp_path)) as guest:
        with (
            open(guests.ram, "rb") as file,
            pytest.raises(RefusedError, match="it is running already"),
        ):
            load_ram(guest.machine, file.fileno())
        assert guest.machine.status() == "running"


# -- disks -----------------------------------------------------------------------------------------


def test_disks_are_found_by_their_files(guests: Lab, tmp_path: Path) -> None:
    images = guests.copies(tmp_path)
    with guests.running(images) as guest:
        assert [disk.path for disk in disks(guest.machine)] == list(images.values())
        assert disk_of(guest.machine, images["data"]).size == 16 << 20
        with pytest.raises(NotFound, match="does not run on"):
            disk_of(guest.machine, tmp_path / "other.qcow2")


def test_raw_and_read_only_images(tmp_path: Path) -> None:
    raw = tmp_path / "raw.img"
    raw.write_bytes(bytes(1 << 20))
    readonly = (
        "-blockdev",
        f"driver=raw,node-name=r,read-only=on,file.driver=file,file.filename={raw}",
        "-device",
        "virtio-blk-pci,drive=r",
    )
    config = MachineConfig(memory=64 << 20, arguments=(*readonly, "-S"))
    with RunningMachine.start(config) as machine:
        with pytest.raises(RefusedError, match="no disk that it can write to"):
            save_snapshot(machine, "x")
        with pytest.raises(RefusedError, match="for reading only"):
            disk_of(machine, raw)
    writable = (
        "-blockdev",
        f"driver=raw,node-name=r,file.driver=file,file.filename={raw}",
        "-device",
        "virtio-blk-pci,drive=r",
    )
    with RunningMachine.start(
        MachineConfig(memory=64 << 20, arguments=(*writable, "-S"))
    ) as machine:
        with pytest.raises(RefusedError, match=r"not QCOW2: .*raw.img \(raw\)"):
            save_snapshot(machine, "x")
        with pytest.raises(RefusedError, match="as raw, not as QCOW2"):
            disk_of(machine, raw)


# -- monitors of others ----------------------------------------------------------------------------


def greet(listener: socket.socket) -> None:
    with listener.accept()[0] as connection:
        connection.sendall(b"220 mail.example.org ESMTP\r\n")


def test_sockets_that_are_no_monitor(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no socket"):
        RunningMachine.connect(tmp_path / "nothing")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(MachineError, match="nobody answers at"):
            RunningMachine.connect(tmp_path / "s")
        listener.listen()
        with pytest.raises(InUse, match=r"did not greet us within 0\.2 s"):
            RunningMachine.connect(tmp_path / "s", timeout=0.2)
        listener.accept()[0].close()
        thread = threading.Thread(target=greet, args=(listener,))
        thread.start()
        with pytest.raises(MachineError, match="does not answer as a monitor"):
            RunningMachine.connect(tmp_path / "s")
        thread.join()


def test_a_second_program_on_the_monitor(guests: Lab, tmp_path: Path) -> None:
    with guests.foreign(guests.copies(tmp_path)) as guest:
        with pytest.raises(InUse, match="did not greet us") as caught:
            RunningMachine.connect(guest.monitor, timeout=0.3)
        assert "another program" in str(caught.value)
        assert guest.machine.status() == "running"
        guest.machine.close()
        with RunningMachine.connect(guest.monitor) as machine:
            assert machine.status() == "running"


def test_a_qemu_that_dies(guests: Lab, tmp_path: Path) -> None:
    with guests.foreign(guests.copies(tmp_path)) as guest:
        assert guest.process is not None
        guest.process.kill()
        with pytest.raises(MachineError, match="has ended, or hung up"):
            guest.machine.status()
        with pytest.raises(MachineError, match="has ended, or hung up"):
            save_snapshot(guest.machine, "x")


# -- a QEMU of our own -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MachineConfig(binary="qemu-system-nothing"), "qemu-system-nothing is not installed"),
        (MachineConfig(machine="no-such-machine"), "did not start: unsupported machine type"),
        (
            MachineConfig({"disk": Path("nowhere/x.qcow2")}, arguments=("-S",)),
            "did not start: .*Could not open",
        ),
        (MachineConfig(arguments=("-no-such-option",)), "did not start: .*invalid option"),
    ],
)
def test_a_machine_that_does_not_start_says_why(config: MachineConfig, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        RunningMachine.start(config)


def test_what_is_wrong_is_told_under_whatever_name_qemu_has(tmp_path: Path) -> None:
    program = tmp_path / "my-qemu"
    said = [
        "my-qemu: warning: old",
        "my-qemu: no such thing",
        "my-qemu: warning: odd",
        "Try harder",
    ]
    program.write_text("#!/bin/sh\n" + "".join(f"echo {line} >&2\n" for line in said))
    program.chmod(0o755)
    with pytest.raises(MachineError, match="did not start: no such thing"):
        RunningMachine.start(MachineConfig(binary=str(program)))


def leftovers() -> tuple[int, int, int]:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return (
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(children.read_text().split()),
    )


def test_starts_and_stops_leave_nothing(tmp_path: Path) -> None:
    with RunningMachine.start(EMPTY) as machine:
        assert machine.pid is not None
    before = leftovers()
    for _ in range(50):
        with RunningMachine.start(EMPTY) as machine:
            assert machine.status() == "running"
            pid = machine.pid
        assert pid is not None
        assert not Path(f"/proc/{pid}").exists()
    assert leftovers() == before
    assert not any(thread.name == "statepool-machines" for thread in threading.enumerate())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_machine_of_ours_does_not_outlive_us(how: signal.Signals | None) -> None:
    program = (
        "import sys, threading, time\nfrom statepool.machine.description import MachineConfig\nfrom"
        " statepool.machine.running import RunningMachine\nmachines = []\nstart = lambda:"
        " machines.append(RunningMachine.start(MachineConfig(memory=64 << 20,"
        " machine='none')))\nthread = threading.Thread(target=start); thread.start();"
        " thread.join()\nprint(machines[0].pid, machines[0].status(),"
        " flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        pid, status = child.stdout.readline().split()
        assert status == "running"
        if how is None:
            child.stdin.close()
        else:
            child.send_signal(how)
        child.wait()
    assert wait_until(lambda: not is_alive(int(pid)), timeout=30)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", ["quit", "kill", "close"])
def test_a_machine_that_has_ended_is_not_running(end: str) -> None:
    with RunningMachine.start(EMPTY) as machine:
        assert machine.is_running
        if end == "quit":
            machine.execute("quit")
        elif end == "kill":
            assert machine.pid is not None
            os.kill(machine.pid, signal.SIGKILL)
        else:
            machine.close()
        assert not machine.is_running
        with pytest.raises(
            MachineError,
            match="was closed" if end == "close" else "has ended: it (ended|was ended)",
        ):
            machine.execute("query-status")
    assert not machine.is_running
    for use in (
        machine.status,
        machine.pause,
        lambda: machine.monitor.execute_many([]),
        lambda: machine.monitor.send_descriptor("x", 0),
    ):
        with pytest.raises(MachineError, match="the machine was closed"):
            use()


def test_a_machine_of_others_that_has_ended_is_not_running(guests: Lab, tmp_path: Path) -> None:
    with guests.foreign(guests.copies(tmp_path)) as guest:
        assert guest.process is not None
        assert guest.machine.is_running
        guest.process.send_signal(signal.SIGSTOP)
        with pytest.raises(MachineError, match="did not answer"):
            guest.machine.monitor.execute("query-status", timeout=0.2)
        assert guest.machine.monitor.is_connected
        guest.process.kill()
        assert not guest.machine.is_running


# -- threads, programs with a loop of their own, forks ---------------------------------------------


def test_many_threads_share_a_machine() -> None:
    with RunningMachine.start(EMPTY) as machine, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: machine.status(), range(100)))
    assert found == ["running"] * 100


def test_a_program_with_a_loop_of_its_own_is_not_held_up() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def main() -> str:
        counter = asyncio.create_task(count())
        loop = asyncio.get_running_loop()
        machine = await loop.run_in_executor(None, RunningMachine.start, EMPTY)
        try:
            return await loop.run_in_executor(None, machine.status)
        finally:
            await loop.run_in_executor(None, machine.close)
            counter.cancel()

    assert asyncio.run(main()) == "running"
    assert turns > 10


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_is_told() -> None:
    with RunningMachine.start(EMPTY) as machine:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _ = machine.is_running
            except MachineError as error:
                code = 0 if "opened by another process" in error.message else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert machine.status() == "running"


def test_a_command_that_takes_too_long(guests: Lab, tmp_path: Path) -> None:
    with guests.foreign(guests.copies(tmp_path)) as guest:
        assert guest.process is not None
        guest.process.send_signal(signal.SIGSTOP)
        with pytest.raises(MachineError, match=r"did not answer query-status within 0\.2 s"):
            guest.machine.monitor.execute("query-status", timeout=0.2)
        guest.process.send_signal(signal.SIGCONT)
        assert guest.machine.status() == "running"


def test_a_monitor_that_was_closed() -> None:
    with RunningMachine.start(EMPTY) as machine:
        monitor = machine.monitor
    monitor.close()
    with pytest.raises(MachineError):
        monitor.execute("query-status")
    assert isinstance(monitor, Monitor)
