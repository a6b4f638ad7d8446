"""
A TCP proxy on loopback with which links can be slow, cut and silent, for tests of transports.

Each of its knobs can be turned while connections go through it.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

_BLOCK = 1 << 16

_TICK = 0.02
"""Seconds' worth of bytes that a limited link passes on at once."""


class Proxy:
    """
    Takes connections on :attr:`port`, and passes their bytes on to another port of 127.0.0.1 and
    back.

    Its knobs are attributes: ``delay`` (seconds, in each direction), ``rate`` (bytes a second in
    each direction, or None), ``silent`` (what arrives is kept) and ``refusing`` (new connections
    are closed at once). ``up`` is the direction to the server, ``down`` the one from it.

    What it counts: ``connections``, ``moved`` (bytes by their direction) and ``turns``, the times
    that something went up after something had come down: with a ``delay``, about the number of
    questions that waited for an answer to the one before.

    :param target: the TCP port of the server
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay = 0.0
        self.rate: float | None = None
        self.silent = False
        self.refusing = False
        self.connections = 0
        self.moved = {"up": 0, "down": 0}
        self.turns = 0
        self._last = "down"
        self._cut_at: dict[str, int | None] = {"up": None, "down": None}
        self._silent_at: dict[str, int | None] = {"up": None, "down": None}
        self._links: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def cut_after(self, *, up: int | None = None, down: int | None = None) -> None:
        """
        Cut all connections, once, when so many bytes more have gone in a direction. The bytes
        before the cut still arrive.
        """
        with self._lock:
            for direction, count in (("up", up), ("down", down)):
                self._cut_at[direction] = (
                    self.moved[direction] + count if count is not None else None
                )

    def fall_silent_after(self, *, up: int | None = None, down: int | None = None) -> None:
        """
        Pass nothing on any more, in either direction, when so many bytes more have gone in one;
        until :meth:`speak`.
        """
        with self._lock:
            for direction, count in (("up", up), ("down", down)):
                self._silent_at[direction] = (
                    self.moved[direction] + count if count is not None else None
                )

    def speak(self) -> None:
        """Pass bytes on again, also those that were kept."""
        self.silent = False

    def cut(self) -> None:
        """Cut all connections now, by a reset, as a host does that has been restarted."""
        with self._lock:
            links, self._links = self._links, set()
        for link in links:
            with contextlib.suppress(OSError):
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                link.shutdown(socket.SHUT_RDWR)
            link.close()

    def close(self) -> None:
        """Take no more connections, and cut those that there are."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    # -- inside ------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                client.close()
                continue
            self.connections += 1
            try:
                server = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._links |= {client, server}
            if self._listener.fileno() < 0:  # we have been closed meanwhile
                self.cut()
                return
            self._pump(client, server, "up")
            self._pump(server, client, "down")

    def _pump(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        """
        One thread takes bytes and notes when they are due, another one passes them on then: a delay
        does not make the link slow.
        """
        ahead: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=256)
        threading.Thread(
            target=self._take, args=(source, ahead), name=f"proxy {direction} takes", daemon=True
        ).start()
        threading.Thread(
            target=self._pass_on,
            args=(target, ahead, direction),
            name=f"proxy {direction} passes on",
            daemon=True,
        ).start()

    def _take(self, source: socket.socket, ahead: queue.Queue[tuple[float, bytes]]) -> None:
        data = b"."
        while data:
            try:
                data = source.recv(_BLOCK)
            except OSError:
                data = b""
            ahead.put((time.monotonic() + self.delay, data))

    def _pass_on(
        self, target: socket.socket, ahead: queue.Queue[tuple[float, bytes]], direction: str
    ) -> None:
        while True:
            due, data = ahead.get()
            time.sleep(max(0.0, due - time.monotonic()))
            self._stay_silent(target)
            try:
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                while data:
                    data = self._send_some(target, data, direction)
            except OSError:
                self._drain(ahead)
                return

    def _send_some(self, target: socket.socket, data: bytes, direction: str) -> bytes:
        """:returns: what is left to be sent"""
        if target.fileno() < 0:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the connection has been cut")
        with self._lock:
            limits = [
                limit - self.moved[direction]
                for limit in (self._cut_at[direction], self._silent_at[direction])
                if limit is not None
            ]
        if self.rate is not None:
            limits.append(max(1, int(self.rate * _TICK)))
        count = min([len(data), *limits])
        with self._lock:
            self.moved[direction] += count
            self.turns += direction == "up" and self._last == "down"
            self._last = direction
        if count > 0:
            time.sleep(count / self.rate if self.rate is not None else 0)
            target.sendall(data[:count])
        with self._lock:
            cut = self._reached(self._cut_at, direction)
            self.silent = self._reached(self._silent_at, direction) or self.silent
        if cut:
            self.cut()
        self._stay_silent(target)
        return data[count:]

    def _reached(self, marks: dict[str, int | None], direction: str) -> bool:
        """:returns: whether a mark is reached; it is taken away then"""
        mark = marks[direction]
        if mark is None or self.moved[direction] < mark:
            return False
        marks[direction] = None
        return True

    def _stay_silent(self, target: socket.socket) -> None:
        while self.silent and target.fileno() >= 0:
            time.sleep(0.01)

    @staticmethod
    def _drain(ahead: queue.Queue[tuple[float, bytes]]) -> None:
        """
        Until the thread that takes has come to its end, so that it does not wait for room forever.
        """
        while ahead.get()[1]:
            continue
