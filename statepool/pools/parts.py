"""
The *parts* of a state: for an image, its chain, tip first; for a machine, its manifest, and then
the chains of all states that it lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TypeVar

from statepool.model.manifest import Kind, Manifest
from statepool.pools.fold import Fold, member_id, member_ids
from statepool.pools.pool import Pool

T = TypeVar("T")


def parts_in(fold: Fold, manifest: Manifest) -> tuple[Manifest, ...]:
    """:returns: the parts of a state of a fold"""
    if manifest.kind is not Kind.MACHINE:
        return fold.chain(manifest)
    chains = (
        fold.chain(fold.states[member_id(manifest, name)]) for name in sorted(manifest.members)
    )
    return (manifest, *(link for chain in chains for link in chain))


def parts_of(pool: Pool, manifest: Manifest) -> tuple[Manifest, ...]:
    """
    :param manifest: of a state that was in the pool a moment ago
    :returns: its parts
    :raises NotFound: the state has been removed meanwhile
    """
    if manifest.kind is not Kind.MACHINE:
        return pool.chain_of(manifest)
    fold = pool.fold(manifest.object)
    if any(member not in fold.states for member in member_ids(manifest)):
        raise pool.missing(manifest.id)
    return parts_in(fold, manifest)


def chains_of(parts: Iterable[T], manifest: Callable[[T], Manifest]) -> list[tuple[T, ...]]:
    """
    :param parts: the parts of a state, or objects for them
    :param manifest: returns the manifest of such an object
    :returns: the chains among them, each tip first
    """

    def chain(part: T) -> tuple[str, Kind]:
        return manifest(part).object, manifest(part).kind

    return [tuple(found) for (_, kind), found in groupby(parts, chain) if kind is not Kind.MACHINE]
