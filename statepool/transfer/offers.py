"""
What a source has to offer: the chain of a state with the files that hold it, whether the source's log knows it or another tool put it there.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import evolve, frozen

from statepool.errors import MissingFile, StatePoolError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, Parent, StateId
from statepool.model.outcomes import Listed
from statepool.model.scope import Scope
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.pools.pool import Pool
from statepool.qcow2.chain import walk
from statepool.qcow2.files import refusal
from statepool.qcow2.header import Header, Read
from statepool.transports.base import FileKind


@frozen
class Source:
    """
    A pool that the cache can be filled from.

    :param pool: the pool
    :param name: what the user calls it
    :param scope: how far it is
    """

    pool: Pool
    name: str
    scope: Scope = Scope.SHARED

    @property
    def location(self) -> Location:
        """Where it is."""
        return self.pool.location

    def __str__(self) -> str:
        return str(self.pool.location)


@frozen
class Member:
    """
    One state of an offered chain.

    :param manifest: what is known of it; without a digest if another tool put it there
    :param path: the file in the source
    """

    manifest: Manifest
    path: str


@frozen
class Offer:
    """
    A chain that a source has.

    :param source: which
    :param members: tip first
    :param managed: whether the source's log knows it
    :param token: changes when what was offered changes
    """

    source: Source
    members: tuple[Member, ...]
    managed: bool
    token: str


def find_offer(source: Source, state: StateId) -> Offer | None:
    """
    :returns: what a source has of a state, or None if it does not have it
    :raises NotAPool: the source is none
    :raises UnsafeImage: it is a file of another tool, and not fit to be used
    """
    pool = source.pool
    fold = pool.fold(state.machine)
    manifest = fold.states.get(state)
    if manifest is not None:
        members = tuple(Member(link, layout.data(link.digest)) for link in fold.chain(manifest) if link.digest is not None)
        return Offer(source, members, managed=True, token=_log_token(fold))
    pool.require()
    if state.kind is Kind.IMAGE and (chain := unmanaged_chain(pool, state, fold)):
        return Offer(source, chain, managed=False, token=_unmanaged_token(pool, chain))
    return None


def is_unchanged(source: Source, state: StateId, token: str) -> bool:
    """:returns: whether a source surely has of a state what it had when it gave this token; at the price of a small request"""
    if token.startswith("log:"):
        return _log_token(source.pool.fold(state.machine)) == token
    offer = find_offer(source, state)
    return offer is not None and offer.token == token


def _log_token(fold: Fold) -> str:
    return f"log:{fold.number}:{fold.nonces.get(fold.number, '')}"


def _unmanaged_token(pool: Pool, chain: tuple[Member, ...]) -> str:
    stats = [pool.transport.stat(member.path) for member in chain]
    return "files:" + ",".join(f"{stat.size}-{stat.mtime_ns}-{stat.identity}" if stat is not None else "none" for stat in stats)


# -- files of other tools ----------------------------------------------------------------------------------------------------------------------------


def reader(pool: Pool, path: str) -> tuple[Read, int]:
    """
    :returns: what reads a file of a pool piece by piece, and its size in bytes
    :raises MissingFile: there is no such file
    :raises UnsafeImage: it is not a regular one
    """
    stat = pool.transport.stat(path)
    if stat is None:
        raise MissingFile(f"there is no file {path} in {pool.location}", pool=str(pool.location), path=path)
    if stat.kind is not FileKind.FILE:
        raise refusal("regular-file", f"{path} in {pool.location}", "it is not a regular file", path=path)
    return (lambda offset, size: pool.transport.read(path, offset, size)), stat.size


def unmanaged_chain(pool: Pool, state: StateId, fold: Fold) -> tuple[Member, ...]:
    """
    The chain of a state that another tool put into a pool, down to its root, or to the first state that the log knows.

    :returns: tip first; nothing if there is no such file
    :raises UnsafeImage: one of its images is not fit to be used, or is missing
    """
    path = layout.view(state)
    found = pool.transport.stat(path)
    if found is None or (found.kind is not FileKind.FILE and pool.view.is_free(state)):
        return ()  # nothing, or a link of ours that has outlived its state

    def open_image(name: str) -> tuple[Read, int]:
        below = StateId(state.object, name)
        known = fold.states.get(below)
        return reader(pool, layout.data(known.digest) if known is not None and known.digest is not None else layout.view(below))

    links = walk(state.state, open_image, max_depth=pool.max_depth, what=state.object)
    members: list[Member] = []
    for link in links:
        below = StateId(state.object, link.state)
        known = fold.states.get(below)
        if known is not None:
            return (*members, *(Member(manifest, layout.data(manifest.digest)) for manifest in fold.chain(known) if manifest.digest is not None))
        members.append(Member(unmanaged_manifest(below, link.header), layout.view(below)))
    return tuple(members)


def unmanaged_manifest(state: StateId, header: Header) -> Manifest:
    """:returns: what a header says of an image that nobody has hashed"""
    return Manifest(object=state.object, state=state.state, size=header.file_size, virtual_size=header.virtual_size, cluster_size=header.cluster_size)


# -- listings ----------------------------------------------------------------------------------------------------------------------------------------


def listing(pool: Pool, machine: str) -> list[Listed]:
    """:returns: all states of a machine in one pool, with what is wrong with those that cannot be used"""
    fold = pool.fold(machine)
    where = (str(pool.location),)
    found = [Listed(manifest, where) for manifest in fold.states.values()]
    for unmanaged in pool.unmanaged(machine):
        found.append(_listed_unmanaged(pool, unmanaged.id, fold, unmanaged.stat.size))
    return found


def _listed_unmanaged(pool: Pool, state: StateId, fold: Fold, size: int) -> Listed:
    where = (str(pool.location),)
    bare = Manifest(object=state.object, state=state.state, kind=state.kind, size=size)
    if state.kind is not Kind.IMAGE:
        return Listed(bare, where, managed=False)
    return _or_problem(lambda: Listed(with_parents(unmanaged_chain(pool, state, fold))[0], where, managed=False), bare, where)


def _or_problem(make: Callable[[], Listed], bare: Manifest, where: tuple[str, ...]) -> Listed:
    try:
        return make()
    except StatePoolError as error:
        return Listed(bare, where, managed=False, problem=error.message)


UNKNOWN = Digest("blake3", "0" * 64)
"""Stands for the digest of a parent that nobody has hashed."""


def with_parents(chain: tuple[Member, ...]) -> tuple[Manifest, ...]:
    """:returns: the manifests of an offered chain, each naming its parent, tip first"""
    below = [*(member.manifest for member in chain[1:]), None]
    return tuple(
        evolve(member.manifest, parent=Parent(parent.state, parent.digest or UNKNOWN)) if parent is not None else member.manifest
        for member, parent in zip(chain, below, strict=True)
    )
