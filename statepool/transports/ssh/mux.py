"""
A client for the control socket of a multiplexing ``ssh`` (a "master"): the messages of OpenSSH's
file ``PROTOCOL.mux``, version 4 of the protocol.

A master opens each session on its connection, and reads and writes the descriptors that the client
sends for it. So no further program has to be started for a session, and none copies its bytes.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
from typing import Any

from statepool.transports.ssh.carrier import LinkGone
from statepool.transports.ssh.packets import string

_VERSION = 4
_HELLO = 0x00000001
_NEW_SESSION = 0x10000002
_TERMINATE = 0x10000005
_STOP_LISTENING = 0x10000009
_EXIT_MESSAGE = 0x80000004
_SESSION_OPENED = 0x80000006
_FAILURES = (0x80000002, 0x80000003)
"""The types of the answers "permission denied" and "failure"."""

_NO_ESCAPE = 0xFFFFFFFF
_LONGEST = 256 << 10
"""The most bytes of one message, as in OpenSSH."""

RECEIVED_AT_ONCE = 256 << 10
"""The most bytes of one read: more than that is never in flight."""

_AHEAD = 208 << 10
"""
Bytes that ssh can write before they are read; the kernel doubles this. With twice the default, ssh
waits less often for this process. With a multiple, the bytes have left the processor's cache before
they are read.
"""

MOST_SAID = 8 << 10
"""The most bytes of standard error that are read."""

_LAST_WORDS = 0.2
"""Timeout in seconds for the standard error of a stream that has ended."""


class SessionRefused(Exception):
    """An error: the server opens no further session. The text is the message of the master."""


class Master:
    """
    A connection to a master. It lasts as long as the master, and keeps it alive.

    :param path: its control socket
    :param seconds: timeout for an answer of the master, or of the server through it
    :raises LinkGone: there is no master
    :raises ConnectionError: it does not speak this protocol
    """

    def __init__(self, path: str, seconds: float) -> None:
        self._path = path
        self._seconds = seconds
        self._link = _connected(path, seconds)
        self._link.setblocking(False)

    @property
    def is_alive(self) -> bool:
        """Whether the master is running."""
        try:
            return bool(self._link.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def await_end(self, seconds: float) -> None:
        """Wait until the master has ended, up to a timeout."""
        poll = select.poll()
        with contextlib.suppress(ValueError):  # another thread has closed it
            poll.register(self._link, select.POLLIN)
            poll.poll(seconds * 1000)

    def session(self, command: str | None) -> MasterStream:
        """
        :param command: for the shell there; None: the subsystem ``sftp``
        :returns: its input and output
        :raises SessionRefused: the server opens no further session
        :raises LinkGone: the master has ended
        :raises ConnectionError: the master ended meanwhile
        """
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            link = undo.enter_context(_connected(self._path, self._seconds))
            stream, far = socket.socketpair()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _AHEAD)
            undo.callback(stream.close)
            theirs.callback(far.close)
            errors, far_errors = os.pipe()
            undo.callback(os.close, errors)
            theirs.callback(os.close, far_errors)
            words = string(b"") + struct.pack(">IIIII", 0, 0, 0, command is None, _NO_ESCAPE)
            name = b"sftp" if command is None else os.fsencode(command)
            _send(link, struct.pack(">II", _NEW_SESSION, 1) + words + string(b"") + string(name))
            for descriptor in (far.fileno(), far.fileno(), far_errors):
                link.sendmsg(
                    [b"\0"],
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))],
                )
            kind, rest = _received(link)
            if kind in _FAILURES:
                raise SessionRefused(rest[8:].decode("utf-8", "replace"))
            if kind != _SESSION_OPENED:
                raise ConnectionAbortedError(f"ssh answers with a message of type {kind:#x}")
            undo.pop_all()
            return MasterStream(stream, link, errors)

    def stop_listening(self) -> None:
        """Make the master accept no more clients, and end when its last session has ended."""
        self._tell(_STOP_LISTENING)

    def terminate(self) -> None:
        """Make the master end."""
        self._tell(_TERMINATE)

    def _tell(self, kind: int) -> None:
        with contextlib.suppress(OSError, EOFError):  # the master has ended by itself
            self._link.settimeout(self._seconds)
            _send(self._link, struct.pack(">II", kind, 1))
            _received(self._link)
        self.close()

    def close(self) -> None:
        """Close the connection to the master."""
        self._link.close()


class MasterStream:
    """
    A session that a master has opened, as a :class:`~statepool.transports.ssh.carrier.Stream`.

    :param link: its input and output
    :param control: on which the master reports the exit status
    :param errors: descriptor of its standard error
    """

    def __init__(self, link: socket.socket, control: socket.socket, errors: int) -> None:
        self._link = link
        self._control = control
        self._errors = os.fdopen(errors, "rb", buffering=0)
        os.set_blocking(errors, False)

    def send(self, data: bytes, /) -> int:
        try:
            return self._link.send(data)
        except ConnectionError as error:
            raise EOFError("the far side takes no more") from error

    def sendall(self, data: bytes, /) -> None:
        # The timeout is for each part; all of them may take longer.
        done = 0
        while done < len(data):
            done += self.send(data[done:])

    def recv(self, count: int, /) -> bytes:
        try:
            return self._link.recv(min(count, RECEIVED_AT_ONCE))
        except ConnectionResetError:
            return b""  # the session ended before it had read all that we sent

    def send_ready(self) -> bool:
        return self._is(select.POLLOUT)

    def recv_ready(self) -> bool:
        return self._is(select.POLLIN)

    def _is(self, ready: int) -> bool:
        poll = select.poll()
        poll.register(self._link, ready)
        return bool(poll.poll(0))

    def settimeout(self, seconds: float, /) -> None:
        self._link.settimeout(seconds)

    def shutdown_write(self) -> None:
        self._link.shutdown(socket.SHUT_WR)

    def exit_status(self, seconds: float) -> int:
        """
        Return the exit status; see :meth:`~statepool.transports.ssh.carrier.Carrier.exit_status`.
        """
        self._control.settimeout(seconds)
        try:
            while True:
                kind, rest = _received(self._control)
                if kind == _EXIT_MESSAGE:
                    status: int = struct.unpack(">I", rest[4:8])[0]
                    return status
        except (EOFError, ConnectionError):
            return -1

    def said(self) -> str:
        """:returns: its output on standard error, as far as it has arrived"""
        poll = select.poll()
        poll.register(self._errors, select.POLLIN)
        poll.poll(_LAST_WORDS * 1000)
        return (self._errors.read(MOST_SAID) or b"").decode("utf-8", "replace").strip()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            # shut down, since a child process may have a copy of the descriptor
            self._link.shutdown(socket.SHUT_RDWR)
        self.abandon()

    def abandon(self) -> None:
        """Close our copies of its descriptors."""
        self._link.close()
        self._control.close()
        self._errors.close()


def _connected(path: str, seconds: float) -> socket.socket:
    link = socket.socket(socket.AF_UNIX)
    try:
        link.settimeout(seconds)
        try:
            link.connect(path)
            _send(link, struct.pack(">II", _HELLO, _VERSION))
            kind, rest = _received(link)
        except (ConnectionError, FileNotFoundError, EOFError) as error:
            raise LinkGone(f"ssh is gone: {error}") from error
        if (kind, rest[:4]) != (_HELLO, struct.pack(">I", _VERSION)):
            raise ConnectionAbortedError("ssh speaks another protocol on its control socket")
    except BaseException:
        link.close()
        raise
    return link


def _send(link: socket.socket, message: bytes) -> None:
    link.sendall(string(message))


def _received(link: socket.socket) -> tuple[int, bytes]:
    """:returns: the type of the next message, and its content"""
    length = int.from_bytes(_take(link, 4), "big")
    if not 4 <= length <= _LONGEST:
        raise ConnectionAbortedError("ssh speaks another protocol on its control socket")
    message = _take(link, length)
    return int.from_bytes(message[:4], "big"), message[4:]


def _take(link: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more: Any = link.recv(count - len(data))
        if not more:
            raise EOFError("ssh has ended")
        data += more
    return data
