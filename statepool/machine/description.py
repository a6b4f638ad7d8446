"""
The description of a machine of ours: enough to start a QEMU, without anything that belongs to one
run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from attrs import evolve, field, frozen

from statepool.errors import UsageError
from statepool.model.names import check_name

MIB = 1 << 20


ACCELERATORS = ("kvm", "tcg", "xen", "qtest")
"""The accelerators of QEMU on Linux."""


def _absolute(images: Mapping[str, os.PathLike[str] | str]) -> dict[str, Path]:
    if not isinstance(images, Mapping):
        raise UsageError(
            f"the images of a machine are not {images!r}",
            hint='write a mapping, as in {"disk": "work.qcow2"}',
        )
    return {name: Path(os.path.abspath(path)) for name, path in images.items()}


def _words(arguments: Iterable[str]) -> tuple[str, ...]:
    if isinstance(arguments, str | bytes):
        raise UsageError(
            f"the arguments of QEMU are not a list, but {arguments!r}",
            hint="write a list, also of one argument",
        )
    return tuple(arguments)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value > 0


@frozen
class MachineConfig:
    """
    A description of a machine.

    :param images: its working images, by the names of the machine's images, in the order in which
        it sees them: QCOW2 files, each as a virtio disk
    :param memory: its RAM, in bytes
    :param arguments: further arguments of QEMU, for example for a kernel, network cards and a
        serial line
    :param processors: the number of its processors
    :param machine: its type, as in ``-machine``. The meaning of a plain name such as ``q35``
        depends on the version of QEMU; a state with RAM records the exact type
    :param cpu: its model, as in ``-cpu``; QEMU's own choice if not given
    :param accelerator: ``kvm``, where the host supports it; ``tcg`` works everywhere, and is slow.
        As in ``-accel``, with its properties after commas
    :param display: as in ``-display``
    :param terminal: whether it uses our terminal as its standard input and output, as for ``-serial
        mon:stdio``
    :param speaks_aside: whether its terminal output goes to our standard error, since standard
        output has another use
    :param binary: the program
    :raises UsageError: the description is not valid
    """

    images: Mapping[str, Path] = field(factory=dict, converter=_absolute)
    memory: int = 512 * MIB
    arguments: tuple[str, ...] = field(default=(), converter=_words)
    processors: int = 1
    machine: str = "q35"
    cpu: str | None = None
    accelerator: str = "tcg"
    display: str = "none"
    terminal: bool = False
    speaks_aside: bool = False
    binary: str = "qemu-system-x86_64"

    def __attrs_post_init__(self) -> None:
        for name in self.images:
            check_name(name, "an image")
        if self.memory < MIB or self.memory % MIB:
            raise UsageError(
                f"a machine cannot have {self.memory} bytes of RAM", hint="give whole MiB, in bytes"
            )
        if not _is_count(self.processors):
            raise UsageError(
                f"a machine cannot have {self.processors!r} processors", hint="give it one or more"
            )
        if str(self.accelerator).partition(",")[0] not in ACCELERATORS:
            raise UsageError(
                f"there is no accelerator {self.accelerator!r}",
                hint="accelerators are " + ", ".join(ACCELERATORS),
            )

    def with_images(self, images: Mapping[str, Path]) -> MachineConfig:
        """:returns: the same machine with other working images"""
        return evolve(self, images=images)

    def node(self, image: str) -> str:
        """
        :returns: the name of an image's disk in QEMU; not every image name is a valid name there
        """
        return f"disk{list(self.images).index(image)}"

    def command(self) -> list[str]:
        """:returns: the program and its arguments, without the monitor"""
        words = [
            self.binary,
            "-nodefaults",
            "-no-user-config",
            "-machine",
            self.machine,
            "-accel",
            self.accelerator,
        ]
        words += [
            "-m",
            f"{self.memory // MIB}M",
            "-smp",
            str(self.processors),
            "-display",
            self.display,
        ]
        if self.cpu is not None:
            words += ["-cpu", self.cpu]
        for name, path in self.images.items():
            node = self.node(name)
            disk = {
                "driver": "qcow2",
                "node-name": node,
                "discard": "unmap",
                "file": {"driver": "file", "filename": str(path)},
            }
            words += [
                "-blockdev",
                json.dumps(disk),
                "-device",
                f"virtio-blk-pci,drive={node},id={node}-device",
            ]
        return [*words, *self.arguments]
