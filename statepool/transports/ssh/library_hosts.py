"""
The configuration of ssh and the files of known hosts, as paramiko reads them.

A keyword that paramiko ignores, and that would change where or how to connect, is an error that
names the other carrier.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from statepool.errors import AccessDenied, ConfigError
from statepool.model.settings import Settings
from statepool.transports.ssh.carrier import SSH_PORT, Endpoint
from statepool.transports.ssh.hosts import (
    HostKey,
    HostSettings,
    changed_key,
    revoked_key,
    unknown_key,
)

CONFIGS = ("~/.ssh/config", "/etc/ssh/ssh_config")

KNOWN_HOSTS = (
    "~/.ssh/known_hosts",
    "~/.ssh/known_hosts2",
    "/etc/ssh/ssh_known_hosts",
    "/etc/ssh/ssh_known_hosts2",
)
"""The defaults of ssh_config(5)."""

DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
"""The keys to try if no ``IdentityFile`` is configured."""

NOT_HONOURED = (
    "ProxyCommand",
    "ProxyJump",
    "IdentityAgent",
    "KnownHostsCommand",
    "CertificateFile",
)

OTHER = "install ssh (Debian: openssh-client), and leave out carrier = paramiko"

_COMMAND = re.compile(r"\s*match\b.*\bexec\b", re.IGNORECASE)
_INCLUDED = re.compile(r"\s*include[\s=]+\"?([^\"]*)", re.IGNORECASE)


def resolve(endpoint: Endpoint, settings: Settings) -> HostSettings:
    """
    :returns: an endpoint as the configuration of ssh resolves it
    :raises ConfigError: it cannot be read, or requires something that paramiko does not support
    """
    found = _lookup(endpoint, settings)
    for keyword in NOT_HONOURED:
        value = str(found.get(keyword.lower()) or "none")
        if value.lower() != "none":
            raise ConfigError(
                f"{endpoint.host} is configured with {keyword} {value}, which paramiko does not"
                " honour",
                hint=OTHER,
            )
    configured: list[str] = found.get("identityfile", [])
    chosen = [key for key in configured if key.lower() != "none"]
    return HostSettings(
        name=endpoint.host,
        address=found["hostname"],
        port=endpoint.port or _port(found.get("port"), endpoint),
        user=endpoint.user or found.get("user") or _local_user(endpoint),
        known_hosts=_known_hosts(found, settings),
        alias=found.get("hostkeyalias"),
        keys=tuple(
            Path(os.path.expanduser(key)) for key in (chosen if configured else DEFAULT_KEYS)
        ),
        keys_are_chosen=bool(chosen),
        only_these_keys=found.get("identitiesonly", "no").lower() in ("yes", "true"),
    )


def _lookup(endpoint: Endpoint, settings: Settings) -> Any:
    import paramiko

    own = settings.ssh_config
    config = paramiko.SSHConfig()
    for name in [own] if own is not None else CONFIGS:
        text = _text(Path(os.path.expanduser(name)), needed=own is not None)
        if any(_COMMAND.match(line) for line in text.splitlines()):
            raise ConfigError(
                f"{name} has Match exec, which paramiko does not honour", hint=OTHER, path=name
            )
        included = [found[1] for line in text.splitlines() if (found := _INCLUDED.match(line))]
        if included and name != CONFIGS[1]:
            raise ConfigError(
                f"{name} has Include {included[0]}, which paramiko does not honour",
                hint=OTHER,
                path=name,
            )
        try:
            config.parse(text.splitlines())
        except (paramiko.SSHException, ValueError) as error:
            raise ConfigError(f"{name}: {error}", hint="see ssh_config(5)", path=name) from error
    try:
        return config.lookup(endpoint.host)
    except Exception as error:  # a parser may raise anything
        raise ConfigError(
            f"the configuration of ssh for {endpoint.host} cannot be used: {error}",
            hint="see ssh_config(5)",
        ) from error


def _text(path: Path, *, needed: bool) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not needed:
            return ""
        raise ConfigError(
            f"{path}: there is no such file", hint="check the setting ssh-config", path=str(path)
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}",
            hint="make it a readable file",
            path=str(path),
        ) from error


def _local_user(endpoint: Endpoint) -> str:
    """
    Return the name of the local account. In a container an account need not have a name.
    Environment variables are not trusted for it: ssh does not use them, either.
    """
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        raise ConfigError(
            f"nobody says which account of {endpoint.host} is meant, and that of this process (uid"
            f" {os.getuid()}) has no name",
            hint=f"write ssh://user@{endpoint.host}/path, or User in ~/.ssh/config",
        ) from None


def _port(text: str | None, endpoint: Endpoint) -> int:
    if text is None:
        return SSH_PORT
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        raise ConfigError(
            f"the configuration of ssh has a Port for {endpoint.host} that is none: {text!r}",
            hint="ports are 1 to 65535",
        )
    return int(text)


def _known_hosts(found: Any, settings: Settings) -> tuple[Path, ...]:
    if settings.known_hosts is not None:
        return (Path(os.path.expanduser(settings.known_hosts)),)
    users = found.get("userknownhostsfile", "").split() or KNOWN_HOSTS[:2]
    systems = found.get("globalknownhostsfile", "").split() or KNOWN_HOSTS[2:]
    return tuple(
        Path(os.path.expanduser(name)) for name in (*users, *systems) if name.lower() != "none"
    )


# -- the keys of hosts -----------------------------------------------------------------------------


def known_types(host: HostSettings) -> set[str]:
    """:returns: the types of the known keys of a host: these are requested first"""
    return {key.type for _, _, key in _known(host)}


def check_host_key(shown: HostKey, host: HostSettings, pool: str | None) -> None:
    """
    :param shown: the key that the host showed, and proved to have
    :raises AccessDenied: the key is unknown, differs from the known one, or is revoked
    """
    marked = [
        (marker, path, rest)
        for path in host.known_hosts
        for _, (marker, *rest) in _lines(path)
        if marker.startswith("@")
    ]
    for marker, path, rest in marked:
        # A revoked key is refused whatever host its line names.
        if marker == "@revoked" and shown.line("").split() == rest[1:3]:
            raise revoked_key(host, f"{shown.fingerprint}, by {path}", pool)
    known = list(_known(host))
    if any(key == shown for _, _, key in known):
        return
    for path, number, key in known:
        if key.type == shown.type:
            raise changed_key(shown, host, path, number, key.fingerprint, pool)
    if any(marker == "@cert-authority" for marker, _, _ in marked):
        what = (
            f"the key of {host.name} is not known: {shown.type} {shown.fingerprint}; paramiko does"
            " not honour @cert-authority"
        )
        raise AccessDenied(what, hint=OTHER, pool=pool)
    raise unknown_key(shown, host, pool)


def _known(host: HostSettings) -> Iterator[tuple[Path, int, HostKey]]:
    """:returns: the known keys of a host, each with its file and line"""
    from paramiko.hostkeys import HostKeyEntry, HostKeys, InvalidHostKey
    from paramiko.ssh_exception import SSHException

    for path in host.known_hosts:
        for number, words in _lines(path):
            keys = HostKeys()
            try:
                entry = HostKeyEntry.from_line(" ".join(words))
                for name in (
                    entry.hostnames if entry is not None and not words[0].startswith("@") else ()
                ):
                    keys.add(name, entry.key.get_name(), entry.key)
            except (SSHException, InvalidHostKey, ValueError):
                continue  # as ssh does: a line that cannot be read admits no host
            for key in (keys.lookup(host.known_as) or {}).values():
                yield path, number, HostKey(key.get_name(), key.asbytes())


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """:returns: the lines of a file of known hosts, as words, with their numbers"""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        hint = "it holds the keys of hosts that are trusted"
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}", hint=hint, path=str(path)
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            yield number, words
