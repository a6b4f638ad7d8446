"""
Taking a working image into the cache as a state: linked, not copied, where both are on one file system.

The file that a machine ran on *becomes* the state, and a fresh overlay takes its place under the name that the machine knows. In between the file has
two names and the backing name of a state, so that a machine could not run from it: a marker says how to go on, and whoever comes after a crash does
so (:mod:`statepool.transfer.takeover`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from attrs import field, frozen

from statepool.beneath import NO_LINKS, Beneath, beside
from statepool.errors import AccessDenied, Conflict, InUse, NotFound, about_file
from statepool.leases import held_lease, try_lease
from statepool.model.digest import Digest
from statepool.model.manifest import MAX_EXTENTS, Manifest, Parent, StateId
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.staging import Staging
from statepool.pools.writer import Writer
from statepool.qcow2 import opened
from statepool.qcow2.checks import Backing, check_image, warnings
from statepool.qcow2.clusters import check_clusters
from statepool.qcow2.files import is_ours, may_become_ours
from statepool.qcow2.formats import recognising
from statepool.qcow2.header import Header, Patch, apply_patches, backing_patch, is_empty_overlay, reader
from statepool.qcow2.tool import QemuImg
from statepool.transfer.access import Access, close_to_others
from statepool.transfer.cache import Cache
from statepool.transfer.fetch import READ_ONLY
from statepool.transfer.frozen import settle_names
from statepool.transfer.ready import require_good
from statepool.transfer.space import require_space
from statepool.transfer.standing import parent_of
from statepool.transfer.takeover import Takeover, finish, give_back
from statepool.transports.copying import copy, data_extents, hash_file
from statepool.transports.flushing import flushed_beside

CANNOT_LINK = NO_LINKS | {errno.EXDEV}
"""What the kernel says where a file cannot get a second name in the cache, which may also be on another file system."""


@frozen
class Taken:
    """
    A working image is a state of the cache.

    :param manifest: what is known of it
    :param written: whether anything had to be changed; False if the same state was there
    :param how: ``hardlink``, ``copy``, ``reflink`` or ``none``
    :param warnings: what the user should know
    """

    manifest: Manifest
    written: bool
    how: str
    warnings: tuple[str, ...] = ()


@frozen
class Examined:
    """What a look at a working image found."""

    header: Header
    parent: Manifest | None
    patches: tuple[Patch, ...] | None
    size: int
    warnings: tuple[str, ...] = ()


@frozen
class Intake:
    """
    Takes one working image.

    :param cache: where to
    :param state: the name it gets
    :param working: the image, absolute
    :param replace: other content under the name gives way, if nothing stands on it
    :param labels: what its owner wants to remember
    :param creator: what made it
    :param clock: tells the time, in seconds since the epoch
    :param running: the image is frozen: a running machine reads it, below the one that it writes to, and nobody else has it open
    """

    cache: Cache
    state: StateId
    working: Path
    replace: bool = False
    labels: Mapping[str, str] = field(factory=dict)
    creator: Mapping[str, str] = field(factory=dict)
    progress: Progress = SILENT
    clock: Callable[[], float] = time.time
    running: bool = False

    def run(self, *, dry_run: bool = False) -> Taken:
        """
        :param dry_run: look at everything, and change nothing
        :raises Conflict: the name exists with other content, or the image was written to on top of the very state it should become
        :raises NotFound: there is no such file
        :raises AccessDenied: it may not be written to, or not be replaced where it is
        :raises InUse: another process has the image open
        :raises UnsafeImage: it is not fit to be a state
        """
        if not os.path.lexists(self.working):
            raise NotFound(f"there is no file {self.working}", path=str(self.working), hint="name the working image that should become the state")
        if not dry_run:
            with recognising(self.working):
                settle_names(self.working, self.cache.chains.leads_here)
        with recognising(self.working), (opened.unwritten if self.running else opened.exclusive)(self.working) as descriptor:
            require_replaceable(self.working, descriptor)
            examined = self.examine(descriptor)
            if self.is_itself(examined):
                return self.unchanged(descriptor, examined)
            if not dry_run:
                self.cache.prepare()
            if examined.patches is None or not can_link(self.cache, descriptor):
                return self._copy(descriptor, examined, dry_run)
            return self._link(descriptor, examined, dry_run)

    # -- looking -----------------------------------------------------------------------------------------------------------------------------------

    def examine(self, descriptor: int) -> Examined:
        """
        :param descriptor: of the image
        :returns: what it is, and stands on
        :raises UnsafeImage: it is not fit to be a state
        :raises Conflict: what it stands on is no state any more
        """
        size = os.fstat(descriptor).st_size
        read = reader(descriptor)
        header = check_image(read, size, str(self.working), backing=Backing.WORKING)
        check_clusters(read, header, str(self.working), descriptor=descriptor)
        parent = parent_of(self.cache, self.state, self.working, header.backing_name) if header.backing_name is not None else None
        if parent is not None:
            require_good(self.cache, self.cache.pool.chain_of(parent), self.working, self.progress)
        patches = backing_patch(read, header, parent.file_name) if parent is not None else ()
        return Examined(header, parent, patches, size, warnings(header))

    def is_itself(self, examined: Examined) -> bool:
        """:returns: whether an image stands on the very state that it should become"""
        return examined.parent is not None and examined.parent.id == self.state

    def unchanged(self, descriptor: int, examined: Examined) -> Taken:
        """
        :returns: that an image which stands on the very state it should become is that state
        :raises Conflict: it was written to since
        """
        assert examined.parent is not None
        if not is_empty_overlay(reader(descriptor), examined.header):
            raise Conflict(
                f"{self.working} stands on {self.state} itself, and was written to since",
                object=self.state.object,
                state=self.state.state,
                path=str(self.working),
                hint="set it under another name",
            )
        return Taken(examined.parent, written=False, how="none", warnings=examined.warnings)

    def manifest(self, descriptor: int, examined: Examined, digest: Digest, size: int) -> Manifest:
        """:returns: what will be known of the state"""
        parent = examined.parent
        extents = data_extents(descriptor, size, limit=MAX_EXTENTS)
        return Manifest(
            object=self.state.object,
            state=self.state.state,
            size=size,
            digest=digest,
            parent=Parent(parent.state, parent.digest) if parent is not None and parent.digest is not None else None,
            virtual_size=examined.header.virtual_size,
            cluster_size=examined.header.cluster_size,
            extents=extents if extents != ((0, size),) else (),
            created=self.clock(),
            creator={"host": Writer.current().host, **self.creator},
            labels=dict(self.labels),
        )

    # -- by linking --------------------------------------------------------------------------------------------------------------------------------

    def _link(self, descriptor: int, examined: Examined, dry_run: bool) -> Taken:
        patches = examined.patches or ()
        with flushed_beside(descriptor, examined.size):
            digest = self._hash(descriptor, examined.size, [(patch.offset, patch.data) for patch in patches])
        manifest = self.manifest(descriptor, examined, digest, examined.size)
        changes = self.cache.pool.check_publishable([manifest], replace=self.replace)
        if dry_run:
            return Taken(manifest, changes, "hardlink", examined.warnings)
        access = Access.of(descriptor)
        staging = self.cache.stage([digest], **self._facts(access, examined, manifest))
        if not self._link_bytes(descriptor, staging, digest):
            return self._copy(descriptor, examined, dry_run)
        try:
            apply_patches(descriptor, patches)
            require_closed(self.working, descriptor, running=self.running)
            os.fsync(descriptor)
            hashed = os.fstat(descriptor)
            finish(self.cache, staging, manifest, self.working, hashed, replace=self.replace, access=access, linked=descriptor)
        except BaseException:
            # Somebody else was faster, the disk is full, or the user does not want to wait: the image becomes again what it was, unless it is a state
            # by now.
            give_back(self.cache, staging.marker, descriptor)
            raise
        return Taken(manifest, changes, "hardlink", examined.warnings)

    def _hash(self, descriptor: int, size: int, overlay: list[tuple[int, bytes]]) -> Digest:
        self.progress.begin(f"set {self.state}", size)
        try:
            return hash_file(descriptor, size, progress=self.progress, overlay=overlay)
        finally:
            self.progress.end()

    def _facts(self, access: Access, examined: Examined, manifest: Manifest) -> dict[str, str]:
        return Takeover(
            working=self.working,
            backing=os.fsdecode(examined.header.backing_name or b""),
            mode=access.mode,
            replace=self.replace,
            manifest=manifest,
            owner=access.uid,
        ).to_facts()

    def _link_bytes(self, descriptor: int, staging: Staging, digest: Digest) -> bool:
        """:returns: whether the image has a second name in the cache now; if not, the staging has ended"""
        try:
            require_same(self.working, descriptor)
            self.cache.tree.name(descriptor, staging.path(digest))  # this very file, whatever has its name by now
            # What says how to go on after a power cut must be there before the image is changed.
            self.cache.pool.transport.flush(layout.INCOMING)
        except BaseException as error:
            staging.end()
            if isinstance(error, OSError) and error.errno in CANNOT_LINK:
                return False
            raise
        return True

    # -- by copying --------------------------------------------------------------------------------------------------------------------------------

    def _copy(self, descriptor: int, examined: Examined, dry_run: bool) -> Taken:
        """For a cache on another file system, an image with other names, or a header that only qemu-img can change."""
        pool = self.cache.pool
        if dry_run:
            digest = self._hash(descriptor, examined.size, [(patch.offset, patch.data) for patch in examined.patches or ()])
            manifest = self.manifest(descriptor, examined, digest, examined.size)
            return Taken(manifest, pool.check_publishable([manifest], replace=self.replace), "copy", examined.warnings)
        require_space(pool, sum(length for _, length in data_extents(descriptor, examined.size, limit=MAX_EXTENTS)))
        gathering = pool.stage([])
        path = self.cache.file(layout.gathered(gathering.marker.nonce))
        try:
            manifest, how, status = self.copy_bytes(descriptor, examined, path)
            require_same(self.working, descriptor)
            changes = pool.check_publishable([manifest], replace=self.replace)
            assert manifest.digest is not None
            staging = pool.stage([manifest.digest])
            try:
                pool.transport.rename(layout.gathered(gathering.marker.nonce), staging.path(manifest.digest))
            except BaseException:
                staging.end()
                raise
        finally:
            path.remove()
            gathering.end()
        try:
            finish(self.cache, staging, manifest, self.working, status, replace=self.replace, access=Access.of(descriptor))
        except BaseException:
            staging.end()
            raise
        return Taken(manifest, changes, how, examined.warnings)

    def copy_bytes(self, descriptor: int, examined: Examined, path: Beneath) -> tuple[Manifest, str, os.stat_result]:
        """
        Copy an image as the state that it becomes, and flush the copy.

        :param path: where to
        :returns: what will be known of it, how it was copied, and the status of the copy
        """
        self.progress.begin(f"set {self.state}", examined.size)
        try:
            with path.open(os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
                moved = copy(descriptor, file, examined.size, progress=self.progress, flush=True)
                digest, parent = moved.digest, examined.parent
                if parent is not None and examined.patches is None:
                    QemuImg(self.cache.settings.tool_timeout).rebase_unsafe(Path(path), parent.file_name)
                elif examined.patches:
                    apply_patches(file, examined.patches)
                size = os.fstat(file).st_size
                if parent is not None:
                    digest = hash_file(file, size)
                manifest = self.manifest(file, examined, digest, size)
                os.fchmod(file, READ_ONLY)
                os.fsync(file)
                return manifest, moved.how, os.fstat(file)
        finally:
            self.progress.end()


def can_link(cache: Cache, descriptor: int) -> bool:
    """
    :param descriptor: of a file, open for writing
    :returns: whether it can become a state itself: it gets a name in the cache, and is made read-only there
    """
    root = cache.root if cache.root.exists() else next(path for path in cache.root.parents if path.exists())
    found = os.fstat(descriptor)
    # The kernel lets who may read and write a file of somebody else link it, but not close it: its owner could go on writing to the state.
    return found.st_dev == os.stat(root).st_dev and found.st_nlink == 1 and may_become_ours(descriptor)


def require_same(working: Path, descriptor: int) -> None:
    """
    Look whether a file still has its name, before another one takes that.

    :param descriptor: of the file
    :raises InUse: another file has the name by now
    """
    there = beside(working).stat()
    if there is None or not os.path.samestat(there, os.fstat(descriptor)):
        raise InUse(
            f"{working} was moved, or replaced by another file, while it was read", path=str(working), hint="set it once more, by the name it has now"
        )


def require_replaceable(working: Path, descriptor: int) -> None:
    """
    Refuse a file whose name no overlay could get, before there is a state that it would have to stand on.

    :param descriptor: of the file, open for writing
    :raises AccessDenied: it is in a directory such as ``/tmp``, in which only the owner of a file may replace it, and belongs to somebody else; or
        this account cannot give another file to its owner and group
    """
    above = os.stat(working.parent)
    if above.st_mode & stat.S_ISVTX and above.st_uid != os.geteuid() and not is_ours(descriptor):
        raise about_file(
            AccessDenied(
                f"{working} belongs to another account, and only that may replace it in this directory",
                path=str(working),
                hint="copy it to a directory of your own, and set the copy",
            )
        )
    Access.of(descriptor).require_givable(working)


def require_closed(working: Path, descriptor: int, *, running: bool) -> None:
    """
    Let nobody write to a file any more that becomes a state.

    :param running: a machine has it open, below the image that it writes to, so that there is no lease to ask
    :raises AccessDenied: it has been given to another account
    :raises InUse: an account that could write to it has asked to: what was opened before the file was closed stays open
    """
    could_write = os.fstat(descriptor).st_uid != os.geteuid() or bool(os.fstat(descriptor).st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    if not close_to_others(descriptor):
        raise AccessDenied(f"{working} has been given to another account", path=str(working), hint="set it as that account, or as root")
    if could_write and not running and held_lease(descriptor) == fcntl.F_UNLCK and try_lease(descriptor, fcntl.F_WRLCK) is not None:
        raise InUse(f"another process wants to write to {working}", path=str(working), hint="set it when nobody writes to it")


def absolute(source: os.PathLike[str] | str) -> Path:
    """:returns: a working image's path, absolute"""
    return Path(os.path.abspath(os.fsdecode(source)))
