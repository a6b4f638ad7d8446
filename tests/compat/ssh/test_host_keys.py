"""
A host is only believed to be itself if its key is known; the error says what would make it so, and
that works.
"""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.errors import AccessDenied
from statepool.model.location import Location
from statepool.transports.ssh.connection import Connection
from tests.support.sshd import NAME, Sshd, make_key, run_sshd

Connect = Callable[..., Connection]
pytestmark = pytest.mark.usefixtures("carrier")


@pytest.fixture
def hosts(sshd: Sshd, tmp_path: Path, connect: Connect, ssh_config: Callable[[str], str]) -> Hosts:
    return Hosts(
        sshd,
        tmp_path / "known_hosts",
        connect,
        ssh_config(f"Host *\n  IdentityFile {sshd.identity}\n  IdentitiesOnly yes\n"),
    )


class Hosts:
    """A file of known hosts, and whether the server is let through by it."""

    def __init__(self, sshd: Sshd, file: Path, connect: Connect, config: str) -> None:
        self.sshd = sshd
        self.file = file
        self.connect = connect
        self.config = config
        self.key = " ".join((sshd.host_key.with_suffix(".pub")).read_text().split()[:2])

    @property
    def name(self) -> str:
        return f"[127.0.0.1]:{self.sshd.port}"

    def try_it(self) -> None:
        settings = self.sshd.settings(known_hosts=str(self.file), ssh_config=self.config)
        _ = self.connect(self.sshd.location("/"), settings).carrier

    def refused(self) -> AccessDenied:
        with pytest.raises(AccessDenied) as caught:
            self.try_it()
        assert caught.value.exit_code == 7
        assert not caught.value.transient
        return caught.value


def fingerprint(public: Path) -> str:
    return subprocess.run(
        ["ssh-keygen", "-lf", str(public)], capture_output=True, text=True, check=True
    ).stdout.split()[1]


def shell(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True, stdin=subprocess.DEVNULL, capture_output=True)


def test_an_unknown_host_and_the_line_that_admits_it(hosts: Hosts) -> None:
    error = hosts.refused()
    assert fingerprint(hosts.sshd.host_key.with_suffix(".pub")) in error.message
    line = (error.hint or "").partition("The line is: ")[2]
    assert line == f"{hosts.name} {hosts.key}"
    assert not hosts.file.exists(), "nobody but the user makes a host known"
    hosts.file.write_text(line + "\n")
    hosts.try_it()


def test_an_unknown_host_and_the_command_that_admits_it(hosts: Hosts) -> None:
    found = re.search(r"(ssh-keyscan .*? >> \S+)\. The line is", hosts.refused().hint or "")
    assert found is not None
    shell(found[1])
    hosts.try_it()


def test_a_key_that_has_changed(hosts: Hosts, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other").with_suffix(".pub")
    hosts.file.write_text(f"# mine\n{hosts.name} {' '.join(other.read_text().split()[:2])}\n")
    before = hosts.file.read_text()
    error = hosts.refused()
    assert fingerprint(other) in error.message
    assert fingerprint(hosts.sshd.host_key.with_suffix(".pub")) in error.message
    assert f"{hosts.file}, line 2" in error.message
    assert hosts.file.read_text() == before
    commands = re.search(r": (ssh-keygen .*), then (ssh-keyscan .*)", error.hint or "")
    assert commands is not None
    shell(commands[1])
    assert "is not known" in hosts.refused().message
    shell(commands[2])
    hosts.try_it()


def test_a_key_of_another_type_is_known(carrier: str, hosts: Hosts, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other", type="ecdsa").with_suffix(".pub")
    hosts.file.write_text(f"{hosts.name} {' '.join(other.read_text().split()[:2])}\n")
    expected = "has changed" if carrier == "openssh" else "is not known: ssh-ed25519"
    assert expected in hosts.refused().message


def test_a_revoked_key_is_refused_though_it_is_known(hosts: Hosts) -> None:
    hosts.file.write_text(f"{hosts.name} {hosts.key}\n@revoked * {hosts.key}\n")
    assert "revoked" in hosts.refused().message


def test_hashed_names(hosts: Hosts) -> None:
    hosts.file.write_text(f"{hosts.name} {hosts.key}\n")
    shell(f"ssh-keygen -q -H -f {shlex.quote(str(hosts.file))}")
    assert "127.0.0.1" not in hosts.file.read_text()
    hosts.try_it()


@pytest.mark.parametrize(
    "line",
    [
        "[127.0.0.1]:1 KEY",
        "*,!127.0.0.1,!NAME KEY",
        "NAME ssh-ed25519 AAAA",
        "NAME ssh-ed25519 !",
        "#NAME KEY",
        "NAME",
    ],
)
def test_lines_that_do_not_admit_it(hosts: Hosts, line: str) -> None:
    hosts.file.write_text(line.replace("NAME", hosts.name).replace("KEY", hosts.key) + "\n")
    hosts.refused()


@pytest.mark.parametrize(
    "line", ["other,NAME KEY comment", "[127.0.0.*]:* KEY", "* KEY", "\t NAME\tKEY"]
)
def test_lines_that_admit_it(carrier: str, hosts: Hosts, line: str) -> None:
    if carrier == "paramiko" and "*" in line:
        pytest.skip("paramiko knows no patterns")
    hosts.file.write_text(
        "nonsense\n\n" + line.replace("NAME", hosts.name).replace("KEY", hosts.key) + "\n"
    )
    hosts.try_it()


def test_ssh_config_cannot_make_us_careless(
    sshd: Sshd, connect: Connect, ssh_config: Callable[[str], str], tmp_path: Path
) -> None:
    text = (
        f"Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile {tmp_path}/none\n  IdentityFile"
        f" {sshd.identity}\n"
    )
    settings = sshd.settings(known_hosts=None, ssh_config=ssh_config(text))
    with pytest.raises(AccessDenied, match="is not known"):
        _ = connect(sshd.location("/"), settings).carrier


def test_an_alias_that_has_a_key_of_its_own(
    sshd: Sshd, connect: Connect, ssh_config: Callable[[str], str], tmp_path: Path
) -> None:
    text = (
        f"Host store\n  HostName 127.0.0.1\n  Port {sshd.port}\n  HostKeyAlias lab\n  IdentityFile"
        f" {sshd.identity}\n"
    )
    settings = sshd.settings(ssh_config=ssh_config(text), known_hosts=str(tmp_path / "known hosts"))
    for before, command in [
        ("", r"(echo .*? >> '.*?')\. The line is"),
        (hosts_line(tmp_path, "lab"), r": (ssh-keygen .*), then (echo .*)"),
    ]:
        (tmp_path / "known hosts").write_text(before)
        with pytest.raises(AccessDenied) as caught:
            _ = connect(Location("ssh", "/", host="store"), settings).carrier
        found = re.search(command, caught.value.hint or "")
        assert found is not None
        for step in found.groups():
            shell(step)
        assert connect(Location("ssh", "/", host="store"), settings).carrier.is_open


def hosts_line(directory: Path, name: str) -> str:
    """:returns: the line of a key that nobody has"""
    key = make_key(directory / "nobodys").with_suffix(".pub").read_text()
    return f"{name} {' '.join(key.split()[:2])}\n"


def test_a_revoked_key_of_one_type_and_a_known_one_of_another(
    connect: Connect, tmp_path: Path
) -> None:
    keys = [make_key(tmp_path / kind, type=kind) for kind in ("ed25519", "rsa")]
    with run_sshd(options={"HostKey": "\nHostKey ".join(map(str, keys))}) as server:
        rsa = " ".join(keys[1].with_suffix(".pub").read_text().split()[:2])
        server.known_hosts.write_text(f"@revoked {hosts_line(tmp_path, NAME)}{NAME} {rsa}\n")
        assert connect(server.location("/"), server.settings()).carrier.is_open


def test_a_host_with_several_keys_of_which_one_is_known(connect: Connect, tmp_path: Path) -> None:
    keys = [make_key(tmp_path / kind, type=kind) for kind in ("ed25519", "ecdsa", "rsa")]
    with run_sshd(options={"HostKey": "\nHostKey ".join(map(str, keys))}) as server:
        for key in keys:
            server.known_hosts.write_text(
                f"{NAME} {' '.join(key.with_suffix('.pub').read_text().split()[:2])}\n"
            )
            assert connect(server.location("/"), server.settings()).carrier.is_open


def test_an_address_of_ipv6(
    connect: Connect, ssh_config: Callable[[str], str], tmp_path: Path
) -> None:
    if (
        not socket.has_ipv6
        or "00000000000000000000000000000001" not in Path("/proc/net/if_inet6").read_text()
    ):
        pytest.skip("no IPv6 here")
    with run_sshd(options={"ListenAddress": "127.0.0.1\nListenAddress ::1"}) as server:
        config = ssh_config(f"Host *\n  IdentityFile {server.identity}\n")
        settings = server.settings(ssh_config=config, known_hosts=str(tmp_path / "known_hosts"))
        location = Location.parse(f"ssh://{server.user}@[::1]:{server.port}/")
        with pytest.raises(AccessDenied) as caught:
            _ = connect(location, settings).carrier
        found = re.search(r"(ssh-keyscan .*? >> \S+)\. The line is", caught.value.hint or "")
        assert found is not None
        shell(found[1])
        assert connect(location, settings).carrier.is_open
