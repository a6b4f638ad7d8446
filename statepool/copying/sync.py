"""
Copy chains from any pool to any other, without a cache between them: parents first, existing states
are skipped, and nothing is visible before it is whole.

An interrupted run is simply started again: it continues with the first state that is missing.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from attrs import evolve, frozen

from statepool.cache.cache import file_in
from statepool.cache.gc_roots import gc_roots
from statepool.cache.linked import refuse_linked
from statepool.cache.space import require_space
from statepool.errors import AccessDenied, NotFound, StatePoolError, UnsafeImage
from statepool.model.digest import Digest
from statepool.model.manifest import MAX_EXTENTS, Kind, Manifest, StateId
from statepool.model.outcomes import SyncAction as Action
from statepool.model.outcomes import Synced, SyncedState
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.fold import Fold, member_ids
from statepool.pools.pool import Pool
from statepool.pools.refusals import mismatched, taken
from statepool.pools.staging import Staging
from statepool.qcow2.checks import Backing, check_image
from statepool.qcow2.clusters import check_clusters
from statepool.qcow2.files import open_regular
from statepool.qcow2.header import Header, Read, reader
from statepool.sources.unmanaged import require_proportion
from statepool.transports.base import FileKind, Transfer
from statepool.transports.copying import data_extents, hash_file
from statepool.transports.reading import Extent


@frozen
class Sync:
    """
    The synchronisation of one pool with another: copies to the target what the origin has.

    :param origin: the pool to copy from
    :param target: the pool to copy to
    :param delete: also remove from the target the states that the origin does not have
    :param replace: replace other content under a name, if no state depends on it
    :param progress: told of the bytes
    """

    origin: Pool
    target: Pool
    delete: bool = False
    replace: bool = False
    progress: Progress = SILENT

    def run(self, object: str | None = None, *, dry_run: bool = False) -> Synced:
        """
        Copy the states that are missing.

        :param object: only its states: ``machine`` or ``machine/image``
        :param dry_run: report what would be done, and change nothing
        :raises NotAPool: the origin or the target is not a pool
        :raises NotFound: the origin has nothing of this name
        """
        self.origin.require()
        self.target.require(write=True)
        machines = self.origin.machines_of(object)
        found = [
            synced for machine in machines for synced in self._machine(machine, object, dry_run)
        ]
        if self.delete:
            for machine in self.target.machines_of(object):
                found += self._remove_others(machine, object, dry_run)
        if not found and object is not None:
            raise NotFound(
                f"there is no state of {object} in {self.origin}",
                object=object,
                pool=str(self.origin),
                hint="statepool show",
            )
        return Synced(str(self.origin), str(self.target), tuple(found))

    # -- copying -----------------------------------------------------------------------------------

    def _machine(self, machine: str, object: str | None, dry_run: bool) -> Iterator[SyncedState]:
        fold = self.origin.fold(machine)
        gone = self.target.lacking(self.target.fold(machine).digests & fold.digests)
        # If a state fails, those on it fail, too: they find that their parent is missing, and say
        # so.
        failed: set[StateId] = set()
        for manifest in in_order(fold, _named(fold, object)):
            done = self._attempt(manifest, dry_run, gone)
            if dry_run and done.action is Action.COPIED and (lacking := _below(manifest) & failed):
                done = evolve(
                    done,
                    action=Action.FAILED,
                    bytes=0,
                    error=f"{min(lacking)} would not be there, on which it stands",
                )
            if done.action is Action.FAILED:
                failed.add(manifest.id)
            yield done
        try:
            others = self.origin.unmanaged(machine)
        except AccessDenied as error:
            yield SyncedState(machine, "", str(Kind.IMAGE), Action.FAILED, error=str(error))
            return
        for unmanaged in others:
            if object in (None, machine, unmanaged.id.object):
                reason = (
                    f"{layout.view(unmanaged.id)} is a file of another tool; make it managed with:"
                    f" statepool adopt {self.origin}"
                )
                yield SyncedState(
                    unmanaged.id.object,
                    unmanaged.id.state,
                    str(unmanaged.id.kind),
                    Action.FAILED,
                    error=reason,
                )

    def _attempt(self, manifest: Manifest, dry_run: bool, gone: set[Digest]) -> SyncedState:
        """
        :param gone: bytes that the target's log names, but that were deleted there: they are put
            back
        """
        done = SyncedState(manifest.object, manifest.state, str(manifest.kind), Action.PRESENT)
        try:
            if not self._is_missing(manifest) and manifest.digest not in gone:
                return done
            if dry_run:
                return evolve(done, action=Action.COPIED, bytes=manifest.data_size)
            return evolve(done, action=Action.COPIED, bytes=self._copy(manifest))
        except StatePoolError as error:
            return evolve(done, action=Action.FAILED, error=str(error))

    def _is_missing(self, manifest: Manifest) -> bool:
        there = self.target.find(manifest.id)
        if there is None:
            return True
        if (
            there.digest == manifest.digest
            and there.parent == manifest.parent
            and there.members == manifest.members
        ):
            return False
        if self.replace:
            return True
        details = f"{there.digest}, in {self.origin} {manifest.digest}"
        raise taken(
            manifest.id,
            self.target,
            details,
            "remove it there first, or have it replaced with --replace",
        )

    def _copy(self, manifest: Manifest) -> int:
        """:returns: how many bytes were moved"""
        digests = [manifest.digest] if manifest.digest is not None else []
        old = self.target.find(manifest.id)
        staging = self.target.stage(digests)
        try:
            sent, extents = 0, tuple[Extent, ...]()
            copied = manifest.derived(size=0, members=manifest.members)
            for digest in digests:
                path = layout.data(digest)
                if not self.target.has_bytes(digest):
                    require_space(self.target, manifest.data_size)
                    (sent, extents), path = (
                        self._move(manifest, digest, staging),
                        staging.path(digest),
                    )
                # The file that lies there now will be used. It may be there because of another
                # state, or of another parent.
                copied = self._look(manifest, digest, path, extents)
            again = (
                partial(self._move, manifest, manifest.digest)
                if manifest.digest is not None
                else None
            )
            self.target.publish([copied], staging, replace=self.replace, again=again)
        finally:
            staging.end()
        if old is not None and old.digest not in (None, manifest.digest):
            self._collect([old])
        return sent

    def _look(
        self, manifest: Manifest, digest: Digest, path: str, sent: tuple[Extent, ...]
    ) -> Manifest:
        """
        :param path: the path of the bytes in the target
        :param sent: the extents that hold data, if known; else empty
        :returns: the manifest for the target: as its own bytes show
        :raises UnsafeImage: they are those of an image, and not safe to use
        """
        transport = self.target.transport
        if (there := transport.beneath(path)) is None:
            found = transport.stat(path)
            size = (
                found.size if found is not None and found.kind is FileKind.FILE else manifest.size
            )
            header = self._check_safe(
                manifest, lambda offset, length: transport.read(path, offset, length), size
            )
            return _derived(manifest, digest, size, header, sent)
        here = file_in(self.target, digest) if path == layout.data(digest) else None
        with open_regular(here or there) as descriptor:
            size = os.fstat(descriptor).st_size
            header = self._check_safe(manifest, reader(descriptor), size, descriptor)
            return _derived(
                manifest, digest, size, header, data_extents(descriptor, size, limit=MAX_EXTENTS)
            )

    def _move(
        self, manifest: Manifest, digest: Digest, staging: Staging
    ) -> tuple[int, tuple[Extent, ...]]:
        """
        :returns: how many bytes were moved, and the extents of the file that was read, if only this
            account can write to it; else none
        """
        self.progress.begin(f"copy {manifest.id}", manifest.size)
        try:
            with self._opened(manifest, digest) as descriptor:
                self._look_first(manifest, digest, descriptor)
                extents = (
                    data_extents(descriptor, manifest.size, limit=MAX_EXTENTS)
                    if _is_our_own(descriptor)
                    else ()
                )
                transfer = Transfer(
                    manifest.size, digest.algorithm, manifest.extents, self.progress
                )
                moved = self.target.transport.store(descriptor, staging.path(digest), transfer)
        finally:
            self.progress.end()
        self._check(manifest, digest, moved.digest)
        staging.list_pieces(digest, manifest.size, transfer.pieces)
        return moved.sent, extents

    @contextmanager
    def _opened(self, manifest: Manifest, digest: Digest) -> Iterator[int]:
        """
        Open the bytes on this host: the file itself, or a temporary copy that lasts for the
        ``with`` block.
        """
        path = layout.data(digest)
        if (here := self.origin.transport.beneath(path)) is not None:
            with open_regular(file_in(self.origin, digest) or here) as descriptor:
                yield descriptor
            return
        require_proportion(self.origin, manifest, path)
        with tempfile.TemporaryFile(buffering=0) as spool:
            moved = self.origin.transport.fetch(
                path, spool.fileno(), Transfer(manifest.size, digest.algorithm, manifest.extents)
            )
            self._check(manifest, digest, moved.digest)
            yield spool.fileno()

    def _look_first(self, manifest: Manifest, digest: Digest, descriptor: int) -> None:
        """
        Check a state before anything is moved: what is certain to be refused is refused while
        nothing is there yet.
        """
        try:
            self._check_safe(manifest, reader(descriptor), os.fstat(descriptor).st_size, descriptor)
        except UnsafeImage as error:  # damaged, or published like this
            if error.check == "proportion":
                raise
            actual = hash_file(descriptor, os.fstat(descriptor).st_size, algorithm=digest.algorithm)
            self._check(manifest, digest, actual)
            raise

    def _check_safe(
        self, manifest: Manifest, read: Read, size: int, descriptor: int | None = None
    ) -> Header | None:
        """
        :param size: how long the file is, in bytes
        :param descriptor: of the file, if it is on this host: then its clusters are checked, too.
            Elsewhere only the header is checked; each get checks again
        :returns: the header of an image
        :raises UnsafeImage: the bytes are those of an image, and not safe to use
        """
        if manifest.kind is not Kind.IMAGE:
            return None
        parent, what = (
            manifest.parent.state if manifest.parent is not None else None,
            f"{manifest.id} from {self.origin}",
        )
        header = check_image(read, size, what, parent=parent, backing=Backing.UNMANAGED)
        if descriptor is not None:
            check_clusters(read, header, what, descriptor=descriptor)
        return header

    def _check(self, manifest: Manifest, digest: Digest, actual: Digest) -> None:
        if actual != digest:
            raise mismatched(
                manifest,
                actual,
                f"from {self.origin}",
                promised=digest,
                pool=str(self.origin),
                hint=(
                    f"look at the pool with: statepool --source {self.origin} verify"
                    f" {manifest.object} {manifest.state}"
                ),
            )

    # -- removing ----------------------------------------------------------------------------------

    def _remove_others(
        self, machine: str, object: str | None, dry_run: bool
    ) -> Iterator[SyncedState]:
        kept = set(self.origin.fold(machine).states)
        fold = self.target.fold(machine)
        for manifest in reversed(
            in_order(
                fold, (manifest for manifest in _named(fold, object) if manifest.id not in kept)
            )
        ):
            yield self._remove(manifest, dry_run)

    def _remove(self, manifest: Manifest, dry_run: bool) -> SyncedState:
        done = SyncedState(manifest.object, manifest.state, str(manifest.kind), Action.REMOVED)
        try:
            if not dry_run:
                self._collect(
                    self.target.remove(
                        manifest.id, allowed=lambda digests: refuse_linked(self.target, digests)
                    )
                )
        except StatePoolError as error:
            return evolve(done, action=Action.FAILED, error=str(error))
        return done

    def _collect(self, manifests: Iterable[Manifest]) -> None:
        digests = [manifest.digest for manifest in manifests if manifest.digest is not None]
        Collector(self.target, lambda: gc_roots(self.target)).collect(digests)


def _derived(
    manifest: Manifest,
    digest: Digest,
    size: int,
    header: Header | None,
    extents: tuple[Extent, ...],
) -> Manifest:
    """:returns: the manifest of a copy with the given digest"""
    return manifest.derived(
        size=size,
        digest=digest,
        parent=manifest.parent,
        virtual_size=header.virtual_size if header is not None else 0,
        cluster_size=header.cluster_size if header is not None else 0,
        extents=extents,
    )


def _is_our_own(descriptor: int) -> bool:
    """Tell whether no other account can change a file while we read it."""
    found = os.fstat(descriptor)
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _below(manifest: Manifest) -> set[StateId]:
    """:returns: the states that a state depends on: its parent and its members"""
    parent = (
        {StateId(manifest.object, manifest.parent.state)} if manifest.parent is not None else set()
    )
    return parent | set(member_ids(manifest))


def _named(fold: Fold, object: str | None) -> Iterator[Manifest]:
    return (
        manifest
        for manifest in fold.states.values()
        if object in (None, fold.machine, manifest.object)
    )


def in_order(fold: Fold, manifests: Iterable[Manifest]) -> list[Manifest]:
    """
    :param fold: has the manifests
    :returns: the manifests, each after what backs it, and machine states after their members
    """
    return sorted(
        manifests,
        key=lambda manifest: (
            manifest.kind is Kind.MACHINE,
            fold.depth(manifest),
            str(manifest.id),
        ),
    )
