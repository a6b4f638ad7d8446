"""
A synchronous client of QEMU's monitor (QMP).

Names of commands, arguments and answers are those of QEMU: ``docs/interop/qemu-qmp-ref`` of its
documentation.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate

from statepool.beneath import DIRECTORY, Descriptor
from statepool.errors import InUse, MachineError, NotFound
from statepool.machine.loop import LOOP

CONNECT_TIMEOUT = 10.0
"""
The timeout of a monitor's greeting, in seconds. QEMU greets at once, unless another program is
using the monitor.
"""

COMMAND_TIMEOUT = 60.0
"""The timeout of a command, in seconds. Commands that take long are jobs, and answer at once."""

# Errors are reported by our own exceptions. Without a handler, Python would print the library's log
# on standard error.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class CommandFailed(MachineError):
    """
    QEMU refused a command.

    :param error_class: QEMU's class of the error: ``GenericError``, ``CommandNotFound`` ...
    """

    def __init__(self, message: str, *, error_class: str = "", **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.error_class = error_class


class Monitor:
    """
    A connection to a monitor. QEMU serves one connection at a time; several threads can use it.

    :param connection: a socket of QEMU's
    :param name: the name of the machine in messages
    :param timeout: the timeout of QEMU's greeting, in seconds
    :raises InUse: QEMU does not greet in time
    :raises MachineError: the peer is not a monitor
    """

    def __init__(
        self, connection: socket.socket, name: str, *, timeout: float = CONNECT_TIMEOUT
    ) -> None:
        self.name = name
        LOOP.acquire()
        try:
            self._client = LOOP.run(_greeted(connection, name, timeout))
        except BaseException:
            connection.close()
            LOOP.release()
            raise
        self._is_open = True
        self._owner = os.getpid()

    @classmethod
    def connect(cls, path: os.PathLike[str] | str, *, timeout: float = CONNECT_TIMEOUT) -> Monitor:
        """
        :param path: the socket of a running QEMU, as in ``-qmp unix:PATH,server=on,wait=off``
        :param timeout: the timeout of QEMU's greeting, in seconds
        :raises NotFound: there is no such socket
        :raises InUse: QEMU does not greet in time: another program is using the monitor
        :raises MachineError: no process listens there, or one that is not QEMU
        """
        return cls(connected(Path(path)), f"the machine at {path}", timeout=timeout)

    @property
    def is_open(self) -> bool:
        """Whether the connection has not been closed here; QEMU may have ended nevertheless."""
        return self._is_open

    @property
    def is_connected(self) -> bool:
        """Whether the connection is open, and no hang-up of QEMU was received."""
        return self._is_open and self._client.runstate is Runstate.RUNNING

    def _require_open(self) -> None:
        if not self._is_open:
            raise MachineError(f"{self.name} was closed", hint="start it, or connect to it, again")

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float = COMMAND_TIMEOUT,
    ) -> Any:
        """
        :param command: such as ``query-status``
        :param arguments: of the command
        :param timeout: in seconds
        :returns: QEMU's answer
        :raises CommandFailed: QEMU refused
        :raises MachineError: QEMU has ended, or does not answer, or the monitor was closed
        """
        self._require_open()
        return LOOP.run(_executed(self._client, self.name, command, arguments, timeout))

    def execute_many(
        self, commands: Sequence[tuple[str, Mapping[str, Any]]], *, timeout: float = COMMAND_TIMEOUT
    ) -> list[Any]:
        """
        Execute several commands, as :meth:`execute` does, without waiting in between.

        :param commands: the commands with their arguments
        :returns: QEMU's answer to each
        """
        self._require_open()
        return LOOP.run(_executed_all(self._client, self.name, commands, timeout))

    def send_descriptor(self, label: str, descriptor: int) -> None:
        """
        Give QEMU a descriptor of ours, which stays open here.

        :param label: its name in later commands, as in ``fd:LABEL``
        """

        def send() -> None:
            try:
                self._client.send_fd_scm(descriptor)
            except (OSError, QMPError) as error:
                raise MachineError(f"{self.name} takes no descriptor: {error}") from error

        self._require_open()
        LOOP.call(send)
        self.execute("getfd", {"fdname": label})

    def close(self) -> None:
        """
        Close the connection. The machine continues to run. In a process that was forked from this
        one, nothing is done.
        """
        if not self._is_open or self._owner != os.getpid():
            return
        self._is_open = False
        try:
            LOOP.run(_disconnected(self._client))
        finally:
            LOOP.release()


def connected(path: Path) -> socket.socket:
    """
    :param path: a socket in the file system; a path that is too long for the kernel is reached by
        its directory
    :raises NotFound: there is no such socket
    :raises MachineError: no process listens there
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        with Descriptor(os.open, path.parent, DIRECTORY) as directory:
            connection.connect(f"/proc/self/fd/{directory}/{path.name}")
    except FileNotFoundError as error:
        connection.close()
        raise NotFound(
            f"there is no socket {path}",
            path=str(path),
            hint="start the machine with -qmp unix:PATH,server=on,wait=off",
        ) from error
    except OSError as error:
        connection.close()
        raise MachineError(
            f"nobody answers at {path}: {error.strerror}",
            path=str(path),
            hint="is this the monitor of a machine that is running?",
        ) from error
    return connection


async def _greeted(connection: socket.socket, name: str, seconds: float) -> QMPClient:
    client = QMPClient()
    connection.setblocking(False)
    try:
        await asyncio.wait_for(client.connect(connection), seconds)
    except TimeoutError as error:
        raise InUse(
            f"{name} did not greet us within {seconds:g} s",
            hint="another program may be using its monitor, which serves one at a time",
        ) from error
    except ConnectError as error:
        raise MachineError(
            f"{name} does not answer as a monitor of QEMU does: {error}",
            hint="name the socket of its QMP monitor",
        ) from error
    return client


async def _executed(
    client: QMPClient, name: str, command: str, arguments: Mapping[str, Any] | None, seconds: float
) -> Any:
    try:
        return await asyncio.wait_for(client.execute(command, dict(arguments or {})), seconds)
    except ExecuteError as error:
        raise CommandFailed(
            f"{name} refused {command}: {error}", error_class=error.error_class
        ) from error
    except TimeoutError as error:
        raise MachineError(f"{name} did not answer {command} within {seconds:g} s") from error
    except (ExecInterruptedError, QMPError, OSError, EOFError) as error:
        raise MachineError(f"{name} has ended, or hung up, before it answered {command}") from error


async def _executed_all(
    client: QMPClient, name: str, commands: Sequence[tuple[str, Mapping[str, Any]]], seconds: float
) -> list[Any]:
    answers = [
        _executed(client, name, command, arguments, seconds) for command, arguments in commands
    ]
    found = await asyncio.gather(*answers, return_exceptions=True)
    for answer in found:
        if isinstance(answer, BaseException):
            raise answer
    return found


async def _disconnected(client: QMPClient) -> None:
    try:
        await client.disconnect()
    except (QMPError, OSError, EOFError):
        pass  # QEMU closed it first
