"""
Which carrier is used, what a location names, and what paramiko makes of a configuration of ssh.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.config import load
from statepool.errors import ConfigError, InvalidLocation
from statepool.model.location import Location
from statepool.model.settings import CarrierName, Settings
from statepool.transports.ssh import carriers
from statepool.transports.ssh.carrier import Endpoint
from statepool.transports.ssh.carriers import choose
from statepool.transports.ssh.hosts import HostSettings
from statepool.transports.ssh.library_hosts import resolve
from statepool.transports.ssh.program import LONGEST_SOCKET, sockets_directory

ME = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def without_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no program ``ssh``."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


def test_the_program_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    assert choose(Settings()) == (CarrierName.OPENSSH, "/opt/ssh is installed")
    assert choose(Settings(carrier="paramiko")) == (CarrierName.PARAMIKO, "it is configured")


@pytest.mark.usefixtures("without_ssh")
def test_without_it_paramiko_is() -> None:
    assert choose(Settings()) == (CarrierName.PARAMIKO, "there is no program ssh here")
    with pytest.raises(ConfigError, match="no program ssh") as caught:
        choose(Settings(carrier="openssh"))
    assert "openssh-client" in (caught.value.hint or "")


@pytest.mark.usefixtures("without_ssh")
def test_without_either_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="nothing here carries SSH") as caught:
        choose(Settings())
    assert "openssh-client" in (caught.value.hint or "")
    assert "paramiko" in (caught.value.hint or "")


def test_an_account_without_a_name(
    resolved: Callable[..., HostSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setenv("USER", "kim")
    assert choose(Settings())[0] is CarrierName.PARAMIKO, "ssh insists on a name"
    assert resolved("Host *\n  User lab\n", "store").user == "lab"
    with pytest.raises(ConfigError, match="which account of store") as caught:
        resolved("", "store")
    assert "ssh://user@store" in (caught.value.hint or "")


def test_all_sources_have_one_or_each_its_own(tmp_path: Path) -> None:
    text = (
        'carrier = "openssh"\nsources = [{ location = "ssh://a/pool", carrier = "paramiko" },'
        ' "ssh://b/pool"]'
    )
    (tmp_path / "statepool.toml").write_text(text)
    for environ, others in (({}, "openssh"), ({"STATEPOOL_CARRIER": "auto"}, "auto")):
        config = load(environ={"HOME": str(tmp_path), **environ}, cwd=tmp_path)
        assert [config.settings_for(source).carrier for source in config.sources] == [
            "paramiko",
            others,
        ]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('carrier = "telnet"', "carrier"),
        ('sources = [{ location = "/p", carrier = 1 }]', "sources[0].carrier"),
    ],
)
def test_what_carries_nothing(tmp_path: Path, text: str, place: str) -> None:
    (tmp_path / "statepool.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(environ={"HOME": str(tmp_path)}, cwd=tmp_path)
    assert place in caught.value.message
    assert "auto, openssh, paramiko" in (caught.value.hint or "")


# -- where sockets are -----------------------------------------------------------------------------


def test_sockets_have_short_names_in_a_directory_of_our_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = tmp_path / "run"
    short.mkdir()
    long = tmp_path / ("x" * 90)
    long.mkdir()
    for base, there in ((short, len(os.fsencode(short)) < 40), (long, False)):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
        found = sockets_directory()
        assert Path(found).stat().st_mode & 0o777 == 0o700
        assert (Path(found).parent == base) == there
        assert len(f"{found}/{'0' * 16}.{'0' * 8}.{'0' * 16}") <= LONGEST_SOCKET


def test_what_others_can_look_into_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = sockets_directory()
    # as if others had taken the name
    monkeypatch.setattr(os, "lstat", lambda path: os.stat("/tmp"))
    found = sockets_directory()
    assert found != usual
    assert Path(found).stat().st_mode & 0o777 == 0o700
    assert sockets_directory() == found, "the same for all of this process"


# -- what a location names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (Endpoint("store"), "store"),
        (Endpoint("::1", 22, "kim"), "kim@[::1]:22"),
        (Endpoint("h", None, "kim"), "kim@h"),
        (Endpoint("h", 1), "h:1"),
    ],
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


@pytest.mark.parametrize(
    "text", ["ssh://store/~/pool", "ssh://store/~kim/pool", "ssh://store/%7E/pool"]
)
def test_a_home_directory_there_is_not_guessed(text: str) -> None:
    with pytest.raises(InvalidLocation, match="~"):
        Endpoint.of(Location.parse(text))


# -- what paramiko makes of a configuration --------------------------------------------------------


@pytest.fixture
def resolved(tmp_path: Path) -> Callable[..., HostSettings]:
    """``resolved(text, host, ...)``: what the configuration ``text`` makes of an endpoint."""

    def make(
        text: str, host: str, port: int | None = None, user: str | None = None, **settings
    ) -> HostSettings:
        (tmp_path / "config").write_text(text)
        return resolve(
            Endpoint(host, port, user), Settings(ssh_config=str(tmp_path / "config"), **settings)
        )

    return make


def test_without_a_configuration(nobodys_environment: Path) -> None:
    found = resolve(
        Endpoint.of(Location.parse("ssh://store/srv/pool")), Settings(connect_timeout=7)
    )
    assert (found.name, found.address, found.port, found.user) == ("store", "store", 22, ME)
    assert found.known_as == "store"
    assert nobodys_environment / ".ssh/known_hosts" in found.known_hosts
    assert Path("/etc/ssh/ssh_known_hosts") in found.known_hosts
    assert found.keys[0] == nobodys_environment / ".ssh/id_ed25519"
    assert not found.keys_are_chosen


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
Host *
  User nobody
  Port 1
"""


def test_everything_that_is_used(
    resolved: Callable[..., HostSettings], nobodys_environment: Path
) -> None:
    assert resolved(FULL, "store") == HostSettings(
        name="store",
        address="store.example.org",
        port=2222,
        user="lab",
        known_hosts=(nobodys_environment / "hosts", Path("/etc/more")),
        keys=(nobodys_environment / "keys/store.example.org", Path("/etc/a key")),
        keys_are_chosen=True,
        only_these_keys=True,
    )
    assert resolved(FULL, "store").known_as == "[store.example.org]:2222"


def test_a_location_goes_before_the_configuration(resolved: Callable[..., HostSettings]) -> None:
    found = resolved(FULL, "store", 24, "root")
    assert (found.port, found.user) == (24, "root")


def test_our_own_settings(resolved: Callable[..., HostSettings]) -> None:
    assert resolved(FULL, "store", known_hosts="/etc/mine").known_hosts == (Path("/etc/mine"),)


def test_an_alias_for_the_key_has_no_port(resolved: Callable[..., HostSettings]) -> None:
    assert resolved("Host *\n  HostKeyAlias lab\n", "store", 2222).known_as == "lab"


@pytest.mark.parametrize(
    "text",
    [
        "Host *\n  ProxyJump none\n",
        "Host *\n  ProxyCommand none\n",
        "Host *\n  IdentityFile none\n",
    ],
)
def test_none(resolved: Callable[..., HostSettings], text: str) -> None:
    found = resolved(text, "store")
    assert not found.proxied
    assert not found.keys_are_chosen
