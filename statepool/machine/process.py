"""
A QEMU process of our own. It ends with this process, however that ends: the thread of our event
loop starts it, and the kernel ends it with that thread.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence

from statepool.beneath import Descriptor
from statepool.errors import MachineError
from statepool.machine.guard import guarded
from statepool.machine.loop import LOOP

KILL_TIMEOUT = 10.0
"""The timeout for the kernel to end a process, in seconds."""

_TAIL = 4096
"""Bytes at the end of QEMU's output that are searched for its error."""


class Process:
    """
    A running QEMU.

    :param command: the program and its arguments
    :param label: the name of the machine in messages
    :param interactive: whether it uses our terminal for its standard input and output
    :param aside: whether its terminal output goes to our standard error
    :raises MachineError: it cannot be started
    """

    def __init__(
        self, command: Sequence[str], label: str, *, interactive: bool = False, aside: bool = False
    ) -> None:
        self.label = label
        self._program = os.path.basename(command[0])
        self._owner = os.getpid()
        self._log = Descriptor(os.memfd_create, "qemu-log", os.MFD_CLOEXEC)
        ours, theirs = socket.socketpair()
        self.connection = ours
        LOOP.acquire()
        try:
            with theirs:
                words = _guarded([*command, *_monitor(theirs.fileno())])
                self._process = LOOP.call(
                    lambda: _start(words, theirs.fileno(), self._log.number, interactive, aside)
                )
        except BaseException:
            ours.close()
            self._log.close()
            LOOP.release()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """
        Whether the process has not ended, as far as this process can tell: a process forked from
        this one cannot tell.
        """
        return self._owner != os.getpid() or self._process.poll() is None

    def said(self) -> str:
        """:returns: the end of its standard error output, or how it ended"""
        size = os.fstat(self._log.number).st_size
        text = os.pread(self._log.number, _TAIL, max(0, size - _TAIL)).decode(errors="replace")
        if text.strip():
            return _complaint(text, self._program)
        code = self._process.poll()
        if code is None:
            return "it said nothing"
        return (
            f"it was ended by signal {-code}"
            if code < 0
            else f"it ended with exit code {code} and said nothing"
        )

    def wait(self, timeout: float | None = None) -> bool:
        """
        :param timeout: in seconds; no limit if not given
        :returns: whether it has ended
        """
        if self._owner != os.getpid():
            return False
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> None:
        """
        Kill the process, if it has not ended, and forget it. In a process that was forked from this
        one, nothing is done.
        """
        if self._log.number < 0:
            return
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait(KILL_TIMEOUT)
            LOOP.release()
        self._log.close()


def _complaint(text: str, program: str) -> str:
    """
    :returns: the last line that begins with the program's name, as QEMU's errors do but not the
        advice that follows them; the last line if there is none
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line.removeprefix(f"{program}: ") for line in lines if line.startswith(f"{program}: ")]
    return ([line for line in ours if not line.startswith("warning: ")] or ours or lines)[-1]


def _monitor(descriptor: int) -> list[str]:
    return [
        "-chardev",
        f"socket,id=statepool,fd={descriptor}",
        "-mon",
        "chardev=statepool,mode=control",
    ]


def _guarded(command: list[str]) -> list[str]:
    if shutil.which(command[0]) is None:
        raise MachineError(f"{command[0]} is not installed", hint="install qemu-system-x86")
    return guarded(command)


def _start(
    words: list[str], descriptor: int, log: int, interactive: bool, aside: bool
) -> subprocess.Popen[bytes]:
    quiet = None if interactive else subprocess.DEVNULL
    output = 2 if interactive and aside else quiet
    try:
        return subprocess.Popen(
            words,
            stdin=quiet,
            stdout=output,
            stderr=log,
            pass_fds=(descriptor,),
            start_new_session=not interactive,
        )
    except OSError as error:
        raise MachineError(f"cannot run {words[0]}: {error.strerror}") from error
