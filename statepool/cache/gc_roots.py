"""
Garbage collection roots of any pool: the bytes that must stay although no record needs them.

A source can be the cache of a neighbour: then machines run from it.
"""

from __future__ import annotations

from functools import partial

from statepool.cache.cache import file_in
from statepool.cache.chains import CHAINS, Chains
from statepool.cache.linked import linked_roots
from statepool.errors import MissingFile
from statepool.model.digest import Digest
from statepool.pools.pool import Pool
from statepool.transports.base import FileKind


def gc_roots(pool: Pool) -> frozenset[Digest]:
    """
    :returns: the bytes that back working images, if the pool is a cache, and those to which other
        caches refer
    """
    return linked_roots(pool) | _under_working_images(pool)


def _under_working_images(pool: Pool) -> frozenset[Digest]:
    here = pool.transport.beneath("")
    if here is not None:
        return Chains(here.tree, partial(file_in, pool), changes=False).gc_roots()
    # This host cannot tell which working images of another host still exist: each chain that was
    # made for one counts.
    chains = [
        f"{CHAINS}/{entry.name}"
        for entry in pool.transport.scan(CHAINS)
        if entry.kind is FileKind.DIRECTORY
    ]
    links = [
        f"{chain}/{entry.name}"
        for chain, entries in zip(chains, pool.transport.scan_many(chains), strict=True)
        for entry in entries
        if entry.kind is FileKind.LINK
    ]
    found = (_target(pool, link) for link in links)
    return frozenset(digest for digest in found if digest is not None)


def _target(pool: Pool, link: str) -> Digest | None:
    try:
        return Digest.from_file_name(pool.transport.readlink(link).rpartition("/")[2])
    except MissingFile:
        return None  # its owner removes the chain
