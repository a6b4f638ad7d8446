"""
Ending a process at a system call of our choice, or making that call fail: what a crash, a full disk
and a broken disk look like from inside.

The command does its work between two calls of :func:`mark`; what Python does to start and to end
does not count. It is run once as it is, to see which system calls change files, and then once for
each of them::

    for call in changing_calls(command):
        kill_at(command, call)      # ... and look at what is left

strace(1) does it, from the outside: the command needs no change, and gets no chance to clean up.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from statepool.errors import ToolError

EVERY = int(os.environ.get("EVERY", "3"))
"""Programs are interrupted at one of so many of their system calls: neighbours are much alike."""

_MARK = "sched_yield"
"""
A system call that changes nothing, takes no time, and that neither Python nor we make otherwise.
"""

_CHANGING = (
    "chmod",
    "copy_file_range",
    "fallocate",
    "fchmod",
    "fchmodat",
    "fchown",
    "fdatasync",
    "fremovexattr",
    "fsetxattr",
    "fsync",
    "ftruncate",
    "ioctl",
    "link",
    "linkat",
    "mkdir",
    "mkdirat",
    "open",
    "openat",
    "openat2",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "rename",
    "renameat",
    "renameat2",
    "rmdir",
    "sendfile",
    "symlink",
    "symlinkat",
    "truncate",
    "unlink",
    "unlinkat",
    "utimensat",
    "write",
    "writev",
)
"""
System calls that can change a file or a directory, or bring one to stable storage. Those that a
kernel does not have are left out (``?``).
"""

_SELDOM = dict.fromkeys(("open", "openat", "openat2"), r"O_CREAT|O_TMPFILE|O_TRUNC") | {
    "ioctl": r"FICLONE"
}
"""Of those that also do other things: what marks a call that changes a file."""

_LINE = re.compile(r"^(?:(\d+) +)?(\w+)\((.*)\) += +(-?\d+|\?)")
"""A line of strace's output: process, call, arguments, result."""


@frozen
class SystemCall:
    """
    One system call of a command.

    :param name: which
    :param number: how many of this name the process has made by then, itself included
    :param arguments: as strace prints them, for people
    """

    name: str
    number: int
    arguments: str = ""

    @property
    def kind(self) -> str:
        """What it does, whatever its path is relative to: ``rename`` for ``renameat2``."""
        return re.sub(r"(at)?2?$", "", self.name)

    def __str__(self) -> str:
        return f"{self.name}({self.arguments}) (number {self.number})"


def mark() -> None:
    """
    The work that matters begins, or has ended. To be called by the command, in its only thread.
    """
    os.sched_yield()


def missing_tool() -> str | None:
    """:returns: why this host cannot do it, or None"""
    if shutil.which("strace") is None:
        return "strace is not installed (Debian: strace)"
    done = subprocess.run(
        ["strace", "-o", os.devnull, "true"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return None if done.returncode == 0 else f"strace may not trace here: {done.stderr.strip()}"


def changing_calls(
    command: Sequence[str],
    *,
    cwd: os.PathLike[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> list[SystemCall]:
    """
    Run a command to its end.

    :param command: a program and its arguments, which calls :func:`mark` before and after its work
    :param env: its environment; ours if not given
    :param timeout: in seconds
    :returns: the successful calls between the marks that change files, in their order
    :raises ToolError: strace is missing, or the command failed
    """
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace")
        done = _strace(
            ["-o", str(trace), "-e", f"trace={_names((*_CHANGING, _MARK))}"],
            command,
            cwd,
            env,
            timeout,
        )
        lines = trace.read_text(errors="replace").splitlines() if trace.exists() else []
    if done.returncode != 0:
        raise ToolError(
            f"{command} ended with {done.returncode} under strace: {done.stderr.strip()}"
        )
    return _between_marks(lines)


def _between_marks(lines: Sequence[str]) -> list[SystemCall]:
    calls, counted, marks = [], Counter[tuple[str | None, str]](), 0
    for line in lines:
        if (found := _LINE.match(line)) is None:
            continue
        thread, name, arguments, result = found.groups()
        counted[thread, name] += 1  # as strace counts when it injects
        if name == _MARK:
            marks += 1
        elif (
            marks == 1
            and not result.startswith("-")
            and re.search(_SELDOM.get(name, ""), arguments)
        ):
            calls.append(SystemCall(name, counted[thread, name], arguments))
    if marks != 2:
        raise ToolError(
            f"the command has marked its work {marks} times, not twice",
            hint="call mark() before and after it",
        )
    return calls


def kill_at(
    command: Sequence[str],
    call: SystemCall,
    *,
    cwd: os.PathLike[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> None:
    """
    Run a command that is killed, as by ``kill -9``, when it is about to make a system call, which
    has no effect any more.

    :raises ToolError: strace is missing, or the command did not come there
    """
    inject = f"inject={call.name}:signal=KILL:when={call.number}"
    done = _strace(
        ["-o", os.devnull, "-e", f"trace={call.name}", "-e", inject], command, cwd, env, timeout
    )
    if done.returncode not in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise ToolError(
            f"{command} was not killed at {call}, but ended with {done.returncode}:"
            f" {done.stderr.strip()}"
        )


def fail_at(
    command: Sequence[str],
    call: SystemCall,
    error: int,
    *,
    onwards: bool = False,
    cwd: os.PathLike[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 600.0,
) -> subprocess.CompletedProcess[str]:
    """
    Run a command in which a system call fails and has no effect.

    :param error: one of :mod:`errno`
    :param onwards: whether all later calls of this name fail too
    :returns: how it ended
    :raises ToolError: strace is missing
    """
    when = f"{call.number}{'+' if onwards else ''}"
    inject = f"inject={call.name}:error={errno.errorcode[error]}:when={when}"
    return _strace(
        ["-o", os.devnull, "-e", f"trace={call.name}", "-e", inject], command, cwd, env, timeout
    )


def _names(names: Sequence[str]) -> str:
    return ",".join(f"?{name}" for name in names)


def _strace(
    options: Sequence[str],
    command: Sequence[str],
    cwd: os.PathLike[str],
    env: Mapping[str, str] | None,
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    # Numbers are counted for each process by itself, and the work is done in one: -f is only there
    # to let helpers it starts be killed with it. Without --seccomp-bpf, with which strace 6.1
    # injects no signals.
    whole = ["strace", "-f", "-qq", *options, *command]
    try:
        return subprocess.run(
            whole,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise ToolError("strace is not installed", hint="Debian: apt install strace") from error
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{command} took more than {timeout:g} s under strace") from error
