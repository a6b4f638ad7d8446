"""
Caches that refer to the files of a pool (``link://``) instead of copying them: the records of their
uses, and what these records forbid.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from typing import Any

from statepool.errors import InUse, InvalidLocation, MissingFile, NoSpace, TransportError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.pools.records import decode
from statepool.pools.writer import Writer
from statepool.transports.base import Transport
from statepool.transports.registry import open_transport

UNSETTLED = 3600
"""
How long a use counts even if the link is missing, in seconds: it is written before the link is
made.
"""


def _name(digest: Digest, cache: str, machine: str) -> str:
    user = Digest.of_text(os.fsencode(f"{machine}:{cache}")).hex[:16]
    return f"{layout.USES}/{digest.file_name}.{user}.json"


def note_use(there: Transport, digest: Digest, cache: os.PathLike[str] | str) -> None:
    """
    Record that a cache is about to refer to bytes of a pool, or does so already.

    In a pool that cannot be written, nothing is recorded: the next get repairs a dead link.
    """
    here = Writer.current()
    path = _name(digest, os.fspath(cache), here.machine)
    data = {
        "format": layout.FORMAT,
        "digest": str(digest),
        "cache": os.fspath(cache),
        "host": here.host,
        "machine": here.machine,
    }
    with suppress(TransportError, NoSpace):
        if there.stat(path) is None:  # else it was recorded before
            there.create(path, json.dumps(data).encode() + b"\n")


def forget_use(pool: Pool, digest: Digest, cache: os.PathLike[str]) -> None:
    """Remove the record of a cache that does not refer to bytes of a pool any more."""
    with suppress(TransportError):
        _forget(
            pool,
            _name(digest, os.fspath(cache), Writer.current().machine),
            digest,
            os.fspath(cache),
        )


def _forget(pool: Pool, path: str, digest: Digest, cache: str) -> None:
    pool.transport.remove(path)
    if _refers(cache, digest):
        # another process made the link meanwhile, and found the record, which was not removed yet
        note_use(pool.transport, digest, cache)


def _refers(cache: str, digest: Digest) -> bool:
    """
    Return whether a cache of this host has a link to these bytes. If this account may not look into
    the cache, the answer is True, so that nothing is taken from that cache.
    """
    try:
        return stat.S_ISLNK(os.lstat(os.path.join(cache, layout.data(digest))).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        return True


def referred(source: str | None) -> Pool | None:
    """
    :param source: the location of a pool, if one is known
    :returns: the pool, if caches refer to its files instead of copying them; else None
    """
    try:
        location = Location.parse(source or "")
    except InvalidLocation:
        return None
    return Pool(open_transport(location)) if location.scheme == "link" else None


def users(pool: Pool) -> dict[Digest, list[str]]:
    """
    Find the bytes of a pool to which caches refer. Remove records of caches of this host that do
    not refer to the bytes any more.

    :returns: the caches, by digest
    """
    found: dict[Digest, list[str]] = {}
    for entry in pool.transport.scan(layout.USES):
        path = f"{layout.USES}/{entry.name}"
        if not entry.name.endswith(".json"):
            continue
        try:
            data = decode(pool.transport.read(path, 0, 1 << 16), f"{pool.location}/{path}")
        except MissingFile:
            continue
        digest, cache, host = (
            Digest.parse(str(data.get("digest"))),
            str(data.get("cache")),
            str(data.get("host")),
        )
        if _is_of_this_host(data) and _is_over(pool, path, digest, cache):
            _forget(pool, path, digest, cache)
            continue
        found.setdefault(digest, []).append(f"{cache} on {host}")
    return found


def _is_of_this_host(use: dict[str, Any]) -> bool:
    """
    Return whether the cache of a use is on this host; older versions wrote only the host's name.
    """
    here = Writer.current()
    return bool(
        use["machine"] == here.machine if "machine" in use else use.get("host") == here.host
    )


def _is_over(pool: Pool, path: str, digest: Digest, cache: str) -> bool:
    """Return whether a use by a cache of this host has ended."""
    if _refers(cache, digest):
        return False
    if not os.path.isdir(os.path.join(cache, layout.OURS)):
        return True  # the cache was removed: it exists before any use
    use = pool.transport.stat(path)
    return use is None or pool.now() - use.mtime_ns / 1e9 > UNSETTLED


def linked_roots(pool: Pool) -> frozenset[Digest]:
    """:returns: the bytes of a pool to which caches refer"""
    return frozenset(users(pool))


def refuse_linked(pool: Pool, digests: set[Digest]) -> None:
    """
    Refuse to remove bytes of a pool to which a cache refers.

    :raises InUse: a cache refers to some of these bytes
    """
    found = (
        {digest: caches for digest, caches in users(pool).items() if digest in digests}
        if digests
        else {}
    )
    for caches in found.values():
        raise InUse(
            f"the cache {caches[0]} refers to these bytes of {pool.location}",
            pool=str(pool.location),
            hint="unset the state in that cache first",
        )
