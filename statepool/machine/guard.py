"""
Programs that do not outlive us, however we end.

The kernel ends such a program with the thread that started it (``PR_SET_PDEATHSIG``, by
util-linux's ``setpriv``). Had we ended before that was arranged, the shell in between finds that
its parent is another one, and starts nothing. What the program itself has started is not ended by
that: :func:`watched` looks after a whole group of processes.
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
"""For the shell: start the program if its parent is still who it should be."""

_WATCHING = 'read -r word || kill -s KILL -- "-$0"'
"""For the shell: end a group of processes when nobody can say any more that they are done."""


def guarded(command: Sequence[str]) -> list[str]:
    """
    :param command: a program and its arguments
    :returns: what is to be started instead, by a thread that lasts
    :raises MachineError: what it takes is not installed
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
    :returns: what is to be started instead, so that it does not inherit passwords which our
        environment has
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
    For as long as a ``with`` block lasts, the processes of a group are killed if we are.

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
