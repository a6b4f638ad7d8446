"""What a configuration of ssh makes of a host, without asking anybody."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.errors import ConfigError, InvalidLocation
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.transports.ssh.hosts import Endpoint, HostSettings, resolve

ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def resolved(tmp_path: Path) -> Callable[..., HostSettings]:
    """``resolved(text, host, ...)``: what the configuration ``text`` makes of an endpoint."""

    def make(text: str, host: str, port: int | None = None, user: str | None = None, **settings) -> HostSettings:
        (tmp_path / "config").write_text(text)
        return resolve(Endpoint(host, port, user), Settings(ssh_config=str(tmp_path / "config"), **settings))

    return make


def test_without_a_configuration(nobodys_environment: Path) -> None:
    found = resolve(Endpoint.of(Location.parse("ssh://store/srv/pool")), Settings(connect_timeout=7))
    assert (found.name, found.address, found.port, found.user) == ("store", "store", 22, ME)
    assert found.known_as == "store"
    assert nobodys_environment / ".ssh/known_hosts" in found.known_hosts
    assert Path("/etc/ssh/ssh_known_hosts") in found.known_hosts
    assert found.keys[0] == nobodys_environment / ".ssh/id_ed25519"
    assert not found.keys_are_chosen
    assert found.connect_timeout == 7
    assert found.jumps == ()


def test_the_users_configuration_is_read(nobodys_environment: Path) -> None:
    (nobodys_environment / ".ssh").mkdir()
    (nobodys_environment / ".ssh/config").write_text("Host store\n  HostName 192.0.2.7\n")
    assert resolve(Endpoint("store"), Settings()).address == "192.0.2.7"


FULL = """
Host store
  HostName store.example.org
  User lab
  Port 2222
  IdentityFile ~/keys/%h
  IdentityFile "/etc/a key"
  IdentitiesOnly yes
  UserKnownHostsFile ~/hosts /etc/more
  GlobalKnownHostsFile none
  ConnectTimeout 3
  ProxyJump kim@[::1]:23,gate
Host *
  User nobody
  Port 1
"""


def test_everything_that_is_used(resolved: Callable[..., HostSettings], nobodys_environment: Path) -> None:
    assert resolved(FULL, "store") == HostSettings(
        name="store",
        address="store.example.org",
        port=2222,
        user="lab",
        key_name="store.example.org",
        known_hosts=(nobodys_environment / "hosts", Path("/etc/more")),
        keys=(nobodys_environment / "keys/store.example.org", Path("/etc/a key")),
        keys_are_chosen=True,
        only_these_keys=True,
        jumps=(Endpoint("::1", 23, "kim"), Endpoint("gate")),
        connect_timeout=3,
    )
    assert resolved(FULL, "store").known_as == "[store.example.org]:2222"


def test_a_location_goes_before_the_configuration(resolved: Callable[..., HostSettings]) -> None:
    found = resolved(FULL, "store", 24, "root")
    assert (found.port, found.user) == (24, "root")


def test_our_own_settings(resolved: Callable[..., HostSettings]) -> None:
    assert resolved(FULL, "store", known_hosts="/etc/mine").known_hosts == (Path("/etc/mine"),)


def test_an_alias_for_the_key_has_no_port(resolved: Callable[..., HostSettings]) -> None:
    assert resolved("Host *\n  HostKeyAlias lab\n", "store", 2222).known_as == "lab"


@pytest.mark.parametrize("text", ["Host *\n  ProxyJump none\n", "Host *\n  ProxyCommand none\n", "Host *\n  IdentityFile none\n"])
def test_none(resolved: Callable[..., HostSettings], text: str) -> None:
    found = resolved(text, "store")
    assert found.jumps == ()
    assert not found.keys_are_chosen


def test_of_proxy_jump_and_proxy_command_the_first_counts(resolved: Callable[..., HostSettings]) -> None:
    assert resolved("Host store\n  ProxyJump gate\nHost *\n  ProxyCommand nc %h %p\n", "store").jumps == (Endpoint("gate"),)
    assert resolved("Host store\n  ProxyCommand none\nHost *\n  ProxyJump gate\n", "store").jumps == ()
    assert resolved("Host store\n  ProxyJump none\nHost *\n  ProxyCommand nc\n", "store").jumps == ()
    with pytest.raises(ConfigError, match="nc %h %p"):
        resolved("Host store\n  ProxyCommand nc %h %p\nHost *\n  ProxyJump gate\n", "store")


def test_files_that_are_included(resolved: Callable[..., HostSettings], tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/1").write_text("Host other\n  Port 1\n")
    (tmp_path / "conf.d/2").write_text("Host store\n  Port 2\n")
    text = "Include conf.d/* missing\nHost store\n  include = none\n  User lab\nHost *\n  Port 9\n"
    assert [(found.port, found.user) for found in (resolved(text, "other"), resolved(text, "store"))] == [(1, ME), (2, "lab")]


def test_what_follows_an_include_belongs_to_the_block_before_it(resolved: Callable[..., HostSettings], tmp_path: Path) -> None:
    (tmp_path / "more").write_text("Host other\n  Port 1\n")
    text = "Host store\n  Include more\n  User lab\n"
    assert resolved(text, "store").user == "lab"
    assert resolved(text, "other").user == ME


def test_what_is_included_within_a_block_is_part_of_it(resolved: Callable[..., HostSettings], tmp_path: Path) -> None:
    (tmp_path / "more").write_text("Host *\n  HostName 192.0.2.7\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/one").write_text("Include deep/two\n")
    (tmp_path / "deep/two").write_text("Port 2\n")
    for begin in ("Host other", "Host\tother", "Host=other", "host = other", '"Host" "other"', "Match originalhost other", "Match user lab"):
        text = f"{begin}\n\tInclude\tmore\n  Include deep/one\nHost *\n  User kim\n"
        assert (resolved(text, "store").address, resolved(text, "store").port) == ("store", 22), begin
        found = resolved(text, "other", user="lab")
        assert (found.address, found.port) == ("192.0.2.7", 2), begin


def test_the_user_of_a_location_is_heeded(resolved: Callable[..., HostSettings], tmp_path: Path) -> None:
    text = f"Match user lab\n  Port 99\nHost *\n  IdentityFile {tmp_path}/%r\n  ProxyJump %r@gate.%h\n"
    found = resolved(text, "store", user="lab")
    assert (found.port, found.keys, found.jumps) == (99, (tmp_path / "lab",), (Endpoint("gate.store", None, "lab"),))
    assert resolved(text, "store", user="kim").port == 22


def test_what_stands_for_something_else(resolved: Callable[..., HostSettings], nobodys_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "/keys")
    keys = "IdentityFile ${KEYS}/%h-%n-%p-%r-%u-%i-%%h\nIdentityFile %d/a\n"
    found = resolved(f'HostName %h.example.org\n{keys}UserKnownHostsFile "%d/a b" ~/%k\n', "store", 24, "lab")
    assert found.keys == (Path(f"/keys/store.example.org-store-24-lab-{ME}-{os.getuid()}-%h"), nobodys_environment / "a")
    assert found.known_hosts[:2] == (nobodys_environment / "a b", nobodys_environment / "store")


def test_what_stands_for_nothing(resolved: Callable[..., HostSettings]) -> None:
    for value in ("${NO_SUCH_VARIABLE}/x", "%Z", "100%"):
        with pytest.raises(ConfigError, match="store"):
            resolved(f"Host *\n  IdentityFile {value}\n", "store")
        assert resolved(f"Host other\n  IdentityFile {value}\n", "store").keys


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1m", 60), ("1M30s", 90), ("1h", 3600), ("none", 7), ("0", 7)])
def test_how_long_it_may_take(resolved: Callable[..., HostSettings], text: str, seconds: float) -> None:
    assert resolved(f"Host *\n  ConnectTimeout {text}\n", "store", connect_timeout=7).connect_timeout == seconds


def test_yes_and_no(resolved: Callable[..., HostSettings]) -> None:
    found = {text: resolved(f"Host *\n  IdentitiesOnly {text}\n", "store").only_these_keys for text in ("yes", "True", "no", "false")}
    assert found == {"yes": True, "True": True, "no": False, "false": False}


def test_canonical_names(resolved: Callable[..., HostSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    def known(name: str, *_: object) -> list[object]:
        if name == "store.lab.example":
            return []
        raise socket.gaierror(socket.EAI_NONAME, "no")

    monkeypatch.setattr(socket, "getaddrinfo", known)
    text = "CanonicalizeHostname yes\nCanonicalDomains x.example lab.example\nHost *.lab.example\n  Port 5\nMatch canonical\n  User lab\n"
    assert [(found.address, found.port, found.user) for found in (resolved(text, "store"), resolved(text, "a.b.c"))] == [
        ("store.lab.example", 5, "lab"),
        ("a.b.c", 22, ME),
    ]
    assert resolved(text, "other").address == "other"
    with pytest.raises(ConfigError, match="other is found in none"):
        resolved(text + "Host *\n  CanonicalizeFallbackLocal no\n", "other")
    with pytest.raises(ConfigError, match="CanonicalizeMaxDots"):
        resolved("CanonicalizeMaxDots x\n" + text, "other")


def test_tags(resolved: Callable[..., HostSettings]) -> None:
    assert resolved("Match tagged lab\n  Port 99\n", "store").port == 22
    assert resolved("Tag lab\nMatch tagged lab\n  Port 99\n", "store").port == 99


def test_no_command_is_run_for_what_does_not_match(resolved: Callable[..., HostSettings], tmp_path: Path) -> None:
    for host in ("store", "other"):
        text = f'Match originalhost other exec "touch {tmp_path}/%n"\n  Port 99\nMatch !exec "exit 3"\n  User lab\n'
        assert resolved(text, host).port == (99 if host == "other" else 22)
        assert resolved(text, host).user == "lab"
    assert (tmp_path / "other").exists()
    assert not (tmp_path / "store").exists()


def test_a_command_that_does_not_end(resolved: Callable[..., HostSettings]) -> None:
    with pytest.raises(ConfigError, match=r"took longer than 0.2 seconds: sleep 60"):
        resolved('Match exec "sleep 60"\n  Port 99\n', "store", connect_timeout=0.2)


def test_an_account_without_a_name(resolved: Callable[..., HostSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("USER", "kim")
    assert resolved("Match localuser kim\n  Port 99\n", "store", user="lab").port == 22
    assert resolved("Host *\n  User lab\n", "store").user == "lab"
    with pytest.raises(ConfigError, match="which account of store") as caught:
        resolved("", "store")
    assert "ssh://user@store" in (caught.value.hint or "")


LINES = [
    'UserKnownHostsFile "/a',
    "UserKnownHostsFile /kim's",
    "Port 1 2",
    "Port",
    "Match",
    "Match user",
    "Match nonsense x",
    'Include "x',
    'Host "x',
]


@pytest.mark.parametrize("text", LINES)
def test_a_line_that_cannot_be_read(resolved: Callable[..., HostSettings], tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(f"# mine\n{text}\n", "store")
    assert f"{tmp_path}/config, line 2: " in caught.value.message


def test_files_that_include_each_other(resolved: Callable[..., HostSettings]) -> None:
    with pytest.raises(ConfigError, match="include each other"):
        resolved("Include config\n", "store")


@pytest.mark.parametrize(
    "text",
    ["Port 0", "Port 65536", "Port x", "ProxyJump a b", "ProxyJump [::1", "ProxyJump @x:1:2", "IdentitiesOnly perhaps", "ConnectTimeout soon"],
)
def test_what_cannot_be_used(resolved: Callable[..., HostSettings], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(f"Host *\n  {text}\n", "store")
    assert "store" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [(Endpoint("store"), "store"), (Endpoint("::1", 22, "kim"), "kim@[::1]:22"), (Endpoint("h", None, "kim"), "kim@h"), (Endpoint("h", 1), "h:1")],
)
def test_as_text(endpoint: Endpoint, text: str) -> None:
    assert str(endpoint) == text


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("ssh://kim@store:2222/p", Endpoint("store", 2222, "kim")),
        ("ssh://[2001:db8::1]/p", Endpoint("2001:db8::1")),
        ("ssh://[fe80::1%eth0]:22/p", Endpoint("fe80::1%eth0", 22)),
        ("store:/p", Endpoint("store")),
    ],
)
def test_of_a_location(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.of(Location.parse(text)) == endpoint


@pytest.mark.parametrize("text", ["ssh://store/~/pool", "ssh://store/~kim/pool", "ssh://store/%7E/pool"])
def test_a_home_directory_there_is_not_guessed(text: str) -> None:
    with pytest.raises(InvalidLocation, match="~"):
        Endpoint.of(Location.parse(text))
