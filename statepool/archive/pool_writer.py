"""
Writing an archive of a pool: its logs, each up to one record, and the bytes that these need.

The logs are read first, and then a marker protects the bytes that they need from collectors, so
what others publish or remove meanwhile changes nothing. A level has what came after the records of
the level below; no bytes that are archived already are read again, or even looked at.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from attrs import field, frozen

from statepool.archive.pool_contents import (
    Contents,
    Index,
    Origin,
    Position,
    Selection,
    header_of,
    index_of,
)
from statepool.archive.writing import Write
from statepool.beneath import Descriptor
from statepool.bundles.contents import padding
from statepool.bundles.export import Placed
from statepool.cache.cache import file_in
from statepool.cache.check_cached import open_whole
from statepool.errors import (
    AccessDenied,
    IntegrityError,
    MissingFile,
    NotFound,
    ReadOnlyPool,
    RefusedError,
    StatePoolError,
)
from statepool.model.digest import Digest, new_hasher
from statepool.model.manifest import Kind, Manifest
from statepool.model.pieces import PIECE
from statepool.pools import layout
from statepool.pools.fold import KEEP_NONCES, Fold, member_id
from statepool.pools.log import MAX_RECORD
from statepool.pools.pool import Pool
from statepool.pools.records import Checkpoint, Record
from statepool.pools.refusals import mismatched
from statepool.transports.base import Transfer
from statepool.transports.behind import Behind
from statepool.transports.copying import hash_read
from statepool.transports.failures import Subject, require_few_holes, translating
from statepool.transports.reading import Slice, slices

ATTEMPTS = 8
"""
How often the logs are read again because bytes were removed, or records deleted, before they were
protected. Each time other processes have removed states meanwhile.
"""

AHEAD = 8
"""Files whose digests may still be computed while the next ones are read and written."""


@frozen
class PoolWriter:
    """
    A writer of one archive.

    :param pool: the pool
    :param below: the indexes of the levels below, from level 0 on; none for level 0
    :param selection: which objects are archived
    :param now: the clock, in seconds since the epoch
    """

    pool: Pool
    below: tuple[Index, ...] = ()
    selection: Selection = field(factory=Selection)
    now: Callable[[], float] = time.time

    # -- what is in it -------------------------------------------------------------------------

    @contextmanager
    def protected(self) -> Iterator[tuple[Contents, list[str]]]:
        """
        Read the logs, and protect the bytes that they need from collectors for the duration of a
        ``with`` block.

        :returns: what the archive has in it, and warnings
        :raises IntegrityError: the pool has a log that cannot be used, or lacks bytes
        :raises NotAPool: there is no pool
        :raises NotFound: no state is selected
        :raises ReadOnlyPool: it is a pool of another tool
        :raises RefusedError: the levels below are of another pool, or a log went back since
        """
        origin = self._origin()
        for _ in range(ATTEMPTS):
            contents = self._contents(origin)
            if contents is None:
                continue
            wanted = set(contents.index.data)
            with self._marked(wanted) as warnings:
                # Read after the marker exists: what was not removed by now, stays.
                lacking = self.pool.lacking(contents.index.data)
                if not lacking:
                    yield contents, warnings
                    return
            self._refuse_lost(contents, lacking)
        raise RefusedError(
            f"states were removed from {self.pool} each time that its logs had been read",
            pool=str(self.pool),
            hint="nothing was written; try again when fewer states are removed",
        )

    def _origin(self) -> Origin:
        """:returns: what the pool is recognised by"""
        self.pool.require()
        if not self.pool.is_managed:
            raise ReadOnlyPool(
                f"{self.pool} is a pool of another tool: it has no logs that could be archived",
                pool=str(self.pool),
                hint=f"make its states managed: statepool init {self.pool}, and statepool adopt",
            )
        where = f"{self.pool}/{layout.POOL_FILE}"
        origin = Origin.read(self.pool.transport.read(layout.POOL_FILE, 0, 1 << 16), where)
        if self.below and origin != self.below[-1].pool:
            raise RefusedError(
                f"level {len(self.below) - 1} is an archive of another pool,"
                f" {self.below[-1].location}, and not of {self.pool}",
                pool=str(self.pool),
                hint="begin with level 0 of this pool, under another id",
            )
        return origin

    def _contents(self, origin: Origin) -> Contents | None:
        """
        :returns: what would be in the archive now; None if records were deleted while they were
            read
        """
        begun = self.now()
        machines = [name for name in self.pool.logged_machines() if not self._is_left_out(name)]
        folds = self.pool.folds(machines)
        positions: dict[str, Position] = {}
        logs: dict[str, bytes] = {}
        needed: set[Digest] = set()
        for machine, fold in folds.items():
            chosen = self._chosen(fold)
            if not fold.number or not (chosen.states or self._is_all):
                continue
            position = Position(fold.number, fold.nonces[fold.number])
            files = self._log_files(machine, fold, chosen, position)
            if files is None:
                return None
            positions[machine] = position
            logs |= files
            needed |= chosen.digests
        if not positions and not self._is_all:
            raise NotFound(
                f"no state in {self.pool} is selected by "
                + ", ".join([*self.selection.objects, *self.selection.exclude]),
                pool=str(self.pool),
                hint="look at them with: statepool show",
            )
        last = self.below[-1] if self.below else None
        index = index_of(
            level=len(self.below),
            base=last.checksum if last is not None else None,
            pool=origin,
            location=str(self.pool),
            time=begun,
            selection=self.selection,
            machines=positions,
        )
        there = {digest for level in self.below for digest in level.data}
        return Contents.of(index, logs, needed=needed - there, where=str(self.pool))

    @property
    def _is_all(self) -> bool:
        return self.selection == Selection()

    def _is_left_out(self, machine: str) -> bool:
        """
        :returns: whether patterns exclude a machine with all its images, so that its log need not
            even be readable
        """
        return all(
            any(fnmatchcase(name, pattern) for pattern in self.selection.exclude)
            for name in (machine, f"{machine}/\0")
        )

    def _is_selected(self, manifest: Manifest) -> bool:
        names = manifest.object, f"{manifest.object}:{manifest.state}"

        def matches(patterns: Sequence[str]) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)

        return (not self.selection.objects or matches(self.selection.objects)) and not matches(
            self.selection.exclude
        )

    def _chosen(self, fold: Fold) -> Fold:
        """:returns: the fold with the selected states, and all that they stand on"""
        if self._is_all:
            return fold
        kept: dict[int, Manifest] = {}
        stack = [one for one in fold.states.values() if self._is_selected(one)]
        while stack:
            manifest = stack.pop()
            if id(manifest) in kept:
                continue
            kept[id(manifest)] = manifest
            if manifest.kind is Kind.MACHINE:
                stack += [fold.states[member_id(manifest, name)] for name in manifest.members]
            elif (parent := fold.parent_of(manifest)) is not None:
                stack.append(parent)
        return Fold.restore(
            fold.machine,
            fold.number,
            dict(fold.nonces),
            [one for one in fold.states.values() if id(one) in kept],
            [one for one in fold.superseded if id(one) in kept],
        )

    def _log_files(
        self, machine: str, fold: Fold, chosen: Fold, position: Position
    ) -> dict[str, bytes] | None:
        """
        :returns: the files of a log that this level has, by their names; None if a record was
            deleted meanwhile
        """
        before = self.below[-1].machines.get(machine) if self.below else None
        same_selection = bool(self.below) and self.below[-1].selection == self.selection
        if before == position and same_selection:
            return {}
        if before is not None and self._went_back(fold, before):
            raise RefusedError(
                f"the log of {machine} in {self.pool} has other records than when level"
                f" {len(self.below) - 1} was made: the pool was restored, or its log removed",
                object=machine,
                pool=str(self.pool),
                hint="begin again with level 0",
            )
        known = before.number if before is not None else 0
        # A log that was gone at the level below may have begun again.
        is_new = all(machine not in level.machines for level in self.below)
        continues = self._is_all and same_selection and (before is not None or is_new)
        if continues and fold.number - known < KEEP_NONCES:
            records = self._records(machine, fold, known + 1)
            if records is not None:  # otherwise a checkpoint stands for them by now
                return records
        last = self._records(machine, fold, fold.number)
        if last is None:
            return None
        content = Checkpoint.of(chosen)
        if len(content) > MAX_RECORD:
            content = Checkpoint.of(chosen, extents=False)
        name = layout.checkpoint(machine, fold.number).removeprefix(f"{layout.LOG}/")
        return {name: content, **last}

    def _went_back(self, fold: Fold, before: Position) -> bool:
        return fold.number < before.number or (
            fold.nonces.get(before.number, before.nonce) != before.nonce
        )

    def _records(self, machine: str, fold: Fold, first: int) -> dict[str, bytes] | None:
        """:returns: the records from ``first`` on, by their names; None if one was deleted"""
        numbers = range(first, fold.number + 1)
        paths = [layout.record(machine, number) for number in numbers]
        contents = self.pool.transport.read_many(paths, MAX_RECORD)
        found: dict[str, bytes] = {}
        for number, path, content in zip(numbers, paths, contents, strict=True):
            if content is None:
                return None
            where = f"{self.pool}/{path}"
            if Record.from_bytes(content, number, where).nonce != fold.nonces.get(number):
                return None  # the record that counted was deleted, and this one came too late
            found[path.removeprefix(f"{layout.LOG}/")] = content
        return found

    # -- keeping its bytes ---------------------------------------------------------------------

    @contextmanager
    def _marked(self, digests: set[Digest]) -> Iterator[list[str]]:
        """
        Announce the bytes to collectors, if this account may write to the pool.

        :returns: warnings
        """
        try:
            marker = self.pool.stage(digests).marker if digests else None
        except AccessDenied as error:
            told = f"{self.pool} cannot be written, so nothing keeps others from removing its bytes"
            yield [f"{told} while they are read: {error.message}"]
            return
        try:
            yield []
        finally:
            if marker is not None:
                # not Staging.end(): nothing was gathered, so there are no other files to remove
                self.pool.transport.remove(layout.marker(marker.nonce))

    def _refuse_lost(self, contents: Contents, lacking: set[Digest]) -> None:
        """
        :raises IntegrityError: states still need bytes that are gone
        """
        for manifest in contents.files:
            if manifest.digest in lacking and self._is_needed(manifest):
                raise self._lost(manifest)

    def _is_needed(self, manifest: Manifest) -> bool:
        return manifest.digest in self.pool.fold(manifest.id.machine).digests

    def _lost(self, manifest: Manifest) -> IntegrityError:
        return IntegrityError(
            f"the bytes of {manifest.id} in {self.pool} are gone",
            object=manifest.object,
            state=manifest.state,
            pool=str(self.pool),
            hint=self._mend(manifest),
        )

    def _mend(self, manifest: Manifest) -> str:
        return (
            f"look at the pool with: statepool verify; or archive the rest with: --exclude"
            f" '{manifest.object}:{manifest.state}', if nothing stands on it"
        )

    # -- writing -------------------------------------------------------------------------------

    def write(self, contents: Contents, out: Write, room: Path) -> None:
        """
        Write the tar.

        :param out: takes its bytes
        :param room: a directory for temporary files, which have no names
        :raises IntegrityError: the pool has other bytes than it says
        :raises RefusedError: a state was removed from a pool that cannot be protected
        """
        for _, content in contents.before_logs:
            out(content)
        for _, content in contents.log_members:
            out(content)
        with checking(self._check) as check:
            for manifest in contents.files:
                with self._opened(manifest, room) as descriptor:
                    self._write_data(manifest, descriptor, out, check)
        for _, content in contents.after_data:
            out(content)

    def _write_data(self, manifest: Manifest, descriptor: int, out: Write, check: Check) -> None:
        assert manifest.digest is not None
        subject = Subject(f"{manifest.id} in {self.pool}", str(self.pool))
        require_few_holes(manifest.size - manifest.data_size, subject)
        reader = Placed(descriptor, manifest.extents, subject)
        out(header_of(manifest))
        if manifest.size <= PIECE:
            content = memoryview(bytearray(manifest.size))
            for part in slices(manifest.extents or ((0, manifest.size),), manifest.size):
                reader.read(part, content[part.start : part.start + part.length])
            check(manifest, content)
            for offset, length in manifest.extents or ((0, manifest.size),):
                out(content[offset : offset + length])
        else:

            def write(part: Slice, content: memoryview) -> None:
                for offset, length in part.data:
                    out(content[offset - part.start :][:length])

            algorithm = manifest.digest.algorithm
            found = hash_read(reader, manifest.size, algorithm=algorithm, each=write)
            self._check(manifest, found)
        out(padding(manifest.data_size))

    def _check(self, manifest: Manifest, found: Digest) -> None:
        if found != manifest.digest:
            where, pool = f"in {self.pool}", str(self.pool)
            raise mismatched(manifest, found, where, pool=pool, hint=self._mend(manifest))

    @contextmanager
    def _opened(self, manifest: Manifest, room: Path) -> Iterator[int]:
        """
        Open the bytes of a state: the file itself, or a temporary copy of a file on another host.
        """
        assert manifest.digest is not None
        try:
            found = self._found(manifest, manifest.digest, room)
        except MissingFile as error:
            if self._is_needed(manifest):
                raise self._lost(manifest) from error
            raise RefusedError(
                f"{manifest.id} was removed from {self.pool} while it was archived",
                object=manifest.object,
                state=manifest.state,
                pool=str(self.pool),
                hint="nothing was written; archive again",
            ) from error
        with found as descriptor:
            yield descriptor

    def _found(self, manifest: Manifest, digest: Digest, room: Path) -> Descriptor:
        """
        :raises MissingFile: the bytes are not there
        """
        try:
            return self._open(manifest, digest, room)
        except MissingFile:
            # A collector that began before the marker existed moves bytes aside, and takes them
            # back when it sees the marker.
            if not self.pool.has_bytes(digest):
                raise
            return self._open(manifest, digest, room)

    def _open(self, manifest: Manifest, digest: Digest, room: Path) -> Descriptor:
        if self.pool.transport.beneath("") is None:
            return self._fetched(manifest, digest, room)
        file = file_in(self.pool, digest)
        if file is None:
            raise MissingFile(f"{layout.data(digest)} is not in {self.pool}")
        return open_whole(file, manifest, self.pool)

    def _fetched(self, manifest: Manifest, digest: Digest, room: Path) -> Descriptor:
        subject = Subject(f"{room}", path=str(room))
        with (
            translating("make a temporary file in", subject, needed=manifest.size),
            tempfile.TemporaryFile(dir=room, buffering=0) as temporary,
        ):
            copy = Descriptor(os.dup, temporary.fileno())
        try:
            transfer = Transfer(manifest.size, digest.algorithm, manifest.extents)
            moved = self.pool.transport.fetch(layout.data(digest), copy.number, transfer)
            self._check(manifest, moved.digest)
        except BaseException:
            copy.close()
            raise
        return copy


Check = Callable[[Manifest, memoryview], None]
"""A function that is given the content of a small file, whose memory must not be used again."""


@contextmanager
def checking(compare: Callable[[Manifest, Digest], None]) -> Iterator[Check]:
    """
    Yield a function that computes the digests of small files in another thread, while the next
    ones are read.

    :param compare: is called with each file and its digest; raises an error if it is wrong
    """

    def check(manifest: Manifest, content: memoryview) -> None:
        assert manifest.digest is not None
        hasher = new_hasher(manifest.digest.algorithm)
        hasher.update(content)
        compare(manifest, Digest(manifest.digest.algorithm, hasher.hexdigest()))

    with Behind(AHEAD, threads=1) as behind:
        try:
            yield lambda manifest, content: behind.do(partial(check, manifest, content))
        except StatePoolError:
            behind.finish()  # what was read before counts first: it may be the cause
            raise
        behind.finish()
