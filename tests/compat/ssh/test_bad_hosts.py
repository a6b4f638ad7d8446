"""
Hosts that cannot be reached, or are not what they should be: each a clear error, none of them a
hang.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paramiko
import pytest

import statepool
from statepool.errors import ConfigError, TransportError
from statepool.model.location import Location
from statepool.model.settings import CarrierName, Settings
from statepool.transports.ssh import SSHTransport
from statepool.transports.ssh.connection import Connection
from statepool.transports.ssh.packets import string
from tests.support.proxy import Proxy
from tests.support.sshd import Sshd, free_port, run_sshd

Connect = Callable[..., Any]
pytestmark = pytest.mark.usefixtures("carrier")
only_openssh = pytest.mark.parametrize("carrier", ["openssh"], indirect=True)
only_paramiko = pytest.mark.parametrize("carrier", ["paramiko"], indirect=True)


def quick() -> Settings:
    return Settings(
        connect_timeout=1,
        timeout=1,
        retries=0,
        ssh_config=os.devnull,
        carrier=CarrierName(Sshd.carrier),
    )


def at(port: int, host: str = "127.0.0.1") -> Location:
    return Location("ssh", "/pool", host=host, port=port, user="kim")


def failure(connection: Connection) -> TransportError:
    with pytest.raises(TransportError) as caught:
        connection.sftp()
    assert caught.value.exit_code == 7
    assert caught.value.hint
    assert caught.value.__cause__ is not None
    return caught.value


@pytest.fixture
def answering() -> Iterator[Callable[[bytes, bool], int]]:
    """
    ``answering(data, stay)``: the port of a server that says these bytes to everybody, and then
    stays or goes.
    """
    listeners: list[socket.socket] = []

    def start(data: bytes, stay: bool) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    link, _ = listener.accept()
                except OSError:
                    break
                link.sendall(data)
                if stay:
                    kept.append(link)
                else:
                    link.close()
            for link in kept:
                link.close()

        threading.Thread(target=serve, daemon=True).start()
        return listener.getsockname()[1]

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_nothing_listens(connect: Connect) -> None:
    port = free_port()
    error = failure(connect(at(port), quick()))
    assert f"cannot connect to 127.0.0.1, port {port}: Connection refused" in error.message
    assert error.transient


def test_a_name_that_does_not_exist(connect: Connect) -> None:
    error = failure(connect(at(22, "no-such-host.invalid"), quick()))
    assert "there is no address for no-such-host.invalid" in error.message


def test_no_route(tmp_path: Path) -> None:
    """In a network of its own, where there is nothing."""
    if (
        os.getuid() != 0
        or subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode
        != 0
    ):
        pytest.skip("a network of one's own takes root's rights")
    command = [
        "unshare",
        "-n",
        sys.executable,
        "-m",
        "statepool",
        "--cache",
        str(tmp_path),
        "--source",
        "ssh://kim@192.0.2.1/pool",
        "show",
    ]
    environ = {**os.environ, "STATEPOOL_RETRIES": "1", "STATEPOOL_RETRY_PAUSE": "0"}
    done = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 7
    assert done.stderr.startswith(
        "statepool: cannot connect to 192.0.2.1, port 22: Network is unreachable ("
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "data", [b"", b"SSH-2.0-x\r\n", b"\0" * 100], ids=["nothing", "greeting", "noise"]
)
def test_a_server_that_falls_silent(
    carrier: str, connect: Connect, answering: Callable[[bytes, bool], int], data: bytes
) -> None:
    error = failure(connect(at(answering(data, True)), quick()))
    noticed = carrier == "openssh" and data.startswith(b"\0")
    assert (
        "did not greet us as SSH does" if noticed else "no answer for 1 seconds"
    ) in error.message
    assert error.transient


@pytest.mark.parametrize(
    "data",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", b"hello\r\n" * 200, b"\xff\xfe\n"],
    ids=["http", "nothing", "chat", "noise"],
)
def test_a_server_that_does_not_speak_ssh(
    connect: Connect, answering: Callable[[bytes, bool], int], data: bytes
) -> None:
    assert (
        "did not greet us as SSH does"
        in failure(connect(at(answering(data, False)), quick())).message
    )


def handshake(*packets: bytes) -> bytes:
    """:returns: a greeting, and packets that are not encrypted (RFC 4253, section 6)"""
    out = b"SSH-2.0-x\r\n"
    for content in packets:
        padding = 8 - (len(content) + 5) % 8 + 8
        out += struct.pack(">IB", len(content) + 1 + padding, padding) + content + bytes(padding)
    return out


JUNK = {
    "ways to agree on keys that are no text": (
        b"\x14" + bytes(16) + string(b"\xff\xfe") + string(b"x") * 9 + bytes(5)
    ),
    "a farewell that is no text": (
        b"\x01" + struct.pack(">I", 2) + string(b"\xff\xfe") + string(b"")
    ),
    "nothing in a packet": b"",
}
ENDLESS = struct.pack(">I", 0xFFFFFFFF)
"""A number of things that are not there."""


@pytest.mark.parametrize("packet", JUNK.values(), ids=JUNK)
def test_a_server_that_talks_junk(
    connect: Connect, answering: Callable[[bytes, bool], int], packet: bytes
) -> None:
    error = failure(connect(at(answering(handshake(packet), True)), quick()))
    assert "does not keep to the protocol" in error.message
    assert not error.transient


def test_a_packet_without_an_end(connect: Connect, answering: Callable[[bytes, bool], int]) -> None:
    length = struct.pack(">IB", 0xFFFFFFFF - 3, 8)
    assert (
        "does not keep to the protocol"
        in failure(
            connect(at(answering(b"SSH-2.0-x\r\n" + length + bytes(100), True)), quick())
        ).message
    )


@pytest.mark.parametrize(
    "message",
    [b"\x07" + ENDLESS, b"\x3c" + string(b"") * 3 + ENDLESS],
    ids=["extensions", "questions"],
)
def test_a_server_that_announces_what_does_not_come(
    serve: Callable[..., Any], connect: Connect, message: bytes
) -> None:
    """It is told from an answer that is late: nothing goes on counting in our process."""

    class Announcing(Anybody):
        def get_allowed_auths(self, username: str) -> str:
            return "keyboard-interactive"

        def check_auth_none(self, username: str) -> int:
            if message[0] == 7:
                self.announce()
            return paramiko.AUTH_FAILED

        def check_auth_interactive(self, username: str, submethods: str) -> int:
            self.announce()
            return paramiko.AUTH_FAILED

        def announce(self) -> None:
            server.transports[-1]._send_message(paramiko.Message(message))

    server = serve(Announcing)
    error = failure(
        connect(
            at(server.port),
            server.settings(
                timeout=20, connect_timeout=20, retries=0, secrets=lambda kind, subject: "x"
            ),
        )
    )
    assert "does not keep to the protocol" in error.message


def test_a_mirror_that_talks_junk_is_one_that_fails(
    carrier: str,
    run_statepool: Callable[..., Any],
    answering: Callable[[bytes, bool], int],
    make_image: Callable[..., Path],
    tmp_path: Path,
) -> None:
    statepool.init(tmp_path / "pool")
    statepool.StatePool(cache=tmp_path / "first", sources=[tmp_path / "pool"]).image(
        "vm1/disk"
    ).set("install", source=make_image(tmp_path / "work.qcow2"))
    port = answering(handshake(*JUNK.values()), True)
    sources = "--source", f"ssh://kim@127.0.0.1:{port}/pool", "--source", tmp_path / "pool"
    environ = {
        "STATEPOOL_CARRIER": carrier,
        "STATEPOOL_SSH_CONFIG": os.devnull,
        "STATEPOOL_KNOWN_HOSTS": os.devnull,
        "STATEPOOL_RETRIES": "0",
    }
    for command in (("get", "vm1/disk", "install"), ("show",)):
        ran = run_statepool("--cache", tmp_path / "cache", *sources, *command, env=environ)
        assert "does not keep to the protocol" in ran.err
    assert (
        "internal error"
        not in run_statepool(
            "--cache", tmp_path / "cache", *sources, "doctor", env=environ, code=None
        ).err
    )


class Anybody(paramiko.ServerInterface):
    """Lets everybody in."""

    def get_allowed_auths(self, username: str) -> str:
        return "none"

    def check_auth_none(self, username: str) -> int:
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


@pytest.mark.parametrize("what", ["channel", "subsystem"])
def test_a_request_that_is_never_answered(
    serve: Callable[..., Any], connect: Connect, what: str
) -> None:
    """Though something is heard all the time."""
    done = threading.Event()

    class Chatting(Anybody):
        def check_channel_request(self, kind: str, chanid: int) -> int:
            return self.chat() if what == "channel" else paramiko.OPEN_SUCCEEDED

        def check_channel_subsystem_request(self, channel: paramiko.Channel, name: str) -> bool:
            return self.chat() == paramiko.OPEN_SUCCEEDED

        def chat(self) -> int:
            while not done.wait(0.1):
                for transport in server.transports:
                    transport.send_ignore(8)
            return paramiko.OPEN_SUCCEEDED

    server = serve(Chatting)
    try:
        with pytest.raises(TransportError) as caught:
            connect(at(server.port), server.settings(timeout=1)).sftp()
        assert caught.value.transient
    finally:
        done.set()


def test_silence_on_a_new_connection_is_called_silence(serve: Callable[..., Any]) -> None:
    done = threading.Event()

    class Mute(paramiko.SFTPServerInterface):
        def lstat(self, path: str) -> Any:
            done.wait()
            return paramiko.SFTP_FAILURE

    server = serve(Anybody, Mute)
    try:
        with pytest.raises(TransportError, match="no answer for 1 seconds"):
            SSHTransport(at(server.port), server.settings(timeout=1)).stat("a")
    finally:
        done.set()


def test_an_old_protocol(connect: Connect, answering: Callable[[bytes, bool], int]) -> None:
    error = failure(connect(at(answering(b"SSH-1.5-old\r\n", True)), quick()))
    assert "no way in common" in error.message
    assert not error.transient


def test_nothing_in_common(connect: Connect) -> None:
    with run_sshd(options={"Ciphers": "aes128-cbc"}) as server:
        error = failure(connect(server.location("/"), server.settings()))
    assert "no way in common" in error.message
    assert not error.transient


def test_a_server_without_sftp(connect: Connect) -> None:
    with run_sshd(sftp="") as server:
        error = failure(connect(server.location("/"), server.settings()))
    assert "has no SFTP" in error.message
    assert "sshd_config" in (error.hint or "")
    assert not error.transient


def test_an_account_whose_shell_says_something_else(connect: Connect) -> None:
    """As one with ``echo`` in its ``.bashrc``, which is the usual reason why SFTP fails."""
    with run_sshd(sftp="/bin/echo hello there") as server:
        connection = connect(server.location("/"), server.settings(timeout=3))
        with pytest.raises(TransportError):
            connection.sftp()


@pytest.mark.parametrize("noise", ["Welcome to the lab", "\\nhi", "x", "two\\nlines"])
def test_start_up_files_that_write_something(tmp_path: Path, noise: str) -> None:
    script = tmp_path / "noisy"
    script.write_text(f"#!/bin/sh\nprintf '{noise}\\n'\nexec /usr/lib/openssh/sftp-server\n")
    script.chmod(0o755)
    with run_sshd(sftp=str(script)) as server, pytest.raises(TransportError) as caught:
        SSHTransport(server.location("/"), server.settings(timeout=3)).stat("a")
    assert "has no SFTP" not in caught.value.message
    assert repr(noise.encode().decode("unicode_escape").strip()) in caught.value.message
    assert "sshd_config" not in (caught.value.hint or "")
    assert ".bashrc" in (caught.value.hint or "")


def test_more_channels_than_the_server_permits(connect: Connect) -> None:
    with run_sshd(options={"MaxSessions": "1"}) as server:
        connection = connect(server.location("/"), server.settings())
        first = connection.sftp()
        error = failure(connection)
        assert "MaxSessions" in (error.hint or "")
        assert error.transient, "another one may be closed meanwhile"
        first.close()
        for _ in range(500):  # until the server has noticed
            try:
                assert connection.sftp().listdir("/")
                break
            except TransportError:
                time.sleep(0.01)
        else:
            pytest.fail("the channel that was closed did not make room for another")


def test_a_proxy_that_refuses(sshd: Sshd, proxy: Proxy, connect: Connect) -> None:
    proxy.refusing = True
    assert failure(connect(sshd.location("/", proxy.port), sshd.settings())).transient


# -- configurations of ssh


@only_paramiko
@pytest.mark.parametrize(
    "line",
    [
        "ProxyCommand touch @/run",
        "ProxyJump other",
        "IdentityAgent @/agent",
        "Include @/more",
        "Match exec 'touch @/run'",
    ],
)
def test_what_paramiko_does_not_honour_names_the_other_carrier(
    connect: Connect, ssh_config: Callable[[str], str], tmp_path: Path, line: str
) -> None:
    (tmp_path / "more").touch()
    text = "Host away\n  " + line.replace("@/", f"{tmp_path}/") + "\n"
    with pytest.raises(ConfigError, match=line.partition(" ")[0]) as caught:
        connect(
            Location("ssh", "/", host="away"),
            Settings(carrier=CarrierName(Sshd.carrier), ssh_config=ssh_config(text)),
        ).sftp()
    assert "install ssh" in (caught.value.hint or "")
    assert not (tmp_path / "run").exists()


@only_openssh
def test_a_proxy_command_is_run(
    sshd: Sshd, connect: Connect, ssh_config: Callable[[str], str]
) -> None:
    text = (
        sshd.ssh_config.read_text()
        + f"Host away\n  User {sshd.user}\n  ProxyCommand python3 -c '{RELAY}' {sshd.port}\n"
    )
    assert (
        connect(Location("ssh", "/", host="away"), sshd.settings(ssh_config=ssh_config(text)))
        .sftp()
        .listdir("/")
    )


RELAY = (
    "import os,socket,sys,threading as t;"
    's=socket.create_connection(("127.0.0.1",int(sys.argv[1])));'
    'read=lambda:[os.write(1,d) for d in iter(lambda:s.recv(65536),b"")];'
    "t.Thread(target=read,daemon=True).start();"
    '[s.sendall(d) for d in iter(lambda:os.read(0,65536),b"")]'
)
"""What nc(1) does."""


@only_openssh
def test_a_proxy_command_that_fails_is_quoted(
    connect: Connect, ssh_config: Callable[[str], str]
) -> None:
    text = "Host away\n  ProxyCommand sh -c 'echo the gate is shut >&2; exit 3'\n"
    error = failure(
        connect(
            Location("ssh", "/", host="away"),
            Settings(carrier=CarrierName(Sshd.carrier), ssh_config=ssh_config(text)),
        )
    )
    assert "the gate is shut" in error.message


def unusable(connect: Connect, path: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        connect(
            Location("ssh", "/", host="store"),
            Settings(carrier=CarrierName(Sshd.carrier), ssh_config=path),
        ).sftp()
    assert caught.value.exit_code == 2
    return caught.value


UNUSABLE = {
    "openssh": [
        ("Host *\n  Port no-port\n", "line 2"),
        ("Host *\n  ProxyJump a:b:c\n", "ProxyJump"),
        ("Nonsense yes\n", "Nonsense"),
    ],
    "paramiko": [
        ("Host *\n  Port ssh\n", "Port"),
        ("Host *\n  =\n", "ssh_config"),
        ("Match\n", "ssh_config"),
        ('Host "x\n', "ssh_config"),
        ('Host *\n  Include "x\n', "Include"),
    ],
}


@pytest.mark.parametrize(
    ("carrier", "text", "words"),
    [(carrier, *case) for carrier, cases in UNUSABLE.items() for case in cases],
    indirect=["carrier"],
)
def test_a_configuration_of_ssh_that_cannot_be_used(
    connect: Connect, ssh_config: Callable[[str], str], text: str, words: str
) -> None:
    assert words.lower() in str(unusable(connect, ssh_config(text))).lower()


def test_a_configuration_of_ssh_that_is_not_there(connect: Connect, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        connect(
            Location("ssh", "/", host="store"),
            Settings(carrier=CarrierName(Sshd.carrier), ssh_config=str(tmp_path / "none")),
        ).sftp()
    with pytest.raises(ConfigError, match="cannot be read"):
        connect(
            Location("ssh", "/", host="store"),
            Settings(carrier=CarrierName(Sshd.carrier), ssh_config=str(tmp_path)),
        ).sftp()


def test_known_hosts_that_cannot_be_read(sshd: Sshd, connect: Connect, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        connect(sshd.location("/"), sshd.settings(known_hosts=str(tmp_path))).sftp()
