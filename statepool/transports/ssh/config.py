"""
The files of ssh_config(5), read as ssh reads them.

Of each keyword the first value counts, save that ``IdentityFile`` collects. A block begins with ``Host`` or ``Match``; what is included within one is
part of it. What we have no use for is passed over; what we would have to guess is an error.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import ipaddress
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from attrs import define, field, frozen

from statepool.errors import ConfigError
from statepool.model.secrets import VARIABLES
from statepool.transports.ssh.wire import within

_DEEPEST_INCLUDE = 16
"""The limit that OpenSSH has."""

_ONE_WORD = frozenset(
    {"hostname", "user", "port", "identityfile", "identitiesonly", "hostkeyalias", "connecttimeout", "tag"}
    | {"canonicalizehostname", "canonicalizemaxdots", "canonicalizefallbacklocal"}
)
_WORDS = frozenset({"userknownhostsfile", "globalknownhostsfile", "canonicaldomains", "proxyjump"})
_PROXIES = frozenset({"proxycommand", "proxyjump"})
"""Two ways to say one thing: the first of either counts."""

_KEYWORD = re.compile(r'(?:"([^"]*)"|([^\s"=]+))(?:\s*=\s*|\s+|\Z)(.*)')
_EXPANDED = re.compile(r"\$\{([^}]*)\}|%(.?)")

_HERE_TOKENS = "CdhikLlnpru"
_PROXY_TOKENS = "hnpr"


@frozen
class Line:
    """
    Where something is written.

    :param path: the file
    :param number: the line, from 1
    """

    path: Path
    number: int

    def error(self, what: str) -> ConfigError:
        """:returns: the error to raise about it"""
        return ConfigError(f"{self.path}, line {self.number}: {what}", hint="see ssh_config(5)", path=str(self.path))


@define
class HostConfig:
    """
    What is configured for one host. Made by :func:`lookup`.

    :param named: the host, as it was asked for
    :param local_user: the name of the account of this process, or None if it has none
    :param port: the TCP port that was asked for
    :param user: the account that was asked for
    :param seconds: how long a command or a name server may take
    """

    named: str
    local_user: str | None
    port: str | None
    user: str | None
    seconds: float
    host: str = field(init=False)
    """What ``Host`` lines are compared with: as it was asked for, or the canonical name."""

    values: dict[str, list[str]] = field(factory=dict)
    canonical: bool = False
    final: bool = False
    wants_final: bool = False

    def __attrs_post_init__(self) -> None:
        self.host = self.named

    # -- what is asked of it ------------------------------------------------------------------------------------------------------------------------

    def word(self, keyword: str) -> str | None:
        """:returns: the value of a keyword that has one"""
        found = self.values.get(keyword)
        return found[0] if found else None

    @property
    def address(self) -> str:
        """The name or address to connect to."""
        text = self.word("hostname")
        address = self._replaced(text, "h", lambda _: self.host) if text is not None else self.host
        return address if _is_address(address) else address.lower()

    @property
    def account(self) -> str:
        """
        The account there.

        :raises ConfigError: nobody says which
        """
        return self.user or self.word("user") or self.local_user or self._nobody()

    def _nobody(self) -> NoReturn:
        """In a container an account need not have a name. Of the environment it is not believed: ssh does not do so, either."""
        raise ConfigError(
            f"nobody says which account of {self.named} is meant, and that of this process (uid {os.getuid()}) has no name",
            hint=f"write ssh://user@{self.named}/path, or User in ~/.ssh/config",
        )

    def files(self, keyword: str) -> list[str]:
        """:returns: the values of a keyword that has paths, with tokens, variables and ``~`` replaced"""
        return [os.path.expanduser(self.expanded(text, _HERE_TOKENS, variables=True)) for text in self.values.get(keyword, [])]

    def expanded(self, text: str, tokens: str = _PROXY_TOKENS, *, variables: bool = False) -> str:
        """
        :param text: of a value
        :param tokens: which of them are permitted in it
        :param variables: whether ``${NAME}`` is
        :returns: the text with what they stand for
        """
        return self._replaced(text, tokens, self._meaning, variables=variables)

    def _replaced(self, text: str, tokens: str, means: Callable[[str], str], *, variables: bool = False) -> str:
        def meaning(match: re.Match[str]) -> str:
            variable, token = match.groups()
            if variable is not None:
                if not variables:
                    return match[0]
                if variable not in os.environ:
                    raise ConfigError(f"the configuration of ssh for {self.named} refers to {match[0]}, which is not set: {text}", hint="set it")
                return os.environ[variable]
            if token == "%":
                return "%"
            if not token or token not in tokens:
                raise ConfigError(f"the configuration of ssh for {self.named} has {match[0]}, which has no meaning there: {text}", hint="a % is %%")
            return means(token)

        return _EXPANDED.sub(meaning, text)

    def _meaning(self, token: str) -> str:
        match token:
            case "d":
                return os.path.expanduser("~")
            case "h":
                return self.address
            case "i":
                return str(os.getuid())
            case "k":
                return self.word("hostkeyalias") or self.named
            case "L":
                return socket.gethostname().partition(".")[0]
            case "l":
                return socket.gethostname()
            case "n":
                return self.named
            case "p":
                return self.port or self.word("port") or "22"
            case "r":
                return self.account
            case "u":
                return self.local_user if self.local_user is not None else self._nobody()
        parts = "".join(map(self._meaning, "lhpr"))  # %C
        return hashlib.sha1(parts.encode(errors="surrogateescape"), usedforsecurity=False).hexdigest()

    # -- reading ------------------------------------------------------------------------------------------------------------------------------------

    def read(self, path: Path, *, needed: bool) -> None:
        """
        :param path: a file
        :param needed: it is an error if there is none
        :raises ConfigError: it cannot be read, or not understood
        """
        self._read(path, path.parent, 0, needed=needed)

    def _read(self, path: Path, base: Path, depth: int, *, needed: bool = False) -> None:
        active = True
        for line, keyword, rest in _lines(path, needed=needed):
            if keyword == "host":
                active = _is_listed(self.host, _words(rest, line))
            elif keyword == "match":
                active = self._matches(_words(rest, line), line)
            elif active and keyword == "include":
                if depth == _DEEPEST_INCLUDE:
                    raise line.error(f"more than {_DEEPEST_INCLUDE} files include each other")
                for name in _words(rest, line):
                    # Relative ones are to ~/.ssh or /etc/ssh, where the first file is.
                    for included in sorted(glob.glob(os.path.join(base, os.path.expanduser(name)))):
                        self._read(Path(included), base, depth + 1)
            elif active:
                self._take(keyword, rest, line)

    def _take(self, keyword: str, rest: str, line: Line) -> None:
        if keyword in _PROXIES:
            if not _PROXIES & self.values.keys():
                self.values[keyword] = [rest] if keyword == "proxycommand" else [" ".join(_words(rest, line))]
        elif keyword in _ONE_WORD | _WORDS:
            words = _words(rest, line)
            if not words or (keyword in _ONE_WORD and len(words) > 1):
                raise line.error(f"{keyword} has {'more than one value' if words else 'no value'}: {rest!r}")
            if keyword == "identityfile":
                self.values[keyword] = [*self.values.get(keyword, []), *(word for word in words if word not in self.values.get(keyword, []))]
            else:
                self.values.setdefault(keyword, words)

    # -- Match --------------------------------------------------------------------------------------------------------------------------------------

    def _matches(self, words: list[str], line: Line) -> bool:
        if not words:
            raise line.error("Match has no criteria")
        ahead = iter(words)
        matched = True
        for word in ahead:
            negated, (criterion, equals, argument) = word.startswith("!"), word.removeprefix("!").partition("=")
            criterion = criterion.lower()
            if criterion not in ("all", "canonical", "final") and not equals:
                argument = next(ahead, "")
                if not argument:
                    raise line.error(f"Match {criterion} has no value")
            # What comes after a criterion that is not met is not looked at: no command is run for it.
            matched = matched and self._meets(criterion, argument, line) != negated
        return matched

    def _meets(self, criterion: str, argument: str, line: Line) -> bool:
        if criterion == "final":
            self.wants_final = True
        plain = {"all": True, "canonical": self.canonical, "final": self.final}
        if criterion in plain:
            return plain[criterion]
        named = {
            "host": self.address.lower(),
            "originalhost": self.named.lower(),
            "user": self.user or self.word("user") or self.local_user or "",
            "localuser": self.local_user or "",
            "tagged": self.word("tag") or "",
        }
        if criterion in named:
            patterns = argument.lower() if criterion in ("host", "originalhost") else argument
            return _is_listed(named[criterion], patterns.split(","))
        if criterion == "exec":
            return self._succeeds(self.expanded(argument, _HERE_TOKENS), line)
        raise line.error(f"Match {criterion} is not understood here")

    def _succeeds(self, command: str, line: Line) -> bool:
        """As in ssh, a shell runs it, and what it prints is thrown away."""
        try:
            ended = subprocess.run(
                ["/bin/sh", "-c", command],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if name not in VARIABLES.values()},
                timeout=self.seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise line.error(f"the command took longer than {self.seconds:g} seconds: {command}") from error
        except (OSError, ValueError) as error:
            raise line.error(f"the command cannot be run: {command} ({error})") from error
        return ended.returncode == 0

    # -- CanonicalizeHostname -----------------------------------------------------------------------------------------------------------------------

    def canonicalized(self) -> str | None:
        """
        :returns: the name with the domain in which it is found, or None if that is not looked for
        :raises ConfigError: it is found in none, and has to be
        """
        wanted = (self.word("canonicalizehostname") or "no").lower()
        name = self.address
        if wanted not in ("yes", "true", "always") or _is_address(name) or name.count(".") > self._most_dots():
            return None
        if wanted != "always" and any((self.word(proxy) or "none").lower() != "none" for proxy in _PROXIES):
            return None
        for domain in self.values.get("canonicaldomains", []):
            if _exists(f"{name}.{domain}", self.seconds):
                return f"{name}.{domain}"
        if (self.word("canonicalizefallbacklocal") or "yes").lower() in ("no", "false"):
            raise ConfigError(f"{name} is found in none of the CanonicalDomains of the configuration of ssh", hint="see ssh_config(5)")
        return name

    def _most_dots(self) -> int:
        text = self.word("canonicalizemaxdots") or "1"
        if not re.fullmatch("[0-9]{1,5}", text):
            raise ConfigError(f"the configuration of ssh has CanonicalizeMaxDots {text!r} for {self.named}", hint="write a number")
        return int(text)


def lookup(
    host: str, paths: Iterable[Path], local_user: str | None, seconds: float, *, port: int | None, user: str | None, needed: bool
) -> HostConfig:
    """
    :param host: as the person calls it
    :param paths: the files, the most important first
    :param local_user: the name of the account of this process, or None if it has none
    :param seconds: how long a command or a name server may take
    :param port: the TCP port, where it is given: it goes before what is configured
    :param user: the account, where it is given
    :param needed: it is an error if a file does not exist
    :returns: what is configured
    :raises ConfigError: a file cannot be read, or not understood
    """
    files = list(paths)
    found = HostConfig(host, local_user, str(port) if port is not None else None, user, seconds)
    for path in files:
        found.read(path, needed=needed)
    canonical = found.canonicalized()
    if canonical is not None or found.wants_final:
        found.final = True
        if canonical is not None:
            found.canonical, found.host = True, canonical
            found.values["hostname"] = [canonical.replace("%", "%%")]
        for path in files:
            found.read(path, needed=needed)
    return found


def _lines(path: Path, *, needed: bool) -> Iterator[tuple[Line, str, str]]:
    """:returns: where each line is, its keyword in small letters, and its rest"""
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError) as error:
        if not needed:
            return
        raise ConfigError(f"{path}: there is no such file", hint="check the setting ssh-config", path=str(path)) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", hint="make it a readable file", path=str(path)) from error
    for number, raw in enumerate(text.split("\n"), 1):
        line = Line(path, number)
        if not raw.strip() or raw.strip().startswith("#"):
            continue
        match = _KEYWORD.match(raw.strip())
        if match is None:
            raise line.error(f"cannot be read: {raw.strip()}")
        yield line, (match[1] or match[2] or "").lower(), match[3]


def _words(text: str, line: Line) -> list[str]:
    """:returns: what blanks separate, outside of quotes, up to a comment"""
    words: list[str] = []
    position = 0
    while True:
        position += len(text[position:]) - len(text[position:].lstrip(" \t"))
        if position == len(text) or text[position] == "#":
            return words
        word, quote = "", ""
        while position < len(text) and (quote or text[position] not in " \t"):
            character, following = text[position], text[position + 1 : position + 2]
            if character == "\\" and following and (following in "\"'\\" or (following == " " and not quote)):
                word += following
                position += 1
            elif character == quote or (not quote and character in "\"'"):
                quote = "" if quote else character
            else:
                word += character
            position += 1
        if quote:
            raise line.error(f"a quote does not end: {text}")
        words.append(word)


def _is_listed(name: str, patterns: Iterable[str]) -> bool:
    """One that is negated and meets it decides; brackets stand for themselves: only ``*`` and ``?`` are special."""
    listed = False
    for pattern in patterns:
        if fnmatch.fnmatchcase(name, pattern.removeprefix("!").replace("[", "[[]")):
            if pattern.startswith("!"):
                return False
            listed = True
    return listed


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _exists(name: str, seconds: float) -> bool:
    try:
        within(seconds, lambda: socket.getaddrinfo(name, None), f"resolve {name}")
    except (OSError, UnicodeError):
        return False
    return True
