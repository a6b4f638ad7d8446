"""
Move the RAM of a machine to and from a file, as QEMU's migration stream through a descriptor of
ours: QEMU opens no file itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets

from statepool.errors import IntegrityError, MachineError, NoSpace, RefusedError
from statepool.machine.running import RunningMachine, wait_until

RAM_TIMEOUT = 600.0
"""The timeout for writing or reading the RAM of a machine, in seconds."""

_BANDWIDTH = 1 << 40
"""
The bandwidth limit for QEMU, in bytes per second: so high that it has no effect. QEMU's default is
128 MiB.
"""

_LOOK = 0.004
"""Seconds between two checks whether the RAM has been moved: a guest is waiting."""

_OVER = frozenset({"completed", "failed", "cancelled"})


def prepare_ram(machine: RunningMachine, descriptor: int) -> str:
    """
    Prepare to write the RAM of a machine, while it may still run.

    :param descriptor: of the file to write
    :returns: its name in QEMU
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
    Write the RAM of a paused machine; it stays paused.

    :param descriptor: of the file to write
    :param label: the result of :func:`prepare_ram`, if that was called before
    :param timeout: in seconds
    :raises NoSpace: there is no room for the RAM
    :raises MachineError: QEMU failed
    """
    label = label or prepare_ram(machine, descriptor)
    try:
        machine.execute("migrate", uri=f"fd:{label}")
        _await_end(machine, timeout)
    except MachineError as error:
        with contextlib.suppress(MachineError):  # QEMU is known to have failed
            machine.execute("migrate_cancel")
        raise _explained(error, descriptor) from error


def load_ram(machine: RunningMachine, descriptor: int, *, timeout: float = RAM_TIMEOUT) -> None:
    """
    Load RAM into a machine that waits for it (``-incoming defer``). The machine is paused
    afterwards.

    :param descriptor: of the file or pipe to read
    :param timeout: in seconds
    :raises RefusedError: the machine does not wait for RAM
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
    """:returns: the error, or its cause: QEMU only says that writing failed"""
    found = os.fstatvfs(descriptor)
    available = found.f_bavail * found.f_frsize
    if "space" in error.message or available < 1 << 20:
        return NoSpace(
            "there is no room for the RAM of the machine",
            available=available,
            hint="make room in the cache, or give it another place",
        )
    return error
