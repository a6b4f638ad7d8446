"""
The adapter for avocado-i2n: state backends with its class methods and its parameters, on
statepool's pools.

::

    from avocado_statepool import states

    states.register()

or, for some of them only, ``avocado_i2n.states.setup.BACKENDS["qcow2ext"] =
states.QCOW2ExtBackend``.

Parameters may be any object with the methods of ``virttest.utils_params.Params``. Neither
avocado-i2n nor virttest is imported, except to make a new disk or start a machine, which virttest
does.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import time
from collections.abc import Iterator
from typing import IO

from avocado_statepool.states.images import QCOW2Backend, QCOW2ExtBackend
from avocado_statepool.states.machines import QCOW2VTBackend, RamfileBackend
from avocado_statepool.states.sourced import RootSourcedStateBackend, SourcedStateBackend
from avocado_statepool.states.transfer import QCOW2ImageTransfer, TransferOps

__all__ = [
    "register",
    "QCOW2ExtBackend",
    "QCOW2Backend",
    "QCOW2VTBackend",
    "RamfileBackend",
    "SourcedStateBackend",
    "RootSourcedStateBackend",
    "QCOW2ImageTransfer",
    "TransferOps",
    "image_lock",
    "SKIP_LOCKS",
]

SKIP_LOCKS = False
"""
Whether :func:`image_lock` does nothing. Nothing here needs that lock: it is for other code that
takes it.
"""

_PAUSE = 0.01
"""Seconds between two attempts to take a lock that another process holds."""

_PLACES = {
    "qcow2": ("QCOW2Backend", "QCOW2ExtBackend", "QCOW2VTBackend"),
    "ramfile": ("RamfileBackend",),
    "pool": (
        "TransferOps",
        "QCOW2ImageTransfer",
        "RootSourcedStateBackend",
        "SourcedStateBackend",
        "image_lock",
    ),
}
"""The names in modules of ``avocado_i2n.states`` that are replaced."""


def register() -> None:
    """
    Replace the state backends of avocado-i2n by these, before or after it has read its command
    line.

    :raises ImportError: avocado-i2n is not installed
    """
    for module, names in _PLACES.items():
        place = importlib.import_module(f"avocado_i2n.states.{module}")
        for name in names:
            setattr(place, name, globals()[name])
    setup = importlib.import_module("avocado_i2n.states.setup")
    setup.BACKENDS.update(
        qcow2=QCOW2Backend, qcow2ext=QCOW2ExtBackend, qcow2vt=QCOW2VTBackend, ramfile=RamfileBackend
    )


@contextlib.contextmanager
def image_lock(resource_path: str, timeout: float = 300) -> Iterator[IO[bytes] | None]:
    """
    Take the lock of avocado-i2n on a file of a pool: a POSIX lock on ``resource_path.lock``.

    :param resource_path: the locked file
    :param timeout: how long to wait for its holder, in seconds
    :raises LockTimeout: another process has held it for so long
    """
    if SKIP_LOCKS:
        yield None
        return
    path = f"{resource_path}.lock"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        _acquire(file, path, timeout)
        try:
            yield file
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN)


def _acquire(file: IO[bytes], path: str, timeout: float) -> None:
    from statepool import LockTimeout

    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() >= deadline:
                raise LockTimeout(
                    f"{path} has been locked for {timeout} s", path=path, hint="see who works there"
                ) from error
            time.sleep(_PAUSE)
        else:
            return
