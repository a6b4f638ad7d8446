"""
The messages of a starting ``ssh``, translated into errors of this package, with the keys that were
tried.

The messages of ``ssh`` are stable enough to be matched: they are not translated (``LC_ALL=C``).
Text of a server, a greeting or another program among them is only shown, as a last resort.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from attrs import define

from statepool.errors import AccessDenied, StatePoolError, TransportError
from statepool.model.secrets import SecretKind
from statepool.model.settings import Settings
from statepool.transports.failures import Subject
from statepool.transports.ssh.askpass import Askpass
from statepool.transports.ssh.failures import (
    cut_off,
    denied,
    garbled,
    in_short,
    no_common_way,
    no_greeting,
    translated,
    unreached,
)
from statepool.transports.ssh.hosts import (
    HostKey,
    HostSettings,
    changed_key,
    revoked_key,
    unknown_key,
)
from statepool.transports.ssh.program import Looked

_ERRNOS = {os.strerror(number): number for number in errno.errorcode}

_PARTLY = re.compile(
    r"^Authenticated using \"publickey\" with partial success\.\s+debug1: Authentications that can"
    r" continue: (\S+)",
    re.MULTILINE,
)

_NO_TEXT = re.compile(r"\\[0-7]{3}")
"""The form in which ssh shows bytes that are no text."""

_LOST = r"[Cc]onnection (?:reset|closed)|[Cc]losed by|Broken pipe|Connection aborted|^Disconnected"

_ADDRESS = {"Temporary failure in name resolution": socket.EAI_AGAIN}
"""The message of the resolver for a transient error."""


class SshFailed(Exception):
    """An error with all that ``ssh`` has written."""


@define
class Complaint:
    """
    The text that ``ssh`` has written while it logged in.

    :param text: the text
    :param host: the host to which it logged in
    :param settings: the settings of the connection
    :param pool: for the attribute ``pool`` of errors
    :param asking: the secrets that it has asked for, if they can be answered
    """

    text: str
    host: HostSettings
    settings: Settings
    pool: str | None
    asking: Askpass | None

    def _find(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, self.text, re.MULTILINE)

    @property
    def facts(self) -> bytes:
        """The facts of the connection: a name and a value on each line."""
        server = self._find(
            r"^debug1: Remote protocol version \S+, remote software version (.*?)\r?$"
        )
        cipher = self._find(r"^debug1: kex: server->client cipher: (\S+)")
        return "".join(
            f"{name}={found[1]}\n"
            for name, found in (("server", server), ("cipher", cipher))
            if found
        ).encode()

    @property
    def _last(self) -> str:
        """The last line; all lines where another program may have written the reason."""
        lines = [
            line.strip()
            for line in self.text.splitlines()
            if line.strip() and not line.startswith("debug")
        ]
        return in_short("; ".join(lines if self.host.proxied else lines[-1:])) or "it said nothing"

    def error(self, subject: Subject, look: Callable[[], Looked]) -> StatePoolError:
        """
        :param subject: the host, for messages
        :param look: connects to the host once more to see what it shows
        :returns: the error of this package for what ``ssh`` has written
        """
        if self.host.proxied and not self._is_greeted:
            self.text = look().text or self.text
        error = (
            self._of_the_way()
            or self._of_the_host(look)
            or self._of_the_account()
            or self._of_the_protocol(subject)
        )
        error.__cause__ = SshFailed(self.text)
        return error

    def timed_out(self) -> StatePoolError:
        """:returns: the error for a login that took too long"""
        seconds = self.settings.connect_timeout
        error: StatePoolError = unreached(
            TimeoutError(), self._place, seconds, Subject(str(self.host), self.pool)
        )
        if self._find(r"^debug1: SSH2_MSG_NEWKEYS received"):
            error = TransportError(
                f"cannot log in to {self.host}: no answer for {seconds:g} seconds",
                hint=(
                    "the agent that SSH_AUTH_SOCK names may not answer, or the server; the setting"
                    " connect-timeout says how long to wait"
                ),
                transient=True,
                pool=self.pool,
            )
        error.__cause__ = SshFailed(self.text)
        return error

    @property
    def _is_greeted(self) -> bool:
        return self._find(r"^debug1: Remote protocol version") is not None

    @property
    def _place(self) -> str:
        return f"{self.host.address}, port {self.host.port}"

    def _of_the_way(self) -> StatePoolError | None:
        subject, seconds = Subject(str(self.host), self.pool), self.settings.connect_timeout
        if found := self._find(r"^ssh: Could not resolve hostname \S+ (.*?)\r?$"):
            return unreached(
                socket.gaierror(_ADDRESS.get(found[1], socket.EAI_NONAME), found[1]),
                self._place,
                seconds,
                subject,
            )
        if found := self._find(r"^channel \d+: open failed: (.*?)\r?$"):
            what = f"cannot reach {self.host} through the host before it: {found[1]}"
            return TransportError(
                what,
                hint="look at ProxyJump or ProxyCommand in the configuration of ssh",
                transient=True,
                pool=self.pool,
            )
        if found := self._find(r"^ssh: connect to (?:host|address) \S+ port \d+: (.*?)\r?$"):
            number = _ERRNOS.get(found[1], errno.EIO)
            return unreached(OSError(number, found[1]), self._place, seconds, subject)
        return None

    # -- is it the host? ---------------------------------------------------------------------------

    def _of_the_host(self, look: Callable[[], Looked]) -> StatePoolError | None:
        found = self._find(
            r"^Unable to negotiate with \S+ port \d+: (.*?)\r?$|^(Protocol major versions"
            r" differ.*?)\r?$"
        )
        if found and not _NO_TEXT.search(found[0]):
            return no_common_way(str(self.host), found[1] or found[2], self.pool)
        # Later lines are a server's, which may send any greeting.
        if "debug1: SSH2_MSG_SERVICE_ACCEPT received" in self.text or not self._find(
            r"^Host key verification failed\."
        ):
            return None
        shown = self._find(r"^debug1: Server host key: (\S+) (\S+)")
        if shown is None:
            return AccessDenied(
                f"the key of a host on the way to {self.host.name} is not known, or not the one"
                f" that is known: {self._reason}",
                hint="connect to that one with ssh first",
                pool=self.pool,
            )
        if self._find(r"marked as revoked|was revoked and|REVOKED HOST KEY"):
            place = self._find(r"^debug1: .*(?:revoked|Found).* key.* in (\S+:\d+)|by file (\S+)")
            return revoked_key(
                self.host, shown[2] + (f", by {place[1] or place[2]}" if place else ""), self.pool
            )
        key = look().key
        if key is None or key.fingerprint != shown[2]:
            return AccessDenied(
                f"the key of {self.host.name} is not known: {shown[1]} {shown[2]}",
                hint="connect to it with ssh first",
                pool=self.pool,
            )
        offending = self._find(r"^Offending \S+ key in (.*):(\d+)\r?$")
        if (
            self._find(r"^Host key for .* has changed and you have requested strict checking")
            and offending is not None
        ):
            path, number = Path(offending[1]), int(offending[2])
            return changed_key(key, self.host, path, number, _fingerprint(path, number), self.pool)
        return unknown_key(key, self.host, self.pool)

    @property
    def _reason(self) -> str:
        found = self._find(
            r"^(No \S+ host key is known for .*|Host key for .* has changed.*?|.*was"
            r" revoked.*?)\r?$"
        )
        return in_short(found[1]) if found else self._last

    # -- is it us? ---------------------------------------------------------------------------------

    def _of_the_account(self) -> StatePoolError | None:
        tried = list(self._tried())
        if self._find(r"Too many authentication failures"):
            return cut_off(str(self.host), tried, self.pool)
        if found := self._find(
            rf"(?s:.*)^{re.escape(self.host.user)}@\S+: Permission denied \((.*)\)\.\r?$"
        ):
            return denied(str(self.host), ", ".join(sorted(found[1].split(","))), tried, self.pool)
        return None

    def _tried(self) -> Iterator[str]:
        """:returns: the keys that were offered, or could not be offered"""
        left = self._find(r"(?s:.*)^debug1: Authentications that can continue: (\S+)")
        if found := self._find(
            r"^debug1: get_agent_identities: ssh_get_authentication_socket: (.*?)\r?$"
        ):
            yield f"the agent: cannot be reached ({found[1]})"
        if found := self._find(
            r"^debug1: get_agent_identities: ssh_(?:agent_bind|fetch_identity).*?: (.*?)\r?$"
        ):
            yield f"the agent: {found[1]}"
        unusable = dict(self._unusable())
        yield from unusable.values()
        for name, agent, outcome in self._offered():
            if name not in unusable:
                yield f"{f'the agent{chr(39)}s key ' if agent else ''}{name}: {outcome}"
        asked = {
            (kind, subject): given
            for kind, subject, given in (self.asking.asked if self.asking is not None else [])
        }
        for (kind, subject), given in asked.items():
            if kind is SecretKind.PASSPHRASE:
                wrong = "the passphrase is not the right one"
                yield f"{subject}: {wrong if given else 'needs a passphrase, and there is none'}"
            else:
                yield "the password: not accepted" if given else "a password: there is none"
        wanted = left is not None and {"password", "keyboard-interactive"} & set(left[1].split(","))
        if wanted and not any(kind is SecretKind.PASSWORD for kind, _ in asked):
            yield "a password: there is none"

    def _unusable(self) -> Iterator[tuple[str, str]]:
        """:returns: files of keys, and what ``ssh`` says of each"""
        for path in re.findall(
            r"^no such identity: (.*): No such file or directory\r?$", self.text, re.MULTILINE
        ):
            yield path, f"{path}: there is no such file"
        for path, why in re.findall(r"^Load key \"(.*)\": (.*?)\r?$", self.text, re.MULTILINE):
            if "passphrase" in why and self.asking is None:
                yield path, f"{path}: needs a passphrase, and there is none"
            elif "passphrase" not in why:
                unread = why in _ERRNOS or why == "bad permissions"
                said = f"cannot be read: {why}" if unread else f"is not a private key ({why})"
                yield path, f"{path}: {said}"

    def _offered(self) -> Iterator[tuple[str, bool, str]]:
        """:returns: keys by their names, whether the agent has them, and what happened to them"""
        refused = dict(
            re.findall(
                r"^sign_and_send_pubkey: signing failed for \S+ \"(.*)\" from agent: (.*?)\r?$",
                self.text,
                re.MULTILINE,
            )
        )
        parts = re.split(r"^debug1: Offering public key: ", self.text, flags=re.MULTILINE)[1:]
        for part in parts:
            line, _, rest = part.partition("\n")
            found = re.match(r"(.*) \S+ SHA256:\S+( .*)?$", line.rstrip())
            name, flags = (found[1], found[2] or "") if found else (line, "")
            if further := _PARTLY.search(rest):
                yield (
                    name,
                    "agent" in flags,
                    f"accepted, but the server also wants {in_short(further[1])}",
                )
            elif name in refused:
                yield name, True, f"the agent did not sign with it: {refused[name]}"
            elif not re.search(r"^debug1: Server accepts key", rest, re.MULTILINE):
                yield name, "agent" in flags, "not accepted"
            elif self.asking is None:
                yield name, "agent" in flags, "needs a passphrase, and there is none"

    # -- or anything else --------------------------------------------------------------------------

    def _of_the_protocol(self, subject: Subject) -> StatePoolError:
        if self._find(r"timed out|^Timeout, server"):
            return self.timed_out()
        if not self._is_greeted:
            return no_greeting(str(self.host), self._last, self.pool)
        if not self._find(r"^Received disconnect from \S+ port \d+:2:") and self._find(_LOST):
            return translated(
                ConnectionResetError(self._last), "connect to", subject, self.settings.timeout
            )
        return garbled(SshFailed(self._last), f"cannot connect to {subject.text}", subject)


def _fingerprint(path: Path, number: int) -> str:
    """:returns: the fingerprint of the key on a line of a file of known hosts"""
    try:
        fields = path.read_text(encoding="utf-8", errors="replace").splitlines()[number - 1].split()
        return HostKey("", base64.b64decode(fields[-1 if len(fields) == 3 else 2])).fingerprint
    except (OSError, ValueError, IndexError):
        return "another one"
