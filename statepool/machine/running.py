"""A running machine: one that another program started, or a QEMU of our own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from statepool.errors import InUse, MachineError, RefusedError
from statepool.machine import keeper
from statepool.machine.description import MachineConfig
from statepool.machine.guard import without_secrets
from statepool.machine.monitor import CONNECT_TIMEOUT, Monitor
from statepool.machine.process import Process

START_TIMEOUT = 60.0
"""The timeout for the greeting of a QEMU that we start, in seconds."""

QUIT_TIMEOUT = 10.0
"""The timeout for QEMU to end when asked to, in seconds; then it is killed."""

_AT_REST = frozenset({"paused", "prelaunch"})
"""
The run states in which a machine is paused and has its disks. After a migration it does not have
them, and QEMU ends on an operation with them.
"""


class RunningMachine:
    """
    A running machine, as its monitor shows it. Close it when you are done: then a machine of ours
    ends, and another one continues to run.

    :param monitor: the machine's monitor
    :param path: the socket of the monitor, if the machine is not ours
    :param process: the QEMU, if it is ours
    :param config: the description from which it was started, if it is ours
    """

    def __init__(
        self,
        monitor: Monitor,
        *,
        path: Path | None = None,
        process: Process | None = None,
        config: MachineConfig | None = None,
    ) -> None:
        self.monitor = monitor
        self.config = config
        self._path = path
        self._process = process
        self._keeper: subprocess.Popen[bytes] | None = None

    @classmethod
    def connect(cls, path: os.PathLike[str] | str, *, timeout: float = CONNECT_TIMEOUT) -> Self:
        """
        :param path: the socket of a running QEMU's monitor, as in ``-qmp
            unix:PATH,server=on,wait=off``
        :param timeout: the timeout of its greeting, in seconds
        :raises NotFound: there is no such socket
        :raises InUse: another program is using the monitor
        :raises MachineError: no process listens there, or one that is not QEMU
        """
        return cls(Monitor.connect(path, timeout=timeout), path=Path(os.path.abspath(path)))

    @classmethod
    def start(cls, config: MachineConfig, *, arguments: Sequence[str] = ()) -> Self:
        """
        Start a QEMU. It ends with this process, however that ends, or with :meth:`close`.

        :param config: the description of the machine
        :param arguments: further arguments, for this run only
        :raises MachineError: QEMU does not start; the message has its output
        """
        label = (
            " ".join(["the machine on", *map(str, config.images.values())])
            if config.images
            else "the machine"
        )
        process = Process(
            [*config.command(), *arguments],
            label,
            interactive=config.terminal,
            aside=config.speaks_aside,
        )
        try:
            monitor = Monitor(process.connection, label, timeout=START_TIMEOUT)
        except BaseException as error:
            process.wait(1)
            said = process.said()
            process.end()
            if not isinstance(error, MachineError | InUse):
                raise
            raise MachineError(
                f"{label} did not start: {said}", hint="see its description and its extra arguments"
            ) from error
        return cls(monitor, process=process, config=config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return self.monitor.name

    def close(self) -> None:
        """Release a machine that is not ours; end one that is."""
        try:
            if self._process is not None and self._process.is_alive and self.monitor.is_open:
                self._quit(self._process)
            self.monitor.close()
        finally:
            self._dismiss_keeper()
            if self._process is not None:
                self._process.end()

    def restart(self, *, arguments: Sequence[str] = ()) -> None:
        """
        End a QEMU that is ours, at once, and start a new one in its place.

        :param arguments: further arguments, for this run only
        :raises RefusedError: the machine is not ours
        :raises MachineError: the new QEMU does not start
        """
        if self.config is None:
            raise RefusedError(
                f"{self} is not ours to be started again",
                hint="end it, and start it with -incoming defer",
            )
        self.close()
        other = type(self).start(self.config, arguments=arguments)
        self.monitor, self._process = other.monitor, other._process

    def _quit(self, process: Process) -> None:
        # QEMU may be ending already; if it does not end, it is killed
        with contextlib.suppress(MachineError):
            self.monitor.execute("quit", timeout=QUIT_TIMEOUT)
            process.wait(QUIT_TIMEOUT)

    # -- what it does ------------------------------------------------------------------------------

    @property
    def is_ours(self) -> bool:
        """Whether this process started it."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """The process id of a QEMU that is ours."""
        return self._process.pid if self._process is not None else None

    def wait(self, timeout: float | None = None) -> bool:
        """
        Wait for the end of a QEMU that is ours, for example when the guest powers itself off.

        :param timeout: in seconds; no limit if not given
        :returns: whether it has ended
        """
        return self._process is None or self._process.wait(timeout)

    def execute(self, command: str, **arguments: Any) -> Any:
        """
        :param command: a command of QEMU's monitor; its arguments are those of QEMU, with ``_`` for
            ``-``
        :returns: QEMU's answer
        :raises CommandFailed: QEMU refused
        :raises MachineError: QEMU has ended, does not answer, or was closed
        """
        try:
            return self.monitor.execute(
                command,
                {
                    name.replace("_", "-"): value
                    for name, value in arguments.items()
                    if value is not None
                },
            )
        except MachineError as error:
            raise self._told(error) from error

    def _told(self, error: MachineError) -> MachineError:
        """:returns: the error, with QEMU's output if it has ended"""
        if (
            self._process is not None
            and self.monitor.is_open
            and self._process.wait(0.5 if "ended" in error.message else 0)
        ):
            return MachineError(f"{self} has ended: {self._process.said()}")
        return error

    def status(self) -> str:
        """:returns: the run state, as in QEMU's ``RunState``: ``running``, ``paused`` ..."""
        return str(self.execute("query-status")["status"])

    @property
    def is_running(self) -> bool:
        """Whether the guest is running; False if the machine has ended or was closed."""
        try:
            return self.status() == "running"
        except MachineError:
            if self._has_ended:
                return False
            raise

    @property
    def _has_ended(self) -> bool:
        return not self.monitor.is_connected or (
            self._process is not None and not self._process.is_alive
        )

    def pause(self) -> None:
        """Pause the guest."""
        self.execute("stop")

    def resume(self) -> None:
        """Let the guest continue."""
        self.execute("cont")

    def require_settled(self) -> bool:
        """
        :returns: True if the machine is running, False if it is paused
        :raises RefusedError: it is neither running nor paused
        """
        status = self.status()
        if status == "running":
            return True
        if status in _AT_REST:
            return False
        raise RefusedError(
            f"{self} is in the state {status}", hint="let it run, or pause it, first"
        )

    # -- in our hands ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self) -> Iterator[bool]:
        """
        Allow this process to stop the machine, for the length of a ``with`` block. Afterwards the
        machine is again in its earlier run state, even if this process was killed, unless the
        machine is ours and ends with this process.

        :returns: whether it was running
        :raises RefusedError: it is neither running nor paused
        """
        running = self.require_settled()
        if running and self._path is not None:
            self._tell_keeper(b"1")
        try:
            yield running
        except BaseException:
            # the first error says more: for example, QEMU has ended
            with contextlib.suppress(MachineError):
                self._restore(running)
            raise
        else:
            self._restore(running)
        finally:
            if running and self._path is not None:
                self._tell_keeper(b"0")

    def _restore(self, running: bool) -> None:
        status = self.status()
        if not running and status == "postmigrate":
            # It gets its disks back only by running. So it runs for a moment, after the earlier
            # moment was saved.
            self.execute("cont")
            status = self.status()
        if running != (status == "running"):
            self.execute("cont" if running else "stop")

    def _tell_keeper(self, word: bytes) -> None:
        assert self._path is not None
        if self._keeper is None:
            command = without_secrets(
                [sys.executable, "-I", "-S", keeper.__file__, str(self._path), str(os.getpid())]
            )
            self._keeper = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
                cwd="/",
            )
            self._hear_keeper()
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(word)
        self._hear_keeper()

    def _hear_keeper(self) -> None:
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        if not self._keeper.stdout.read(1):
            raise MachineError(
                f"cannot make sure that {self} goes on if we are killed",
                hint=f"is {sys.executable} able to run programs?",
            )

    def _dismiss_keeper(self) -> None:
        if self._keeper is None:
            return
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        self._keeper.wait()
        self._keeper.stdout.close()
        self._keeper = None


def wait_until(done: Any, *, timeout: float, first: float = 0.001, most: float = 0.02) -> bool:
    """
    :param done: called repeatedly until it returns a true value
    :param timeout: in seconds
    :param first: seconds until the second call; the pause doubles for each further call
    :param most: the longest pause, in seconds
    :returns: whether it was true in time
    """
    end = time.monotonic() + timeout
    pause = first
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, most)
    return True
