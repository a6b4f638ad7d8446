"""
Clients that take their answers too slowly, and so keep others from getting any.

What a client has taken is what its host has acknowledged (the kernel counts it, ``TCP_INFO`` of
``tcp(7)``): so it is known of encrypted connections too, and while one large write is under way.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import socket
import struct
import termios
import threading
from collections.abc import Callable, Iterator

from attrs import define

SECONDS = 60.0
"""For how long a client may be slow."""

_LONGEST_LOOK = 5.0
"""The most seconds between two looks that count: after more, this process was paused."""

_ACKED = struct.Struct("=Q")
_ACKED_AT = 120
"""Where ``tcpi_bytes_acked`` is in ``struct tcp_info`` of ``linux/tcp.h``, since Linux 4.1."""

_AT_ONCE = struct.pack("ii", 1, 0)
"""Tells the kernel to reset a connection when it is closed (``SO_LINGER`` of ``socket(7)``)."""


@define(eq=False)
class _Answer:
    """One that is being sent; ``waited`` are seconds in which bytes waited for the client."""

    connection: socket.socket
    client: str
    taken: int
    waited: float = 0.0


class Rates:
    """
    Ends connections on which an answer is taken too slowly.

    :param least: bytes a second that a client must take, over a minute in which there was something
        to take; 0: any will do
    :param tell: the log: is told of those that are ended
    """

    def __init__(self, least: float, tell: Callable[..., object]) -> None:
        self._least = least
        self._tell = tell
        self._answers: set[_Answer] = set()
        self._lock = threading.Lock()
        self._looked: float | None = None
        self._ending = False

    @contextlib.contextmanager
    def watching(self, connection: socket.socket, client: str) -> Iterator[None]:
        """
        Watch an answer for as long as a ``with`` block lasts. Meanwhile the connection has no
        other time limit, unless any rate will do: the kernel says that nothing more can be sent
        until the client has taken a third of all that was, which may be megabytes.

        :param client: the name of the client in the log
        """
        answer = _Answer(connection, client, _taken(connection))
        limit = connection.gettimeout()
        with self._lock:
            self._answers.add(answer)
            if self._ending:
                _end(connection)
        try:
            if self._least:
                connection.settimeout(None)
            yield
        finally:
            with self._lock:
                self._answers.discard(answer)
            if connection.fileno() >= 0:
                connection.settimeout(limit)

    def end_all(self) -> None:
        """End every connection on which an answer is being sent, from now on."""
        with self._lock:
            self._ending = True
            for answer in self._answers:
                _end(answer.connection)

    def look(self, now: float) -> None:
        """
        Look how far all answers are, about once a second.

        :param now: by a clock that is never set
        """
        if not self._least:
            return
        before, self._looked = self._looked, now
        passed = min(now - before, _LONGEST_LOOK) if before is not None else 0.0
        with self._lock:  # meanwhile none of them ends, and its descriptor stays its own
            for answer in self._answers:
                self._look_at(answer, passed)

    def _look_at(self, answer: _Answer, passed: float) -> None:
        try:
            if not _waiting(answer.connection):
                return
            answer.waited += passed
            if answer.waited < SECONDS:
                return
            taken = _taken(answer.connection)
            if taken - answer.taken < self._least * answer.waited:
                told = "ended the connection of %s: it took %d bytes in %d s (least-rate)"
                self._tell(told, answer.client, taken - answer.taken, round(answer.waited))
                _end(answer.connection)
            answer.taken, answer.waited = taken, 0.0
        except (OSError, ValueError):
            pass  # it has ended by itself


def _end(connection: socket.socket) -> None:
    try:
        # What was not taken is thrown away, and does not wait for the client in the kernel.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended by itself


def _taken(connection: socket.socket) -> int:
    """:returns: bytes that the client has acknowledged since the connection began"""
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + _ACKED.size)
        return int(_ACKED.unpack_from(told, _ACKED_AT)[0])
    except (OSError, struct.error):
        return 0  # it has ended by itself


def _waiting(connection: socket.socket) -> int:
    """:returns: bytes that have been sent, or are to be, and are not acknowledged"""
    count = array.array("i", [0])
    fcntl.ioctl(connection, termios.TIOCOUTQ, count)
    return count[0]
