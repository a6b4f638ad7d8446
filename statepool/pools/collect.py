"""
Garbage collection: removal of bytes that no record needs, and of files that crashed writers left.

Bytes are removed in three steps. They are renamed into ``trash/``; *then* the markers and the logs
are read; bytes that are needed after all are renamed back, the others are deleted. A writer that
comes to need the bytes at the same moment either left its marker before the collector looked, or
finds the bytes missing and brings them back from the trash itself.

Where files cannot be renamed, the first step is a marker that condemns the bytes, and they are
deleted in place. A writer that finds its bytes condemned puts a spare of them into the trash. The
condemnation of an interrupted collector stays until it is certain that no removal by it is under
way; spares stay as long.
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
Age in seconds, by the pool's own clock, after which a temporary file without a marker counts as
left over: such files are used for a moment only.
"""


RESUMABLE = 24 * 3600
"""
Age in seconds, by the pool's own clock, after which the part that an interrupted transfer left is
not resumed any more.
"""


def _no_roots() -> frozenset[Digest]:
    return frozenset()


@frozen
class Leftover:
    """A file in ``incoming/`` whose writer has ended."""

    path: str
    what: str


class Collector:
    """
    The garbage collector of one pool.

    :param pool: the pool
    :param roots: returns the garbage collection roots: the bytes that must stay although no record
        needs them
    """

    def __init__(self, pool: Pool, roots: GCRoots = _no_roots) -> None:
        self._pool = pool
        self._roots = roots
        self._transport = pool.transport

    def collect(
        self, digests: Iterable[Digest], *, dry_run: bool = False, besides: Marker | None = None
    ) -> list[Collected]:
        """
        Remove those of some bytes that are not needed.

        :param digests: bytes that may not be needed any more
        :param besides: the caller's own marker, which does not protect them
        :returns: what was removed
        """
        wanted = sorted(set(digests))
        needed = self._needed(besides) if wanted else set()
        stats = {
            digest: stat
            for digest in wanted
            if digest not in needed
            and (stat := self._transport.stat(layout.data(digest))) is not None
        }
        # A link does not tell the size of the bytes. If the bytes were truncated, the list stays,
        # and is collected later as a list without bytes.
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
        Remove lists of pieces without their bytes, which a crash can leave.

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
        """:returns: the bytes that were removed"""
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
        # A removal that fails may still reach the server later. Then the condemnation stays.
        for digest in sorted(gone):
            self._transport.remove(layout.data(digest))
            if digests[digest]:
                # if this removes a list that was just made anew, only a list is missing
                self._transport.remove(layout.list_of(layout.data(digest)))
        self._transport.remove(path)
        return set(gone)

    def _put_aside(
        self, digests: Mapping[Digest, bool], besides: Marker | None, *, alone: bool = False
    ) -> set[Digest]:
        """
        :param digests: of bytes, each with whether there can be a list of their pieces; the list is
            moved after the bytes, never before
        :param alone: the bytes do not exist any more, and only lists are left
        :returns: the bytes that were removed
        """
        aside: list[tuple[str, Digest]] = []
        try:
            for digest, has_list in digests.items():
                data, path = layout.data(digest), layout.trash(self._pool.nonce(), digest)
                if self._move(data, path):
                    aside.append((path, digest))
                elif not alone:
                    continue  # another collector removes it
                if has_list and self._move(layout.list_of(data), layout.list_of(path)):
                    aside.append((layout.list_of(path), digest))
        finally:
            gone = self._empty(aside, besides)
        return gone

    def _move(self, source: str, target: str) -> bool:
        """:returns: whether the file existed"""
        try:
            self._transport.rename(source, target)
        except MissingFile:
            return False
        return True

    def _empty(
        self, aside: Sequence[tuple[str, Digest]], besides: Marker | None = None
    ) -> set[Digest]:
        """
        Delete bytes in the trash, unless they turn out to be needed. The needed bytes are
        determined once for all of them, after all have been put there.

        :returns: the bytes that were removed
        """
        needed, gone = self._needed(besides) if aside else set(), set()
        doomed = condemned(self._transport) if aside else frozenset()
        for path, digest in aside:
            if digest not in needed:
                self._transport.remove(path)
                gone.add(digest)
                continue
            if not self._pool.in_place:
                self._move(path, layout.untrashed(path))  # unless a writer was faster
                continue
            with suppress(MissingFile):
                bring_back(self._transport, path, digest)
                if digest not in doomed:
                    self._transport.remove(path)
        return gone

    def sweep(self, *, dry_run: bool = False) -> list[Collected]:
        """
        Remove all garbage.

        :param dry_run: only report what would be removed
        :returns: what was removed, or would be
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
            # nothing depends on it; it can wait until there is space for a lock and a name
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
        """
        Remove old files of claims: those that mark an end after an hour, all others after seven
        days.
        """
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
        Remove what writers left that have certainly ended.

        :param thorough: also judge by age: the writers of other hosts, and files without a marker
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
        Complete the view after crashes: a writer that died before it removed its marker may have
        left a record without a name in the view.
        """
        dead = [marker for marker in read_markers(self._transport) if marker.writer.is_dead]
        digests = {digest for marker in dead for digest in marker.digests}
        # A marker without digests: its writer had not got that far, or a power cut took the content
        # of the marker, and then names of the view as well.
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
        # A marker with facts describes more than these files: the command that understands the
        # facts ends it.
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
            # The marker is removed last here, too. So after a crash of this collector, the next one
            # can still recognise the files.
            if nonce in dead and path != layout.marker(nonce):
                yield Leftover(path, "an unfinished transfer")
            elif nonce not in markers and now is not None and self._age(path, now) > PASSING:
                yield Leftover(path, "a temporary file")
        for nonce in sorted(dead):
            yield Leftover(layout.marker(nonce), "the marker of a writer that is gone")

    def _is_over(self, marker: Marker, now: float | None) -> bool:
        if marker.condemns:
            # A condemnation does not end by age alone: a collector that is alive may send a removal
            # late, and it would remove bytes that have come back. A removal that was sent arrives
            # within this time.
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
