"""
The TCP connection below SSH, and the watch over it.

paramiko has no timeout for some answers, nor for a write to a silent link. Both get one here:
paramiko's own thread polls the socket ten times a second, and this socket then reports that the
other end does not answer any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from attrs import define, field

T = TypeVar("T")

KEEPALIVE = 15.0
"""
Seconds without traffic after which a keepalive is sent, so that routers on the way do not forget
the connection, and a dead connection is noticed.
"""

RECEIVED_AT_ONCE = 256 << 10
"""
The most bytes of one read from the kernel. paramiko reads the head of each packet, and then its
rest: two system calls for 32 KiB.
"""


LEAST_RATE = 4 << 10
"""
The lowest rate in bytes per second. If data arrives more slowly than this for longer than an answer
may take, the wait ends: it might last forever.
"""


class Pace:
    """
    A check whether data arrives fast enough. Only the time spent waiting counts.

    :param patience: how long any amount of data may take, in seconds
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._waited = 0.0
        self._came = 0

    def note(self, seconds: float, count: int) -> None:
        """
        Note that ``count`` bytes came after a wait of ``seconds``.

        :raises TimeoutError: all data together was too slow
        """
        self._waited += seconds
        self._came += count
        if self._waited > self._patience + self._came / LEAST_RATE:
            raise TimeoutError(
                errno.ETIMEDOUT, f"{self._came} bytes came in {self._waited:.0f} seconds"
            )


class LinkSilent(ConnectionAbortedError):
    """
    An error: nothing moved for too long. It is no :class:`TimeoutError`, since after one of those
    paramiko continues to wait.

    :param seconds: how long
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(errno.ECONNABORTED, f"nothing was heard for {round(seconds, 1):g} seconds")
        self.seconds = seconds


@define(eq=False)
class Waiting:
    """
    A wait for an answer until ``deadline`` (of the monotonic clock). Unless it is ``hard``, the
    deadline moves when something is received.
    """

    seconds: float
    deadline: float
    hard: bool


@define(eq=False)
class WatchedSocket:
    """
    The socket that paramiko uses.

    :param link: a connected socket, or a channel of another connection
    :param timeout: how long a write may make no progress, in seconds
    """

    link: Any
    timeout: float
    received: int = 0
    sent: int = 0
    failure: OSError | None = None
    ended: bool = False
    """
    Whether the connection has ended. paramiko notices it a moment later, after it has woken the
    waiting threads.
    """

    _closed: bool = False
    _ahead: memoryview = field(factory=lambda: memoryview(b""))
    """Bytes that have arrived and have not been read yet."""

    _waiting: set[Waiting] = field(factory=set)
    _stuck_since: float | None = None

    # -- what paramiko calls -----------------------------------------------------------------------

    def recv(self, size: int) -> bytes:
        if not self._ahead:
            self._ahead = memoryview(self._receive())
        data, self._ahead = bytes(self._ahead[:size]), self._ahead[size:]
        return data

    def _receive(self) -> bytes:
        try:
            data: bytes = self.link.recv(RECEIVED_AT_ONCE)
        except TimeoutError:
            self._look_at_the_clock()
            raise
        except OSError:
            self.ended = True
            raise
        self.ended = self.ended or not data
        if self._waiting:
            self._heard()
            self._look_at_the_clock()
        self.received += len(data)
        return data

    def send(self, data: bytes) -> int:
        try:
            count: int = self.link.send(data)
        except TimeoutError:
            now = time.monotonic()
            self._stuck_since = self._stuck_since or now
            if now - self._stuck_since > self.timeout:
                self._fail(self.timeout)
            raise
        except OSError:
            self.ended = True
            raise
        self._stuck_since = None
        self.sent += count
        return count

    def settimeout(self, seconds: float | None) -> None:
        self.link.settimeout(seconds)

    def getpeername(self) -> Any:
        return self.link.getpeername()

    def close(self) -> None:
        self._closed = True
        self.link.close()

    # -- what we call ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def expecting(self, seconds: float, *, hard: bool = False) -> Iterator[None]:
        """
        Note inside the block that an answer is awaited.

        :param seconds: the connection is closed if nothing at all is received for that long
        :param hard: close it also if the answer is not complete by then
        """
        waiting = Waiting(seconds, time.monotonic() + seconds, hard)
        self._waiting.add(waiting)
        try:
            yield
        finally:
            self._waiting.discard(waiting)

    def abandon(self) -> None:
        """
        Forget the connection in the child of a fork, since it belongs to the parent. Nothing is
        sent, and no lock is taken.
        """
        self._closed = True
        if isinstance(self.link, socket.socket):
            self.link.close()

    def _heard(self) -> None:
        now = time.monotonic()
        for waiting in list(self._waiting):
            if not waiting.hard:
                waiting.deadline = now + waiting.seconds

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for waiting in list(self._waiting):
            if now > waiting.deadline:
                self._fail(waiting.seconds)

    def _fail(self, seconds: float) -> None:
        self.ended = True
        self.failure = LinkSilent(seconds)
        raise self.failure


def dial(host: str, port: int, seconds: float) -> socket.socket:
    """
    :param seconds: how long it may take, all addresses of the host together
    :returns: a connected socket
    :raises OSError: why the last address could not be reached; :class:`TimeoutError` if none
        answered in time
    """
    deadline = time.monotonic() + seconds
    failure: OSError = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    for family, kind, protocol, _, address in _resolve(host, port, seconds):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        link = socket.socket(family, kind, protocol)
        try:
            link.settimeout(left)
            link.connect(address)
        except OSError as error:
            link.close()
            failure = error
            continue
        return link
    raise failure


def tune(link: socket.socket, timeout: float) -> None:
    """
    Set socket options: small requests are sent at once, and the kernel closes a connection if the
    other end acknowledges nothing (tcp(7)).

    :param timeout: how long it may acknowledge nothing, in seconds
    """
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(timeout * 1000)))


def within(seconds: float, work: Callable[[], T], name: str) -> T:
    """
    Run a function that has no timeout, in a thread that may be left behind.

    :param seconds: the timeout
    :param work: the function
    :param name: of the thread
    :returns: the result of the function
    :raises TimeoutError: it took longer
    """
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001 - given to who waits
            answer.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return answer.result(timeout=seconds)


def _resolve(host: str, port: int, seconds: float) -> list[Any]:
    """Resolve a name with a timeout: the resolver of the C library has none."""
    try:
        return within(
            seconds,
            lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM),
            f"resolve {host}",
        )
    except UnicodeError as error:  # a part of it is too long, for example
        raise socket.gaierror(socket.EAI_NONAME, "this cannot be the name of a host") from error
    except TimeoutError:
        raise socket.gaierror(socket.EAI_AGAIN, "the name server does not answer") from None
