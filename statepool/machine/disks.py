"""
The disks of a running machine, as block nodes of QEMU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from statepool.errors import NotFound, RefusedError
from statepool.machine.running import RunningMachine


@frozen
class Disk:
    """
    A disk of a running machine.

    :param node: the name of its active block node
    :param device: the id or the QOM path of the device that it is plugged in to
    :param path: the file behind it
    :param format: the format of that file: ``qcow2``, ``raw`` ...
    :param read_only: whether the guest cannot write to it
    :param size: the size of the disk, in bytes
    :param tags: the names of its internal snapshots, with the size of the RAM in each, in bytes
    """

    node: str
    device: str
    path: Path
    format: str
    read_only: bool
    size: int
    tags: Mapping[str, int]

    def __str__(self) -> str:
        return f"{self.path} ({self.format})"


def disks(machine: RunningMachine) -> list[Disk]:
    """:returns: the disks that have a medium, in QEMU's order"""
    return [_disk(block) for block in machine.execute("query-block") if block.get("inserted")]


def _disk(block: dict[str, Any]) -> Disk:
    inserted = block["inserted"]
    image = inserted["image"]
    return Disk(
        node=inserted["node-name"],
        device=block.get("qdev") or block["device"],
        path=_path(inserted["file"]),
        format=inserted["drv"],
        read_only=inserted["ro"],
        size=image["virtual-size"],
        tags={
            snapshot["name"]: snapshot["vm-state-size"] for snapshot in image.get("snapshots", ())
        },
    )


def _path(name: str) -> Path:
    """
    Get the path of the file from QEMU's name of a node: it is a JSON text if the backing file is
    not the one that the header names.
    """
    if not name.startswith("json:"):
        return Path(name)
    node = json.loads(name.removeprefix("json:"))
    while isinstance(node.get("file"), dict):
        node = node["file"]
    return Path(str(node.get("filename", name)))


def writable(machine: RunningMachine) -> list[Disk]:
    """
    :returns: the disks that the guest can write to
    :raises RefusedError: there is no such disk, or one of them cannot have states
    """
    found = [disk for disk in disks(machine) if not disk.read_only]
    if not found:
        raise RefusedError(
            f"{machine} has no disk that it can write to",
            hint="a state needs at least one QCOW2 image",
        )
    unfit = [str(disk) for disk in found if disk.format != "qcow2"]
    if unfit:
        raise RefusedError(
            f"{machine} writes to images that are not QCOW2: {', '.join(unfit)}",
            hint="convert them, or make them read-only",
        )
    return found


def disk_of(machine: RunningMachine, path: Path) -> Disk:
    """
    :param path: a working image
    :returns: the disk of the machine that uses the image
    :raises NotFound: no disk uses it
    :raises RefusedError: the guest cannot write to it, or it is not a QCOW2 image there
    """
    for disk in disks(machine):
        if is_same_file(disk.path, path):
            if disk.read_only:
                raise RefusedError(
                    f"{machine} has {path} for reading only",
                    path=str(path),
                    hint="it cannot have changed: there is nothing to set",
                )
            if disk.format != "qcow2":
                raise RefusedError(
                    f"{machine} uses {path} as {disk.format}, not as QCOW2",
                    path=str(path),
                    hint="give the drive format=qcow2",
                )
            return disk
    raise NotFound(
        f"{machine} does not run on {path}",
        path=str(path),
        hint="name the image that it runs on: " + ", ".join(map(str, disks(machine))),
    )


def is_same_file(one: Path, other: Path) -> bool:
    """:returns: whether two paths lead to one file"""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False  # for example json:{...}, which is no plain path
