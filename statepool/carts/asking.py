"""
Asking a service of carts, by the standard library alone: its refusals become our errors.

Nothing here imports what the service itself is made of.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.message import Message
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from attrs import define, field, frozen

from statepool import (
    AccessDenied,
    ConfigError,
    Conflict,
    NoSpace,
    NotFound,
    RefusedError,
    StatePoolError,
    TransportError,
    UsageError,
    __version__,
)

_Answer = TypeVar("_Answer")

_MOST = 256 << 20
"""Bytes of an answer in JSON at most: that is several hundred thousand files."""

_PAUSES = (0.2, 5.0)
"""Seconds between two tries: at first, and at most."""

_ERRORS: dict[int, type[StatePoolError]] = {
    HTTPStatus.BAD_REQUEST: UsageError,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: UsageError,
    HTTPStatus.UNAUTHORIZED: AccessDenied,
    HTTPStatus.FORBIDDEN: RefusedError,
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.CONFLICT: Conflict,
    HTTPStatus.INSUFFICIENT_STORAGE: NoSpace,
    HTTPStatus.INTERNAL_SERVER_ERROR: StatePoolError,
}
"""What statuses of HTTP are here; all others are errors of the way there."""

_KEYS = ("url", "token-file", "ca-file")
"""The keys of the section ``[carts]``."""

_TOKEN_HINT = "name a file with a token that the service knows: --token-file"


@define
class Patience:
    """
    How long a service may be away, as while it is restarted.

    :param seconds: that it may be away each time
    :param tell: is given what there is to say to a person
    """

    seconds: float
    tell: Callable[[str], None]
    _end: float | None = field(default=None, init=False)
    _pause: float = field(default=_PAUSES[0], init=False)

    def renew(self) -> None:
        """The service is there."""
        self._end, self._pause = None, _PAUSES[0]

    def wait(self, error: TransportError) -> None:
        """
        Wait a moment after an error.

        :raises TransportError: the error itself, if it does not pass, or the time is over
        """
        now = time.monotonic()
        if not error.transient or not self.seconds:
            raise error
        if self._end is None:
            self._end = now + self.seconds
            self.tell(f"{error.message}; trying for another {self.seconds:g} s")
        if now >= self._end:
            raise error
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _PAUSES[1])


@frozen
class Response:
    """
    An answer whose body has not been read yet.

    :param status: of HTTP
    :param headers: by their names, which are searched in whatever case
    """

    status: int
    headers: Message
    _connection: http.client.HTTPConnection
    _response: http.client.HTTPResponse
    _url: str

    def read(self, size: int) -> bytes:
        """
        :returns: the next bytes, at most so many; none at the end
        :raises TransportError: the connection broke
        """
        with _translated(self._url):
            return self._response.read1(size)

    def close(self) -> None:
        """Let go of the connection."""
        self._response.close()
        self._connection.close()


class CartService:
    """
    A service of carts, somewhere. Nothing is asked before something is wanted of it.

    :param url: where it is, ``http://`` or ``https://``
    :param token: identifies the client
    :param ca_file: PEM file with the certificates of the authorities that may vouch for the
        service; those of the system if not given
    :param timeout: seconds for which it may be silent
    :param patience: seconds for which it may be away; it is asked again meanwhile
    :param tell: is given what there is to say to a person
    :raises UsageError: the URL or the token cannot be used
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        ca_file: str | Path | None = None,
        timeout: float = 30.0,
        patience: float = 60.0,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        parts = _split(url)
        assert parts.hostname is not None
        self.url = url.rstrip("/")
        self._host, self._port, self._root = parts.hostname, parts.port, parts.path.rstrip("/")
        self._token = _check_token(token) if token is not None else None
        self._tls = _tls(ca_file) if parts.scheme == "https" else None
        self._timeout = timeout
        self._patience, self._tell = patience, tell

    def __repr__(self) -> str:
        return f"CartService({self.url!r})"

    @classmethod
    def configured(
        cls,
        layers: Iterable[tuple[str, Mapping[str, object]]],
        *,
        url: str | None = None,
        token: str | None = None,
        token_file: str | Path | None = None,
        ca_file: str | Path | None = None,
        **more: Any,
    ) -> CartService:
        """
        Return the service that the sections ``[carts]`` of configurations name.

        :param layers: such sections, each with the file that it is from, as
            :attr:`statepool.Config.carts` has them; each overrides those before it
        :param token_file: a file with the token; it comes before one that is given as it is
        :param more: as for the class itself
        :raises ConfigError: a section cannot be used
        :raises UsageError: the URL of the service is not given, or a file cannot be read
        """
        known = _from_layers(layers)
        place = url or known.get("url")
        if place is None:
            raise UsageError(
                "it is not said which service of carts is meant",
                hint="name its URL: --url, STATEPOOL_CARTS, or url in [carts] of statepool.toml",
            )
        file = token_file or (known.get("token-file") if token is None else None)
        given = _read_token(file) if file is not None else token
        return cls(place, token=given, ca_file=ca_file or known.get("ca-file"), **more)

    @property
    def tells_token(self) -> bool:
        """Whether a token passes unencrypted, and to another host."""
        return self._token is not None and self._tls is None and not _is_here(self._host)

    def patience(self) -> Patience:
        """:returns: what waits while the service is away"""
        return Patience(self._patience, self._tell)

    def patiently(self, do: Callable[[], _Answer]) -> _Answer:
        """:returns: what a function returns, once the service is there"""
        patience = self.patience()
        while True:
            try:
                return do()
            except TransportError as error:
                patience.wait(error)

    def json(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Any:
        """
        :param body: is sent as JSON
        :returns: what the service answers
        :raises StatePoolError: it refuses, or cannot be asked
        """
        data = json.dumps(body).encode() if body is not None else None

        def ask() -> Any:
            with self.opened(method, path, data) as response:
                return self._parse(_read_all(response))

        return self.patiently(ask)

    @contextlib.contextmanager
    def opened(self, *arguments: Any, **more: Any) -> Iterator[Response]:
        """As :meth:`open`, for as long as a ``with`` block lasts."""
        response = self.open(*arguments, **more)
        try:
            yield response
        finally:
            response.close()

    def open(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """
        Ask once.

        :param path: below the URL of the service, quoted
        :returns: an answer that is none of an error
        :raises StatePoolError: it is one, or the service cannot be asked
        """
        known = {"User-Agent": f"statepool/{__version__}", "Connection": "close", **(headers or {})}
        if self._token is not None:
            known["Authorization"] = f"Bearer {self._token}"
        if body is not None:
            known["Content-Type"] = "application/json"
        connection = self._connection()
        try:
            with _translated(self.url):
                connection.request(method, f"{self._root}{path}", body, known)
                found = connection.getresponse()
                response = Response(found.status, found.headers, connection, found, self.url)
            if found.status // 100 != 2:
                raise self._failure(response)
        except BaseException:
            connection.close()
            raise
        return response

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=self._timeout, context=self._tls
        )

    def _failure(self, response: Response) -> StatePoolError:
        """:returns: the error that an answer stands for"""
        status = response.status
        try:
            text = str(self._parse(_read_all(response))["message"])[:4000]
        except (TransportError, KeyError, TypeError):
            where = response.headers.get("Location", "")
            told = f"{status} {http.client.responses.get(status, '')}".rstrip()
            return TransportError(
                f"{self.url} answers {told}{f', and names {where[:200]}' if where else ''}",
                hint="is the URL that of a service of carts?",
                transient=status in (502, 503, 504),
            )
        kind = _ERRORS.get(status, TransportError)
        hint = _TOKEN_HINT if kind is AccessDenied else None
        if kind is TransportError:
            return TransportError(f"{self.url}: {text}", transient=status // 100 == 5)
        return kind(f"{self.url}: {text}", hint=hint)

    def _parse(self, data: bytes) -> Any:
        try:
            return json.loads(data, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise TransportError(
                f"{self.url} does not answer as a service of carts", hint="correct the URL"
            ) from error


def path_of(uid: str) -> str:
    """:returns: the path of a cart below the URL of its service"""
    return f"/{urllib.parse.quote(uid, safe='')}"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _is_here(host: str) -> bool:
    """:returns: whether a name or an address can only mean this host"""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_all(response: Response) -> bytes:
    parts: list[bytes] = []
    size = 0
    while data := response.read(1 << 20):
        size += len(data)
        if size > _MOST:
            raise TransportError(f"an answer has more than {_MOST} bytes", hint="correct the URL")
        parts.append(data)
    expected = response.headers.get("Content-Length")
    if expected is not None and expected.isdecimal() and size < int(expected):
        raise TransportError("the connection ended in the middle of an answer", transient=True)
    return b"".join(parts)


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise TransportError(
            f"the certificate of {url} is not trusted: {error.verify_message}",
            hint="name the certificate of the authority that vouches for it: --ca-file",
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
        raise TransportError(
            f"cannot ask {url}: {reason}",
            hint="is it running, and is the URL right?",
            transient=_passes(error),
        ) from error


def _passes(error: Exception) -> bool:
    """:returns: whether an error may be over when the service is asked again"""
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if isinstance(error, ssl.SSLError):
        return isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
    return not isinstance(error, ValueError | http.client.InvalidURL)


# -- the URL, and the token ------------------------------------------------------------------------


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.port != 0 and parts.scheme in ("http", "https") and bool(parts.hostname)
        if not usable or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError
    except ValueError as error:
        hint = "write it as in https://carts.example.org:8081"
        raise UsageError(f"{url[:200]!r} is not the URL of a service", hint=hint) from error
    if parts.username is not None or parts.password is not None:
        hint = "put the token into a file, and name it: --token-file"
        raise UsageError("the URL of a service of carts has a password in it", hint=hint)
    if parts.query or parts.fragment:
        raise UsageError(f"{url[:200]!r} has more than a place in it", hint="end it before ? or #")
    return parts


def _check_token(text: str) -> str:
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        hint = "a token is one word, as statepool carts token add has printed it"
        raise UsageError("the token cannot be used", hint=hint)
    return text


def _read_token(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text"
        raise UsageError(
            f"the token cannot be read from {path}: {reason}", hint="name a file that has it"
        ) from error


def _tls(ca_file: str | Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # that of ssl is one, too
        raise UsageError(
            f"the certificates in {ca_file} cannot be used: {error.strerror or error}",
            hint="name a PEM file with certificates of authorities",
        ) from error


def _from_layers(layers: Iterable[tuple[str, Mapping[str, object]]]) -> dict[str, str]:
    known: dict[str, str] = {}
    for where, table in layers:
        for key, value in table.items():
            if key not in _KEYS:
                hint = f"settings are {', '.join(_KEYS)}"
                raise ConfigError(f"{where}: carts.{key}: there is no such setting", hint=hint)
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{where}: carts.{key}: not a text", hint="write it in quotes")
            is_file = key.endswith("-file")
            known[key] = str(Path(where).parent / Path(value).expanduser()) if is_file else value
    return known
