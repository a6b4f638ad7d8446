"""What a configuration of ssh makes of a host, without asking anybody."""

from __future__ import annotations

import os
import pwd
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


def test_a_proxy_jump_goes_before_a_proxy_command(resolved: Callable[..., HostSettings]) -> None:
    assert resolved("Host *\n  ProxyJump gate\n  ProxyCommand nc %h %p\n", "store").jumps == (Endpoint("gate"),)
    with pytest.raises(ConfigError, match="nc store"):
        resolved("Host *\n  ProxyCommand nc %h %p\n", "store")


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


@pytest.mark.parametrize("text", ["Port 0", "Port 65536", "Port x", "ProxyJump a b", "ProxyJump [::1", "ProxyJump @x:1:2"])
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
