"""
Sources, from which a cache is filled: the interface, and the chain of a state that a source offers.

A source is asked for chains and listings, and its transport moves the files. All code that chooses
among sources and fetches from them uses nothing else. So a source need not be a pool with a log,
and need not be writable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from attrs import evolve, frozen

from statepool.errors import InvalidLocation, MissingFile, ReadOnlyPool, TransportError, UsageError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest, Parent, StateId
from statepool.model.outcomes import Listing
from statepool.model.scope import Scope
from statepool.pools.pool import Pool
from statepool.transports.base import Transport


class Source(ABC):
    """
    A place from which the cache can be filled.

    :ivar name: what the user calls it
    :ivar scope: how far it is
    :ivar authority: whether it is right where sources have different content under one name
    """

    name: str
    scope: Scope
    authority: bool

    # -- what is there -----------------------------------------------------------------------------

    @property
    @abstractmethod
    def transport(self) -> Transport:
        """The transport that moves its files: those that the members of its chains name."""

    @abstractmethod
    def require(self) -> None:
        """
        Check with a small request that the source is there.

        :raises NotAPool: there is no such source at this place
        :raises TransportError: it cannot be reached
        """

    @abstractmethod
    def resolve(self, state: StateId) -> RemoteChain | None:
        """
        :returns: what the source has of a state, or None if it does not have the state
        :raises NotAPool: the place is no source
        :raises UnsafeImage: the state is a file of another tool, and not safe to use
        """

    @abstractmethod
    def states(self, machine: str | None = None) -> Listing:
        """
        :param machine: only list the states of this machine
        :returns: all states, and a warning for what cannot be read
        """

    def is_unchanged(self, state: StateId, token: str) -> bool:
        """
        :returns: whether the source certainly has the same of a state as when it gave this token.
            This costs only a small request, where that is possible.
        """
        found = self.resolve(state)
        return found is not None and found.token == token

    def has_bytes(self, digest: Digest) -> bool:
        """
        Look for bytes that :meth:`transport` does not see since a collector had moved them aside,
        and bring them back.

        :returns: whether the source has them
        """
        return False

    # -- changing it -------------------------------------------------------------------------------

    def to_change(self) -> Pool:
        """
        :returns: the pool, if the source is one
        :raises ReadOnlyPool: the source is not a pool, and takes no states
        """
        raise ReadOnlyPool(
            f"the source {self} can only be read",
            pool=str(self),
            hint="name another source, or permit others with --scope",
        )

    # -- what all have -----------------------------------------------------------------------------

    @property
    def location(self) -> Location:
        """The location of the source."""
        return self.transport.location

    def __str__(self) -> str:
        return str(self.transport.location)

    def is_called(self, name: str) -> bool:
        """:returns: whether ``name`` means this source: it is the name or the location"""
        if name in (self.name, str(self)):
            return True
        try:
            return Location.parse(name) == self.location
        except InvalidLocation:
            return False

    def require_whole(self, chain: RemoteChain) -> None:
        """
        Check that the source has the bytes of an offered chain. A log can list a state although its
        bytes were deleted; another source may still have them.

        :raises MissingFile: bytes are missing
        """
        if not chain.managed:
            return  # it was read file by file
        stats = self.transport.stat_many([member.path for member in chain.members])
        for member, stat in zip(chain.members, stats, strict=True):
            digest = member.manifest.digest
            if stat is None and digest is not None and not self._has_aside(digest):
                raise MissingFile(
                    f"{self} does not have the bytes of {member.manifest.id}, on which"
                    f" {chain.members[0].manifest.id} stands",
                    object=member.manifest.object,
                    state=member.manifest.state,
                    pool=str(self),
                    path=member.path,
                    hint=f"look at the pool with: statepool --source {self} doctor",
                )

    def _has_aside(self, digest: Digest) -> bool:
        try:
            return self.has_bytes(digest)
        except TransportError:
            return False  # only an account that may write there can bring them back

    def close(self) -> None:
        """Close the connections; the next use makes new ones."""
        self.transport.close()


@frozen
class Member:
    """
    One part of an offered state.

    :param manifest: of the part; without a digest if another tool put it there
    :param path: the file in the source; empty for a machine state itself, which has none
    """

    manifest: Manifest
    path: str


@frozen
class RemoteChain:
    """
    A state that a source offers, with all that backs it.

    :param source: the source
    :param members: its parts, in the order of :mod:`~statepool.pools.parts`
    :param managed: whether the source's log knows it
    :param token: changes when the offer changes
    """

    source: Source
    members: tuple[Member, ...]
    managed: bool
    token: str


def require_distinct(cache: Pool, sources: Sequence[Source]) -> None:
    """:raises UsageError: a pool is named twice, or two sources have one name"""
    seen = {cache.transport.identity: "the cache"}
    for source in sources:
        identity = source.transport.identity
        if identity in seen:
            raise UsageError(
                f"the source {source.name} is {seen[identity]} itself", hint="name each pool once"
            )
        seen[identity] = f"the source {source.name}"
    named: dict[str, Source] = {}
    for source in sources:
        other = named.setdefault(source.name, source)
        if other is not source:
            raise UsageError(
                f"two sources are named {source.name!r}: {other} and {source}",
                hint="give each a name of its own",
            )


UNKNOWN = Digest("blake3", "0" * 64)
"""The digest that represents a parent which was not hashed yet."""


def with_parents(chain: tuple[Member, ...]) -> tuple[Manifest, ...]:
    """:returns: the manifests of an offered chain, each naming its parent, tip first"""
    below = [*(member.manifest for member in chain[1:]), None]
    return tuple(
        (
            evolve(member.manifest, parent=Parent(parent.state, parent.digest or UNKNOWN))
            if parent is not None
            else member.manifest
        )
        for member, parent in zip(chain, below, strict=True)
    )
