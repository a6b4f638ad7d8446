"""
Authentication: keys from files and from the agent, then a password, each as ssh would offer it.

Nothing is asked on a terminal. A passphrase or a password comes from
:class:`~statepool.model.settings.Settings`.
"""

from __future__ import annotations

import binascii
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from attrs import define, field

from statepool.errors import AccessDenied
from statepool.model.secrets import SecretKind, Secrets
from statepool.transports.failures import Subject
from statepool.transports.ssh.failures import cut_off, denied, in_short, said
from statepool.transports.ssh.hosts import HostSettings
from statepool.transports.ssh.library_messages import open_agent
from statepool.transports.ssh.wire import within

_UNSIGNED = "key cannot be used for signing"
"""The message of paramiko for an agent that does not sign; it also ends the connection."""

_PATIENCE = 2
"""
Number of offered keys from which on a closed connection is probably due to MaxAuthTries of
sshd_config(5).
"""


@define
class Login:
    """
    One attempt to log in.

    :param host: the host, and the keys to offer
    :param secrets: asked for passphrases and passwords
    :param subject: for messages
    :param deadline: when the login has to be complete, by the monotonic clock
    """

    host: HostSettings
    secrets: Secrets | None
    subject: Subject
    deadline: float
    tried: list[str] = field(factory=list)
    """The keys that were offered or could not be offered, for the error message."""

    agent: Any = None

    def run(self, transport: Any) -> None:
        """
        :param transport: a connected transport, whose host key has been checked
        :raises AccessDenied: the server accepts none of the keys and passwords
        """
        try:
            self._run(transport)
        finally:
            if self.agent is not None:
                self.agent.close()

    def _run(self, transport: Any) -> None:
        allowed = self._allowed(transport)
        if allowed is None:
            return
        if "publickey" in allowed:
            for key, name in self._keys():
                if self._offer_key(transport, key, name):
                    return
        if allowed & {"password", "keyboard-interactive"} and self._offer_password(transport):
            return
        raise self._denied(allowed)

    def _allowed(self, transport: Any) -> set[str] | None:
        """
        :returns: the authentication methods that the server permits, or None if it requires none
        """
        from paramiko.ssh_exception import BadAuthenticationType

        try:
            transport.auth_none(self.host.user)
        except BadAuthenticationType as error:
            return set(error.allowed_types)
        return None

    def _offer_key(self, transport: Any, key: Any, name: str) -> bool:
        """:returns: whether the login succeeded"""
        from paramiko.ssh_exception import AuthenticationException, SSHException

        try:
            further = transport.auth_publickey(self.host.user, key)
        except AuthenticationException as error:
            if not transport.is_active():
                self._cut_off(error)
            self.tried.append(f"{name}: not accepted")
            return False
        except SSHException as error:
            if not transport.is_active() and str(error) != _UNSIGNED:
                raise
            if not transport.is_active():
                raise denied(
                    str(self.host),
                    "publickey",
                    [*self.tried, f"{name}: the agent did not sign with it"],
                    self.subject.pool,
                ) from error
            self.tried.append(f"{name}: {said(error)}")  # the server does not support the algorithm
            return False
        if further:
            self.tried.append(
                f"{name}: accepted, but the server also wants"
                f" {in_short(' or '.join(sorted(further)))}"
            )
            return self._offer_password(transport)
        return True

    def _offer_password(self, transport: Any) -> bool:
        from paramiko.ssh_exception import AuthenticationException

        password = self._secret(SecretKind.PASSWORD, str(self.host))
        if password is None:
            self.tried.append("a password: there is none")
            return False
        try:
            further = transport.auth_password(self.host.user, password)
        except AuthenticationException as error:
            if not transport.is_active():
                self._cut_off(error)
            self.tried.append("the password: not accepted")
            return False
        if further:
            self.tried.append(
                "the password: accepted, but the server also wants"
                f" {in_short(' or '.join(sorted(further)))}"
            )
        return not further

    # -- keys --------------------------------------------------------------------------------------

    def _keys(self) -> Iterator[tuple[Any, str]]:
        """
        :returns: keys with their names, in the order of ssh: configured keys of the agent,
            configured files, then the other keys of the agent; if none are configured, the agent's
            keys come before the default files
        """
        agent = self._agent_keys()
        public = (
            {blob for path in self.host.keys if (blob := _public_blob(path)) is not None}
            if self.host.keys_are_chosen
            else set()
        )
        chosen = [(key, name) for key, name in agent if key.asbytes() in public]
        others = [(key, name) for key, name in agent if key.asbytes() not in public]
        if not self.host.keys_are_chosen:
            yield from others
        yield from chosen
        for path in self.host.keys:
            key = (
                None
                if _public_blob(path) in {key.asbytes() for key, _ in chosen}
                else self._load(path)
            )
            if key is not None:
                yield key, str(path)
        if self.host.keys_are_chosen and not self.host.only_these_keys:
            yield from others

    def _agent_keys(self) -> list[tuple[Any, str]]:
        """Return the keys of the agent, with a timeout: paramiko has none."""
        if not os.environ.get("SSH_AUTH_SOCK"):
            return []
        seconds = max(0.1, (self.deadline - time.monotonic()) / 2)
        try:
            with _parsing():
                self.agent = within(seconds, open_agent, "agent")
                found = within(seconds, self.agent.get_keys, "agent")
        except TimeoutError:
            self.tried.append(f"the agent: no answer for {seconds:.1g} seconds")
        except _Unusable as error:
            self.tried.append(f"the agent: {error}")
        else:
            return [(key, f"the agent's key {key.comment or key.fingerprint}") for key in found]
        return []

    def _load(self, path: Path) -> Any:
        """Load a key, and a certificate beside it."""
        try:
            with _parsing():
                return _pkey().from_path(path)
        except TypeError:  # paramiko reports so that a passphrase is needed
            return self._unlocked(path)
        except FileNotFoundError:
            if self.host.keys_are_chosen:
                self.tried.append(f"{path}: there is no such file")
        except OSError as error:
            self.tried.append(f"{path}: cannot be read: {error.strerror}")
        except _Unusable as error:
            certificate = f"{path}-cert.pub"
            what = (
                f"{certificate}: cannot be read"
                if os.path.lexists(certificate)
                else f"{path}: is not a private key that paramiko knows"
            )
            self.tried.append(f"{what} ({error})")
        return None

    def _unlocked(self, path: Path) -> Any:
        passphrase = self._secret(SecretKind.PASSPHRASE, str(path))
        if not passphrase:
            self.tried.append(f"{path}: needs a passphrase, and there is none")
            return None
        try:
            with _parsing():
                return _pkey().from_path(path, passphrase.encode(errors="surrogateescape"))
        except _Unusable as error:
            known = (
                isinstance(error.__cause__, ValueError)
                or type(error.__cause__).__name__ == "InvalidTag"
            )
            what = f"is not a private key that paramiko knows ({error})"
            self.tried.append(f"{path}: {'the passphrase is not the right one' if known else what}")
            return None

    def _secret(self, kind: SecretKind, subject: str) -> str | None:
        return self.secrets(kind, subject) if self.secrets is not None else None

    # -- errors ------------------------------------------------------------------------------------

    def _denied(self, allowed: set[str]) -> AccessDenied:
        return denied(
            str(self.host), in_short(", ".join(sorted(allowed))), self.tried, self.subject.pool
        )

    def _cut_off(self, error: Exception) -> NoReturn:
        """
        Raise the error for a connection that ended during the login: by a failure, or because the
        server permits no more attempts. paramiko does not tell which.
        """
        if len(self.tried) < _PATIENCE:
            raise error
        raise cut_off(str(self.host), self.tried, self.subject.pool) from error


class _Unusable(Exception):
    """An error: a key, or an agent, cannot be used; the text says why."""


@contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except (OSError, TypeError):
        raise
    except Exception as error:  # a parser may raise anything
        raise _Unusable(said(error)) from error


def _pkey() -> Any:
    from paramiko import PKey

    return PKey


def _public_blob(path: Path) -> bytes | None:
    """:returns: the public half of a key, if its file lies beside that of the private half"""
    try:
        fields = (
            path.with_name(path.name + ".pub").read_text(encoding="utf-8", errors="replace").split()
        )
        return binascii.a2b_base64(fields[1]) if len(fields) > 1 else None
    except (OSError, ValueError):
        return None
