"""Sending bytes over HTTP: all of them, a range, or nothing if the client has them already."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from attrs import frozen
from flask import Request, Response

from statepool.carts.spans import Body, Span

OCTETS = "application/octet-stream"


@frozen
class Content:
    """
    Content that can be sent.

    :param length: length in bytes
    :param etag: a strong validator
    :param modified: seconds since the epoch
    :param read: yields the bytes between two offsets, and parts of files that have them
    :param name: the file name under which a client should save them
    """

    length: int
    etag: str
    modified: float
    read: Callable[[int, int], Iterator[bytes | Span]]
    name: str | None = None


def send(request: Request, content: Content, close: Callable[[], None]) -> Response:
    """
    :param close: called when the last byte is sent, or the client has disconnected
    :returns: the response with the requested part of the content
    """
    start, stop, status = 0, content.length, 200
    if request.if_none_match.contains(content.etag):
        status = 304
    elif request.range is not None and _if_range(request, content):
        wanted = request.range
        if wanted.units == "bytes" and len(wanted.ranges) == 1:
            found = wanted.range_for_length(content.length)
            status = 206 if found is not None else 416
            start, stop = found if found is not None else (0, 0)
    response = Response(None, status, mimetype=OCTETS)
    if status in (200, 206) and request.method != "HEAD":
        response.response = Body(content.read(start, stop), close)
        response.direct_passthrough = True  # the server gets the body itself
    else:
        response.call_on_close(close)
    response.set_etag(content.etag)
    response.last_modified = datetime.fromtimestamp(content.modified, UTC)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Cache-Control"] = "private, no-cache"
    if status in (200, 206):
        response.content_length = stop - start
        if content.name is not None:
            response.headers["Content-Disposition"] = _attachment(content.name)
    if status == 206:
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.length}"
    if status == 416:
        response.headers["Content-Range"] = f"bytes */{content.length}"
    return response


def _if_range(request: Request, content: Content) -> bool:
    """:returns: whether to send a range: only if the client's first part is of the same content"""
    given = request.if_range  # empty without such a header
    if given.etag is not None:
        return given.etag == content.etag
    return given.date is None or given.date.timestamp() == int(content.modified)


def _attachment(name: str) -> str:
    """:returns: the header as Cartd sends it; a name that is not ASCII also as RFC 6266 says"""
    name = name.rpartition("/")[2][:255]
    plain = re.sub(r"[^ !#-\[\]-~]", "_", name).strip(". ") or "data.tar"
    header = f'attachment; filename="{plain}"'
    if not name.isascii() and name.isprintable():
        header += f"; filename*=UTF-8''{urllib.parse.quote(name, safe='')}"
    return header
