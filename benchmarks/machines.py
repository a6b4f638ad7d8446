"""
Running machines: the time until a guest resumes from a state with RAM, and the time for which it is
paused while a state is set.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from attrs import define, field

import statepool
from benchmarks.bench import MIB, ROOT, Bench, run
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, rounds, timed
from statepool.machine.ram import save_ram
from statepool.machine.running import RunningMachine, wait_until
from statepool.machine.snapshots import load_snapshot, save_snapshot
from statepool.model.objects import Machine
from statepool.testing.guest import make_guest, talking_to
from tests.support.machines import IMAGES, Lab

MACHINE = Machine("vm1", tuple(IMAGES))
START = 0.5
"""The most seconds from the start with a cached state with RAM to the guest's next tick."""

TIMES = 1.5
"""The limit as a multiple of the time of bare QEMU for the same work."""

PAUSE = 0.3
"""Seconds for which a set may pause the guest."""

INTERVAL = 0.02
"""Seconds between two ticks of the undisturbed guest; it sleeps for half of them."""


def table(bench: Bench) -> Table:
    """:returns: the cost of operations on running machines"""
    title = "machines: a guest with 128 MiB of RAM, without KVM"
    programs = [name for name in ("qemu-system-x86_64", "setpriv") if shutil.which(name) is None]
    if programs or subprocess.run([ROOT / "tools/guest"], check=False).returncode != 0:
        return Table(
            title, notes=[f"Not measured: {', '.join(programs) or 'the guest'} is missing."]
        )
    place = bench.place / "machines"
    place.mkdir()
    lab = Lab(make_guest(ROOT / ".guest", place / "initramfs"), place)
    lab.prepare()
    states = bench.open(place / "cache", _pool(place / "pool"))
    states.machine(MACHINE).set("install", source=lab.copies(place / "first"))
    with lab.running(_working(states, "install", place / "run")) as guest:
        states.machine(MACHINE).set_running("loggedin", guest.machine)
        states.machine(MACHINE).set_running("small", guest.machine, compress=True)
    return Table(
        title,
        [
            *_starts(bench, lab, states, place),
            *_pauses(bench, lab, states, place),
            _snapshots(bench, lab, states, place),
        ],
        _sizes(states),
        notes=[
            (
                "A pause is the longest silence of the guest during a set, which says a number"
                " every 20 ms or so, less the usual silence."
            )
        ],
    )


def _pool(place: Path) -> Path:
    statepool.init(place)
    return place


def _working(states: statepool.StatePool, state: str, to: Path) -> dict[str, Path]:
    states.machine(MACHINE).get(state, to=to)
    return {name: to / f"{name}.qcow2" for name in IMAGES}


# -- starting --------------------------------------------------------------------------------------


def _starts(bench: Bench, lab: Lab, states: statepool.StatePool, place: Path) -> list[Figure]:
    ram = _ram_file(states)
    ours, small, bare = rounds(
        [
            lambda: _start(lab, states, place, "loggedin"),
            lambda: _start(lab, states, place, "small"),
            lambda: _bare_start(lab, states, place, ram),
        ],
        bench.scale.pairs,
    )
    what = "from a cached state with RAM to the next tick"
    return [
        Figure(
            what, "qemu-img create, qemu -incoming exec:cat", ours, bare, Limit(Unit.RATIO, TIMES)
        ),
        Figure(what + ", in seconds", "the same", ours, bare, Limit(Unit.TIME, START)),
        Figure(what + ", compressed", "the same, not compressed", small, bare),
    ]


def _ram_file(states: statepool.StatePool) -> Path:
    cache = states.machine(MACHINE).context.cache
    found = cache.pool.find(statepool.StateId("vm1", "loggedin", statepool.Kind.RAM))
    assert found is not None
    assert found.digest is not None
    return cache.data(found.digest)


def _start(lab: Lab, states: statepool.StatePool, place: Path, state: str) -> float:
    with bench_directory(place) as directory, lab.directory() as sockets:
        images = {name: directory / f"{name}.qcow2" for name in IMAGES}
        begin = time.perf_counter()
        machine = states.machine(MACHINE).start(state, lab.config(images, sockets), to=images)
        with machine, talking_to(sockets / "serial") as console:
            console.wait_for(r"tick \d+")
            return time.perf_counter() - begin


def _bare_start(lab: Lab, states: statepool.StatePool, place: Path, ram: Path) -> float:
    """Start a machine with bare QEMU, as a user or a script would do."""
    tips = (
        _working(states, "loggedin", place / "tips")
        if not (place / "tips").exists()
        else {name: place / "tips" / f"{name}.qcow2" for name in IMAGES}
    )
    with bench_directory(place) as directory, lab.directory() as sockets:
        images = {name: directory / f"{name}.qcow2" for name in IMAGES}
        command = lab.config(images, sockets).command()
        begin = time.perf_counter()
        for name, path in images.items():
            run(
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                str(tips[name]),
                "-F",
                "qcow2",
                str(path),
            )
        # The state was saved while the machine was paused, so it is resumed by its monitor.
        qemu = subprocess.Popen(
            [
                *command,
                "-incoming",
                f"exec:cat {ram}",
                "-qmp",
                f"unix:{sockets}/monitor,server=on,wait=off",
            ]
        )
        try:
            wait_until((sockets / "monitor").exists, timeout=60)
            with socket.socket(socket.AF_UNIX) as monitor:
                monitor.connect(str(sockets / "monitor"))
                lines = monitor.makefile("rw")
                lines.readline()
                _say(lines, "qmp_capabilities")
                while '"inmigrate"' in _say(lines, "query-status"):
                    time.sleep(0.001)
                _say(lines, "cont")
                with talking_to(sockets / "serial") as console:
                    console.wait_for(r"tick \d+")
                    return time.perf_counter() - begin
        finally:
            qemu.kill()
            qemu.wait()


def _say(lines: object, command: str) -> str:
    lines.write(f'{{"execute": "{command}"}}\n')  # type: ignore[attr-defined]
    lines.flush()  # type: ignore[attr-defined]
    while True:
        answer = str(lines.readline())  # type: ignore[attr-defined]
        if '"event"' not in answer:
            return answer


@contextlib.contextmanager
def bench_directory(place: Path) -> Iterator[Path]:
    """Yield a directory for working images, which is removed afterwards."""
    path = place / "images"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


# -- standing still --------------------------------------------------------------------------------


@define
class Silence:
    """
    A listener on a guest that measures the longest time without output.

    :param path: the socket of its serial line
    """

    path: Path
    longest: float = 0.0
    _over: threading.Event = field(factory=threading.Event)

    def during(self, work: Callable[[], object]) -> float:
        """:returns: the longest silence during some work, minus the usual one, in seconds"""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.path))
            line.settimeout(0.001)
            thread = threading.Thread(target=self._listen, args=(line,))
            thread.start()
            try:
                time.sleep(0.3)
                self.longest = 0.0
                work()
                time.sleep(0.3)
            finally:
                self._over.set()
                thread.join()
        return max(self.longest - INTERVAL, 0.001)

    def _listen(self, line: socket.socket) -> None:
        last = time.perf_counter()
        while not self._over.is_set():
            try:
                line.recv(4096)
            except TimeoutError:
                continue
            now = time.perf_counter()
            self.longest = max(self.longest, now - last)
            last = now


def _pauses(bench: Bench, lab: Lab, states: statepool.StatePool, place: Path) -> Iterator[Figure]:
    vm = states.machine(MACHINE)
    numbers = iter(range(10**6))

    def ours(image: bool) -> float:
        images = (
            _working(states, "install", place / "pause")
            if not image
            else _large(bench, states, place)
        )
        with lab.running(images) as guest:
            guest.console.close()
            name = f"p{next(numbers)}"
            work = (
                (lambda: vm.set_running_image("disk", name, guest.machine))
                if image
                else (lambda: vm.set_running(name, guest.machine))
            )
            found = Silence(guest.directory / "serial").during(work)
        (
            vm.unset(name, scope="all")
            if not image
            else states.image("vm1/disk").unset(name, scope="all")
        )
        shutil.rmtree(place / ("large" if image else "pause"))
        return found

    def bare(image: bool) -> float:
        images = (
            _working(states, "install", place / "pause")
            if not image
            else _large(bench, states, place)
        )
        with lab.running(images) as guest:
            guest.console.close()
            work = (
                (lambda: _bare_freeze(guest.machine, images))
                if image
                else (lambda: _bare_save(guest.machine, place / "bare"))
            )
            found = Silence(guest.directory / "serial").during(work)
        shutil.rmtree(place / ("large" if image else "pause"))
        return found

    for what, image, peer in (
        ("pause of the guest: set of a state with RAM", False, "stop, migrate to a file, cont"),
        ("pause of the guest: set of a disk with 1 GiB", True, "blockdev-snapshot-sync alone"),
    ):
        mine, other = rounds(
            [lambda image=image: ours(image), lambda image=image: bare(image)], bench.scale.pairs
        )
        yield Figure(what, peer, mine, other, Limit(Unit.TIME, PAUSE))


def _large(bench: Bench, states: statepool.StatePool, place: Path) -> dict[str, Path]:
    """
    :returns: working images; the first one has much data that is in no state, and is larger than
        the guest knows
    """
    images = _working(states, "install", place / "large")
    images["disk"].unlink()
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        str(images["disk"]),
        str(64 * MIB + bench.scale.virtual),
    )
    bench.write(images["disk"], 64 * MIB, bench.scale.root)
    return images


def _bare_save(machine: RunningMachine, path: Path) -> None:
    with open(path, "wb") as file:
        machine.pause()
        save_ram(machine, file.fileno())
        machine.resume()
    path.unlink()


def _bare_freeze(machine: RunningMachine, images: Mapping[str, Path]) -> None:
    path = images["disk"].with_suffix(".overlay")
    machine.execute(
        "blockdev-snapshot-sync",
        node_name="disk0",
        snapshot_file=str(path),
        snapshot_node_name="overlay",
        format="qcow2",
    )


# -- snapshots, and what states take ---------------------------------------------------------------


def _snapshots(bench: Bench, lab: Lab, states: statepool.StatePool, place: Path) -> Figure:
    with lab.running(_working(states, "install", place / "inside")) as guest:
        numbers = iter(range(10**6))
        save, load = [], []
        for _ in range(bench.scale.pairs):
            name = f"s{next(numbers)}"
            save.append(timed(lambda name=name: save_snapshot(guest.machine, name)))
            load.append(timed(lambda name=name: load_snapshot(guest.machine, name)))
    return Figure("load of an internal snapshot", "save of one", load, save)


def _sizes(states: statepool.StatePool) -> list[Fact]:
    found = {
        one.manifest.state: one.manifest.size
        for one in states.machine(MACHINE).show()
        if one.manifest.kind is statepool.Kind.RAM
    }
    told = f"{found['loggedin'] / MIB:.0f} MiB, {found['small'] / MIB:.0f} MiB compressed"
    return [Fact("RAM of a state", told, "less than the guest has", found["loggedin"] < 128 * MIB)]
