"""
The carrier by the installed program ``ssh``: all of its features and configuration work.

One ``ssh`` logs in, and stays in the background as the master of a private control socket: sessions
are opened through it (``mux.py``). Other processes of the same user with the same settings find its
socket and use it too. It ends a short time after the last of them has ended. If the server permits
no more sessions on one connection, a process opens its own connection. A master that may log in
with a password or a passphrase is used by its own process only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets as tokens
import socket
import tempfile
import threading
import weakref
from collections.abc import Iterator
from typing import IO, Any

from attrs import define

from statepool.errors import ConfigError, TransportError
from statepool.model.settings import CarrierName, Settings
from statepool.transports.failures import Subject
from statepool.transports.ssh.askpass import answering
from statepool.transports.ssh.carrier import CIPHERS, Carrier, Endpoint, Facts, LinkGone, Stream
from statepool.transports.ssh.complaints import Complaint
from statepool.transports.ssh.failures import refused_channel, translating
from statepool.transports.ssh.mux import Master, MasterStream, SessionRefused
from statepool.transports.ssh.program import (
    configured,
    identity,
    look,
    quoted,
    run,
    settings_of,
    sockets_directory,
)

PERSISTS = 20
"""Seconds for which a master stays after its last use."""

ENDS_WITHIN = 0.1
"""Seconds after the end of a stream within which it shows whether its master has ended, too."""

_OURS = {
    "ControlMaster": "yes",
    "ControlPersist": str(PERSISTS),
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "Tunnel": "no",
    "UpdateHostKeys": "no",
    "VisualHostKey": "no",
    "StrictHostKeyChecking": "yes",
    "NumberOfPasswordPrompts": "1",
    "LogLevel": "DEBUG1",
}
"""
Options that override those of the user's configuration. What ``ssh`` logs before it goes into the
background is used for error messages.
"""


class OpenSSH(Carrier):
    """A carrier by the program ``ssh``."""

    name = CarrierName.OPENSSH

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        super().__init__(endpoint, settings)
        self._shared: _Shared | None = None
        self._replacing = threading.Lock()
        self._streams: weakref.WeakSet[MasterStream] = weakref.WeakSet()

    @property
    def is_open(self) -> bool:
        shared = self._shared
        return shared is not None and shared.master.is_alive

    @property
    def facts(self) -> Facts:
        lines = self._now().facts()
        return Facts(*(lines.get(name, "unknown") for name in ("server", "cipher")))

    def open(self, command: str | None = None, *, window: int = 4 << 20) -> Stream:
        shared = self._now()
        try:
            stream = shared.master.session(command)
        except SessionRefused as error:
            with self._replacing:
                if self._shared is shared:  # another thread may have replaced it
                    if shared.is_ours_alone:
                        raise self._refused(error) from error
                    # Other processes use all sessions that the server permits on one connection:
                    # this process opens another connection. The streams of the old one go on.
                    self._shared = self._start()
                    shared.let_go()
            return self.open(command, window=window)
        except (LinkGone, TimeoutError) as error:
            with self._replacing:
                # No further request may wait for this master; its streams may go on.
                if self._shared is shared:
                    self._shared = None
                    if isinstance(error, TimeoutError):
                        shared.master.stop_listening()
                    shared.let_go()
            raise
        stream.settimeout(self.settings.timeout)
        self._streams.add(stream)
        return stream

    def _refused(self, error: SessionRefused) -> TransportError:
        what = (
            f"cannot open a channel to {self.subject.text}: the server opens no further channel"
            f" ({error})"
        )
        return refused_channel(2, what, self.subject)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError):
            shared = self._shared
            if shared is not None:  # a master ends its streams a moment before it ends itself
                shared.master.await_end(ENDS_WITHIN)
            raise

    def exit_status(self, stream: Any, seconds: float) -> int:
        status: int = stream.exit_status(seconds)
        return status

    def said(self, stream: Any) -> str:
        text: str = stream.said()
        return text

    def close(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            if shared.is_ours_alone:
                shared.master.terminate()
            shared.let_go()

    def after_fork(self) -> None:
        # A thread that does not exist in the child may hold the old lock.
        self._replacing = threading.Lock()
        if self._shared is not None:
            self._shared.let_go()
        self._shared = None
        for stream in list(self._streams):
            stream.abandon()

    def _now(self) -> _Shared:
        shared = self._shared
        if shared is None:
            raise LinkGone("there is no connection any more")
        return shared

    # -- connecting --------------------------------------------------------------------------------

    def connect(self) -> None:
        if self._shared is not None:
            self._shared.let_go()
            self._shared = None
        self._require_files()
        with translating("connect to", self.subject, self.settings.timeout):
            self._shared = self._found() or self._start()

    def _require_files(self) -> None:
        """
        Require that configured files exist: ssh does not report, or not clearly, that one is
        missing.
        """
        for path, needed in ((self.settings.ssh_config, True), (self.settings.known_hosts, False)):
            if path is None:
                continue
            try:
                with open(os.path.expanduser(path), "rb"):
                    pass
            except (FileNotFoundError, NotADirectoryError) as error:
                if needed:
                    raise ConfigError(
                        f"{path}: there is no such file",
                        hint="check the setting ssh-config",
                        path=path,
                    ) from error
            except OSError as error:
                hint = (
                    "make it a readable file; one holds the configuration of ssh, one the keys of"
                    " hosts that are trusted"
                )
                raise ConfigError(
                    f"{path}: cannot be read: {error.strerror}", hint=hint, path=path
                ) from error

    def _found(self) -> _Shared | None:
        """:returns: a master that another process has started"""
        if self.settings.secrets is not None:
            return None
        try:
            name = os.readlink(self._link)
        except OSError:
            return None
        with contextlib.suppress(OSError, EOFError):
            return _Shared.joined(os.path.join(sockets_directory(), name), self.settings.timeout)
        return None

    @property
    def _link(self) -> str:
        """
        Return the symbolic link that names the control socket for all processes with the same
        host and settings. These include the files of keys of trusted hosts.
        """
        files = [os.path.expanduser(name or default) for name, default in self._files()]
        stamps = [(path, _stamp(path)) for path in files]
        words = [*self._words(), "--", self.endpoint.host]
        values = (words, stamps, identity(), self.settings.connect_timeout)
        return os.path.join(
            sockets_directory(),
            hashlib.sha256(repr(values).encode(errors="surrogateescape")).hexdigest()[:16],
        )

    def _files(self) -> Iterator[tuple[str | None, str]]:
        yield self.settings.ssh_config, "~/.ssh/config"
        yield self.settings.known_hosts, "~/.ssh/known_hosts"

    def _words(self) -> list[str]:
        """:returns: the command line of ``ssh`` without the options about the master"""
        settings, endpoint = self.settings, self.endpoint
        words = ["ssh"]
        if settings.ssh_config is not None:
            words += ["-F", os.path.abspath(os.path.expanduser(settings.ssh_config))]
        # The connection to a server that sends nothing for the timeout is closed.
        options = {
            **_OURS,
            "ServerAliveInterval": str(max(1, int(settings.timeout / 2))),
            "ServerAliveCountMax": "1",
        }
        options["BatchMode"] = "no" if settings.secrets is not None else "yes"
        if settings.known_hosts is not None:
            path = os.path.abspath(os.path.expanduser(settings.known_hosts))
            options |= {"UserKnownHostsFile": quoted(path), "GlobalKnownHostsFile": "none"}
        words += [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        if endpoint.port is not None:
            words += ["-p", str(endpoint.port)]
        if endpoint.user is not None:
            words += ["-l", endpoint.user]
        return words

    def _start(self) -> _Shared:
        words = self._words()
        found = configured(words, self.endpoint.host, self.settings.connect_timeout)
        host = settings_of(found, self.endpoint, self.settings)
        offered = found.get("ciphers", [""])[0].split(",")
        fast = [cipher for cipher in CIPHERS[:2] if cipher in offered]
        ciphers = ",".join([*fast, *(cipher for cipher in offered if cipher not in fast)])
        path = f"{self._link}.{tokens.token_hex(4)}"
        command = [
            *words,
            "-o",
            f"Ciphers={ciphers}",
            "-o",
            f"ControlPath={quoted(path)}",
            "-n",
            "-N",
            "-f",
            "--",
            self.endpoint.host,
        ]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(tempfile.TemporaryFile())
            asking = None
            if self.settings.secrets is not None:
                asking = stack.enter_context(
                    answering(self.settings.secrets, (f"{host.user}@{host.address}", str(host)))
                )
            users = stack.enter_context(_users(path))
            code = run(command, output, asking, self.settings.connect_timeout)
            output.seek(0)
            complaint = Complaint(
                output.read().decode("utf-8", "replace"),
                host,
                self.settings,
                self.subject.pool,
                asking,
            )
            if code is None:
                raise complaint.timed_out()
            if code != 0:
                with contextlib.suppress(OSError):
                    os.unlink(f"{path}.users")
                subject = Subject(str(host), self.subject.pool)
                raise complaint.error(
                    subject, lambda: look(words, self.endpoint.host, self.settings.connect_timeout)
                )
            users.write(complaint.facts)
            users.flush()
            return self._begun(path)

    def _begun(self, path: str) -> _Shared:
        started = _Shared.joined(path, self.settings.timeout)
        if self.settings.secrets is None:
            temporary = f"{path}.new"
            os.symlink(os.path.basename(path), temporary)
            os.replace(temporary, self._link)
        return started


@define(eq=False)
class _Shared:
    """
    A master, and the file that each process using it has locked.

    :param users: that file; its first lines are the facts of the connection
    """

    master: Master
    users: IO[bytes]

    @classmethod
    def joined(cls, path: str, seconds: float) -> _Shared:
        """:raises OSError: the master has ended"""
        users = open(f"{path}.users", "r+b")  # noqa: SIM115  as long as the master is used
        try:
            fcntl.flock(users, fcntl.LOCK_SH)
            return cls(Master(path, seconds), users)
        except BaseException:
            users.close()
            raise

    @property
    def is_ours_alone(self) -> bool:
        """Return whether no other process uses the master."""
        try:
            fcntl.flock(self.users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self.users, fcntl.LOCK_SH)  # the attempt has released the shared lock
            return False
        fcntl.flock(self.users, fcntl.LOCK_SH)
        return True

    def facts(self) -> dict[str, str]:
        """:returns: the facts of the connection, by their names"""
        text = os.pread(self.users.fileno(), 4096, 0).decode("utf-8", "replace")
        return dict(line.partition("=")[::2] for line in text.splitlines())

    def let_go(self) -> None:
        """Release the master."""
        self.master.close()
        self.users.close()


# -- where masters are found -----------------------------------------------------------------------


@contextlib.contextmanager
def _users(path: str) -> Iterator[IO[bytes]]:
    """
    :returns: the file that processes lock while they use a master; the files of masters that have
        ended are removed
    """
    directory = os.path.dirname(path)
    for name in os.listdir(directory):
        other = os.path.join(directory, name)
        if name.endswith(".users"):
            _forget(other)
        elif os.path.islink(other) and not os.path.exists(other):
            with contextlib.suppress(OSError):
                os.unlink(other)
    with open(f"{path}.new", "x+b") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        os.rename(users.name, f"{path}.users")
        yield users


def _forget(users: str) -> None:
    """Remove the files of a master that has ended and that no process uses."""
    path = users.removesuffix(".users")
    with (
        contextlib.suppress(OSError),
        open(users, "r+b") as file,
        socket.socket(socket.AF_UNIX) as link,
    ):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if link.connect_ex(path):
            os.unlink(users)
            os.unlink(path)


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
