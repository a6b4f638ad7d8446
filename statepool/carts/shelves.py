"""Pools that are served read-only: their logs, and the bytes of their states."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attrs import frozen

from statepool import ConfigError, LocalTransport, Location, NotAPool, NotFound, TransportError
from statepool.carts.archives import check_plain
from statepool.carts.sending import Content
from statepool.carts.spans import Span, spans

_OURS = ".statepool"
_SHOWN = ("pool.json", "data", "log")
"""
The served entries of a pool's directory: all others are work in progress, or only for its own host.
"""


@frozen
class Found:
    """
    An opened file.

    :param content: its bytes
    :param close: closes the file
    """

    content: Content
    close: Callable[[], None]


class Shelves:
    """
    The pools that are served.

    :param pools: their directories by name
    :raises ConfigError: a pool is not a directory of this host
    :raises NotAPool: a directory is no pool
    """

    def __init__(self, pools: Mapping[str, str], step: int) -> None:
        self._step = step
        self._pools: dict[str, LocalTransport] = {}
        for name, place in pools.items():
            location = Location.parse(os.path.expanduser(place))
            if location.scheme != "file":
                hint = "name a directory"
                raise ConfigError(f"the pool {name} is not on this host: {place}", hint=hint)
            transport = LocalTransport(location)
            if transport.stat(f"{_OURS}/pool.json") is None:
                hint = f"statepool init {place}, or is its file system not mounted?"
                raise NotAPool(f"there is no pool at {place}", pool=place, hint=hint)
            self._pools[name] = transport

    def find(self, name: str, path: str) -> Found | list[dict[str, Any]]:
        """
        :param path: of a file, or of a directory if it ends with a slash
        :returns: the file, or what is in the directory
        :raises NotFound: there is nothing to serve at this path
        """
        if name not in self._pools:
            raise NotFound(f"no pool {name} is served", hint="see --pool")
        pool, plain = self._pools[name], path.rstrip("/")
        if plain:
            check_plain(plain, "the path")
        parts = plain.split("/")
        if parts[0] == _OURS and len(parts) > 1 and parts[1] not in _SHOWN:
            raise _missing(name, path)
        if plain != path or not plain:
            try:
                return _listed(pool, plain)
            except TransportError as error:
                raise _missing(name, path) from error
        return self._open(pool, name, plain)

    def _open(self, pool: LocalTransport, name: str, path: str) -> Found:
        try:
            found = pool.stat(path)
            if found is not None and found.kind == "link":
                # In the view: a link to bytes of this pool. Links are followed nowhere else.
                target = pool.readlink(path).rpartition("../")[2]
                path = target if target.startswith(f"{_OURS}/data/") else path
            opened = pool.beneath(path).open(os.O_RDONLY | os.O_NONBLOCK)
        except (OSError, TransportError) as error:
            raise _missing(name, path) from error
        status = os.fstat(opened.number)
        if not stat.S_ISREG(status.st_mode):
            opened.close()
            raise _missing(name, path)
        is_bytes = path.startswith(f"{_OURS}/data/")
        etag = os.path.basename(path) if is_bytes else f"{status.st_size}-{status.st_mtime_ns}"

        def read(start: int, stop: int) -> Iterator[Span]:
            return spans(opened.number, start, stop, self._step, path)

        return Found(Content(status.st_size, etag, status.st_mtime, read), opened.close)


def _listed(pool: LocalTransport, path: str) -> list[dict[str, Any]]:
    entries = sorted(pool.scan(path), key=lambda entry: entry.name)
    shown = [entry for entry in entries if path != _OURS or entry.name in _SHOWN]
    return [{"name": entry.name, "kind": str(entry.kind)} for entry in shown]


def _missing(name: str, path: str) -> NotFound:
    return NotFound(f"there is no file {path} in the pool {name}", hint=f"list /pools/{name}/")
