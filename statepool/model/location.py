"""
The address of a pool.

The printed form of a location parses to an equal location. A relative path of a local location is
made absolute when it is parsed, so that a location means the same in every working directory.
"""

from __future__ import annotations

import os
import re
import urllib.parse

from attrs import field, frozen

from statepool.errors import InvalidLocation

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\Z")
_PLAIN = re.compile(r"[A-Za-z0-9_./+-]*\Z")
"""Most paths: those in which nothing has to be quoted."""
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]*\Z")


def _as_named_here(path: str) -> str:
    """
    Normalise the bytes of a path that are not valid text: they are kept as surrogates, as in file
    names of Python (PEP 383), and in one form only.
    """
    try:
        return os.fsdecode(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise InvalidLocation(f"no file can be named so: {path!r}") from error


@frozen(order=True)
class Location:
    """
    The address of a pool.

    :param scheme: which transport reaches it: ``file``, ``link``, ``ssh``, or one that a plug-in
        registers
    :param path: the directory of the pool, absolute
    :param host: the host, if the scheme has one; an IPv6 address without brackets
    :param user: the account on that host
    :param port: the TCP port of that host
    """

    scheme: str
    path: str = field(converter=_as_named_here)
    host: str | None = None
    user: str | None = None
    port: int | None = None
    _text: str = field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not self.path.startswith("/"):
            raise InvalidLocation(f"the path of a location must be absolute: {self.path!r}")
        if any(ord(character) < 32 or ord(character) == 127 for character in self.path):
            raise InvalidLocation(f"a location cannot contain control characters: {self.path!r}")
        if self.host is not None and not (_HOST.match(self.host) or _ADDRESS.match(self.host)):
            raise InvalidLocation(f"not a host name or address: {self.host!r}")
        if self.user is not None and not _USER.match(self.user):
            raise InvalidLocation(f"not a user name: {self.user!r}")
        if self.port is not None and not 0 < self.port < 65536:
            raise InvalidLocation(f"not a TCP port: {self.port}")
        if self.host is None and (self.user is not None or self.port is not None):
            raise InvalidLocation("a location with a user or a port needs a host")
        if self.is_local and self.host is not None:
            raise InvalidLocation(
                f"{self.scheme}:// takes no host, only a path: {self.scheme}:///path"
            )
        if self.scheme == "ssh" and self.host is None:
            raise InvalidLocation("ssh:// needs a host: ssh://user@host:port/path")
        # computed once: the text names the source in each note and comparison
        object.__setattr__(self, "_text", self._written())

    @property
    def is_local(self) -> bool:
        """Whether the pool is in a file system of this host."""
        return self.scheme in ("file", "link")

    def __str__(self) -> str:
        return self._text

    def _written(self) -> str:
        # A shell must read the text as one word without more quotes: many hints contain it.
        path = (
            self.path
            if _PLAIN.match(self.path)
            else urllib.parse.quote(os.fsencode(self.path), safe="/+:@~,=")
        )
        if self.host is None:
            return f"{self.scheme}://{path}"
        user = f"{self.user}@" if self.user is not None else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port is not None else ""
        return f"{self.scheme}://{user}{host}{port}{path}"

    @classmethod
    def parse(cls, text: str) -> Location:
        """
        :param text: a path, a URL, or one of avocado-i2n's forms: ``:/path`` (local), ``:;/path``
            (link), ``host:/path`` (SSH)
        :raises InvalidLocation: the text is none of these
        """
        if not text:
            raise InvalidLocation("a location cannot be empty")
        match = _SCHEME.match(text)
        if match:
            return cls._parse_url(match[1].lower(), text[match.end() :], text)
        if text.startswith(":;/"):
            return cls("link", _normal(text[2:]))
        if text.startswith(":/"):
            return cls("file", _normal(text[1:]))
        host, colon, path = text.partition(":")
        if (
            colon
            and "/" not in host
            and "@" not in host
            and not host.startswith("[")
            and path.startswith("/")
        ):
            return cls("ssh", _normal(path), host=host)
        if colon and "/" not in host and (meant := _as_url(text)) is not None:
            raise InvalidLocation(f"{text!r} is not a location", hint=f"write {meant}")
        if colon and "/" not in host:
            raise InvalidLocation(
                f"{text!r} is not a location",
                hint=(
                    "write /path, file:///path, link:///path or ssh://user@host:port/path; ./"
                    " before a path with a colon"
                ),
            )
        named = _as_named_here(text)
        if "\0" in named:
            raise InvalidLocation(f"a location cannot contain control characters: {text!r}")
        return cls("file", _normal(os.path.abspath(os.path.expanduser(named))))

    @classmethod
    def _parse_url(cls, scheme: str, rest: str, text: str) -> Location:
        if "?" in rest or "#" in rest:
            raise InvalidLocation(
                f"a location has no query and no fragment: {text!r}",
                hint="write %3F for ? and %23 for #",
            )
        authority, slash, path = rest.partition("/")
        if not slash:
            raise InvalidLocation(f"{text!r} has no path", hint=f"write {scheme}://.../path")
        user: str | None = None
        if "@" in authority:
            user, _, authority = authority.rpartition("@")
            user = urllib.parse.unquote(user)
            if ":" in user:
                raise InvalidLocation(
                    "a location holds no password", hint="use a key, an agent or the configuration"
                )
        host, port = _host_and_port(authority, text)
        named = os.fsencode(_as_named_here(path))
        return cls(
            scheme,
            _normal("/" + os.fsdecode(urllib.parse.unquote_to_bytes(named))),
            host=host or None,
            user=user,
            port=port,
        )


def _host_and_port(authority: str, text: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::([0-9]{1,5}))?", authority)
    if not match and re.fullmatch(r"[^:\[\]]+:[^0-9]*", authority):
        host, _, path = authority.partition(":")
        meant = text.replace(authority, f"{host}/{path}" if path else host, 1)
        raise InvalidLocation(
            f"what stands behind the colon in {text!r} is no port",
            hint=f"leave the colon out: {meant}",
        )
    if not match:
        raise InvalidLocation(
            f"cannot read the host and port in {text!r}",
            hint="write an IPv6 address in brackets: ssh://[::1]:22/path",
        )
    return match[1] or match[2] or "", int(match[3]) if match[3] else None


def _as_url(text: str) -> str | None:
    """:returns: the URL for a text in the form of ``scp``; None if there is none"""
    match = re.fullmatch(r"((?:[^/:@]+@)?(?:\[[^\]/]+\]|[^/:@]+)):(/.*)", text)
    try:
        return (
            str(Location.parse(f"ssh://{match[1]}{urllib.parse.quote(os.fsencode(match[2]))}"))
            if match is not None
            else None
        )
    except InvalidLocation:
        return None


def _normal(path: str) -> str:
    """
    Remove doubled and trailing slashes. ``..`` stays, and the file system resolves it, since the
    component before it may be a symbolic link.
    """
    return re.sub(r"/+", "/", path).rstrip("/") or "/"
