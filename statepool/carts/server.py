"""The server: cheroot, with limits that keep slow clients from occupying all of its threads."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cheroot import wsgi
from cheroot.errors import MaxSizeExceeded
from cheroot.server import HTTPConnection, HTTPRequest
from cheroot.ssl.builtin import BuiltinSSLAdapter

from statepool import ConfigError, TransportError
from statepool.carts.auth import Authenticator, is_loopback
from statepool.carts.metrics import Metrics
from statepool.carts.overview import Downloads, Pools
from statepool.carts.parts import READING, Parts
from statepool.carts.rates import Rates
from statepool.carts.runner import Runner
from statepool.carts.service import Service, log
from statepool.carts.shelves import Shelves
from statepool.carts.spans import Body, Span, became_shorter
from statepool.carts.views import create_app

_GRACE = 10
"""Seconds within which requests and tasks have to end when the service stops."""

_HEADERS = 32 << 10
"""The most bytes of a request before its body."""

_BACKLOG = 128
"""The most connections that may wait for a thread; a further one gets 503."""


class _Request(HTTPRequest):
    """
    A request with a deadline for its head, and a least rate for its answer, however slow the client
    is.
    """

    def parse_request(self) -> None:
        with self.server.deadlines.running(self.conn.socket):
            super().parse_request()

    def respond(self) -> None:
        with self.server.rates.watching(self.conn.socket, f"{self.conn.remote_addr}"):
            super().respond()


class _Connection(HTTPConnection):
    RequestHandlerClass = _Request


class Deadlines:
    """
    A watchdog that closes connections on which an operation takes too long.

    :param seconds: the timeout
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[int, tuple[float, Any]] = {}
        self._lock = threading.Lock()

    def running(self, socket: Any) -> _Running:
        """:returns: a context in which everything must be received before the timeout"""
        return _Running(self, socket)

    def begin(self, socket: Any) -> None:
        """Start the timeout for a connection."""
        with self._lock:
            self._running[id(socket)] = time.monotonic() + self._seconds, socket

    def end(self, socket: Any) -> None:
        """Stop the timeout, whether it has expired or not."""
        with self._lock:
            self._running.pop(id(socket), None)

    def expire(self) -> None:
        """Close connections that are late: a waiting thread finds its connection closed."""
        with self._lock:
            late = [one for when, one in self._running.values() if when < time.monotonic()]
        for connection in late:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is closed by now


class _Running:
    def __init__(self, deadlines: Deadlines, socket: Any) -> None:
        self._deadlines, self._socket = deadlines, socket

    def __enter__(self) -> None:
        self._deadlines.begin(self._socket)

    def __exit__(self, *error: object) -> None:
        self._deadlines.end(self._socket)


class _Chunks:
    """A body in chunks, of which too long a one is an error of reading, as a broken one is."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks

    def read(self, size: int) -> bytes:
        """:returns: the next bytes, at most so many; none at the end"""
        try:
            data: bytes = self._chunks.read(size)
        except MaxSizeExceeded as error:
            raise OSError(str(error)) from error
        return data


class _Gateway(wsgi.Gateway_10):
    """A gateway with deadlines for bodies, by which the kernel sends parts of files."""

    def get_environ(self) -> Any:
        environ: dict[str, Any] = super().get_environ()  # type: ignore[no-untyped-call]
        reading = partial(self.req.server.deadlines.running, self.req.conn.socket)
        if self.req.chunked_read:
            self.req.rfile.maxlen = self.req.server.longest_body
            environ["wsgi.input"] = _Chunks(self.req.rfile)
        else:
            # werkzeug takes any value to say that the input ends by itself; then it would take a
            # body that is cut off for a whole one.
            del environ["wsgi.input_terminated"]
        return {**environ, READING: reading}

    def respond(self) -> None:
        """Call the application, and send its answer: parts of files by the kernel, without TLS."""
        connection = self.req.conn.socket
        answer = self.req.server.wsgi_app(self.env, self.start_response)
        in_files = isinstance(answer, Body) and not isinstance(connection, ssl.SSLSocket)
        try:
            for part in answer.parts if in_files else answer:
                self.req.ensure_headers_sent()
                if isinstance(part, Span):
                    _send_file(connection, part)
                elif self.req.chunked_write:
                    self.req.write(part)
                else:  # its file object would copy what is left after each part that is sent
                    connection.sendall(part)
        finally:
            self.req.ensure_headers_sent()
            if hasattr(answer, "close"):
                answer.close()


def _send_file(connection: socket.socket, span: Span) -> None:
    offset, left = span.start, span.length
    while left:
        try:
            sent = os.sendfile(connection.fileno(), span.descriptor, offset, left)
        except BlockingIOError:
            poll, seconds = select.poll(), connection.gettimeout()
            poll.register(connection, select.POLLOUT)
            if not poll.poll(seconds * 1000 if seconds is not None else None):
                raise TimeoutError("the client takes nothing") from None
            continue
        if not sent:
            raise became_shorter(span.name)
        offset, left = offset + sent, left - sent


class Server(wsgi.Server):
    """
    A server of a WSGI application.

    :param service: gives the settings
    """

    ConnectionClass = _Connection
    max_request_header_size = _HEADERS

    def __init__(self, service: Service, application: Callable[..., Any]) -> None:
        settings = service.settings
        super().__init__(
            (settings.address, settings.port),
            application,
            numthreads=settings.requests,
            max=settings.requests,
            request_queue_size=_BACKLOG,
            accepted_queue_size=_BACKLOG,
            timeout=math.ceil(settings.timeout),
            shutdown_timeout=_GRACE,
            server_name="statepool",
        )
        self.gateway = _Gateway
        self.longest_body = 2 * settings.max_body
        """Bytes of a body in chunks, with their lengths: a chunk that is longer is not read."""
        self.deadlines = Deadlines(settings.header_timeout)
        self.rates = Rates(settings.least_rate, log.warning)
        if settings.certificate is not None:
            try:
                self.ssl_adapter = BuiltinSSLAdapter(str(settings.certificate), str(settings.key))
            except OSError as error:
                raise ConfigError(
                    f"TLS with {settings.certificate} and {settings.key} cannot be: {error}",
                    hint="name a PEM file with the chain of certificates, and one with its key",
                ) from error

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        """Write to the log."""
        log.log(level, "%s", msg, exc_info=traceback)


def make_runner(service: Service, tell: Callable[[str], None]) -> Runner:
    """
    :param tell: is given what there is to say to a person
    :returns: what fills carts, or has them filled
    :raises TransportError: the broker of Celery never could be reached
    """
    if service.settings.tasks == "threads":
        return Runner(service)
    from statepool.carts.celery import CeleryRunner

    return CeleryRunner(service, tell)


def make_application(service: Service, runner: Runner, *, open_here: bool) -> Callable[..., Any]:
    """:returns: the WSGI application of a service"""
    settings = service.settings
    authenticator = Authenticator(settings, service.database, open_here=open_here)
    shelves = Shelves(settings.pools, settings.transfer_size)
    metrics, pools = Metrics(service), Pools(service)
    parts = Parts(service, runner, authenticator, shelves, metrics, pools, Downloads())
    return create_app(parts)


def serve(service: Service, tell: Callable[[str], None]) -> None:
    """
    Serve until SIGTERM or SIGINT.

    Running work then has some seconds to end; unfinished work is resumed at the next start.

    :param tell: called with messages for the user
    :raises TransportError: the server cannot listen on the address
    """
    settings = service.settings
    is_open = is_loopback(settings.address) and settings.trust_header is None
    runner = make_runner(service, tell)
    server = Server(service, make_application(service, runner, open_here=is_open))
    try:
        server.prepare()
    except OSError as error:
        reason = str(error) or type(error).__name__
        raise TransportError(
            f"cannot listen on {settings.address} port {settings.port}: {reason}",
            hint="is another service there already?",
        ) from error
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    runner.start()
    scheme = "https" if settings.certificate is not None else "http"
    host = f"[{settings.address}]" if ":" in settings.address else settings.address
    tell(f"serving carts at {scheme}://{host}:{server.bind_addr[1]}/")
    if not is_open and scheme == "http":
        tell("tokens pass unencrypted: name --certificate and --key, or let a proxy do it")
    threading.Thread(target=server.serve, name="server", daemon=True).start()
    while not stop.wait(1.0):
        server.deadlines.expire()
        server.rates.look(time.monotonic())
    tell("stopping")
    service.stopping.set()
    late = threading.Timer(_GRACE, server.rates.end_all)
    late.daemon = True  # else it would keep a process alive that has stopped before
    late.start()
    server.stop()
    if not runner.stop(_GRACE):
        tell("what still runs is taken up at the next start")
