"""
One connection for each account of a host, shared by all that this process does there.

It is made when it is first needed, kept, made again when it has died, and made anew after a fork: two processes on one connection would garble it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shlex
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from statepool.errors import AccessDenied, ConfigError, StatePoolError, TransportError
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.transports.failures import Subject
from statepool.transports.ssh.failures import said, translating, understanding, unreached
from statepool.transports.ssh.hosts import Endpoint, HostSettings, resolve
from statepool.transports.ssh.known_hosts import HostKey, known_keys
from statepool.transports.ssh.login import Login
from statepool.transports.ssh.wire import KEEPALIVE, WatchedSocket, dial, tune

CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)
"""The fastest first, where the processor helps with AES: docs/measurements.rst. Those that are broken or slow are not offered."""

REKEY_BYTES = 1 << 33
"""
New keys are agreed on after so many bytes. paramiko's half a GiB interrupts a transfer every second or so; RFC 4344, section 3.2, asks for it after
2**32 blocks of AES, which are 64 GiB.
"""

PACKET = 1 << 18
"""The largest packet that we take, in bytes: one answer of 255 KiB, the most that OpenSSH's SFTP server gives, fits into it."""

_DEEPEST_JUMP = 8


class Connection:
    """
    A connection to one account of a host. It can be used from several threads.

    :param endpoint: where
    :param settings: how
    :param depth: through how many hosts we came here
    """

    def __init__(self, endpoint: Endpoint, settings: Settings, depth: int = 0) -> None:
        if depth > _DEEPEST_JUMP:
            raise ConfigError(f"{endpoint} is reached through more than {_DEEPEST_JUMP} hosts", hint="look for a loop of ProxyJump in ~/.ssh/config")
        self.endpoint = endpoint
        self.settings = settings
        self.epoch = 0
        """Rises with every new connection: what belongs to an older one is gone."""
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        """Of those that the process shares: who has not released it."""
        self._depth = depth
        self._lock = threading.RLock()
        self._transport: Any = None
        self._link: WatchedSocket | None = None
        self._jump: Connection | None = None
        self._attempts = 0
        self._failure: StatePoolError | None = None
        self._channels: weakref.WeakSet[Any] = weakref.WeakSet()
        self._buried: list[Any] = []
        _connections.add(self)

    def __str__(self) -> str:
        return str(self.endpoint)

    @property
    def _place(self) -> str:
        """For the attribute of errors that says which pool is concerned: all there."""
        return f"ssh://{self}"

    @property
    def _subject(self) -> Subject:
        """For messages about the connection itself."""
        return Subject(str(self), self._place)

    # -- what the others need ------------------------------------------------------------------------------------------------------------------------

    @property
    def transport(self) -> Any:
        """
        The paramiko transport: alive and logged in.

        :raises TransportError: there is no connection to be had
        :raises AccessDenied: the host's key is not known, or it does not let us in
        """
        asked = self._attempts
        with self._lock:
            if not self.is_open:
                if self._failure is not None and self._attempts != asked:
                    raise copy.copy(self._failure) from self._failure  # of an attempt that we have waited for: the next one would take as long
                self._let_go()
                self._transport = self._attempt()
                self.epoch += 1
            return self._transport

    @property
    def is_open(self) -> bool:
        """Whether there is a connection now. Makes none."""
        transport, link = self._transport, self._link
        return transport is not None and transport.is_active() and link is not None and not link.ended

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes received and sent on the present connection, all of SSH included."""
        link = self._link
        return (link.received, link.sent) if link is not None else (0, 0)

    def session(self, *, window: int = 4 << 20) -> Any:
        """
        :param window: how many bytes the far side may send ahead
        :returns: a new channel, with the timeout set
        """
        transport = self.transport
        with self.answering("open a channel to"):
            channel = transport.open_session(window_size=window, max_packet_size=PACKET, timeout=2 * self.settings.timeout)
        channel.settimeout(self.settings.timeout)
        self._channels.add(channel)
        return channel

    def execute(self, command: str, *, window: int = 4 << 20) -> Any:
        """
        Run a command on the far side.

        :param command: for the shell there; whoever makes it quotes what is in it
        :returns: the channel to it
        :raises TransportError: the account has no shell
        """
        channel = self.session(window=window)
        with self.answering("run a command on"):
            channel.exec_command(command)
        return channel

    def sftp(self, *, window: int = 4 << 20) -> Any:
        """
        :param window: how many bytes the far side may send ahead; with much more, paramiko gets slow
        :returns: an SFTP client on a channel of its own, with the timeout set
        :raises TransportError: the server has no SFTP
        """
        from paramiko.sftp_client import SFTPClient
        from paramiko.ssh_exception import SSHException

        channel = self.session(window=window)
        with self.answering("start SFTP on"):
            try:
                channel.invoke_subsystem("sftp")
            except SSHException as error:
                if not self.is_open:
                    raise
                hint = "a line in sshd_config(5) there makes it: Subsystem sftp internal-sftp"
                raise TransportError(f"{self} has no SFTP ({said(error)})", hint=hint, pool=self._place) from error
            return SFTPClient(channel)

    @contextlib.contextmanager
    def expecting(self, *, hard: bool = False) -> Iterator[None]:
        """
        Within, the connection is given up if nothing at all is heard for the timeout: for waits that paramiko does not end.

        :param hard: if what is waited for has not come within twice the timeout, whatever else is heard
        """
        link = self._link
        if link is None:
            yield
            return
        with link.expecting(self.settings.timeout * (2 if hard else 1), hard=hard):
            yield

    @contextlib.contextmanager
    def answering(self, doing: str, subject: Subject | None = None) -> Iterator[None]:
        """
        As :meth:`translating`, for requests whose answer paramiko waits for without end: something has to be heard within the timeout, and the answer
        within twice that, whatever else arrives.
        """
        named = subject or self._subject
        with self.translating(doing, named), understanding(self._transport, doing, named), self.expecting(), self.expecting(hard=True):
            yield

    @contextlib.contextmanager
    def translating(self, doing: str, subject: Subject | None = None) -> Iterator[None]:
        """As :func:`~statepool.transports.ssh.failures.translating`; what became of the link below explains what paramiko only suspects."""
        named = subject or self._subject
        before = self._link if self.is_open else None
        with translating(doing, named, self.settings.timeout):
            try:
                yield
            except (EOFError, OSError, self._ssh_exception()) as error:
                link = before or self._link  # which may have been made within
                if link is not None and link.failure is not None and link.failure is not error:
                    raise link.failure from error
                raise

    def close(self) -> None:
        """End the connection; the next use makes it again."""
        with self._lock:
            self._let_go()

    # -- connecting ----------------------------------------------------------------------------------------------------------------------------------

    @staticmethod
    def _ssh_exception() -> type[Exception]:
        from paramiko.ssh_exception import SSHException

        found: type[Exception] = SSHException
        return found

    def _let_go(self) -> None:
        transport, self._transport, self._link = self._transport, None, None
        if transport is not None:
            transport.close()

    def _attempt(self) -> Any:
        self._failure = None
        try:
            return self._connect()
        except StatePoolError as error:
            self._failure = error
            raise
        finally:
            self._attempts += 1

    def _connect(self) -> Any:
        _quiet()
        host = resolve(self.endpoint, self.settings)
        subject = Subject(str(host), self._place)
        deadline = time.monotonic() + host.connect_timeout
        link = WatchedSocket(self._reach(host, subject, deadline), self.settings.timeout)
        try:
            return self._log_in(link, host, subject, deadline)
        except BaseException:
            link.close()
            raise

    def _reach(self, host: HostSettings, subject: Subject, deadline: float) -> Any:
        if host.jumps:
            return self._reach_through(host, subject)
        seconds = deadline - time.monotonic()
        try:
            link = dial(host.address, host.port, seconds)
        except OSError as error:
            raise unreached(error, f"{host.address}, port {host.port}", host.connect_timeout, subject) from error
        tune(link, self.settings.timeout)
        return link

    def _reach_through(self, host: HostSettings, subject: Subject) -> Any:
        """Each host on the way opens a TCP connection to the next one for us (RFC 4254, section 7.2)."""
        jump = self._jump
        if jump is None:
            jump = self._jump = _Chained(host.jumps, self.settings, self._depth + 1)
        transport = jump.transport
        with jump.answering(f"reach {host} through", Subject(str(jump), subject.pool)):
            return transport.open_channel("direct-tcpip", (host.address, host.port), ("127.0.0.1", 0), timeout=host.connect_timeout)

    def _log_in(self, link: WatchedSocket, host: HostSettings, subject: Subject, deadline: float) -> Any:
        import paramiko

        known = known_keys(host.known_hosts, host.known_as)
        transport = paramiko.Transport(link, packetizer_class=_packetizer())
        left = max(0.1, deadline - time.monotonic())
        # The link below has the deadline; paramiko's own ones only say less well what happened.
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = 2 * left
        transport.channel_timeout = transport.clear_to_send_timeout = self.settings.timeout
        options = transport.get_security_options()
        options.ciphers = CIPHERS
        preferred = [kind for kind in options.key_types if any(_is_of_type(entry.key, kind) for entry in known if not entry.revoked)]
        options.key_types = (*preferred, *(kind for kind in options.key_types if kind not in preferred))
        self._link = link
        try:
            with self.translating("connect to", subject), understanding(transport, "connect to", subject), link.expecting(left, hard=True):
                _greet(transport, link, host, subject)
                key = transport.get_remote_server_key()
                check_host_key(HostKey(key.get_name(), key.asbytes()), host, subject)
                Login(host, self.settings.secrets, subject, deadline).run(transport)
        except BaseException:
            self._link = None
            transport.close()
            raise
        transport.set_keepalive(KEEPALIVE)
        return transport

    def _after_fork(self) -> None:
        """In the child. The locks may be held by threads that are not there any more, so nothing of the old connection is touched but its socket."""
        if self._link is not None:
            self._link.abandon()
        if self._transport is not None:
            self._transport.active = False
            self._buried += [self._transport, *self._channels]  # kept: they would take their locks to be taken apart
        self._transport = self._link = None
        self._lock = threading.RLock()
        self.epoch += 1


class _Chained(Connection):
    """The last of several hosts on the way: what comes before it is given, not looked up."""

    def __init__(self, hosts: tuple[Endpoint, ...], settings: Settings, depth: int) -> None:
        super().__init__(hosts[-1], settings, depth)
        before = hosts[:-1]
        self._jump = _Chained(before, settings, depth + 1) if before else None

    def _reach(self, host: HostSettings, subject: Subject, deadline: float) -> Any:
        if self._jump is not None:
            return self._reach_through(host, subject)
        return super()._reach(host, subject, deadline)


def _greet(transport: Any, link: WatchedSocket, host: HostSettings, subject: Subject) -> None:
    from paramiko.ssh_exception import IncompatiblePeer, SSHException

    try:
        transport.start_client()
    except IncompatiblePeer as error:
        hint = "its SSH is too old, or configured to take nothing that we have"
        raise TransportError(f"{host} and we have no way in common to encrypt: {said(error)}", hint=hint, pool=subject.pool) from error
    except SSHException as error:
        if transport.remote_version or link.failure is not None:
            raise
        raise TransportError(
            f"{host} did not greet us as SSH does: {said(error)}",
            hint="check the port; if it is right, a firewall may be in between, or too many log in there at once (MaxStartups in sshd_config(5))",
            transient=True,
            pool=subject.pool,
        ) from error


def check_host_key(key: HostKey, host: HostSettings, subject: Subject) -> None:
    """
    :param key: what the host showed, and proved to have
    :raises AccessDenied: it is not known, not the one that is known, or revoked
    """
    known = known_keys(host.known_hosts, host.known_as)
    for entry in known:
        if entry.revoked and entry.key.blob == key.blob:
            raise AccessDenied(
                f"the key of {host.name} is revoked: {key.fingerprint}, by {entry.path}, line {entry.number}",
                hint="do not connect; ask who runs that host",
                pool=subject.pool,
            )
    valid = [entry for entry in known if not entry.revoked]
    if any(entry.key.blob == key.blob for entry in valid):
        return
    file = shlex.quote(str(host.known_hosts[0])) if host.known_hosts else "~/.ssh/known_hosts"
    same_type = [entry for entry in valid if entry.key.type == key.type]
    if same_type:
        old = same_type[0]
        raise AccessDenied(
            f"the key of {host.name} has changed: it has {key.fingerprint}, and {old.path}, line {old.number} says {old.key.fingerprint}. "
            "The host was set up anew, or somebody else answers in its place",
            hint=f"if its operator confirms the new key: {_forget(old.path, host)}, then {_line_command(key, host)} >> {shlex.quote(str(old.path))}",
            pool=subject.pool,
        )
    raise AccessDenied(
        f"the key of {host.name} is not known: {key.type} {key.fingerprint}",
        hint=f"if its operator confirms that fingerprint: {_line_command(key, host)} >> {file}. The line is: {key.line(host.known_as)}",
        pool=subject.pool,
    )


def _forget(path: Path, host: HostSettings) -> str:
    return f"ssh-keygen -f {shlex.quote(str(path))} -R {shlex.quote(host.known_as)}"


def _line_command(key: HostKey, host: HostSettings) -> str:
    """:returns: a command that prints the line that admits the key: ssh-keyscan knows no aliases, and goes through no other host"""
    if host.alias or host.jumps:
        return f"echo {shlex.quote(key.line(host.known_as))}"
    port = f" -p {host.port}" if host.port != 22 else ""
    kind = key.type.removeprefix("ssh-").partition("-")[0]
    return f"ssh-keyscan -t {kind}{port} {host.address}"


def _is_of_type(key: HostKey, algorithm: str) -> bool:
    """RSA keys have one type, and several algorithms to sign with (RFC 8332)."""
    return key.type == algorithm or (key.type == "ssh-rsa" and algorithm.startswith("rsa-sha2-"))


def _packetizer() -> Any:
    from paramiko.packet import Packetizer

    return type("RareRekeys", (Packetizer,), {"REKEY_BYTES": REKEY_BYTES})


def _quiet() -> None:
    """What paramiko logs is for whoever asks for it; without a handler Python would print it on standard error."""
    logger = logging.getLogger("paramiko")
    if not any(isinstance(handler, logging.NullHandler) for handler in logger.handlers):
        logger.addHandler(logging.NullHandler())


# -- the connections of this process -----------------------------------------------------------------------------------------------------------------

_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_shared: dict[tuple[object, ...], list[Connection]] = {}
"""By the endpoint, and by the settings that matter for a connection; several where different functions are asked for secrets."""

_shared_lock = threading.Lock()


def connection_to(location: Location, settings: Settings, user: object = None) -> Connection:
    """
    :param location: where a pool is
    :param settings: how to connect
    :param user: who tells by :func:`release` when the connection is not needed any more
    :returns: the connection of this process to that account, which may have to be made yet
    """
    endpoint = Endpoint.of(location)
    with _shared_lock:
        alike = _shared.setdefault(_key(endpoint, settings), [])
        found = next((connection for connection in alike if connection.settings.secrets == settings.secrets), None)
        if found is None:
            found = Connection(endpoint, settings)
            alike.append(found)
        if user is not None:
            found.users.add(user)
        return found


def release(connection: Connection, user: object) -> None:
    """
    Somebody is done with a connection. It stays for others that may come, unless a function is asked for secrets: nobody else may ever have that one.

    :param user: as for :func:`connection_to`; who uses it once more all the same makes it again
    """
    with _shared_lock:
        connection.users.discard(user)
        if connection.settings.secrets is None or connection.users:
            return
        alike = _shared.get(_key(connection.endpoint, connection.settings), [])
        if connection in alike:
            alike.remove(connection)
    connection.close()


def _key(endpoint: Endpoint, settings: Settings) -> tuple[object, ...]:
    return endpoint, settings.timeout, settings.connect_timeout, settings.ssh_config, settings.known_hosts


def _in_the_child() -> None:
    global _shared_lock  # noqa: PLW0603  a thread that is not there any more may hold the old one
    _shared_lock = threading.Lock()
    for connection in list(_connections):
        connection._after_fork()


os.register_at_fork(after_in_child=_in_the_child)
