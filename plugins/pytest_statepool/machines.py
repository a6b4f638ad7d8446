"""A machine that runs from the working images of a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_statepool.working import Working

if TYPE_CHECKING:
    from statepool import MachineConfig, RunningMachine, StatePool

_WAITS_FOR_RAM = ("-incoming", "defer")
"""The arguments that make QEMU wait for the RAM of a state."""


def start(pool: StatePool, workings: Sequence[Working], config: MachineConfig) -> RunningMachine:
    """
    Start a machine. It ends when it is closed, or when this process ends in any way.

    :param pool: the pool from which its state came
    :param workings: of images of one machine, or of the whole machine: then it resumes from its RAM
        if the state has it
    :param config: its configuration, without its images; images that it names come first, in its
        order, then the others by their names
    :returns: the running machine
    :raises UsageError: there is no working image, or not all are of one machine
    :raises Incompatible: the state's RAM is that of another machine
    :raises MachineError: QEMU is not installed, or does not start
    """
    from statepool import RunningMachine

    images = _images(workings)
    names = [name for name in config.images if name in images]
    names += sorted(set(images) - set(names))
    described = config.with_images({name: images[name] for name in names})
    with_ram = next((working for working in workings if _has_ram(pool, working)), None)
    if with_ram is None:
        return RunningMachine.start(described)
    machine = RunningMachine.start(described, arguments=_WAITS_FOR_RAM)
    try:
        pool.machine(with_ram.object).load(with_ram.name, machine)
    except BaseException:
        machine.close()
        raise
    return machine


def _images(workings: Sequence[Working]) -> dict[str, Path]:
    from statepool import UsageError

    machines = sorted({working.machine for working in workings})
    if len(machines) != 1:
        what = f"working images of {' and '.join(machines)}" if machines else "no working image"
        raise UsageError(
            f"one machine cannot be started on {what}",
            hint='name those of one, as in make_vm(vm_state["vm1/disk"])',
        )
    images: dict[str, Path] = {}
    for working in workings:
        for name, path in working.images.items():
            if name in images:
                raise UsageError(
                    f"two working images of {working.machine}/{name} are named for one machine",
                    hint="name one",
                )
            images[name] = path
    return images


def _has_ram(pool: StatePool, working: Working) -> bool:
    from statepool import Kind

    if not working.is_machine:
        return False
    listed = pool.machine(working.object).show(scope="own")
    return any(
        one.manifest.kind is Kind.RAM and one.manifest.state == working.name for one in listed
    )
