"""
What a location says of a host, and what ``~/.ssh/config`` makes of it.

Of what is in ssh_config(5), this is used: ``HostName``, ``User``, ``Port``, ``IdentityFile``, ``IdentitiesOnly``, ``ProxyJump``,
``UserKnownHostsFile``, ``GlobalKnownHostsFile``, ``HostKeyAlias`` and ``ConnectTimeout``. Whatever there makes ssh less careful about the keys of
hosts is not followed.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from pathlib import Path

from attrs import field, frozen

from statepool.errors import ConfigError, InvalidLocation
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.transports.ssh.config import HostConfig, lookup

SSH_PORT = 22

USER_CONFIG = "~/.ssh/config"
SYSTEM_CONFIG = "/etc/ssh/ssh_config"

USER_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
SYSTEM_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
"""The defaults of ssh_config(5)."""

DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
"""Tried where no ``IdentityFile`` is configured."""

_TIME = re.compile(r"([0-9]+[smhdwSMHDW]?)+")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
"""In seconds: sshd_config(5), section "TIME FORMATS"."""

_JUMP = re.compile(r"(?:ssh://)?(?:([^@\s]+)@)?(?:\[([^\]\s]+)\]|([^:\[\]\s]+))(?::([0-9]{1,5}))?/?\Z")


@frozen
class Endpoint:
    """
    A host as a location names it, before ``~/.ssh/config`` is applied.

    :param host: a name, an alias, or an address
    :param port: the TCP port, or None where the location does not say it
    :param user: the account, or None where the location does not say it
    """

    host: str
    port: int | None = None
    user: str | None = None

    @classmethod
    def of(cls, location: Location) -> Endpoint:
        """
        :returns: where a location is
        :raises InvalidLocation: its path begins with ``~``, which nobody expands there
        """
        if location.path.startswith("/~"):
            raise InvalidLocation(f"{location} has no absolute path: nothing expands the ~ there", hint="write the path as that host sees it")
        return cls(location.host or "localhost", location.port, location.user)

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user is not None else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{user}{host}" + (f":{self.port}" if self.port is not None else "")


@frozen
class HostSettings:
    """
    All that has to be known to connect.

    :param name: what the person calls the host
    :param address: the name or address to connect to
    :param port: the TCP port there
    :param user: the account there
    :param key_name: the name under which its key is known: in ``known_hosts`` with its port, unless that is 22 or the name is an alias
    :param known_hosts: files with the keys of hosts, the most important first
    :param keys: files with keys of ours
    :param keys_are_chosen: they were configured: not the default ones
    :param only_these_keys: no other keys of the agent are offered
    :param jumps: the hosts through which it is reached, the nearest to us first
    :param connect_timeout: in seconds
    """

    name: str
    address: str
    port: int
    user: str
    key_name: str
    known_hosts: tuple[Path, ...]
    keys: tuple[Path, ...] = ()
    keys_are_chosen: bool = False
    only_these_keys: bool = False
    jumps: tuple[Endpoint, ...] = ()
    connect_timeout: float = 20.0
    alias: bool = field(default=False)

    def __str__(self) -> str:
        return str(Endpoint(self.address, self.port, self.user))

    @property
    def known_as(self) -> str:
        """How ``known_hosts`` spells it (sshd(8))."""
        return self.key_name if self.alias or self.port == SSH_PORT else f"[{self.key_name}]:{self.port}"


def resolve(endpoint: Endpoint, settings: Settings) -> HostSettings:
    """
    :returns: what ``~/.ssh/config`` makes of an endpoint
    :raises ConfigError: it cannot be read, or wants something that we do not do
    """
    found = _lookup(endpoint, settings)
    command = found.word("proxycommand")
    if command is not None and command.lower() != "none":
        raise ConfigError(
            f"{endpoint.host} is configured to be reached by a ProxyCommand, which is not run here: {command}",
            hint="write it as a ProxyJump, or mount the pool and use its path",
        )
    configured = found.files("identityfile")
    chosen = [key for key in configured if key.lower() != "none"]
    alias = found.word("hostkeyalias")
    return HostSettings(
        name=endpoint.host,
        address=found.address,
        port=endpoint.port or _port(found.word("port"), endpoint),
        user=found.account,
        key_name=alias or found.address,
        alias=alias is not None,
        known_hosts=_known_hosts(found, settings),
        keys=tuple(Path(os.path.expanduser(key)) for key in (chosen if configured else DEFAULT_KEYS)),
        keys_are_chosen=bool(chosen),
        only_these_keys=_is_set("IdentitiesOnly", found, endpoint),
        jumps=tuple(_jumps(found, endpoint)),
        connect_timeout=_connect_timeout(found, settings, endpoint),
    )


def _lookup(endpoint: Endpoint, settings: Settings) -> HostConfig:
    own = settings.ssh_config
    return lookup(
        endpoint.host,
        [Path(os.path.expanduser(path)) for path in ([own] if own is not None else [USER_CONFIG, SYSTEM_CONFIG])],
        _local_user(),
        settings.connect_timeout,
        port=endpoint.port,
        user=endpoint.user,
        needed=own is not None,
    )


def _local_user() -> str | None:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return None


def _port(text: str | None, endpoint: Endpoint) -> int:
    if text is None:
        return SSH_PORT
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ConfigError(f"the configuration of ssh has a Port for {endpoint.host} that is none: {text!r}", hint="ports are 1 to 65535")
    return int(text)


def _is_set(keyword: str, found: HostConfig, endpoint: Endpoint) -> bool:
    text = found.word(keyword.lower())
    meaning = {None: False, "yes": True, "true": True, "no": False, "false": False}.get(text.lower() if text is not None else None)
    if meaning is None:
        raise ConfigError(f"the configuration of ssh has {keyword} {text!r} for {endpoint.host}", hint="write yes or no")
    return meaning


def _connect_timeout(found: HostConfig, settings: Settings, endpoint: Endpoint) -> float:
    text = found.word("connecttimeout")
    if text is None or text.lower() == "none":
        return settings.connect_timeout
    if not _TIME.fullmatch(text):
        raise ConfigError(f"the configuration of ssh has a ConnectTimeout for {endpoint.host} that is none: {text!r}", hint="write seconds, or 1m30s")
    seconds = sum(int(number) * _UNITS[unit.lower()] for number, unit in re.findall(r"([0-9]+)([smhdwSMHDW]?)", text))
    return float(seconds) or settings.connect_timeout


def _known_hosts(found: HostConfig, settings: Settings) -> tuple[Path, ...]:
    if settings.known_hosts is not None:
        return (Path(os.path.expanduser(settings.known_hosts)),)
    users = found.files("userknownhostsfile") or [os.path.expanduser(name) for name in USER_KNOWN_HOSTS]
    systems = found.values.get("globalknownhostsfile") or SYSTEM_KNOWN_HOSTS
    return tuple(Path(name) for name in (*users, *systems) if name.lower() != "none")


def _jumps(found: HostConfig, endpoint: Endpoint) -> Iterator[Endpoint]:
    text = found.word("proxyjump")
    if text is None or text.lower() == "none":
        return
    for part in found.expanded(text).split(","):
        match = _JUMP.match(part.strip())
        if match is None:
            raise ConfigError(f"the ProxyJump of {endpoint.host} cannot be read: {text!r}", hint="write user@host:port, separated by commas")
        user, bracketed, plain, port = match.groups()
        yield Endpoint(bracketed or plain, int(port) if port else None, user)
