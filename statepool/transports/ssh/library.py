"""
The carrier by paramiko, for hosts without the program ``ssh``.

paramiko reads the configuration of ssh, keys, agents and known hosts itself, and supports less of
each than ssh does. An unsupported setting that would change where or how to connect is an error
that names the other carrier.
"""

from __future__ import annotations

import contextlib
import logging
import time
import weakref
from collections.abc import Iterator
from typing import Any

from attrs import define

from statepool.model.settings import CarrierName, Settings
from statepool.transports.ssh.carrier import CIPHERS, Carrier, Endpoint, Facts, LinkGone, Stream
from statepool.transports.ssh.failures import (
    no_common_way,
    no_greeting,
    said,
    translating,
    understanding,
    unreached,
)
from statepool.transports.ssh.hosts import HostKey, HostSettings
from statepool.transports.ssh.library_hosts import check_host_key, known_types, resolve
from statepool.transports.ssh.library_messages import PACKET, packetizer
from statepool.transports.ssh.login import Login
from statepool.transports.ssh.wire import KEEPALIVE, WatchedSocket, dial, tune


@define(eq=False)
class _Link:
    """A logged-in transport of paramiko, and the socket below it."""

    transport: Any
    socket: WatchedSocket

    @property
    def is_open(self) -> bool:
        return bool(self.transport.is_active()) and not self.socket.ended


class Paramiko(Carrier):
    """A carrier by paramiko."""

    name = CarrierName.PARAMIKO

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        super().__init__(endpoint, settings)
        self._link: _Link | None = None
        self._connecting: WatchedSocket | None = None
        self._channels: weakref.WeakSet[Any] = weakref.WeakSet()
        self._buried: list[Any] = []

    @property
    def is_open(self) -> bool:
        link = self._link
        return link is not None and link.is_open

    @property
    def facts(self) -> Facts:
        transport = self._now().transport
        return Facts(transport.remote_version.removeprefix("SSH-2.0-"), transport.remote_cipher)

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes received and sent on the present connection, all of SSH included."""
        link = self._now().socket
        return link.received, link.sent

    def open(self, command: str | None = None, *, window: int = 4 << 20) -> Stream:
        from paramiko.ssh_exception import SSHException

        transport = self._now().transport
        with understanding(transport, "open a channel to", self.subject):
            channel = transport.open_session(
                window_size=window, max_packet_size=PACKET, timeout=2 * self.settings.timeout
            )
            channel.settimeout(self.settings.timeout)
            self._channels.add(channel)
            if command is not None:
                channel.exec_command(command)
                return channel  # type: ignore[no-any-return]  # paramiko has no types
            try:
                channel.invoke_subsystem("sftp")
            except SSHException as error:
                channel.close()
                raise EOFError(said(error)) if self.is_open else error from error
            return channel  # type: ignore[no-any-return]

    def exit_status(self, stream: Any, seconds: float) -> int:
        if not stream.status_event.wait(seconds):
            raise TimeoutError
        status: int = stream.exit_status
        return status

    @contextlib.contextmanager
    def expecting(self, *, hard: bool = False) -> Iterator[None]:
        link = self._link
        if link is None:
            yield
            return
        with link.socket.expecting(self.settings.timeout * (2 if hard else 1), hard=hard):
            yield

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        from paramiko.ssh_exception import SSHException

        before = self._link if self.is_open else None
        try:
            yield
        except (EOFError, OSError, SSHException) as error:
            found = before or self._link  # which may have been made inside the block
            link = found.socket if found is not None else self._connecting
            if link is not None and link.failure is not None and link.failure is not error:
                raise link.failure from error
            raise

    def close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.transport.close()

    def after_fork(self) -> None:
        if self._link is not None:
            self._link.socket.abandon()
            self._link.transport.active = False
            # kept referenced: their destructors would take their locks
            self._buried += [self._link.transport, *self._channels]
        self._link = None

    def _now(self) -> _Link:
        link = self._link
        if link is None:
            raise LinkGone("there is no connection any more")
        return link

    # -- connecting --------------------------------------------------------------------------------

    def connect(self) -> None:
        self.close()
        _quiet()
        host = resolve(self.endpoint, self.settings)
        deadline = time.monotonic() + self.settings.connect_timeout
        self._connecting = link = WatchedSocket(self._reach(host, deadline), self.settings.timeout)
        try:
            self._link = _Link(self._log_in(link, host, deadline), link)
        except BaseException:
            link.close()
            raise
        finally:
            self._connecting = None

    def _reach(self, host: HostSettings, deadline: float) -> Any:
        try:
            link = dial(host.address, host.port, deadline - time.monotonic())
        except OSError as error:
            raise unreached(
                error,
                f"{host.address}, port {host.port}",
                self.settings.connect_timeout,
                self.subject,
            ) from error
        tune(link, self.settings.timeout)
        return link

    def _log_in(self, link: WatchedSocket, host: HostSettings, deadline: float) -> Any:
        import paramiko

        transport = paramiko.Transport(link, packetizer_class=packetizer())
        left = max(0.1, deadline - time.monotonic())
        # The link below has the deadline; paramiko's own timeouts would report less precisely what
        # happened.
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = 2 * left
        transport.channel_timeout = transport.clear_to_send_timeout = self.settings.timeout
        options = transport.get_security_options()
        options.ciphers = CIPHERS
        known = known_types(host)
        preferred = [
            kind
            for kind in options.key_types
            if kind.replace("rsa-sha2-256", "ssh-rsa").replace("rsa-sha2-512", "ssh-rsa") in known
        ]
        options.key_types = (
            *preferred,
            *(kind for kind in options.key_types if kind not in preferred),
        )
        try:
            with (
                translating("connect to", self._named(host), self.settings.timeout),
                self.explaining(),
                understanding(transport, "connect to", self._named(host)),
                link.expecting(left, hard=True),
            ):
                _greet(transport, link, host)
                key = transport.get_remote_server_key()
                check_host_key(HostKey(key.get_name(), key.asbytes()), host, self.subject.pool)
                Login(host, self.settings.secrets, self._named(host), deadline).run(transport)
        except BaseException:
            transport.close()
            raise
        transport.set_keepalive(KEEPALIVE)
        return transport

    def _named(self, host: HostSettings) -> Any:
        from attrs import evolve

        return evolve(self.subject, text=str(host))


def _greet(transport: Any, link: WatchedSocket, host: HostSettings) -> None:
    from paramiko.ssh_exception import IncompatiblePeer, SSHException

    try:
        transport.start_client()
    except IncompatiblePeer as error:
        raise no_common_way(str(host), said(error), f"ssh://{host}") from error
    except SSHException as error:
        if transport.remote_version or link.failure is not None:
            raise
        raise no_greeting(str(host), said(error), f"ssh://{host}") from error


def _quiet() -> None:
    """
    Give paramiko's logger a null handler: without a handler Python would print its log on standard
    error. An application can still add its own handler.
    """
    logger = logging.getLogger("paramiko")
    if not any(isinstance(handler, logging.NullHandler) for handler in logger.handlers):
        logger.addHandler(logging.NullHandler())
