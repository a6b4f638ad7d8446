"""
Running machines for tests: the tiny guest, booted once, and then had again and again within a
fraction of a second.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import define, field, frozen

from statepool.errors import MachineError
from statepool.machine.description import MachineConfig
from statepool.machine.ram import load_ram, save_ram
from statepool.machine.running import RunningMachine, wait_until
from statepool.testing.guest import MEMORY, Console, Guest, GuestError, talking_to

IMAGES = {"disk": 64 << 20, "data": 16 << 20}
"""The disks of the guest, with their sizes in bytes: ``vda`` and ``vdb``."""

BOOT_TIMEOUT = 240.0
"""How long the guest may take to boot on a busy machine, in seconds."""


@define
class Talking:
    """
    A guest that runs.

    :param machine: what it runs in
    :param console: its serial line
    :param images: its working images
    :param directory: where its sockets are: ``monitor`` if it is not ours, and ``agent``
    :param process: the QEMU, if it is not ours
    """

    machine: RunningMachine
    console: Console
    images: Mapping[str, Path]
    directory: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def monitor(self) -> Path:
        """The socket of the monitor of a QEMU that is not ours."""
        return self.directory / "monitor"

    @property
    def agent(self) -> Path:
        """The socket of the guest's agent."""
        return self.directory / "agent"


@frozen
class Lab:
    """
    Where guests come from.

    :param guest: what they are
    :param place: a directory of its own; the booted guest is kept there
    """

    guest: Guest
    place: Path
    _booted: list[bool] = field(factory=list)

    def config(self, images: Mapping[str, Path], directory: Path) -> MachineConfig:
        """
        :param images: working images
        :param directory: where its sockets go; its path must be short
        :returns: a machine for the guest
        """
        arguments: list[str] = []
        for name, path in (("serial", directory / "serial"), ("agent", directory / "agent")):
            arguments += [
                "-chardev",
                f"socket,id={name},path={path},server=on,wait=off",
                "-serial",
                f"chardev:{name}",
            ]
        return MachineConfig(images, memory=MEMORY, arguments=[*arguments, *self.guest.arguments])

    def prepare(self) -> None:
        """Boot the guest, once, and keep its RAM and its disks."""
        if self._booted:
            return
        disks = {name: self.place / f"{name}.qcow2" for name in IMAGES}
        for name, path in disks.items():
            subprocess.run(
                ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(IMAGES[name])],
                check=True,
            )
        with (
            self.directory() as directory,
            RunningMachine.start(self.config(disks, directory)) as machine,
        ):
            with talking_to(directory / "serial") as console:
                console.wait_for("tick 1", timeout=BOOT_TIMEOUT)
            with open(self.ram, "wb") as file, machine.held():
                machine.pause()
                save_ram(machine, file.fileno())
        self._booted.append(True)

    @property
    def ram(self) -> Path:
        """The RAM of the booted guest."""
        return self.place / "ram"

    def copies(self, place: Path) -> dict[str, Path]:
        """:returns: copies of the disks of the booted guest, in a directory"""
        self.prepare()
        place.mkdir(parents=True, exist_ok=True)
        return {
            name: Path(shutil.copy(self.place / f"{name}.qcow2", place / f"{name}.qcow2"))
            for name in IMAGES
        }

    @contextlib.contextmanager
    def directory(self) -> Iterator[Path]:
        """A directory for sockets, whose paths may have 107 characters."""
        with tempfile.TemporaryDirectory(prefix="guest-") as directory:
            yield Path(directory)

    @contextlib.contextmanager
    def running(self, images: Mapping[str, Path]) -> Iterator[Talking]:
        """
        A guest in a machine of ours, which goes on from where it was booted.

        :param images: working images with the content of the booted guest's disks
        """
        self.prepare()
        with (
            self.directory() as directory,
            RunningMachine.start(
                self.config(images, directory), arguments=("-incoming", "defer")
            ) as machine,
        ):
            with open(self.ram, "rb") as file:
                load_ram(machine, file.fileno())
            machine.resume()
            with talking_to(directory / "serial") as console:
                yield Talking(machine, console, images, directory)

    @contextlib.contextmanager
    def foreign(
        self, images: Mapping[str, Path], *, arguments: Sequence[str] = ()
    ) -> Iterator[Talking]:
        """
        A guest in a machine that somebody else has started, with its monitor at a socket.

        :param images: as for :meth:`running`
        :param arguments: further ones of QEMU
        """
        self.prepare()
        with self.directory() as directory:
            command = self.config(images, directory).command()
            command += [
                "-qmp",
                f"unix:{directory / 'monitor'},server=on,wait=off",
                "-incoming",
                f"exec:cat {self.ram}",
                *arguments,
            ]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                monitor = directory / "monitor"
                if (
                    not wait_until(
                        lambda: _listens(monitor) or process.poll() is not None,
                        timeout=BOOT_TIMEOUT,
                    )
                    or process.poll() is not None
                ):
                    assert process.stderr is not None
                    raise GuestError(f"QEMU did not start: {process.stderr.read().decode()}")
                with (
                    RunningMachine.connect(monitor) as machine,
                    talking_to(directory / "serial") as console,
                ):
                    wait_until(lambda: machine.status() != "inmigrate", timeout=BOOT_TIMEOUT)
                    machine.resume()
                    yield Talking(machine, console, images, directory, process)
            finally:
                process.kill()
                process.wait()
                assert process.stderr is not None
                process.stderr.close()


def _listens(path: Path) -> bool:
    """Whether QEMU has got as far as to listen; a socket has its name before that."""
    if not path.exists():
        return False
    try:
        RunningMachine.connect(path, timeout=BOOT_TIMEOUT).close()
    except MachineError:
        return False
    return True
