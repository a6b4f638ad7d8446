"""
Make files of another tool managed where they lie: hash them, give them a name among the bytes, and
record them in the log.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from attrs import evolve, frozen

from statepool.beneath import Beneath
from statepool.cache.check_cached import hash_open
from statepool.cache.gc_roots import gc_roots
from statepool.errors import AccessDenied, InUse, NotAPool, StatePoolError, UsageError
from statepool.leases import held_lease
from statepool.model.digest import Digest
from statepool.model.manifest import MAX_EXTENTS, Kind, Manifest, Parent, StateId
from statepool.model.outcomes import Adopted
from statepool.model.pieces import Pieces
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.pool import Pool
from statepool.pools.view import Unmanaged
from statepool.pools.writer import Writer
from statepool.qcow2 import opened
from statepool.qcow2.checks import Backing, check_image
from statepool.qcow2.clusters import check_clusters
from statepool.qcow2.header import apply_patches, backing_patch, read_header_fd, reader
from statepool.qcow2.tool import QemuImg
from statepool.sources.source import Member
from statepool.sources.unmanaged import reader as reader_of
from statepool.sources.unmanaged import unmanaged_chain
from statepool.transports.base import Transfer
from statepool.transports.copying import data_extents
from statepool.transports.failures import Subject, translating


@frozen
class Adoption:
    """
    The adoption of the files that another tool put into a pool: makes them managed.

    :param pool: the pool
    :param relocate: also rewrite absolute backing names, so that the files can be used as they are
        wherever they are copied
    :param progress: told of the bytes that are hashed
    :param tool_timeout: for qemu-img, in seconds
    """

    pool: Pool
    relocate: bool = False
    progress: Progress = SILENT
    tool_timeout: float = 60.0

    def run(self, *, dry_run: bool = False) -> list[Adopted]:
        """
        :returns: the outcome for each file, in the order in which the files were looked at: parents
            first; files whose names no state can have come last
        :raises NotAPool: the pool has no log yet
        """
        if not self.pool.is_managed:
            self.pool.require()
            raise NotAPool(
                f"{self.pool.location} holds states of another tool, but has no log to adopt them"
                " into",
                pool=str(self.pool.location),
                hint=f"make one with: statepool init {self.pool.location}",
            )
        if not dry_run:
            self._undo_unfinished()
        found: list[Unmanaged] = []
        adopted: list[Adopted] = []
        for machine in self.pool.machines():
            try:
                found += self.pool.unmanaged(machine)
            except AccessDenied as error:
                adopted.append(Adopted(str(self.pool), machine, "", problem=str(error)))
        done: set[StateId] = set()
        for unmanaged in found:
            self._adopt_with_parents(unmanaged.id, found, done, adopted, dry_run)
        return adopted + [
            Adopted(str(self.pool), file.object, file.state, problem=str(file.error))
            for file in self.pool.view.misnamed()
        ]

    def _undo_unfinished(self) -> None:
        """
        Undo interrupted adoptions: a file that has its name among the bytes but no record looks
        like one of ours. Without that name it is a file of another tool again.
        """
        self._collector.clear_incoming()
        digests = (
            Digest.from_file_name(entry.name) for entry in self.pool.transport.scan(layout.DATA)
        )
        self._collector.collect(digest for digest in digests if digest is not None)

    @property
    def _collector(self) -> Collector:
        return Collector(self.pool, lambda: gc_roots(self.pool))

    def _adopt_with_parents(
        self,
        state: StateId,
        found: list[Unmanaged],
        done: set[StateId],
        adopted: list[Adopted],
        dry_run: bool,
    ) -> None:
        if state in done:
            return
        done.add(state)
        try:
            if state.kind is not Kind.IMAGE:
                raise UsageError(
                    f"{layout.view(state)} is the RAM of a machine, and cannot be adopted without"
                    " its fingerprint"
                )
            chain = unmanaged_chain(self.pool, state, self.pool.fold(state.machine))
            if not chain or chain[0].manifest.digest is not None:
                return  # it was removed since the listing, or another adoption was faster
            for member in chain[1:]:
                (
                    self._adopt_with_parents(member.manifest.id, found, done, adopted, dry_run)
                    if member.manifest.digest is None
                    else None
                )
            adopted.append(self._would_adopt(state) if dry_run else self._adopt(chain))
        except StatePoolError as error:
            adopted.append(Adopted(str(self.pool), state.object, state.state, problem=str(error)))

    def _would_adopt(self, state: StateId) -> Adopted:
        with _unwritten(self.pool.transport.beneath(layout.view(state))):
            pass
        return Adopted(str(self.pool), state.object, state.state)

    def _adopt(self, chain: tuple[Member, ...]) -> Adopted:
        tip = chain[0].manifest
        parent = self.pool.find(chain[1].manifest.id) if len(chain) > 1 else None
        if len(chain) > 1 and parent is None:
            raise UsageError(f"its parent {chain[1].manifest.state} could not be adopted")
        path = layout.view(tip.id)
        local = self.pool.transport.beneath(path)
        with _unwritten(local) as descriptor:
            self._check(tip, path, parent, descriptor)
        relocated = (
            self._relocate(local, parent)
            if self.relocate and local is not None and parent is not None
            else False
        )
        with _unwritten(local) as descriptor:
            lease = _lease(descriptor)
            self._check(tip, path, parent, descriptor)
            digest, pieces = self._digest(tip, path, descriptor)
            manifest = self._manifest(tip, path, digest, parent, descriptor)
            with self._closed(manifest, descriptor):
                if _lease(descriptor) != lease:
                    # The other process passed the permission check before the file became
                    # read-only. It waits for our lease now, but will not wait for long.
                    raise InUse(
                        f"another process wants to write to {local}",
                        path=str(local),
                        hint="adopt it when nobody writes to it",
                    )
                self._publish(manifest, digest, pieces, path, descriptor)
        return Adopted(str(self.pool), tip.object, tip.state, str(digest), relocated)

    def _check(
        self, tip: Manifest, path: str, parent: Manifest | None, descriptor: int | None
    ) -> None:
        """
        Check the very file that is hashed, if it is on this host, and not another file that had its
        name when the chain was looked at.
        """
        what = f"{tip.id} in {self.pool}"
        if descriptor is None:
            read, size = reader_of(self.pool, path)
        else:
            read, size = reader(descriptor), os.fstat(descriptor).st_size
        header = check_image(
            read,
            size,
            what,
            parent=parent.state if parent is not None else None,
            backing=Backing.UNMANAGED,
        )
        check_clusters(read, header, what, descriptor=descriptor)

    def _digest(self, tip: Manifest, path: str, descriptor: int | None) -> tuple[Digest, Pieces]:
        if descriptor is not None:
            hashed = hash_open(descriptor, title=f"adopt {tip.id}", progress=self.progress)
            return hashed.digest, hashed.pieces
        self.progress.begin(f"adopt {tip.id}", tip.size)
        try:
            transfer = Transfer(self._size(path), progress=self.progress)
            return self.pool.transport.digest(path, transfer), transfer.pieces
        finally:
            self.progress.end()

    def _publish(
        self, manifest: Manifest, digest: Digest, pieces: Pieces, path: str, descriptor: int | None
    ) -> None:
        staging = self.pool.stage([digest])
        staging.list_pieces(digest, manifest.size, pieces)
        try:
            self._link(path, descriptor, staging.path(digest))
            self.pool.publish(
                [manifest],
                staging,
                in_place=True,
                again=lambda renewed: self._link(path, descriptor, renewed.path(digest)),
            )
        finally:
            staging.end()
            self._collector.collect([digest])  # nothing, unless the publication failed

    def _link(self, path: str, descriptor: int | None, target: str) -> None:
        self.pool.transport.link(path, target)
        linked = self.pool.transport.stat(target)
        if descriptor is not None and (
            linked is None or linked.identity != _identity(os.fstat(descriptor))
        ):
            raise InUse(
                f"another file took the place of {path} in {self.pool} while it was hashed",
                path=path,
                hint="adopt it once more",
            )

    @contextmanager
    def _closed(self, manifest: Manifest, descriptor: int | None) -> Iterator[None]:
        """
        Make a file read-only before it becomes a state. If it does not become one, restore its
        mode.
        """
        if descriptor is None:
            yield
            return
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        with translating(
            "make read-only",
            Subject(f"{manifest.id} in {self.pool}", str(self.pool), layout.view(manifest.id)),
        ):
            os.fchmod(descriptor, layout.READ_ONLY)
        try:
            yield
        except BaseException:
            if self.pool.find(manifest.id) is None:
                os.fchmod(descriptor, mode)
            raise

    def _size(self, path: str) -> int:
        stat = self.pool.transport.stat(path)
        return stat.size if stat is not None else 0

    def _manifest(
        self,
        tip: Manifest,
        path: str,
        digest: Digest,
        parent: Manifest | None,
        descriptor: int | None,
    ) -> Manifest:
        size = os.fstat(descriptor).st_size if descriptor is not None else self._size(path)
        return evolve(
            tip,
            size=size,
            digest=digest,
            parent=(
                Parent(parent.state, parent.digest)
                if parent is not None and parent.digest is not None
                else None
            ),
            extents=_extents(descriptor, size) if descriptor is not None else (),
            created=time.time(),
            creator={"host": Writer.current().host, "adopted": "yes"},
        )

    def _relocate(self, path: Beneath, parent: Manifest) -> bool:
        """
        Give a file a plain sibling backing name.

        :returns: whether it had another one
        """
        with opened.exclusive(path) as descriptor:
            header = read_header_fd(descriptor, str(path))
            if header.backing_name == parent.file_name.encode():
                return False
            patches = backing_patch(reader(descriptor), header, parent.file_name)
            if patches is not None:
                apply_patches(descriptor, patches)
                os.fsync(descriptor)
                return True
        QemuImg(self.tool_timeout).rebase_unsafe(Path(path), parent.file_name)
        return True


def _unwritten(path: Beneath | None) -> AbstractContextManager[int | None]:
    """
    Open a file for reading while no process writes to it, where that can be known: on this host.

    :returns: its descriptor
    """
    return opened.shared(path) if path is not None else nullcontext()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _lease(descriptor: int | None) -> int | None:
    return held_lease(descriptor) if descriptor is not None else None


def _extents(descriptor: int, size: int) -> tuple[tuple[int, int], ...]:
    extents = data_extents(descriptor, size, limit=MAX_EXTENTS)
    return extents if extents != ((0, size),) else ()
