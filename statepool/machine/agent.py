"""
A client of QEMU's guest agent, which can make a guest's file systems consistent for the moment in
which its disks are frozen.

Its protocol is in ``docs/interop/qemu-ga-ref`` of QEMU's documentation: lines of JSON. A stale
answer to an earlier request may come first. So each connection begins with a number that the agent
has to return.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from statepool.errors import MachineError
from statepool.machine.monitor import connected

AGENT_TIMEOUT = 10.0
"""The timeout of an answer of the agent, in seconds."""


class GuestAgent:
    """
    A connection to a guest agent.

    :param path: the socket of the channel to it
    :param timeout: the timeout of an answer, in seconds
    :raises MachineError: no agent answers
    """

    def __init__(self, path: Path, *, timeout: float = AGENT_TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout
        self._connection: socket.socket = connected(path)
        self._unread = b""
        try:
            self._synchronise()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _synchronise(self) -> None:
        number = secrets.randbelow(1 << 31)
        self._send("guest-sync", {"id": number})
        end = time.monotonic() + self._timeout
        while self._receive(end).get("return") != number:
            continue

    def execute(self, command: str) -> Any:
        """
        :param command: such as ``guest-fsfreeze-freeze``
        :returns: the agent's answer
        :raises MachineError: the agent refuses, or does not answer
        """
        self._send(command, {})
        answer = self._receive(time.monotonic() + self._timeout)
        if "error" in answer:
            raise MachineError(
                f"the guest agent at {self._path} refused {command}:"
                f" {answer['error'].get('desc', answer['error'])}"
            )
        return answer.get("return")

    def _send(self, command: str, arguments: dict[str, Any]) -> None:
        question = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            self._connection.settimeout(self._timeout)
            self._connection.sendall(json.dumps(question).encode() + b"\n")
        except OSError as error:
            raise self._silent() from error

    def _receive(self, end: float) -> dict[str, Any]:
        while True:
            line, newline, rest = self._unread.partition(b"\n")
            if newline:
                self._unread = rest
                with contextlib.suppress(ValueError):  # may be the rest of an earlier answer
                    answer = json.loads(line)
                    if isinstance(answer, dict):
                        return answer
                continue
            try:
                self._connection.settimeout(max(end - time.monotonic(), 0.001))
                data = self._connection.recv(65536)
            except OSError as error:
                raise self._silent() from error
            if not data:
                raise self._silent()
            self._unread += data

    def _silent(self) -> MachineError:
        return MachineError(
            f"no guest agent answers at {self._path} within {self._timeout:g} s",
            path=str(self._path),
            hint=(
                "is one running in the guest? Without it a state is what a power cut would have"
                " left"
            ),
        )


@contextlib.contextmanager
def file_systems_frozen(path: Path | None) -> Iterator[bool]:
    """
    Freeze the guest's file systems for the length of a ``with`` block: they are consistent on its
    disks, and nothing is written to them.

    :param path: the socket of the channel to the guest agent, if there is one
    :returns: whether they are frozen
    :raises MachineError: the agent does not answer, or refuses
    """
    if path is None:
        yield False
        return
    agent = GuestAgent(path)
    try:
        try:
            agent.execute("guest-fsfreeze-freeze")
            yield True
        finally:
            agent.execute("guest-fsfreeze-thaw")  # after a failure too: some may be frozen
    finally:
        agent.close()
