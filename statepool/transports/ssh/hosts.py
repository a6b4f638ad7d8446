"""
The facts about a host that are needed to connect to it, and the errors for a host key that is not
accepted.

A connection is made only to a host whose key is in the ``known_hosts`` of the user or of the
system; no configuration of ssh weakens this.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from pathlib import Path

from attrs import frozen

from statepool.errors import AccessDenied
from statepool.transports.ssh.carrier import SSH_PORT, Endpoint


@frozen
class HostKey:
    """
    A key that some host has, or had.

    :param type: such as ``ssh-ed25519``
    :param blob: the public key as it goes over the wire (RFC 4253, section 6.6)
    """

    type: str
    blob: bytes

    @property
    def fingerprint(self) -> str:
        """The fingerprint as ``ssh-keygen -l`` prints it."""
        return "SHA256:" + base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")

    def line(self, name: str) -> str:
        """:returns: the line of ``known_hosts`` that admits it"""
        return f"{name} {self.type} {base64.b64encode(self.blob).decode()}"


@frozen
class HostSettings:
    """
    An endpoint as the configuration of ssh resolves it.

    :param name: the user's name for the host
    :param address: the name or address to connect to
    :param port: the TCP port there
    :param user: the account there
    :param known_hosts: files with the keys of hosts, the most important first
    :param alias: the name under which its key is known, if it is another one
    :param proxied: whether it is reached through another host or a command
    :param keys: files with the user's keys
    :param keys_are_chosen: whether they were configured, and are not the default ones
    :param only_these_keys: whether no other keys of the agent are offered
    """

    name: str
    address: str
    port: int
    user: str
    known_hosts: tuple[Path, ...]
    alias: str | None = None
    proxied: bool = False
    keys: tuple[Path, ...] = ()
    keys_are_chosen: bool = False
    only_these_keys: bool = False

    def __str__(self) -> str:
        return str(Endpoint(self.address, self.port, self.user))

    @property
    def known_as(self) -> str:
        """The host as ``known_hosts`` writes it (sshd(8))."""
        return self.alias or (
            self.address if self.port == SSH_PORT else f"[{self.address}]:{self.port}"
        )


def unknown_key(key: HostKey, host: HostSettings, pool: str | None) -> AccessDenied:
    """
    :param key: what the host showed
    :returns: the error that says how the user can make the key known
    """
    file = shlex.quote(str(host.known_hosts[0])) if host.known_hosts else "~/.ssh/known_hosts"
    return AccessDenied(
        f"the key of {host.name} is not known: {key.type} {key.fingerprint}",
        hint=(
            f"if its operator confirms that fingerprint: {_line_command(key, host)} >> {file}. The"
            f" line is: {key.line(host.known_as)}"
        ),
        pool=pool,
    )


def changed_key(
    key: HostKey, host: HostSettings, path: Path, number: int, old: str, pool: str | None
) -> AccessDenied:
    """
    :param key: what the host showed
    :param path: the file in which it has another key
    :param number: the line there, from 1
    :param old: the fingerprint of that other key
    """
    forget = f"ssh-keygen -f {shlex.quote(str(path))} -R {shlex.quote(host.known_as)}"
    return AccessDenied(
        f"the key of {host.name} has changed: it has {key.fingerprint}, and {path}, line {number}"
        f" says {old}. The host was set up anew, or somebody else answers in its place",
        hint=(
            f"if its operator confirms the new key: {forget}, then {_line_command(key, host)} >>"
            f" {shlex.quote(str(path))}"
        ),
        pool=pool,
    )


def revoked_key(host: HostSettings, fingerprint: str, pool: str | None) -> AccessDenied:
    """:returns: the error for a key that is marked as revoked"""
    return AccessDenied(
        f"the key of {host.name} is revoked: {fingerprint}",
        hint="do not connect; ask the operator of that host for another key",
        pool=pool,
    )


def _line_command(key: HostKey, host: HostSettings) -> str:
    """
    :returns: a command that prints the line that admits the key: ssh-keyscan knows no aliases, and
        goes through no other host
    """
    if host.alias or host.proxied:
        return f"echo {shlex.quote(key.line(host.known_as))}"
    port = f" -p {host.port}" if host.port != SSH_PORT else ""
    kind = key.type.removeprefix("ssh-").partition("-")[0]
    return f"ssh-keyscan -t {kind}{port} {host.address}"
