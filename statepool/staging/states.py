"""
States of a peer come as chains into a pool in its directory of the day.

Bytes that a pool of the same day, or of the day before it that was staged, has already are not
copied: they get a second name. The names of bytes are their digests, and bytes never change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase

from attrs import frozen

from statepool.beneath import NO_LINKS, link
from statepool.copying.sync import Sync
from statepool.errors import NotFound, StatePoolError, TransportError
from statepool.model.manifest import Manifest
from statepool.model.outcomes import SyncAction
from statepool.model.progress import SILENT, Progress
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.sources.pool_source import open_pool
from statepool.staging.day import Day
from statepool.staging.files import Brought, StagedFile
from statepool.staging.ready import unreachable
from statepool.staging.settings import Peer


def stage_states(day: Day, peer: Peer, settings: Settings, progress: Progress = SILENT) -> Brought:
    """
    :param peer: has states
    :param progress: told of the bytes
    :returns: what has come; its files are the states, with the digests of their bytes
    :raises NotFound: the peer has no state of such an object
    :raises NotReady: its pool cannot be reached
    :raises TransportError: a state could not be copied
    """
    origin = open_pool(peer.location, settings)
    try:
        origin.require()
    except TransportError as error:
        raise unreachable(peer, error) from error
    objects = _objects(origin, peer.objects)
    if not objects:
        raise NotFound(
            f"no object in {origin} matches {' or '.join(peer.objects)}",
            hint="look at its states with statepool show",
            pool=str(origin),
        )
    day.staging.make(day.below(peer.name))
    target = open_pool(f"{day}/{peer.name}", settings)
    target.create()
    others = _Others(day, peer.name, settings)
    sent = new = 0
    failed: list[str] = []
    for name in objects:
        others.lend(target, _manifests(origin, name))
        for state in Sync(origin, target, progress=progress).run(name).states:
            new += state.action is SyncAction.COPIED
            sent += state.bytes
            if state.action is SyncAction.FAILED:
                failed.append(f"{state.object} {state.state}: {state.error}")
    if failed:
        raise TransportError(
            f"{len(failed)} of the states of {peer.name} could not be copied: {failed[0]}",
            hint="look at its pool with statepool verify",
            pool=str(origin),
        )
    staged = [
        StagedFile(f"{one.object} {one.state}", one.size, str(one.digest or ""))
        for name in objects
        for one in _manifests(target, name)
    ]
    return Brought(tuple(staged), new=new, sent=sent)


def is_pool(day: Day, name: str) -> bool:
    """:returns: whether a peer's directory of a day is a pool"""
    return day.staging.files.stat(day.below(name, layout.POOL_FILE)) is not None


def _objects(pool: Pool, patterns: tuple[str, ...]) -> list[str]:
    found = {
        manifest.object
        for machine in pool.machines_of(None)
        for manifest in pool.fold(machine).states.values()
    }
    return sorted(name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns))


def _manifests(pool: Pool, object: str) -> Iterator[Manifest]:
    machine = object.partition("/")[0]
    return (one for one in pool.fold(machine).states.values() if one.object == object)


@frozen
class _Others:
    """Other pools of the day, and those of the last day before it."""

    day: Day
    name: str
    settings: Settings

    def _pools(self) -> Iterator[Pool]:
        staging = self.day.staging
        before = [one for one in staging.days() if one.path < self.day.path][-1:]
        for one in (self.day, *before):
            for entry in sorted(entry.name for entry in staging.files.scan(one.path)):
                if (one, entry) != (self.day, self.name) and is_pool(one, entry):
                    yield open_pool(f"{one}/{entry}", self.settings)

    def lend(self, target: Pool, manifests: Iterable[Manifest]) -> None:
        """Give bytes that another pool has a name in this one, too."""
        wanted = {one.digest for one in manifests if one.digest is not None}
        pools = list(self._pools()) if wanted else []
        for digest, pool in itertools.product(wanted, pools):
            if target.has_bytes(digest):
                continue
            with suppress(StatePoolError):  # a damaged pool of another day: the bytes are copied
                if not pool.has_bytes(digest):
                    continue
            path = layout.data(digest)
            one, other = pool.transport.beneath(path), target.transport.beneath(path)
            assert one is not None
            assert other is not None
            try:
                link(one, other)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
