"""
A connection is made once, kept, revived, made anew after a fork; and it ends what nobody else
would.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from statepool.errors import ConfigError, TransportError
from statepool.model.location import Location
from statepool.transports.ssh import SSHTransport
from statepool.transports.ssh.carrier import CIPHERS
from statepool.transports.ssh.connection import connection_to
from statepool.transports.ssh.library import Paramiko
from tests.support.proxy import Proxy
from tests.support.sshd import Sshd, run_sshd

Connect = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("carrier")
only_openssh = pytest.mark.parametrize("carrier", ["openssh"], indirect=True)


@pytest.fixture
def place(sshd: Sshd, tmp_path: Path) -> Path:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/file").write_text("hello")
    return tmp_path / "pool"


def quick(sshd: Sshd, **knobs):
    return sshd.settings(**{"timeout": 1, "connect_timeout": 1, **knobs})


def test_files_and_commands(carrier: str, sshd: Sshd, connect: Connect, place: Path) -> None:
    connection = connect(sshd.location(place), sshd.settings())
    assert not connection.is_open
    assert connection.sftp().listdir(str(place)) == ["file"]
    stream = connection.open("echo said")
    assert (stream.recv(100), stream.recv(100), connection.carrier.exit_status(stream, 60)) == (
        b"said\n",
        b"",
        0,
    )
    assert connection.is_open
    assert connection.carrier.name == carrier
    assert connection.carrier.facts.cipher == CIPHERS[0]
    assert "OpenSSH" in connection.carrier.facts.server
    if isinstance(connection.carrier, Paramiko):
        assert all(count > 1000 for count in connection.carrier.moved)


def test_a_chrooted_account_has_files_only(chrooted_sshd: Sshd, connect: Connect) -> None:
    place = chrooted_sshd.directory_for(f"connection-{Sshd.carrier}")
    location = chrooted_sshd.location(place)
    assert location.path == f"/connection-{Sshd.carrier}"
    connection = connect(location, chrooted_sshd.settings())
    connection.sftp().mkdir(f"{location.path}/made")
    assert (place / "made").is_dir()
    assert connection.carrier.exit_status(connection.open("echo said"), 60) != 0


def test_one_connection_for_all_that_is_done_there(
    sshd: Sshd, proxy: Proxy, files: Callable[..., Any]
) -> None:
    settings = sshd.settings()
    one, other = (
        connection_to(sshd.location(path, proxy.port), settings) for path in ("/one", "/other")
    )
    assert one is other

    def ask(number: int) -> bool:
        found = files(one)
        try:
            return "/" in found.normalize(".")
        finally:
            found.close()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(8))) == [True] * 8
    assert proxy.connections == 1
    assert connection_to(sshd.location("/one", proxy.port), sshd.settings(fresh=1)) is one
    assert connection_to(sshd.location("/one", proxy.port), sshd.settings(timeout=1)) is not one
    one.close()


class Person:
    """Has no secrets, and cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]  # as of any class that only says what is equal

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Person) and other.name == self.name

    def __call__(self, kind: str, subject: str) -> None:
        return None


def test_a_connection_ends_with_the_last_who_has_the_same_secrets(sshd: Sshd, place: Path) -> None:
    one, same, other = (
        SSHTransport(sshd.location(place), sshd.settings(secrets=Person(name)))
        for name in ("kim", "kim", "lee")
    )
    shared, separate = (
        connection_to(sshd.location(place), sshd.settings(secrets=Person(name)))
        for name in ("kim", "lee")
    )
    assert shared is not separate
    for transport in (one, same, other):
        assert transport.stat("file") is not None
    one.close()
    assert shared.is_open
    same.close()
    assert not shared.is_open
    assert separate.is_open
    other.close()
    assert not separate.is_open
    assert same.stat("file") is not None, "a close is not the end"
    same.close()
    assert not shared.is_open


def test_it_is_revived_when_it_has_died(
    sshd: Sshd, proxy: Proxy, connect: Connect, place: Path
) -> None:
    connection = connect(sshd.location(place, proxy.port), sshd.settings())
    files = connection.sftp()
    epoch = connection.epoch
    proxy.cut()
    with (
        pytest.raises(TransportError, match="the connection was lost") as caught,
        connection.translating("list"),
    ):
        files.listdir(str(place))
    assert caught.value.transient
    assert connection.sftp().listdir(str(place)) == ["file"]
    assert (proxy.connections, connection.epoch) == (2, epoch + 1)


def test_it_outlives_a_server_that_was_restarted(connect: Connect, place: Path) -> None:
    with run_sshd() as server:
        connection = connect(server.location(place), server.settings())
        connection.sftp()
        server.kill()
        told = ""
        while "refused" not in told:  # first the end of the old connection is noticed
            with pytest.raises(TransportError) as caught:
                connection.sftp()
            assert caught.value.transient
            told = caught.value.message
        server.restart()
        assert connection.sftp().listdir(str(place)) == ["file"]


def test_a_close_is_not_the_end(sshd: Sshd, connect: Connect, place: Path) -> None:
    connection = connect(sshd.location(place), sshd.settings())
    connection.sftp()
    connection.close()
    assert not connection.is_open
    assert connection.sftp().listdir(str(place)) == ["file"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # that is the point
def test_a_fork_makes_its_own(
    carrier: str, sshd: Sshd, proxy: Proxy, connect: Connect, place: Path
) -> None:
    connection = connect(sshd.location(place, proxy.port), sshd.settings())
    files = connection.sftp()
    stop = threading.Event()

    # the locks of the connection are held at the moment of the fork, more often than not
    def use() -> None:
        while not stop.is_set():
            files.listdir(str(place))

    user = threading.Thread(target=use)
    user.start()
    try:
        for _ in range(3):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = (
                        0
                        if not connection.is_open
                        and connection.sftp().listdir(str(place)) == ["file"]
                        else 2
                    )
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        user.join()
    assert files.listdir(str(place)) == ["file"]
    assert proxy.connections == (4 if carrier == "paramiko" else 1), "a master is for all of them"


# -- when nobody answers


@pytest.mark.parametrize("heard", [0, 20, 500, 1200, 1800])
def test_silence_while_connecting_is_an_error(
    sshd: Sshd, proxy: Proxy, connect: Connect, heard: int
) -> None:
    proxy.fall_silent_after(down=heard)
    with pytest.raises(TransportError, match="no answer for") as caught:
        connect(sshd.location("/", proxy.port), quick(sshd)).sftp()
    assert caught.value.transient
    assert caught.value.exit_code == 7


def test_silence_of_a_kept_connection_is_an_error(
    sshd: Sshd, proxy: Proxy, connect: Connect
) -> None:
    connection = connect(sshd.location("/", proxy.port), quick(sshd, connect_timeout=5))
    files = connection.sftp()
    proxy.silent = True
    for ask in (
        connection.sftp,
        connection.open,
        lambda: connection.open("true"),
        lambda: files.stat("/"),
    ):
        with pytest.raises(TransportError) as caught, connection.translating("ask"):
            ask()
        assert caught.value.transient
    proxy.speak()
    assert connection.sftp().listdir("/")


def test_many_who_wait_for_a_connection_are_told_at_once_that_there_is_none(
    sshd: Sshd, proxy: Proxy, connect: Connect
) -> None:
    proxy.silent = True
    connection = connect(sshd.location("/", proxy.port), quick(sshd, connect_timeout=5))
    start = threading.Barrier(8)

    def ask(number: int) -> str:
        start.wait()
        with pytest.raises(TransportError) as caught:
            connection.sftp()
        return caught.value.message

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(ask, range(8)))) == 1
    assert proxy.connections < 8, "they do not try one after the other"
    proxy.speak()
    assert connection.sftp().listdir("/")


def test_silence_while_writing_is_an_error(sshd: Sshd, proxy: Proxy, connect: Connect) -> None:
    connection = connect(sshd.location("/", proxy.port), quick(sshd, connect_timeout=5))
    channel = connection.open("cat >/dev/null")
    proxy.silent = True
    with pytest.raises(TransportError) as caught, connection.translating("write"):
        for _ in range(1000):
            channel.sendall(bytes(1 << 16))
    assert caught.value.transient


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("count", [0, 100, 900, 1500, 2000])
def test_a_cut_while_connecting_is_an_error_that_may_pass(
    sshd: Sshd, proxy: Proxy, connect: Connect, direction: str, count: int
) -> None:
    proxy.cut_after(**{direction: count})
    with pytest.raises(TransportError) as caught:
        connection = connect(sshd.location("/", proxy.port), sshd.settings())
        for _ in range(100):
            connection.sftp()
    assert caught.value.transient, caught.value
    assert connection.sftp().listdir("/")


def test_a_slow_link_is_none_of_this(
    sshd: Sshd, proxy: Proxy, connect: Connect, place: Path
) -> None:
    proxy.delay = 0.1
    connection = connect(sshd.location(place, proxy.port), sshd.settings(timeout=5))
    assert connection.sftp().listdir(str(place)) == ["file"]


# -- the way there


def test_an_alias(sshd: Sshd, connect: Connect, place: Path) -> None:
    connection = connect(Location("ssh", str(place), host="store"), sshd.settings())
    assert connection.sftp().listdir(str(place)) == ["file"]


def config_for(sshd: Sshd, port: int, alias: str, more: str = "") -> str:
    return (
        f"Host {alias}\n  HostName 127.0.0.1\n  Port {port}\n  User {sshd.user}\n  IdentityFile"
        f" {sshd.identity}\n  UserKnownHostsFile {sshd.known_hosts}\n  HostKeyAlias"
        f" sshd-under-test\n{more}"
    )


@only_openssh
def test_through_other_hosts(
    sshd: Sshd, proxy: Proxy, connect: Connect, place: Path, ssh_config: Callable[[str], str]
) -> None:
    with Proxy(sshd.port) as second:
        text = config_for(sshd, proxy.port, "first") + config_for(sshd, second.port, "second")
        text += config_for(sshd, sshd.port, "third", "  ProxyJump first,second\n")
        settings = sshd.settings(ssh_config=ssh_config(text), known_hosts=None)
        connection = connect(Location("ssh", str(place), host="third"), settings)
        assert connection.sftp().listdir(str(place)) == ["file"]
        assert (proxy.connections, second.connections) == (1, 1)
        proxy.cut()
        while connection.is_open:
            time.sleep(0.01)
        assert connection.sftp().listdir(str(place)) == ["file"]
        assert proxy.connections == 2


@only_openssh
def test_a_jump_to_itself(sshd: Sshd, connect: Connect, ssh_config: Callable[[str], str]) -> None:
    settings = sshd.settings(ssh_config=ssh_config("Host loop\n  ProxyJump loop\n"))
    with pytest.raises(ConfigError, match="jumphost loop"):
        connect(Location("ssh", "/", host="loop"), settings).sftp()


@only_openssh
def test_a_host_on_the_way_that_does_not_reach_the_next(
    sshd: Sshd, connect: Connect, ssh_config: Callable[[str], str]
) -> None:
    text = (
        config_for(sshd, sshd.port, "first")
        + "Host away\n  HostName 127.0.0.1\n  Port 1\n  ProxyJump first\n"
    )
    settings = sshd.settings(ssh_config=ssh_config(text))
    with pytest.raises(TransportError, match=r"cannot reach .*127\.0\.0\.1:1 through"):
        connect(Location("ssh", "/", host="away"), settings).sftp()
