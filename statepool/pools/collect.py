"""
Taking away what nobody needs: bytes that no record names, and what crashed writers left.

Bytes go in three steps. They are renamed into ``trash/``; *then* the markers and the log are read;
whoever needs them after all gets them back, otherwise they are deleted. A writer that comes to need
them at the same moment either left its marker before we looked, or finds them missing and fetches
them from the trash itself.

Where files cannot be renamed, the first step is a marker that condemns them, and they are deleted
where they lie. A writer that finds its bytes condemned puts a spare of them into the trash. The
condemnation of a collector that was interrupted stays until it is certain that no removal of it is
on its way; spares stay as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from attrs import frozen

from statepool.errors import MissingFile, NoSpace
from statepool.model.digest import Digest
from statepool.model.outcomes import Collected
from statepool.pools import layout
from statepool.pools.claims import has_ended, is_claim
from statepool.pools.pool import GCRoots, Pool
from statepool.pools.staging import Marker, bring_back, condemned, read_markers
from statepool.pools.writer import Writer
from statepool.transports.base import FileKind

ABANDONED = 7 * 24 * 3600
"""
Age in seconds, by the pool's own clock, after which the marker of a writer on another host counts
as abandoned.
"""

PASSING = 3600
"""
Age in seconds, by the pool's own clock, after which a nameless temporary file counts as left over:
each lives for a moment.
"""


RESUMABLE = 24 * 3600
"""
Age in seconds, by the pool's own clock, after which nobody will go on with what an interrupted
transfer has left.
"""


def _no_roots() -> frozenset[Digest]:
    return frozenset()


@frozen
class Leftover:
    """Something in ``incoming/`` whose writer is gone."""

    path: str
    what: str


class Collector:
    """
    Takes away what nobody needs in one pool.

    :param pool: which
    :param roots: tells which bytes must stay although no record needs them
    """

    def __init__(self, pool: Pool, roots: GCRoots = _no_roots) -> None:
        self._pool = pool
        self._roots = roots
        self._transport = pool.transport

    def collect(
        self, digests: Iterable[Digest], *, dry_run: bool = False, besides: Marker | None = None
    ) -> list[Collected]:
        """
        :param digests: bytes that may be needless
        :param besides: the caller's own marker, for whose sake they need not stay
        :returns: those that were, and are gone
        """
        wanted = sorted(set(digests))
        needed = self._needed(besides) if wanted else set()
        stats = {
            digest: stat
            for digest in wanted
            if digest not in needed
            and (stat := self._transport.stat(layout.data(digest))) is not None
        }
        # A link says nothing of the size. Of bytes that were cut short the list stays, and is
        # collected as one that is left alone.
        lists = {
            digest: stat.kind is not FileKind.FILE or layout.has_pieces(digest, stat.size)
            for digest, stat in stats.items()
        }
        if dry_run:
            gone = set(stats)
        elif self._pool.in_place:
            gone = self._remove_in_place(lists, besides)
        else:
            gone = self._put_aside(lists, besides)
        return [
            Collected(
                str(self._pool),
                "bytes that no state needs",
                layout.data(digest),
                stats[digest].size,
            )
            for digest in stats
            if digest in gone
        ]

    def _collect_lists(self, names: Iterable[str], dry_run: bool) -> list[Collected]:
        """
        Take away lists of pieces whose bytes are gone, which a crash can leave.

        :param names: of all files in ``data/``
        """
        held, lists = set[Digest](), dict[Digest, str]()
        for name in names:
            if (digest := layout.data_of(name)) is not None:
                held.add(digest) if name == digest.file_name else lists.update(
                    {digest: layout.list_of(layout.data(digest))}
                )
        needed = self._needed() if lists.keys() - held else set()
        alone = {
            digest: stat
            for digest in lists.keys() - held - needed
            if (stat := self._transport.stat(lists[digest])) is not None
        }
        if dry_run or self._pool.in_place:
            gone = {digest for digest in alone if dry_run or self._transport.remove(lists[digest])}
        else:
            gone = self._put_aside(dict.fromkeys(alone, True), None, alone=True)
        return [
            Collected(
                str(self._pool), "a list of bytes that are gone", lists[digest], alone[digest].size
            )
            for digest in sorted(gone)
        ]

    def _needed(self, besides: Marker | None = None) -> set[Digest]:
        return self._pool.needed(besides=besides) | self._roots()

    def _remove_in_place(
        self, digests: Mapping[Digest, bool], besides: Marker | None
    ) -> set[Digest]:
        """:returns: those that are gone"""
        condemnation = Marker(
            self._pool.nonce(), frozenset(digests), Writer.current(), condemns=True
        )
        if not condemnation.digests:
            return set()
        path = layout.marker(condemnation.nonce)
        self._transport.create(path, condemnation.to_bytes())
        self._transport.flush(layout.INCOMING)
        try:
            gone = condemnation.digests - self._needed(besides)
        except BaseException:
            self._transport.remove(path)
            raise
        # A removal that fails may still happen later: then the condemnation stays.
        for digest in sorted(gone):
            self._transport.remove(layout.data(digest))
            if digests[digest]:
                # one that has just been made anew is only missed
                self._transport.remove(layout.list_of(layout.data(digest)))
        self._transport.remove(path)
        return set(gone)

    def _put_aside(
        self, digests: Mapping[Digest, bool], besides: Marker | None, *, alone: bool = False
    ) -> set[Digest]:
        """
        :param digests: of bytes, and whether there can be a list of their pieces, which goes with
            them and never before them
        :param alone: the bytes are gone, and only lists are left
        :returns: those that are gone
        """
        aside: list[tuple[str, Digest]] = []
        try:
            for digest, has_list in digests.items():
                data, path = layout.data(digest), layout.trash(self._pool.nonce(), digest)
                if self._move(data, path):
                    aside.append((path, digest))
                elif not alone:
                    continue  # another collector is at it
                if has_list and self._move(layout.list_of(data), layout.list_of(path)):
                    aside.append((layout.list_of(path), digest))
        finally:
            gone = self._empty(aside, besides)
        return gone

    def _move(self, source: str, target: str) -> bool:
        """:returns: whether there was such a file"""
        try:
            self._transport.rename(source, target)
        except MissingFile:
            return False
        return True

    def _empty(
        self, aside: Sequence[tuple[str, Digest]], besides: Marker | None = None
    ) -> set[Digest]:
        """
        Delete bytes that lie in the trash, unless they turn out to be needed; which is looked up
        once for all of them, since all have been put there before.

        :returns: those that are gone
        """
        needed, gone = self._needed(besides) if aside else set(), set()
        doomed = condemned(self._transport) if aside else frozenset()
        for path, digest in aside:
            if digest not in needed:
                self._transport.remove(path)
                gone.add(digest)
                continue
            if not self._pool.in_place:
                self._move(path, layout.untrashed(path))  # unless whoever needs them was faster
                continue
            with suppress(MissingFile):
                bring_back(self._transport, path, digest)
                if digest not in doomed:
                    self._transport.remove(path)
        return gone

    def sweep(self, *, dry_run: bool = False) -> list[Collected]:
        """
        Take away everything that nobody needs.

        :param dry_run: only say what would go
        :returns: what went, or would go
        """
        gone = self.clear_incoming(dry_run=dry_run, thorough=True)
        gone += self._clear_trash(dry_run)
        gone += self._clear_claims(dry_run)
        names = [entry.name for entry in self._transport.scan(layout.DATA)]
        gone += self._collect_lists(names, dry_run)
        gone += self.collect(
            (digest for name in names if (digest := Digest.from_file_name(name)) is not None),
            dry_run=dry_run,
        )
        for machine in self._pool.logged_machines():
            # nothing depends on it, and it waits until there is room for a lock and a name
            with suppress(NoSpace):
                gone += self._tidy_machine(machine, dry_run)
        return gone

    def _tidy_machine(self, machine: str, dry_run: bool) -> list[Collected]:
        log, view = self._pool.log(machine), self._pool.view
        stale = view.leftovers(machine, log.fold())
        gone = [
            Collected(
                str(self._pool),
                "a name in the view of a state that was removed",
                layout.view(state),
            )
            for state in stale
        ]
        if not dry_run:
            view.update([*stale, *log.fold().states], log.fold)
            with self._pool.log_locks.hold(f"log-{machine}", self._pool.lock_timeout):
                gone += [
                    Collected(str(self._pool), "log behind a checkpoint", path)
                    for path in log.compact()
                ]
        return gone

    def _clear_trash(self, dry_run: bool) -> list[Collected]:
        found = {
            f"{layout.TRASH}/{entry.name}": layout.trashed(entry.name)
            for entry in self._transport.scan(layout.TRASH)
        }
        stats = {path: stat for path in found if (stat := self._transport.stat(path)) is not None}
        ours = [(path, digest) for path in stats if (digest := found[path]) is not None]
        if dry_run:
            needed = self._pool.needed() if ours else set()
            gone = {path for path in stats if found[path] not in needed}
        else:
            emptied = self._empty(ours)
            gone = {
                path
                for path in stats
                if (
                    found[path] in emptied
                    if found[path] is not None
                    else self._transport.remove(path)
                )
            }
        return [
            Collected(str(self._pool), "bytes that were being removed", path, stat.size)
            for path, stat in stats.items()
            if path in gone
        ]

    def _clear_claims(self, dry_run: bool) -> list[Collected]:
        """Claims that ended, or whose holders died, and that nobody has followed since."""
        paths = [
            f"{layout.LOCKS}/{name}"
            for name in sorted(entry.name for entry in self._transport.scan(layout.LOCKS))
            if is_claim(name)
        ]
        if not paths:
            return []
        now, gone = self._pool.now(), []
        for path, stat in zip(paths, self._transport.stat_many(paths), strict=True):
            old = stat is not None and now - stat.mtime_ns / 1e9 > (
                PASSING if has_ended(path) else ABANDONED
            )
            if old and (dry_run or self._transport.remove(path)):
                gone.append(Collected(str(self._pool), "a claim that is over", path))
        return gone

    # -- what crashed writers left -----------------------------------------------------------------

    def clear_incoming(self, *, dry_run: bool = False, thorough: bool = False) -> list[Collected]:
        """
        Remove what writers left that are surely gone.

        :param thorough: also judge by age the writers of other hosts, and files without a marker
        """
        gone = []
        if not dry_run:
            with suppress(NoSpace):
                self._show_published()
        for leftover in self._leftovers(thorough):
            stat = self._transport.stat(leftover.path)
            if stat is not None and (dry_run or self._transport.remove(leftover.path)):
                gone.append(Collected(str(self._pool), leftover.what, leftover.path, stat.size))
        return gone

    def _show_published(self) -> None:
        """
        A writer that was gone before its marker may have left a record, and no name in the view for
        it.
        """
        dead = [marker for marker in read_markers(self._transport) if marker.writer.is_dead]
        digests = {digest for marker in dead for digest in marker.digests}
        # One without digests had not got so far, or lost its content in a power cut, which took
        # names from the view as well.
        anything = not all(marker.digests for marker in dead)
        for machine in self._pool.logged_machines() if dead else ():
            states = self._pool.fold(machine).states.items()
            self._pool.view.update(
                [state for state, manifest in states if anything or manifest.digest in digests],
                self._pool.log(machine).fold,
            )

    def _leftovers(self, thorough: bool) -> Iterator[Leftover]:
        names = sorted(entry.name for entry in self._transport.scan(layout.INCOMING))
        if not names:
            return
        now = self._pool.now() if thorough else None
        markers = {marker.nonce: marker for marker in read_markers(self._transport)}
        # A marker with facts is about more than these files: whoever understands them ends it.
        passive = {nonce: marker for nonce, marker in markers.items() if not marker.facts}
        dead = {nonce for nonce, marker in passive.items() if self._is_over(marker, now)}
        for name in names:
            nonce = layout.nonce_of(name)
            path = f"{layout.INCOMING}/{name}"
            if layout.part_of(name) is not None:
                if (
                    (nonce in dead or nonce not in markers)
                    and now is not None
                    and self._age(path, now) > RESUMABLE
                ):
                    yield Leftover(path, "an interrupted transfer that nobody has resumed")
                continue
            # The marker goes last here too, so that a crash of ours leaves what the next one can
            # still recognise.
            if nonce in dead and path != layout.marker(nonce):
                yield Leftover(path, "an unfinished transfer")
            elif nonce not in markers and now is not None and self._age(path, now) > PASSING:
                yield Leftover(path, "a temporary file")
        for nonce in sorted(dead):
            yield Leftover(layout.marker(nonce), "the marker of a writer that is gone")

    def _is_over(self, marker: Marker, now: float | None) -> bool:
        if marker.condemns:
            # Never by its age alone: a removal that is sent late takes bytes that have come back.
            # One that was sent arrives within this time.
            return (
                marker.writer.is_dead
                and now is not None
                and self._age(layout.marker(marker.nonce), now) > PASSING
            )
        return marker.writer.is_dead or self._is_abandoned(marker, now)

    def _is_abandoned(self, marker: Marker, now: float | None) -> bool:
        return (
            now is not None
            and not marker.writer.is_here
            and self._age(layout.marker(marker.nonce), now) > ABANDONED
        )

    def _age(self, path: str, now: float) -> float:
        stat = self._transport.stat(path)
        return now - stat.mtime_ns / 1e9 if stat is not None else 0.0
