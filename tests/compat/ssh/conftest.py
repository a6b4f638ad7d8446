"""
What tests of connections share: servers that are as wished, and configurations of ssh that lead to
them.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.transports.ssh import batches
from statepool.transports.ssh.carrier import Endpoint, Stream
from statepool.transports.ssh.channels import Channels
from statepool.transports.ssh.connection import Connection
from statepool.transports.ssh.packets import Kind, names_in, string
from tests.support.proxy import Proxy
from tests.support.sshd import NAME, Sshd, make_key


@pytest.fixture(params=["openssh", "paramiko"])
def carrier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What carries SSH where a server's settings are used: both, one after the other."""
    monkeypatch.setattr(Sshd, "carrier", request.param)
    return str(request.param)


class Files:
    """SFTP on a channel of its own."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.sftp = Channels(connection)._open()

    def listdir(self, path: str) -> list[str]:
        return [name for name, _ in batches.scan(self.sftp, [path.encode()], follow=[True])[0]]

    def mkdir(self, path: str) -> None:
        self.sftp.ask(Kind.MKDIR, string(path.encode()) + bytes(4))

    def stat(self, path: str) -> Any:
        return batches.look(self.sftp, [path.encode()])[0]

    def normalize(self, path: str) -> str:
        return names_in(self.sftp.ask(Kind.REALPATH, string(path.encode())))[0][0].decode()

    def close(self) -> None:
        self.sftp.close()


class Reached(Connection):
    """A connection with what tests need of it. What is opened on it is closed with it."""

    def open(self, command: str | None = None, *, window: int = 4 << 20) -> Stream:
        stream = super().open(command, window=window)
        self.opened = [*getattr(self, "opened", []), stream]
        return stream

    def close(self) -> None:
        super().close()
        for stream in getattr(self, "opened", []):
            stream.close()

    def sftp(self) -> Files:
        """:returns: SFTP on it; raises why there is none"""
        found = Files(self)
        self.opened = [*getattr(self, "opened", []), found]
        return found


@pytest.fixture
def files() -> Callable[[Connection], Files]:
    """``files(connection)``: SFTP on it, or the error why there is none."""
    return Files


@pytest.fixture
def connect() -> Iterator[Callable[..., Connection]]:
    """``connect(location, settings)``: a connection of this test alone, closed at its end."""
    made: list[Reached] = []

    def make(location: Location, settings: Settings) -> Reached:
        made.append(Reached(Endpoint.of(location), settings))
        return made[-1]

    yield make
    for connection in made:
        connection.close()


@pytest.fixture
def proxy(sshd: Sshd) -> Iterator[Proxy]:
    """A proxy before the server with a shell."""
    with Proxy(sshd.port) as found:
        yield found


@pytest.fixture
def ssh_config(tmp_path: Path) -> Callable[[str], str]:
    """``ssh_config(text)``: the path of a configuration of ssh with that text."""

    def write(text: str) -> str:
        path = tmp_path / "ssh_config"
        path.write_text(text)
        return str(path)

    return write


class Account(paramiko.ServerInterface):
    """A server of our own for what sshd does with accounts of the system only: passwords."""

    def __init__(self, methods: str, password: str) -> None:
        self.methods = methods
        self.password = password

    def get_allowed_auths(self, username: str) -> str:
        return self.methods

    def check_auth_password(self, username: str, password: str) -> int:
        return (
            paramiko.AUTH_SUCCESSFUL
            if "password" in self.methods and password == self.password
            else paramiko.AUTH_FAILED
        )

    def check_auth_interactive(self, username: str, submethods: str) -> Any:
        return paramiko.InteractiveQuery("", "", ("Password: ", False))

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        return paramiko.AUTH_SUCCESSFUL if responses == [self.password] else paramiko.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


class Served:
    """A server of our own that runs."""

    def __init__(
        self, directory: Path, account: Callable[[], paramiko.ServerInterface], files: Any = None
    ) -> None:
        self.directory = directory
        self.account = account
        self.files = files
        make_key(directory / "fake_key")
        kind, blob, *_ = (directory / "fake_key.pub").read_text().split()
        self.known_hosts = directory / "fake_known_hosts"
        self.known_hosts.write_text(f"{NAME} {kind} {blob}\n")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.transports: list[paramiko.Transport] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self.listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(link)
            transport.add_server_key(
                paramiko.Ed25519Key.from_private_key_file(str(self.directory / "fake_key"))
            )
            if self.files is not None:
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, self.files)
            self.transports.append(transport)
            try:
                transport.start_server(server=self.account())
            except (paramiko.SSHException, EOFError):
                continue

    def settings(self, **knobs: Any) -> Settings:
        config = self.directory / "fake_ssh_config"
        config.write_text(f"Host *\n  HostKeyAlias {NAME}\n  IdentityFile none\n")
        return Settings(
            **{
                "ssh_config": str(config),
                "known_hosts": str(self.known_hosts),
                "timeout": 10,
                "carrier": Sshd.carrier,
                **knobs,
            }
        )

    def close(self) -> None:
        self.listener.close()
        for transport in self.transports:
            transport.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """``serve(account, files)``: a server of our own, with an account and perhaps with SFTP."""
    made: list[Served] = []

    def start(account: Callable[[], paramiko.ServerInterface], files: Any = None) -> Served:
        made.append(Served(tmp_path, account, files))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def password_server(serve: Callable[..., Served]) -> Callable[[str], Served]:
    """
    ``password_server(methods)``: a server that takes the password ``hunter2``, by the methods
    given.
    """
    return lambda methods: serve(lambda: Account(methods, "hunter2"))


# -- a server that has SFTP and none of its extensions


def told(work: Callable[[], Any]) -> Any:
    """:returns: what a function gives, or the status that SFTP has for its error; OK for None"""
    try:
        result = work()
    except OSError as error:
        return paramiko.SFTPServer.convert_errno(error.errno)
    return paramiko.SFTP_OK if result is None else result


def change(path: str, attributes: Any) -> None:
    """As paramiko's own helper, which empties a file that is to be given a length."""
    if attributes.st_size is not None:
        os.truncate(path, attributes.st_size)
    if attributes.st_mode is not None:
        os.chmod(path, attributes.st_mode)
    if attributes.st_mtime is not None:
        os.utime(path, (attributes.st_atime, attributes.st_mtime))


class BareHandle(paramiko.SFTPHandle):
    """An open file."""

    def __init__(self, descriptor: int, flags: int) -> None:
        super().__init__(flags)
        self.descriptor = descriptor

    def close(self) -> None:
        os.close(self.descriptor)

    def read(self, offset: int, length: int) -> Any:
        return told(lambda: os.pread(self.descriptor, length, offset))

    def write(self, offset: int, data: bytes) -> Any:
        return told(lambda: os.pwrite(self.descriptor, data, offset) and None)

    def stat(self) -> Any:
        return told(lambda: paramiko.SFTPAttributes.from_stat(os.fstat(self.descriptor)))

    def chattr(self, attr: Any) -> Any:
        return told(lambda: change(f"/proc/self/fd/{self.descriptor}", attr))


class BareFiles(paramiko.SFTPServerInterface):
    """
    The files of this host, by the operations of the protocol alone, one after the other.

    :param ahead: seconds by which its clock is ahead of ours
    """

    def __init__(self, server: paramiko.ServerInterface, ahead: int = 0) -> None:
        super().__init__(server)
        self.ahead = ahead

    def _attributes(self, found: os.stat_result, name: str = "") -> Any:
        attributes = paramiko.SFTPAttributes.from_stat(found, name)
        attributes.st_mtime += self.ahead
        return attributes

    def list_folder(self, path: str) -> Any:
        return told(
            lambda: [
                self._attributes(entry.stat(follow_symlinks=False), entry.name)
                for entry in os.scandir(path)
            ]
        )

    def stat(self, path: str) -> Any:
        return told(lambda: self._attributes(os.stat(path)))

    def lstat(self, path: str) -> Any:
        return told(lambda: self._attributes(os.lstat(path)))

    def open(self, path: str, flags: int, attr: Any) -> Any:
        mode = 0o666 if attr.st_mode is None else attr.st_mode
        return told(lambda: BareHandle(os.open(path, flags, mode), flags))

    def remove(self, path: str) -> Any:
        return told(lambda: os.unlink(path))

    def rename(self, oldpath: str, newpath: str) -> Any:
        return (
            paramiko.SFTP_FAILURE
            if os.path.lexists(newpath)
            else told(lambda: os.rename(oldpath, newpath))
        )

    def mkdir(self, path: str, attr: Any) -> Any:
        return told(lambda: os.mkdir(path))

    def rmdir(self, path: str) -> Any:
        return told(lambda: os.rmdir(path))

    def chattr(self, path: str, attr: Any) -> Any:
        return told(lambda: change(path, attr))

    def readlink(self, path: str) -> Any:
        return told(lambda: os.readlink(path))

    def symlink(self, target_path: str, path: str) -> Any:
        return told(lambda: os.symlink(target_path, path))


@pytest.fixture
def bare_server(serve: Callable[..., Served]) -> Callable[..., Served]:
    """
    ``bare_server(ahead=0)``: SFTP without any extension, for whoever comes, by a clock that may be
    ahead.
    """

    class Anybody(Account):
        def check_auth_none(self, username: str) -> int:
            return paramiko.AUTH_SUCCESSFUL

    return lambda ahead=0: serve(
        lambda: Anybody("none", ""), lambda server: BareFiles(server, ahead)
    )
