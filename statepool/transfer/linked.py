"""
Caches that refer to the files of a pool (``link://``) instead of copying them: the records in which they say so, and what these forbid.
"""

from __future__ import annotations

import json
import os

from statepool.errors import FileExists, InUse, MissingFile
from statepool.model.digest import Digest
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.pools.records import decode
from statepool.pools.writer import Writer


def _name(digest: Digest, cache: str, host: str) -> str:
    return f"{layout.USES}/{digest.file_name}.{Digest.of(os.fsencode(f'{host}:{cache}')).hex[:16]}.json"


def note_use(pool: Pool, digest: Digest, cache: os.PathLike[str]) -> None:
    """
    A cache is about to refer to bytes of a pool.

    :raises TransportError: the pool cannot be written
    """
    host = Writer.current().host
    data = {"format": layout.FORMAT, "digest": str(digest), "cache": os.fspath(cache), "host": host}
    try:
        pool.transport.create(_name(digest, os.fspath(cache), host), json.dumps(data).encode() + b"\n")
    except FileExists:
        pass  # it said so before


def users(pool: Pool) -> dict[Digest, list[str]]:
    """
    Which bytes of a pool caches refer to. Records of caches of this host that do so no more are removed.

    :returns: the caches, by the bytes
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
        digest, cache, host = Digest.parse(str(data.get("digest"))), str(data.get("cache")), str(data.get("host"))
        if host == Writer.current().host and not os.path.islink(os.path.join(cache, layout.data(digest))):
            pool.transport.remove(path)
            continue
        found.setdefault(digest, []).append(f"{cache} on {host}")
    return found


def held_by_links(pool: Pool) -> frozenset[Digest]:
    """:returns: the bytes of a pool that caches refer to"""
    return frozenset(users(pool))


def refuse_linked(pool: Pool, digests: set[Digest]) -> None:
    """
    :raises InUse: a cache refers to some of these bytes
    """
    found = {digest: caches for digest, caches in users(pool).items() if digest in digests} if digests else {}
    for caches in found.values():
        raise InUse(
            f"the cache {caches[0]} refers to these bytes of {pool.location}",
            pool=str(pool.location),
            hint="unset the state in that cache first",
        )
