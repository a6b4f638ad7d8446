"""SSH by the installed ``ssh``: its masters, what it asks, and what only it can do."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.errors import AccessDenied, TransportError
from statepool.model.location import Location
from statepool.model.secrets import SecretKind
from statepool.model.settings import Settings
from statepool.transports.base import Transfer
from statepool.transports.registry import open_transport
from statepool.transports.ssh import openssh
from statepool.transports.ssh.connection import connection_to
from statepool.transports.ssh.program import sockets_directory
from tests.support.proxy import Proxy
from tests.support.sshd import NAME, Sshd, make_key, run_sshd

pytestmark = pytest.mark.skipif(
    shutil.which("ssh") is None, reason="ssh is not installed (Debian: openssh-client)"
)

Connect = Callable[..., Any]
MIB = 1 << 20


@pytest.fixture(autouse=True)
def carrier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sshd, "carrier", "openssh")


@pytest.fixture
def place(sshd: Sshd, tmp_path: Path) -> Path:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/file").write_text("hello")
    return tmp_path / "pool"


def masters(port: int) -> list[int]:
    """:returns: the processes of ``ssh`` that stay in the background with a connection to a port"""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if words and words[0].startswith(b"ssh") and _is_connected(int(entry.name), port):
            found.append(int(entry.name))
    return found


def _is_connected(pid: int, port: int) -> bool:
    try:
        inodes = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return False
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(
        fields[2].endswith(f":{port:04X}") and f"socket:[{fields[9]}]" in inodes for fields in lines
    )


LIST = """
import sys
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.transports.ssh import SSHTransport
where, config, known = sys.argv[1:]
settings = Settings(ssh_config=config, known_hosts=known, timeout=20.0, carrier="openssh")
transport = SSHTransport(Location.parse(where), settings)
print(len(transport.scan("")), "paramiko" in sys.modules, flush=True)
sys.stdin.readline()
"""


def start(location: Location, sshd: Sshd) -> subprocess.Popen[str]:
    """:returns: a process that has listed a pool, and waits for a line"""
    arguments = [str(location), str(sshd.ssh_config), str(sshd.known_hosts)]
    process = subprocess.Popen(
        [sys.executable, "-c", LIST, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1 False\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


# -- masters ---------------------------------------------------------------------------------------


def test_processes_use_one_connection_after_one_another_and_at_once(
    sshd: Sshd, proxy: Proxy, place: Path
) -> None:
    location = sshd.location(place, proxy.port)
    end(start(location, sshd))
    first, second = start(location, sshd), start(location, sshd)
    end(first)
    end(second)
    assert proxy.connections == 1


def test_what_the_server_does_not_permit_on_one_connection_is_had_on_another(place: Path) -> None:
    with run_sshd(options={"MaxSessions": "1"}) as server, Proxy(server.port) as proxy:
        location = server.location(place, proxy.port)
        processes = [start(location, server) for _ in range(3)]
        for process in processes:
            end(process)
        assert proxy.connections == 3


def test_threads_that_are_refused_get_one_further_connection_together(place: Path) -> None:
    """And give up where there is none for them all, as on one that is theirs alone."""
    with run_sshd(options={"MaxSessions": "3"}) as server, Proxy(server.port) as proxy:
        location = server.location(place, proxy.port)
        others = [start(location, server) for _ in range(3)]
        connection = connection_to(location, server.settings())
        barrier = threading.Barrier(3)
        streams = []

        def ask() -> None:
            barrier.wait()
            streams.append(connection.open("cat"))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(streams) == 3
        assert proxy.connections == 2
        with pytest.raises(TransportError, match="opens no further channel"):
            connection.open("cat")
        for stream in streams:
            stream.close()
        connection.close()
        for other in others:
            end(other)


def test_a_master_ends_a_while_after_its_last_user_was_killed(
    sshd: Sshd, proxy: Proxy, connect: Connect, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # seconds, within which a loaded machine gets to look
    monkeypatch.setitem(openssh._OURS, "ControlPersist", "9")
    child = os.fork()
    if child == 0:
        try:
            connection = connection_to(
                sshd.location(place, proxy.port), sshd.settings(connect_timeout=19)
            )
            connection.open("cat")
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(masters(proxy.port)) == 1
    while masters(proxy.port):
        time.sleep(0.05)


def test_it_ends_at_once_with_the_one_who_has_secrets(
    sshd: Sshd, proxy: Proxy, connect: Connect
) -> None:
    connection = connect(
        sshd.location("/", proxy.port), sshd.settings(secrets=lambda kind, subject: None)
    )
    connection.sftp()
    assert len(masters(proxy.port)) == 1
    other = connect(
        sshd.location("/", proxy.port), sshd.settings(secrets=lambda kind, subject: None)
    )
    other.sftp()
    assert proxy.connections == 2, "it is not shared"
    connection.close()
    other.close()
    while masters(proxy.port):
        time.sleep(0.05)


def test_a_master_that_dies_in_the_middle_is_replaced(
    sshd: Sshd, proxy: Proxy, place: Path, tmp_path: Path
) -> None:
    (place / "large").write_bytes(os.urandom(8 * MIB))
    transport = open_transport(
        sshd.location(place, proxy.port),
        sshd.settings(retry_pause=0.01, compress="off", connect_timeout=18),
    )
    proxy.rate = 8.0 * MIB
    killed = threading.Event()

    class Progress:
        def begin(self, what: str, total: int) -> None: ...
        def end(self) -> None: ...
        def advance(self, count: int) -> None:
            if count and not killed.is_set():
                killed.set()
                os.kill(masters(proxy.port)[0], signal.SIGKILL)

    with open(tmp_path / "copy", "w+b") as copy:
        transport.fetch("large", copy.fileno(), Transfer(8 * MIB, progress=Progress()))
    transport.close()
    assert killed.is_set()
    assert (tmp_path / "copy").read_bytes() == (place / "large").read_bytes()
    assert proxy.connections == 2


def test_a_master_is_replaced_that_is_there_but_takes_nothing_any_more(
    sshd: Sshd, proxy: Proxy, place: Path
) -> None:
    """As one is for a moment before it ends: its socket is gone first."""
    connection = connection_to(sshd.location(place, proxy.port), sshd.settings())
    with contextlib.closing(connection.open("echo first")) as stream:
        assert stream.recv(100) == b"first\n"
    before = connection.epoch
    carrier: Any = connection.carrier
    os.unlink(carrier._shared.master._path)
    assert connection.is_open
    with contextlib.closing(connection.open("echo second")) as stream:
        assert stream.recv(100) == b"second\n"
    assert connection.epoch == before + 1
    assert proxy.connections == 2


def test_the_users_own_masters_are_left_alone(
    sshd: Sshd, proxy: Proxy, connect: Connect, ssh_config: Callable[[str], str], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    text = (
        f"Host *\n  ControlMaster auto\n  ControlPersist 30\n  ControlPath {own}\n"
        + sshd.ssh_config.read_text()
    )
    settings = sshd.settings(ssh_config=ssh_config(text))
    assert connect(sshd.location("/", proxy.port), settings).sftp().listdir("/")
    assert not own.exists()
    command = ["ssh", "-F", settings.ssh_config or "", "-p", str(proxy.port), "127.0.0.1"]
    subprocess.run([*command, "true"], check=True, capture_output=True)
    try:
        assert own.exists()
        assert (
            connect(
                sshd.location("/", proxy.port),
                sshd.settings(ssh_config=settings.ssh_config, connect_timeout=17),
            )
            .sftp()
            .listdir("/")
        )
        assert proxy.connections == 3, "one of the user's own, two of ours"
    finally:
        subprocess.run([*command[:3], "-O", "exit", *command[3:]], check=False, capture_output=True)


def test_what_the_user_trusts_is_asked_anew_when_it_has_changed(
    sshd: Sshd, proxy: Proxy, connect: Connect, tmp_path: Path
) -> None:
    known = tmp_path / "known"
    known.write_text(sshd.known_hosts.read_text())
    settings = sshd.settings(known_hosts=str(known))
    connect(sshd.location("/", proxy.port), settings).sftp()
    known.write_text("")
    with pytest.raises(AccessDenied, match="is not known"):
        connect(sshd.location("/", proxy.port), settings).sftp()


def test_sockets_are_nobody_elses(sshd: Sshd, connect: Connect) -> None:
    connect(sshd.location("/"), sshd.settings(connect_timeout=16)).sftp()
    directory = Path(sockets_directory())
    assert directory.stat().st_mode & 0o777 == 0o700
    assert any(entry.is_socket() for entry in directory.iterdir())


# -- processes, threads and interruptions ----------------------------------------------------------


def test_an_interrupted_get_leaves_a_pool_that_can_be_used(
    sshd: Sshd, proxy: Proxy, tmp_path: Path, make_image: Callable[..., Path]
) -> None:
    statepool.init(tmp_path / "pool")
    filler = statepool.StatePool(cache=tmp_path / "filler", sources=[tmp_path / "pool"])
    filler.image("vm1/disk").set(
        "install",
        source=make_image(
            tmp_path / "work.qcow2", 32 * MIB, writes=[(n * MIB, MIB, n + 1) for n in range(12)]
        ),
    )
    proxy.rate = 2.0 * MIB
    location = sshd.location(tmp_path / "pool", proxy.port)
    environ = {
        **os.environ,
        "STATEPOOL_SSH_CONFIG": str(sshd.ssh_config),
        "STATEPOOL_KNOWN_HOSTS": str(sshd.known_hosts),
    }
    command = [
        sys.executable,
        "-m",
        "statepool",
        "--cache",
        str(tmp_path / "cache"),
        "--source",
        str(location),
        "get",
        "vm1/disk",
        "install",
    ]
    process = subprocess.Popen(
        command,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while proxy.moved["down"] < 3 * MIB:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode == 130
    proxy.rate = None
    assert subprocess.run(command, env=environ, check=False, capture_output=True).returncode == 0


def test_a_fork_does_not_keep_the_parents_streams(sshd: Sshd, connect: Connect) -> None:
    connection = connect(sshd.location("/"), sshd.settings(connect_timeout=15))
    stream = connection.open("cat; echo ended")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    stream.shutdown_write()
    assert stream.recv(100) == b"ended\n", "the child has no copy of it that would keep it open"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_without_descriptors_there_is_an_error_and_no_hang(sshd: Sshd, connect: Connect) -> None:
    connection = connect(sshd.location("/"), sshd.settings(connect_timeout=14))
    connection.sftp()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, before[1])
    )
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(2):
            os.close(taken.pop())
        with pytest.raises(TransportError, match="Too many open files"):
            connection.sftp()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in taken:
            os.close(descriptor)
    assert connection.sftp().listdir("/")


# -- what it asks, and what it says ----------------------------------------------------------------


def test_secrets_are_in_no_command_line_and_in_no_environment(
    sshd: Sshd, connect: Connect, ssh_config: Callable[[str], str], tmp_path: Path
) -> None:
    key = tmp_path / "locked"
    shutil.copy(sshd.identity, key)
    word = "open-" + os.urandom(8).hex()
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-P", "", "-N", word, "-f", str(key)],
        check=True,
        capture_output=True,
    )
    seen: list[bytes] = []

    def look() -> None:
        for name in ("environ", "cmdline"):
            for entry in Path("/proc").glob(f"[0-9]*/{name}"):
                try:
                    seen.append(entry.read_bytes())
                except OSError:
                    continue

    def answer(kind: SecretKind, subject: str) -> str:
        threading.Timer(0.02, look).start()
        return word

    settings = sshd.settings(
        ssh_config=ssh_config(f"Host *\n  HostKeyAlias {NAME}\n  IdentityFile {key}\n"),
        secrets=answer,
    )
    connect(sshd.location("/"), settings).sftp()
    look()
    assert seen
    assert not any(word.encode() in text for text in seen)


def test_nothing_is_asked_where_nobody_can_answer(
    sshd: Sshd, connect: Connect, ssh_config: Callable[[str], str], tmp_path: Path
) -> None:
    """Even if the configuration wants it, and a program for it is there."""
    asking = tmp_path / "asking"
    asking.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nsleep 100\n")
    asking.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSH_ASKPASS", str(asking))
        patch.setenv("SSH_ASKPASS_REQUIRE", "force")
        patch.setenv("DISPLAY", ":7")
        text = ssh_config("Host *\n  BatchMode no\n  StrictHostKeyChecking ask\n")
        with pytest.raises(AccessDenied, match="is not known"):
            connect(
                sshd.location("/"),
                sshd.settings(ssh_config=text, known_hosts=str(tmp_path / "none")),
            ).sftp()
    assert not (tmp_path / "asked").exists()


def test_banners_and_warnings_are_no_errors(
    connect: Connect, ssh_config: Callable[[str], str], tmp_path: Path
) -> None:
    banner = tmp_path / "banner"
    banner.write_text("Host key verification failed.\nkim@store: Permission denied (publickey).\n")
    with run_sshd(options={"Banner": str(banner), "PrintMotd": "yes"}) as server:
        text = server.ssh_config.read_text() + f"Host *\n  IdentityFile {tmp_path}/missing\n"
        settings = server.settings(ssh_config=ssh_config(text))
        connection = connect(server.location("/"), settings)
        assert connection.sftp().listdir("/")
        stream = connection.open("echo hi")
        assert stream.recv(100) == b"hi\n"
        other = ssh_config(
            f"Host *\n  HostKeyAlias {NAME}\n  IdentityFile {make_key(tmp_path / 'wrong')}\n"
        )
        with pytest.raises(AccessDenied, match="does not let us in"):
            connect(server.location("/"), server.settings(ssh_config=other)).sftp()


# -- what only it can do ---------------------------------------------------------------------------


def test_authorities_that_certify_hosts(connect: Connect, tmp_path: Path) -> None:
    authority, key = make_key(tmp_path / "authority"), make_key(tmp_path / "host")
    subprocess.run(
        ["ssh-keygen", "-q", "-s", str(authority), "-I", "host", "-h", "-n", NAME, f"{key}.pub"],
        check=True,
        capture_output=True,
    )
    with run_sshd(options={"HostKey": f"{key}\nHostCertificate {key}-cert.pub"}) as server:
        server.known_hosts.write_text(
            f"@cert-authority {NAME} {authority.with_suffix('.pub').read_text()}"
        )
        assert connect(server.location("/"), server.settings()).sftp().listdir("/")
        with pytest.raises(AccessDenied, match="@cert-authority") as caught:
            connect(server.location("/"), server.settings(carrier="paramiko")).sftp()
    assert "install ssh" in (caught.value.hint or "")


def test_an_agent_of_its_own(
    sshd: Sshd, connect: Connect, ssh_config: Callable[[str], str], tmp_path: Path
) -> None:
    started = subprocess.run(
        ["ssh-agent", "-s", "-a", str(tmp_path / "agent")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    try:
        environ = {**os.environ, "SSH_AUTH_SOCK": str(tmp_path / "agent")}
        subprocess.run(
            ["ssh-add", "-q", str(sshd.identity)], check=True, env=environ, stdin=subprocess.DEVNULL
        )
        text = f"Host *\n  HostKeyAlias {NAME}\n  IdentityAgent {tmp_path}/agent\n"
        assert (
            connect(sshd.location("/"), sshd.settings(ssh_config=ssh_config(text)))
            .sftp()
            .listdir("/")
        )
    finally:
        os.kill(int(started.split("SSH_AGENT_PID=")[1].split(";")[0]), signal.SIGTERM)


def test_a_source_can_have_its_own_carrier(
    sshd: Sshd, tmp_path: Path, run_statepool: Callable[..., Any]
) -> None:
    statepool.init(tmp_path / "pool")
    statepool.init(tmp_path / "other")
    one, two = sshd.location(tmp_path / "pool"), sshd.location(tmp_path / "other")
    (tmp_path / "statepool.toml").write_text(
        f'ssh-config = "{sshd.ssh_config}"\nknown-hosts = "{sshd.known_hosts}"\nsources = [{{'
        f' location = "{one}", name = "one" }}, {{ location = "{two}", name = "two", carrier ='
        ' "paramiko" }]\n'
    )
    ran = run_statepool("doctor", code=None)
    told = ran.out
    assert told, ran.err
    assert "openssh carries SSH: " in told
    assert "is installed" in told
    assert "paramiko carries SSH: it is configured" in told


def test_without_either_the_command_says_what_to_install(
    sshd: Sshd, tmp_path: Path, run_statepool: Callable[..., Any]
) -> None:
    (tmp_path / "paramiko.py").write_text("raise ImportError\n")
    environ = {"PATH": str(tmp_path), "STATEPOOL_CARRIER": "openssh"}
    ran = run_statepool(
        "--cache",
        tmp_path / "cache",
        "--source",
        sshd.location("/"),
        "show",
        env=environ,
        code=None,
    )
    assert "there is no program ssh here" in ran.err
    assert "openssh-client" in ran.err


def test_settings_know_their_carrier() -> None:
    with pytest.raises(ValueError, match="telnet"):
        Settings(carrier="telnet")


def test_each_host_has_a_connection_of_its_own(sshd: Sshd, place: Path, tmp_path: Path) -> None:
    """Also if nothing else of the two differs: a host has no port where its name leads to one."""
    config = tmp_path / "config"
    nobody = "Host elsewhere\n  HostName 127.0.0.1\n  Port 1\n"
    config.write_text(nobody + sshd.ssh_config.read_text())
    settings = sshd.settings(ssh_config=str(config), known_hosts=None, retries=0)
    first, other = (
        open_transport(Location("ssh", str(place), host=host, user=sshd.user), settings)
        for host in ("store", "elsewhere")
    )
    try:
        assert [entry.name for entry in first.scan("")] == ["file"]
        with pytest.raises(TransportError, match="refused"):
            other.scan("")
    finally:
        first.close()
        other.close()
