"""
Saying who we are: keys from files and from the agent, then a password, each as ssh would offer it.

Nothing asks a terminal. A passphrase or a password comes from :class:`~statepool.model.settings.Settings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from attrs import define, field

from statepool.errors import AccessDenied, TransportError
from statepool.model.secrets import SecretKind, Secrets
from statepool.transports.failures import Subject
from statepool.transports.ssh.agent import Agent, AgentFailure, agent_key
from statepool.transports.ssh.failures import in_short, said
from statepool.transports.ssh.hosts import HostSettings
from statepool.transports.ssh.keys import UnusableKey, add_certificate, load_key, public_blob

_PATIENCE = 2
"""So many keys were offered: what ends the connection then is probably MaxAuthTries of sshd_config(5)."""


@define
class Login:
    """
    One attempt to log in.

    :param host: where, and with which keys
    :param secrets: asked for passphrases and passwords
    :param subject: for messages
    :param deadline: when we have to be logged in, by the monotonic clock
    """

    host: HostSettings
    secrets: Secrets | None
    subject: Subject
    deadline: float
    tried: list[str] = field(factory=list)
    """What was offered or could not be, for the message of the error."""

    agent: Agent | None = None

    def run(self, transport: Any) -> None:
        """
        :param transport: a connected transport, whose host key has been checked
        :raises AccessDenied: the server takes nothing of what there is
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
        """:returns: the ways that the server permits, or None if it wants nothing"""
        from paramiko.ssh_exception import BadAuthenticationType

        try:
            transport.auth_none(self.host.user)
        except BadAuthenticationType as error:
            return set(error.allowed_types)
        return None

    def _offer_key(self, transport: Any, key: Any, name: str) -> bool:
        """:returns: whether we are logged in"""
        from paramiko.ssh_exception import AuthenticationException, SSHException

        try:
            further = transport.auth_publickey(self.host.user, key)
        except AuthenticationException as error:
            if not transport.is_active():
                self._cut_off(error)
            self.tried.append(f"{name}: {getattr(key, 'failure', None) or 'not accepted'}")
            return False
        except SSHException as error:
            if not transport.is_active():
                raise
            self.tried.append(f"{name}: {said(error)}")  # the server has no such algorithm
            return False
        if further:
            self.tried.append(f"{name}: accepted, but the server also wants {in_short(' or '.join(sorted(further)))}")
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
            self.tried.append(f"the password: accepted, but the server also wants {in_short(' or '.join(sorted(further)))}")
        return not further

    # -- keys ---------------------------------------------------------------------------------------------------------------------------------------

    def _keys(self) -> Iterator[tuple[Any, str]]:
        """
        :returns: keys with their names, in the order of ssh: those of the agent that were configured, the configured files, then the other ones of
            the agent; without any configured, the agent's go before the default files
        """
        agent = self._agent_keys()
        if not self.host.keys_are_chosen:
            yield from self._while_it_answers(agent)
            yield from self._file_keys(set())
            return
        public = {blob for path in self.host.keys if (blob := public_blob(path)) is not None}
        chosen = [(key, name) for key, name in agent if key.asbytes() in public]
        yield from self._while_it_answers(chosen)
        yield from self._file_keys({key.asbytes() for key, _ in chosen if key.failure is None})
        if not self.host.only_these_keys:
            yield from self._while_it_answers([(key, name) for key, name in agent if key.asbytes() not in public])

    def _while_it_answers(self, keys: list[tuple[Any, str]]) -> Iterator[tuple[Any, str]]:
        for key, name in keys:
            if self.agent is not None and not self.agent.failed:
                yield key, name

    def _agent_keys(self) -> list[tuple[Any, str]]:
        found: list[tuple[Any, str]] = []
        try:
            agent = self.agent = Agent.reached(self.deadline)
            if agent is None:
                return []
            for blob, comment in agent.public_keys():
                try:
                    key = agent_key(agent, blob, comment)
                except UnusableKey as error:
                    self.tried.append(f"the agent's key {comment}: cannot be read ({error})")
                else:
                    found.append((key, f"the agent's key {comment or key.fingerprint}"))
        except AgentFailure as error:
            self.tried.append(f"the agent: {error}")
        return found

    def _file_keys(self, known: set[bytes]) -> Iterator[tuple[Any, str]]:
        for path in self.host.keys:
            key = None if public_blob(path) in known else self._load(path)
            if key is not None:
                yield key, str(path)

    def _load(self, path: Path) -> Any:
        """A certificate beside the key is loaded with it."""
        try:
            key = load_key(path, lambda: self._secret(SecretKind.PASSPHRASE, str(path)))
        except FileNotFoundError:
            if self.host.keys_are_chosen:
                self.tried.append(f"{path}: there is no such file")
            return None
        except UnusableKey as error:
            self.tried.append(f"{path}: {error}")
            return None
        try:
            add_certificate(key, path)
        except UnusableKey as error:
            self.tried.append(f"{path}-cert.pub: {error}")
        return key

    def _secret(self, kind: SecretKind, subject: str) -> str | None:
        return self.secrets(kind, subject) if self.secrets is not None else None

    # -- errors -------------------------------------------------------------------------------------------------------------------------------------

    def _denied(self, allowed: set[str]) -> AccessDenied:
        tried = "; ".join(self.tried) or "there was nothing to offer"
        return AccessDenied(
            f"{self.host} does not let us in. It takes {in_short(', '.join(sorted(allowed)))}. Tried: {tried}",
            hint="add a key to the agent (ssh-add), or name one in ~/.ssh/config; STATEPOOL_SSH_PASSPHRASE and STATEPOOL_SSH_PASSWORD are used, too",
            pool=self.subject.pool,
        )

    def _cut_off(self, error: Exception) -> NoReturn:
        """The connection ended meanwhile: by an accident, or because the server has heard enough. paramiko does not tell which."""
        if len(self.tried) < _PATIENCE:
            raise error
        raise TransportError(
            f"{self.host} ended the connection while we logged in. Tried: {'; '.join(self.tried)}",
            hint="MaxAuthTries there may be exceeded: name the right key in ~/.ssh/config, with IdentitiesOnly yes",
            pool=self.subject.pool,
        ) from error
