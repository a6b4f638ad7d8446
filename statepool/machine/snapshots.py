"""
Internal snapshots of a running machine: its RAM and all writable disks, inside the QCOW2 images.
"""

from __future__ import annotations

from statepool.errors import Conflict, NotFound
from statepool.machine.disks import writable
from statepool.machine.jobs import run_job
from statepool.machine.running import RunningMachine
from statepool.model.progress import SILENT, Progress


def snapshots(machine: RunningMachine) -> dict[str, int]:
    """
    :returns: the snapshots that all writable disks have, with the size of the RAM in each, in bytes
    :raises RefusedError: a writable disk cannot have snapshots
    """
    found = [disk.tags for disk in writable(machine)]
    return {
        tag: size
        for tag in found[0]
        if all(tag in tags for tags in found) and (size := max(tags[tag] for tags in found))
    }


def _where(machine: RunningMachine) -> tuple[str, list[str]]:
    nodes = [disk.node for disk in writable(machine)]
    return nodes[0], nodes


def save_snapshot(machine: RunningMachine, tag: str, *, progress: Progress = SILENT) -> None:
    """
    Save a snapshot. The machine is paused meanwhile, and then continues.

    :param tag: the name of the snapshot
    :raises Conflict: a disk has a snapshot of this name
    :raises RefusedError: a writable disk cannot have snapshots
    :raises MachineError: QEMU failed
    """
    taken = [str(disk.path) for disk in writable(machine) if tag in disk.tags]
    if taken:
        raise Conflict(
            f"{machine} has a snapshot {tag} already, in {', '.join(taken)}",
            state=tag,
            hint="choose another name, or ask for replacing",
        )
    vmstate, nodes = _where(machine)
    with machine.held():
        run_job(
            machine,
            "snapshot-save",
            what=f"save the snapshot {tag}",
            progress=progress,
            tag=tag,
            vmstate=vmstate,
            devices=nodes,
        )


def load_snapshot(machine: RunningMachine, tag: str, *, progress: Progress = SILENT) -> None:
    """
    Restore a snapshot. Afterwards the machine runs if it ran before, and is paused if it was
    paused.

    :param tag: the name of the snapshot
    :raises NotFound: no snapshot has this name, or not all disks have it
    :raises MachineError: QEMU failed
    """
    _require(machine, tag)
    vmstate, nodes = _where(machine)
    with machine.held():
        run_job(
            machine,
            "snapshot-load",
            what=f"load the snapshot {tag}",
            progress=progress,
            tag=tag,
            vmstate=vmstate,
            devices=nodes,
        )


def delete_snapshot(machine: RunningMachine, tag: str, *, progress: Progress = SILENT) -> None:
    """
    Delete a snapshot.

    :param tag: the name of the snapshot
    :raises NotFound: no disk has a snapshot of this name
    :raises MachineError: QEMU failed
    """
    nodes = [disk.node for disk in writable(machine) if tag in disk.tags]
    if not nodes:
        raise _missing(machine, tag)
    run_job(
        machine,
        "snapshot-delete",
        what=f"delete the snapshot {tag}",
        progress=progress,
        tag=tag,
        devices=nodes,
    )


def _require(machine: RunningMachine, tag: str) -> None:
    if tag not in snapshots(machine):
        raise _missing(machine, tag)


def _missing(machine: RunningMachine, tag: str) -> NotFound:
    there = ", ".join(snapshots(machine)) or "none"
    return NotFound(
        f"{machine} has no snapshot {tag} with RAM on all its disks",
        state=tag,
        hint=f"there are: {there}",
    )
