"""
What a location says of a host, and what ``~/.ssh/config`` makes of it.

ssh_config(5) is read by paramiko, after its ``Include`` lines have been replaced by what they include. Of what is in it, this is used: ``HostName``,
``User``, ``Port``, ``IdentityFile``, ``IdentitiesOnly``, ``ProxyJump``, ``UserKnownHostsFile``, ``GlobalKnownHostsFile``, ``HostKeyAlias`` and
``ConnectTimeout``. Whatever there makes ssh less careful about the keys of hosts is not followed.
"""

from __future__ import annotations

import glob
import os
import pwd
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from statepool.errors import ConfigError, InvalidLocation
from statepool.model.location import Location
from statepool.model.settings import Settings

SSH_PORT = 22

USER_CONFIG = "~/.ssh/config"
SYSTEM_CONFIG = "/etc/ssh/ssh_config"

USER_KNOWN_HOSTS = "~/.ssh/known_hosts ~/.ssh/known_hosts2"
SYSTEM_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2"
"""The defaults of ssh_config(5)."""

DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
"""Tried where no ``IdentityFile`` is configured."""

_DEEPEST_INCLUDE = 16
"""The limit that OpenSSH has."""

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
    found = _lookup(endpoint.host, settings)
    command = found.get("proxycommand")
    if command and not found.get("proxyjump"):
        raise ConfigError(
            f"{endpoint.host} is configured to be reached by a ProxyCommand, which is not run here: {command}",
            hint="write it as a ProxyJump, or mount the pool and use its path",
        )
    user = endpoint.user or found.get("user") or pwd.getpwuid(os.getuid()).pw_name
    address = found.get("hostname") or endpoint.host
    chosen = [key for key in found.get("identityfile", ()) if key.lower() != "none"]
    keys = chosen if found.get("identityfile") else list(DEFAULT_KEYS)
    return HostSettings(
        name=endpoint.host,
        address=address,
        port=endpoint.port or _port(found.get("port"), endpoint),
        user=user,
        key_name=found.get("hostkeyalias") or address,
        alias="hostkeyalias" in found,
        known_hosts=_known_hosts(found, settings),
        keys=tuple(Path(os.path.expanduser(key)) for key in keys),
        keys_are_chosen=bool(chosen),
        only_these_keys=found.get("identitiesonly", "no").lower() == "yes",
        jumps=tuple(_jumps(found.get("proxyjump"), endpoint)),
        connect_timeout=_connect_timeout(found.get("connecttimeout"), settings),
    )


def _port(text: str | None, endpoint: Endpoint) -> int:
    if text is None:
        return SSH_PORT
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise ConfigError(f"the configuration of ssh has a Port for {endpoint.host} that is none: {text!r}", hint="ports are 1 to 65535")
    return int(text)


def _connect_timeout(text: str | None, settings: Settings) -> float:
    if text is None or not text.isdigit() or int(text) == 0:
        return settings.connect_timeout
    return float(text)


def _known_hosts(found: Mapping[str, Any], settings: Settings) -> tuple[Path, ...]:
    if settings.known_hosts is not None:
        return (Path(os.path.expanduser(settings.known_hosts)),)
    names = [*shlex.split(found.get("userknownhostsfile", USER_KNOWN_HOSTS)), *shlex.split(found.get("globalknownhostsfile", SYSTEM_KNOWN_HOSTS))]
    return tuple(Path(os.path.expanduser(name)) for name in names if name.lower() != "none")


def _jumps(text: str | None, endpoint: Endpoint) -> Iterator[Endpoint]:
    if text is None or text.lower() == "none":
        return
    for part in text.split(","):
        match = _JUMP.match(part.strip())
        if match is None:
            raise ConfigError(f"the ProxyJump of {endpoint.host} cannot be read: {text!r}", hint="write user@host:port, separated by commas")
        user, bracketed, plain, port = match.groups()
        yield Endpoint(bracketed or plain, int(port) if port else None, user)


# -- reading the files -------------------------------------------------------------------------------------------------------------------------------


def _lookup(host: str, settings: Settings) -> Mapping[str, Any]:
    from paramiko.config import SSHConfig
    from paramiko.ssh_exception import ConfigParseError, CouldNotCanonicalize

    config = SSHConfig()
    paths = [settings.ssh_config] if settings.ssh_config is not None else [USER_CONFIG, SYSTEM_CONFIG]
    for path in paths:
        try:
            config.parse(list(_lines(Path(os.path.expanduser(path)), needed=settings.ssh_config is not None)))
        except ConfigError:
            raise
        except (ConfigParseError, ValueError) as error:
            raise ConfigError(f"{path}: {error}", hint="see ssh_config(5)", path=path) from error
    try:
        found: Mapping[str, Any] = config.lookup(host)
    except (CouldNotCanonicalize, ImportError, KeyError, ValueError) as error:
        raise ConfigError(f"the configuration of ssh cannot be applied to {host}: {error}", hint="ssh -G shows what ssh makes of it") from error
    return found


def _lines(path: Path, *, needed: bool = False, depth: int = 0) -> Iterator[str]:
    """:returns: the lines of a file, with those of the files that it includes in their place"""
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not needed:
            return
        raise ConfigError(f"{path}: there is no such file", hint="check the setting ssh-config", path=str(path)) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="make it a readable file", path=str(path)) from error
    block = "Host *"
    for line in text.splitlines():
        word, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        if word.lower() in ("host", "match"):
            block = line
        if word.lower() != "include":
            yield line
            continue
        if depth == _DEEPEST_INCLUDE:
            raise ConfigError(f"{path}: more than {_DEEPEST_INCLUDE} files include each other", hint="see Include in ssh_config(5)", path=str(path))
        for name in shlex.split(rest):
            pattern = os.path.join(path.parent, os.path.expanduser(name))  # relative ones are to ~/.ssh or /etc/ssh, where this file is
            for included in sorted(glob.glob(pattern)):
                yield from _lines(Path(included), depth=depth + 1)
        yield block
