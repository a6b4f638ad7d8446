"""The server: cheroot, with limits that keep slow clients from taking all of it."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cheroot import wsgi
from cheroot.server import HTTPConnection, HTTPRequest
from cheroot.ssl.builtin import BuiltinSSLAdapter

from statepool import ConfigError, TransportError
from statepool.carts.auth import Authenticator, is_loopback
from statepool.carts.metrics import Metrics
from statepool.carts.overview import Downloads, Pools
from statepool.carts.parts import READING, Parts
from statepool.carts.runner import Runner
from statepool.carts.service import Service, log
from statepool.carts.shelves import Shelves
from statepool.carts.views import create_app

_GRACE = 10
"""Seconds that requests and tasks have to end when the service stops."""

_HEADERS = 32 << 10
"""Bytes that a request may have before its body."""

_BACKLOG = 128
"""Connections that may wait for a thread; one more gets 503."""


class _Request(HTTPRequest):
    """A request whose first lines have to come in time, however the client spreads them."""

    def parse_request(self) -> None:
        with self.server.deadlines.running(self.conn.socket):
            super().parse_request()


class _Connection(HTTPConnection):
    RequestHandlerClass = _Request


class Deadlines:
    """
    Ends connections on which something takes too long.

    :param seconds: that it may take
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: dict[int, tuple[float, Any]] = {}
        self._lock = threading.Lock()

    def running(self, socket: Any) -> _Running:
        """:returns: a context in which what is received must be there in time"""
        return _Running(self, socket)

    def begin(self, socket: Any) -> None:
        """Something begins."""
        with self._lock:
            self._running[id(socket)] = time.monotonic() + self._seconds, socket

    def end(self, socket: Any) -> None:
        """It has ended in time, or not."""
        with self._lock:
            self._running.pop(id(socket), None)

    def expire(self) -> None:
        """End what is too late: who waits for it finds the connection closed."""
        with self._lock:
            late = [one for when, one in self._running.values() if when < time.monotonic()]
        for socket in late:
            try:
                socket.shutdown(2)
            except OSError:
                pass  # it is closed by now


class _Running:
    def __init__(self, deadlines: Deadlines, socket: Any) -> None:
        self._deadlines, self._socket = deadlines, socket

    def __enter__(self) -> None:
        self._deadlines.begin(self._socket)

    def __exit__(self, *error: object) -> None:
        self._deadlines.end(self._socket)


class _Gateway(wsgi.Gateway_10):
    """Tells an application that the body of a request has an end, also where no length says so."""

    def get_environ(self) -> Any:
        environ: dict[str, Any] = super().get_environ()  # type: ignore[no-untyped-call]
        reading = partial(self.req.server.deadlines.running, self.req.conn.socket)
        return {**environ, "wsgi.input_terminated": True, READING: reading}


class Server(wsgi.Server):
    """
    Serves a WSGI application.

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
            accepted_queue_size=_BACKLOG,
            timeout=math.ceil(settings.timeout),
            shutdown_timeout=_GRACE,
            server_name="statepool",
        )
        self.gateway = _Gateway
        self.deadlines = Deadlines(settings.header_timeout)
        if settings.certificate is not None:
            try:
                self.ssl_adapter = BuiltinSSLAdapter(str(settings.certificate), str(settings.key))
            except OSError as error:
                raise ConfigError(
                    f"TLS with {settings.certificate} and {settings.key} cannot be: {error}",
                    hint="name a PEM file with the chain of certificates, and one with its key",
                ) from error

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        """Tell the log."""
        log.log(level, "%s", msg, exc_info=traceback)


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

    What runs then has some seconds to end; what does not is taken up by the next start.

    :param tell: is given what there is to say to a person
    :raises TransportError: the address cannot be listened on
    """
    settings = service.settings
    is_open = is_loopback(settings.address) and settings.trust_header is None
    runner = Runner(service)
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
    tell("stopping")
    service.stopping.set()
    server.stop()
    if not runner.stop(_GRACE):
        tell("what still runs is taken up at the next start")
