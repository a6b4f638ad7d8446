"""
RAM of a machine to and from a file, as QEMU's migration stream through a descriptor of ours: QEMU
opens no file of its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets

from statepool.errors import IntegrityError, MachineError, NoSpace, RefusedError
from statepool.machine.running import RunningMachine, wait_until

RAM_TIMEOUT = 600.0
"""How long it may take to write or read the RAM of a machine, in seconds."""

_BANDWIDTH = 1 << 40
"""What QEMU may write in a second, in bytes: as fast as it can. By itself it takes 128 MiB."""

_LOOK = 0.004
"""Seconds between two looks whether RAM has been moved: a guest is waiting."""

_OVER = frozenset({"completed", "failed", "cancelled"})


def prepare_ram(machine: RunningMachine, descriptor: int) -> str:
    """
    Get ready to write the RAM of a machine, while it may still run.

    :param descriptor: where to; of a file
    :returns: what QEMU calls it
    """
    machine.execute("migrate-set-parameters", max_bandwidth=_BANDWIDTH)
    label = "statepool-" + secrets.token_hex(4)
    machine.monitor.send_descriptor(label, descriptor)
    return label


def save_ram(
    machine: RunningMachine,
    descriptor: int,
    *,
    label: str | None = None,
    timeout: float = RAM_TIMEOUT,
) -> None:
    """
    Write the RAM of a machine that stands still; it does so afterwards, too.

    :param descriptor: where to; of a file
    :param label: what :func:`prepare_ram` gave, if that was done before
    :param timeout: in seconds
    :raises NoSpace: there is no room for it
    :raises MachineError: QEMU failed
    """
    label = label or prepare_ram(machine, descriptor)
    try:
        machine.execute("migrate", uri=f"fd:{label}")
        _await_end(machine, timeout)
    except MachineError as error:
        with contextlib.suppress(MachineError):  # it is known to have failed
            machine.execute("migrate_cancel")
        raise _explained(error, descriptor) from error


def load_ram(machine: RunningMachine, descriptor: int, *, timeout: float = RAM_TIMEOUT) -> None:
    """
    Give RAM to a machine that waits for it (``-incoming defer``). It stands still afterwards.

    :param descriptor: where from; a file or a pipe
    :param timeout: in seconds
    :raises RefusedError: it does not wait for RAM
    :raises IntegrityError: QEMU could not load it, and has ended
    """
    status = machine.status()
    if status != "inmigrate":
        raise RefusedError(
            f"{machine} cannot take the RAM of a state: it is {status} already",
            hint="only a machine that was started with -incoming defer can",
        )
    label = "statepool-" + secrets.token_hex(4)
    machine.monitor.send_descriptor(label, descriptor)
    try:
        machine.execute("migrate-incoming", uri=f"fd:{label}")
        _await_end(machine, timeout)
        wait_until(lambda: machine.status() != "inmigrate", timeout=timeout)
    except MachineError as error:
        raise IntegrityError(
            f"the RAM of a state could not be loaded: {error.message}",
            hint="was it saved by such a machine, and is it whole?",
        ) from error


def _await_end(machine: RunningMachine, timeout: float) -> None:
    last: dict[str, object] = {}

    def is_over() -> bool:
        last.update(machine.execute("query-migrate"))
        return last.get("status") in _OVER

    if not wait_until(is_over, timeout=timeout, most=_LOOK):
        raise MachineError(
            f"{machine} did not move its RAM within {timeout:g} s", hint="allow it more time"
        )
    if last["status"] != "completed":
        raise MachineError(
            f"{machine} could not move its RAM: {last.get('error-desc', last['status'])}"
        )


def _explained(error: MachineError, descriptor: int) -> MachineError | NoSpace:
    """:returns: the error, or what it comes from: QEMU says no more than that writing failed"""
    found = os.fstatvfs(descriptor)
    available = found.f_bavail * found.f_frsize
    if "space" in error.message or available < 1 << 20:
        return NoSpace(
            "there is no room for the RAM of the machine",
            available=available,
            hint="make room in the cache, or give it another place",
        )
    return error
