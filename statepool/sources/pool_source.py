"""Pools as sources: the states in their logs, and the files that other tools have put there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

from attrs import frozen

from statepool.errors import IntegrityError, NotFound, StatePoolError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.outcomes import Listed, Listing
from statepool.model.scope import Scope
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.pools.parts import parts_in
from statepool.pools.pool import Pool
from statepool.pools.view import Unmanaged
from statepool.sources.source import Member, RemoteChain, Source, with_parents
from statepool.sources.unmanaged import Looked, token_of, unmanaged_chain
from statepool.transports.base import Transport
from statepool.transports.registry import open_transport


@frozen
class PoolSource(Source):
    """
    A pool that the cache can be filled from.

    :param pool: the pool
    :param name: what the user calls it
    :param scope: how far it is
    :param authority: whether it is right where sources have different content under one name
    """

    pool: Pool
    name: str
    scope: Scope = Scope.SHARED
    authority: bool = False

    @property
    def transport(self) -> Transport:
        return self.pool.transport

    def require(self) -> None:
        self.pool.require()

    def resolve(self, state: StateId) -> RemoteChain | None:
        """
        Resolve a state, as every source: a state in the log takes precedence over a file of another
        tool.
        """
        fold = self.pool.fold(state.machine)
        manifest = fold.states.get(state)
        if manifest is not None:
            members = tuple(
                Member(part, layout.data(part.digest) if part.digest is not None else "")
                for part in parts_in(fold, manifest)
            )
            return RemoteChain(self, members, managed=True, token=_log_token(fold))
        self.pool.require()
        if state.kind is Kind.IMAGE and (chain := unmanaged_chain(self.pool, state, fold)):
            return RemoteChain(self, chain, managed=False, token=token_of(self.pool, chain))
        return None

    def is_unchanged(self, state: StateId, token: str) -> bool:
        """
        Return whether the state is unchanged, as every source: for a state in the log, the log
        tells.
        """
        if token.startswith(_LOG):
            return _log_token(self.pool.fold(state.machine)) == token
        return Source.is_unchanged(self, state, token)

    def states(self, machine: str | None = None) -> Listing:
        """
        List the states, as every source. The listing of all machines takes a number of round trips
        that does not grow with the number of machines.
        """
        return listing(self.pool, machine) if machine is not None else listings(self.pool)

    def has_bytes(self, digest: Digest) -> bool:
        return self.pool.has_bytes(digest)

    def to_change(self) -> Pool:
        return self.pool


def pools_of(sources: Iterable[Source]) -> list[Pool]:
    """:returns: the pools among some sources, in their order"""
    return [source.pool for source in sources if isinstance(source, PoolSource)]


_LOG = "log:"


def _log_token(fold: Fold) -> str:
    """:returns: a token that changes with every record of a machine"""
    return f"{_LOG}{fold.number}:{fold.nonces.get(fold.number, '')}"


Place = str | os.PathLike[str] | Location
"""A pool as a caller names it: a path, or anything that :meth:`Location.parse` reads."""


def open_pool(place: Place, settings: Settings) -> Pool:
    """
    :param settings: the settings, among them how other hosts are reached
    :returns: a pool, of which nothing has been read yet
    :raises InvalidLocation: the place is no location
    """
    location = place if isinstance(place, Location) else Location.parse(os.fsdecode(place))
    return Pool(
        open_transport(location, settings),
        max_depth=settings.max_depth,
        lock_timeout=settings.lock_timeout,
    )


def listing(pool: Pool, machine: str) -> Listing:
    """
    :returns: all states of a machine in one pool, with the problems of states that cannot be used,
        and a warning for what cannot be read
    :raises IntegrityError: the log of the machine cannot be used
    """
    return _listed(pool, Looked(pool, pool.folds([machine])), {})


def listings(pool: Pool) -> Listing:
    """
    List the states of all machines, as :func:`listing`, in a number of round trips that does not
    grow with the number of machines.

    :returns: the states, and a warning for each log that cannot be used
    """
    folds, damaged = pool.usable_folds(pool.machines())
    return _listed(pool, Looked(pool, folds), damaged)


def _listed(pool: Pool, looked: Looked, damaged: Mapping[str, IntegrityError]) -> Listing:
    where = (str(pool.location),)
    found: list[Listed] = []
    for machine, fold in looked.folds.items():
        found += [Listed(manifest, where) for manifest in fold.states.values()]
        found += [
            _listed_unmanaged(pool, unmanaged, fold, looked)
            for unmanaged in looked.unmanaged[machine]
        ]
    left_out = [f"{machine} in {pool} is left out: {error}" for machine, error in damaged.items()]
    return Listing(
        found,
        [*left_out, *(f"files of other tools are left out: {error}" for error in looked.closed)],
    )


def _listed_unmanaged(pool: Pool, unmanaged: Unmanaged, fold: Fold, looked: Looked) -> Listed:
    where = (str(pool.location),)
    state = unmanaged.id
    bare = Manifest(
        object=state.object, state=state.state, kind=state.kind, size=unmanaged.stat.size
    )
    if state.kind is not Kind.IMAGE:
        return Listed(bare, where, managed=False)

    def listed() -> Listed:
        if not (chain := unmanaged_chain(pool, state, fold, looked)):
            raise NotFound(
                f"{state} in {pool} was removed meanwhile",
                object=str(state),
                pool=str(pool),
                hint="look again",
            )
        return Listed(with_parents(chain[:2])[0], where, managed=False)

    return _or_problem(listed, bare, where)


def _or_problem(make: Callable[[], Listed], bare: Manifest, where: tuple[str, ...]) -> Listed:
    try:
        return make()
    except StatePoolError as error:
        return Listed(bare, where, managed=False, problem=error.message)
