"""
The archive behind Pacifica's archive interface: POST stages a file, HEAD tells its status, GET
fetches it.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus

from statepool import ConfigError, IntegrityError, NotFound, TransportError
from statepool.carts.archives import Archive, Context, Part, Status, Wanted, check_plain
from statepool.carts.sinks import Sink

_LEVELS = re.compile(r"\s*\(?\s*([0-9]{1,19})\s*[,)]")
"""``X-Pacifica-Bytes-Per-Level``, as in ``(26214400,)``: the bytes at level 1 come first."""

_MOST = (1 << 63) - 1


class InterfaceArchive(Archive):
    """
    An archive of files of a Pacifica archive interface. Redirections are not followed.

    :param url: its address, ``http://`` or ``https://``
    :param timeout: timeout in seconds for an answer
    """

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url
        self._timeout = timeout

    @classmethod
    def open(cls, options: Mapping[str, object], context: Context) -> InterfaceArchive:
        """Open the archive; the option ``url`` is its address."""
        url = options.get("url")
        if set(options) == {"url"} and isinstance(url, str):
            parsed = urllib.parse.urlsplit(url)
            if parsed.scheme in ("http", "https") and parsed.hostname and not parsed.query:
                return cls(url, context.timeout)
        raise ConfigError(
            "an archive interface has one option, its URL",
            hint='write: url = "http://archive.example:8080/"',
        )

    def check(self, wanted: Wanted) -> None:
        check_plain(wanted.id, "the id")

    def stage(self, wanted: Wanted, advance: Callable[[int], None]) -> None:
        with self._ask("POST", wanted):
            pass

    def status(self, wanted: Wanted) -> Status:
        with self._ask("HEAD", wanted) as response:
            headers = response.headers
        size = _number(headers.get("X-Content-Length"))
        mtime = _time(headers.get("Last-Modified"))
        if size is None or mtime is None:
            raise TransportError(
                f"{self._url} does not say how long or how old {wanted.id} is",
                hint="X-Content-Length and Last-Modified are missing, or no numbers",
                transient=True,
            )
        level = _LEVELS.match(headers.get("X-Pacifica-Bytes-Per-Level") or "")
        on_disk = headers.get("X-Pacifica-File-Storage-Media") == "disk"
        near = on_disk or (level is not None and int(level[1]) >= size)
        return Status(near, (Part(wanted.path, size, mtime),))

    def pull(self, wanted: Wanted, part: Part, sink: Sink) -> None:
        with self._ask("GET", wanted) as response:
            while data := response.read(sink.step):
                sink.write(data)

    @contextmanager
    def _ask(self, method: str, wanted: Wanted) -> Iterator[http.client.HTTPResponse]:
        parsed = urllib.parse.urlsplit(self._url)
        secure = parsed.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert parsed.hostname is not None
        connection = kind(parsed.hostname, parsed.port, timeout=self._timeout)
        path = f"{parsed.path.rstrip('/')}/{urllib.parse.quote(wanted.id)}"
        try:
            connection.request(method, path)
            response = connection.getresponse()
            self._require_success(response, wanted)
            yield response
        except http.client.IncompleteRead as error:
            raise IntegrityError(
                f"{self._url} broke off while it sent {wanted.id}", hint="ask for it once more"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TransportError):
                raise
            reason = str(error) or type(error).__name__
            raise TransportError(
                f"cannot {method} {wanted.id} at the archive {self._url}: {reason}",
                hint="is it running?",
                transient=True,
            ) from error
        finally:
            connection.close()

    def _require_success(self, response: http.client.HTTPResponse, wanted: Wanted) -> None:
        if response.status == HTTPStatus.NOT_FOUND:
            raise NotFound(
                f"the archive {self._url} has no file {wanted.id}", hint="correct the id"
            )
        if response.status // 100 != 2:
            raise TransportError(
                f"the archive {self._url} answered {response.status} for {wanted.id}",
                hint="look at its log",
                transient=response.status >= HTTPStatus.INTERNAL_SERVER_ERROR,
            )


def _number(text: str | None) -> int | None:
    number = int(text) if text and text.isascii() and text.isdecimal() and len(text) < 20 else None
    return number if number is not None and number <= _MOST else None


def _time(text: str | None) -> float | None:
    """
    :returns: seconds since the epoch, from a number, as Pacifica sends it, or from an HTTP date
    """
    try:
        seconds = float(text or "")
    except ValueError:
        found = email.utils.parsedate_tz(text or "")
        if found is None:
            return None
        seconds = float(email.utils.mktime_tz(found))
    return seconds if 0 <= seconds < 1e12 else None
