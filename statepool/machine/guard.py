"""
Programs that end with this process, however it ends.

The kernel ends such a program with the thread that started it (``PR_SET_PDEATHSIG``, by
util-linux's ``setpriv``). If this process ended before that was arranged, the shell in between
finds that it has another parent, and starts nothing. Processes that the program itself has started
are not ended by that: :func:`watched` handles a whole group of processes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from statepool.errors import MachineError
from statepool.model.secrets import SECRET_VARIABLES

_GUARDED = 'if [ "$PPID" = "$0" ]; then exec "$@"; fi'
"""A shell command: start the program if the parent is still the expected one."""

_WATCHING = 'read -r word || kill -s KILL -- "-$0"'
"""
A shell command: kill a group of processes when the writer of the pipe has ended without reporting
that they are done.
"""


def guarded(command: Sequence[str]) -> list[str]:
    """
    :param command: a program and its arguments
    :returns: the command to start instead, from a thread that lasts
    :raises MachineError: a program that it needs is not installed
    """
    return without_secrets(
        [
            _found("setpriv"),
            "--pdeathsig",
            "KILL",
            _found("sh"),
            "-c",
            _GUARDED,
            str(os.getpid()),
            *command,
        ]
    )


def without_secrets(command: Sequence[str]) -> list[str]:
    """
    :param command: a program and its arguments
    :returns: the command to start instead, so that it does not inherit the passwords of our
        environment
    """
    return [_found("sh"), "-c", f'unset {" ".join(SECRET_VARIABLES)}; exec "$@"', "sh", *command]


def _found(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise MachineError(
            f"{name} is not installed", hint="install util-linux" if name == "setpriv" else None
        )
    return path


@contextlib.contextmanager
def watched(group: int) -> Iterator[None]:
    """
    Kill the processes of a group if this process is killed, for the length of a ``with`` block.

    :param group: its id, which must be in use when the block ends
    """
    watcher = subprocess.Popen(
        without_secrets([_found("sh"), "-c", _WATCHING, str(group)]),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )
    try:
        yield
    finally:
        watcher.communicate(b"done\n")
