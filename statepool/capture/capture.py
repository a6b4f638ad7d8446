"""
Make files that a machine wrote into states of the cache: one working image, or all images of a
machine, with its RAM if it has some. All files become states, or none.

Where a file and the cache are on one file system, the file is linked, not copied: the file that a
machine ran on *becomes* the state, and a fresh overlay takes its place under the name that the
machine knows. In between, the file has two names and the backing name of a state, so that a machine
could not run from it. A journal says how to continue, and the next command after a crash does so
(:mod:`statepool.capture.capture_journal`).

Every file is checked before anything changes. Then one record publishes all states, and the machine
state that lists them.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

from attrs import evolve, field, frozen

from statepool.beneath import NO_LINKS, Beneath, beside
from statepool.cache.access import Access, require_closed, require_replaceable, require_same
from statepool.cache.cache import Cache
from statepool.cache.check_cached import require_good
from statepool.cache.get_journal import stamp
from statepool.cache.space import require_space
from statepool.capture.capture_journal import Journal, Part, finish, give_back
from statepool.capture.frozen import settle_names
from statepool.capture.standing import parent_of
from statepool.errors import Conflict, NotFound, UsageError
from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.manifest import MAX_EXTENTS, Kind, Manifest, Parent, StateId
from statepool.model.objects import Image
from statepool.model.pieces import Pieces
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.fold import member_name
from statepool.pools.staging import Staging
from statepool.pools.writer import Writer
from statepool.qcow2 import opened
from statepool.qcow2.checks import Backing, check_image, warnings
from statepool.qcow2.clusters import check_clusters
from statepool.qcow2.files import may_become_ours
from statepool.qcow2.formats import recognising
from statepool.qcow2.header import (
    Header,
    Patch,
    apply_patches,
    backing_patch,
    is_empty_overlay,
    reader,
)
from statepool.qcow2.tool import QemuImg
from statepool.transports.base import Transfer
from statepool.transports.copying import copy, data_extents, hash_file
from statepool.transports.flushing import flushed_beside

CANNOT_LINK = NO_LINKS | {errno.EXDEV}
"""
The errors of the kernel where a file cannot get a second name in the cache, which may also be on
another file system.
"""


@frozen
class CaptureResult:
    """
    The result of a capture: what a machine wrote is in the cache.

    :param manifest: of the state
    :param members: of a machine: the manifests of its images' states, and of its RAM
    :param written: whether anything had to be changed; False if the same state was there
    :param how: ``hardlink``, ``copy``, ``reflink`` or ``none``
    :param bytes: how many bytes were copied
    :param warnings: what the user should know
    """

    manifest: Manifest
    members: tuple[Manifest, ...] = ()
    written: bool = True
    how: str = "hardlink"
    bytes: int = 0
    warnings: tuple[str, ...] = ()


@frozen
class Looked:
    """
    An open file that was checked and can become a state.

    :param state: the state that it will become
    :param header: the header of an image
    :param parent: the cached state that backs an image
    :param patches: the bytes to change to give an image the backing name of a state; None if only
        qemu-img can do it
    :param warnings: what the user should know
    """

    state: StateId
    path: Path
    descriptor: int
    size: int
    header: Header | None = None
    parent: Manifest | None = None
    patches: tuple[Patch, ...] | None = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_itself(self) -> bool:
        """Whether an image is backed by the very state that it will become."""
        return self.parent is not None and self.parent.id == self.state

    @property
    def is_unwritten(self) -> bool:
        """Whether nothing was written to an image since its creation."""
        return self.header is not None and is_empty_overlay(reader(self.descriptor), self.header)


@frozen
class _Prepared:
    """
    What one file will become, with its pieces. If it was copied: also the staging that holds the
    copy, how the copy was made, and its status.
    """

    part: Part
    looked: Looked
    pieces: Pieces = field(factory=Pieces, eq=False)
    copied: Staging | None = None
    how: str = "hardlink"
    status: os.stat_result | None = None


def files_of(
    machine: StateId, images: Mapping[str, Path], ram: Path | None = None
) -> dict[StateId, Path]:
    """
    :param machine: a machine state
    :param images: the working images, absolute, by the names of the machine's images
    :param ram: the file with its RAM
    :returns: all files, by the states that they will become
    """
    files = {
        StateId(str(Image(machine.object, name)), machine.state): path
        for name, path in images.items()
    }
    return {
        **files,
        **({StateId(machine.object, machine.state, Kind.RAM): ram} if ram is not None else {}),
    }


@frozen
class Capture:
    """
    The capture of working images, and perhaps of RAM.

    :param cache: the destination
    :param state: the new state, of an image or of a machine
    :param files: the files, absolute, by the states that they will become: one image, or the result
        of :func:`files_of`. The file with the RAM must be complete; it is removed once it is a
        state
    :param replace: replace other content under the name, if no state depends on it
    :param labels: notes of the state's owner
    :param creator: what made it
    :param fingerprint: what can load the RAM, and how it is compressed
    :param running: the images are frozen: a running machine reads them as backing files of the
        images that it writes to, and no other process has them open
    :param copying: the files stay as they are, and no overlay takes their places: their bytes are
        copied, or shared where the file system can
    :param clock: tells the time, in seconds since the epoch
    """

    cache: Cache
    state: StateId
    files: Mapping[StateId, Path]
    replace: bool = False
    labels: Mapping[str, str] = field(factory=dict)
    creator: Mapping[str, str] = field(factory=dict)
    fingerprint: Mapping[str, str] = field(factory=dict)
    running: bool = False
    copying: bool = False
    progress: Progress = SILENT
    clock: Callable[[], float] = time.time

    def run(self, *, dry_run: bool = False) -> CaptureResult:
        """
        :param dry_run: check everything, and change nothing
        :raises UsageError: no image is named, or a file is named twice
        :raises NotFound: there is no such file
        :raises Conflict: a name exists with other content, or an image was written to on top of the
            very state that it should become
        :raises AccessDenied: an image may not be written to, or not be replaced in its directory
        :raises InUse: another process has an image open
        :raises UnsafeImage: an image is not safe as a state
        """
        self._require_files()
        for path in self._images.values() if not (dry_run or self.copying) else ():
            with recognising(path):
                settle_names(path, self.cache.chains.leads_here)
        with ExitStack() as stack:
            looked = [self._look(state, path, stack) for state, path in self.files.items()]
            if self._is_machine:
                self._require_all(looked)
            elif (known := self._unchanged(looked[0])) is not None:
                return CaptureResult(known, written=False, how="none", warnings=looked[0].warnings)
            if dry_run:
                return self._planned(looked)
            self.cache.prepare()
            return self._take(looked, may_link=not self.copying)

    @property
    def _is_machine(self) -> bool:
        return self.state.kind is Kind.MACHINE

    @property
    def _images(self) -> dict[StateId, Path]:
        return {state: path for state, path in self.files.items() if state.kind is Kind.IMAGE}

    # -- looking -----------------------------------------------------------------------------------

    def _require_files(self) -> None:
        images = "images" if self._is_machine else "image"
        if not self._images:
            raise UsageError(
                f"no working image of {self.state.object} is named",
                hint="name one for each image of the machine",
            )
        for path in self.files.values():
            if not os.path.lexists(path):
                raise NotFound(
                    f"there is no file {path}",
                    path=str(path),
                    hint=f"name the working {images} that should become the state",
                )
        for one, other in combinations(self.files.values(), 2):
            if os.path.samestat(os.lstat(one), os.lstat(other)):
                raise UsageError(
                    f"{one} and {other} are one file",
                    hint="name another file for each image of the machine",
                )

    def _require_all(self, looked: Sequence[Looked]) -> None:
        """
        Require all images of the parent machine state: a machine state on top of it must have them,
        too.
        """
        fold = self.cache.pool.fold(self.state.machine)
        for one in looked:
            below = (
                fold.states.get(StateId(self.state.object, one.parent.state, Kind.MACHINE))
                if one.parent is not None
                else None
            )
            if (
                one.parent is None
                or below is None
                or below.members.get(one.parent.object) != one.parent.digest
            ):
                continue
            named = {state.object for state in self.files}
            lacking = sorted(
                name.partition("/")[2]
                for name in below.members
                if "/" in name and name not in named
            )
            if lacking:
                raise UsageError(
                    f"{one.path} stands on {below.id}, which has the images {', '.join(lacking)}"
                    " too, and no working image of them is named",
                    object=self.state.object,
                    state=self.state.state,
                    hint="name one for each image of the machine",
                )

    def _look(self, state: StateId, path: Path, stack: ExitStack) -> Looked:
        """:param stack: keeps the file open, if it passes the checks"""
        # Of the two, the file is closed first: to be recognised, it may have to be opened again.
        with recognising(path), ExitStack() as own:
            mode = (
                opened.unwritten if self.running and state.kind is Kind.IMAGE else opened.exclusive
            )
            descriptor = own.enter_context((opened.shared if self.copying else mode)(path))
            if state.kind is Kind.IMAGE and not self.copying:
                require_replaceable(path, descriptor)
            looked = self.look(state, path, descriptor)
            stack.push(own.pop_all())
            return looked

    def look(self, state: StateId, path: Path, descriptor: int) -> Looked:
        """
        :param state: the state that the file will become
        :param descriptor: of the file
        :returns: what it is, and what backs it
        :raises UnsafeImage: it is not safe as a state
        :raises Conflict: what backs it is no longer a state
        """
        size = os.fstat(descriptor).st_size
        if state.kind is not Kind.IMAGE:
            return Looked(state, path, descriptor, size)
        read = reader(descriptor)
        header = check_image(read, size, str(path), backing=Backing.WORKING)
        check_clusters(read, header, str(path), descriptor=descriptor)
        parent = (
            parent_of(self.cache, state, path, header.backing_name)
            if header.backing_name is not None
            else None
        )
        if parent is not None:
            require_good(self.cache, self.cache.pool.chain_of(parent), path, self.progress)
        patches = backing_patch(read, header, parent.file_name) if parent is not None else ()
        return Looked(state, path, descriptor, size, header, parent, patches, warnings(header))

    def _unchanged(self, looked: Looked) -> Manifest | None:
        """
        :returns: the state that an image is already: the one that backs it, if nothing was written
            to the image since
        :raises Conflict: the image is backed by that state, and was written to since
        """
        if not looked.is_itself:
            return None
        if not looked.is_unwritten:
            raise Conflict(
                f"{looked.path} stands on {looked.state} itself, and was written to since",
                object=looked.state.object,
                state=looked.state.state,
                path=str(looked.path),
                hint="set it under another name",
            )
        return looked.parent

    def _planned(self, looked: Sequence[Looked]) -> CaptureResult:
        parts = [self._linked(one).part for one in looked]
        copied = [
            part.manifest.data_size
            for part, one in zip(parts, looked, strict=True)
            if self.copying or not self._can_link(one)
        ]
        journal = self._journal(parts)
        written = self.cache.pool.check_publishable(journal.manifests, replace=self.replace)
        return self._result(journal, looked, written, "copy" if copied else "hardlink", sum(copied))

    def _can_link(self, looked: Looked) -> bool:
        return looked.patches is not None and can_link(self.cache, looked.descriptor)

    # -- what each file is to become ---------------------------------------------------------------

    def _linked(self, looked: Looked) -> _Prepared:
        """:returns: what a file will become whose bytes are linked"""
        if (known := self._unchanged(looked)) is not None:
            return _Prepared(Part(None, known), looked)
        overlay, pieces = [(patch.offset, patch.data) for patch in looked.patches or ()], Pieces()
        self.progress.begin(f"set {self.state}", looked.size)
        try:
            with flushed_beside(looked.descriptor, looked.size):
                algorithm, progress = self._algorithm(looked), self.progress
                digest = hash_file(
                    looked.descriptor,
                    looked.size,
                    algorithm=algorithm,
                    progress=progress,
                    overlay=overlay,
                    pieces=pieces,
                )
        finally:
            self.progress.end()
        return _Prepared(
            self._part(
                looked, self._manifest(looked, looked.descriptor, digest, looked.size), linked=True
            ),
            looked,
            pieces,
        )

    def _algorithm(self, looked: Looked) -> str:
        """
        :returns: the hash algorithm for the name of the bytes: that of the cached state of this
            name, which may have the same bytes and may be old
        """
        known = self.cache.pool.find(looked.state) if not self.replace else None
        return (
            known.digest.algorithm
            if known is not None and known.digest is not None
            else DEFAULT_ALGORITHM
        )

    def _part(self, looked: Looked, manifest: Manifest, *, linked: bool) -> Part:
        if self.copying:
            return Part(None, manifest)
        return Part(
            source=looked.path,
            manifest=manifest,
            linked=linked,
            backing=(
                os.fsdecode(looked.header.backing_name or b"") if looked.header is not None else ""
            ),
            access=Access.of(looked.descriptor),
            stamp=stamp(beside(looked.path)),
        )

    def _manifest(self, looked: Looked, descriptor: int, digest: Digest, size: int) -> Manifest:
        """:returns: the manifest of the new state"""
        header, parent, extents = (
            looked.header,
            looked.parent,
            data_extents(descriptor, size, limit=MAX_EXTENTS),
        )
        return Manifest(
            *looked.state,
            size=size,
            digest=digest,
            parent=(
                Parent(parent.state, parent.digest)
                if parent is not None and parent.digest is not None
                else None
            ),
            virtual_size=header.virtual_size if header is not None else 0,
            cluster_size=header.cluster_size if header is not None else 0,
            extents=extents if extents != ((0, size),) else (),
            created=self.clock(),
            creator=self._creator,
            labels=dict(self.labels) if header is not None else {},
            fingerprint=dict(self.fingerprint) if header is None else {},
        )

    @property
    def _creator(self) -> dict[str, str]:
        return {"host": Writer.current().host, **self.creator}

    def _copied(self, looked: Looked) -> _Prepared:
        """
        Copy a file into the cache, where it has no name yet. This is for a cache on another file
        system, a file with other names, or a header that only qemu-img can change.
        """
        if (known := self._unchanged(looked)) is not None:
            return _Prepared(Part(None, known), looked)
        gathering = self.cache.pool.stage([])
        path, pieces = self.cache.file(layout.gathered(gathering.marker.nonce)), Pieces()
        try:
            manifest, how, status = self._copy(looked, path, pieces)
        except BaseException:
            path.remove()
            gathering.end()
            raise
        return _Prepared(
            self._part(looked, manifest, linked=False), looked, pieces, gathering, how, status
        )

    def _copy(
        self, looked: Looked, path: Beneath, pieces: Pieces
    ) -> tuple[Manifest, str, os.stat_result]:
        """
        Copy and flush a file.

        :returns: the manifest of the copy, how it was made, and its status
        """
        self.progress.begin(f"set {self.state}", looked.size)
        try:
            with path.open(os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
                transfer = Transfer(
                    looked.size, self._algorithm(looked), progress=self.progress, pieces=pieces
                )
                moved = copy(looked.descriptor, file, transfer, flush=True)
                digest, parent = moved.digest, looked.parent
                if parent is not None and looked.patches is None:
                    QemuImg(self.cache.settings.tool_timeout).rebase_unsafe(
                        Path(path), parent.file_name
                    )
                elif looked.patches:
                    apply_patches(file, looked.patches)
                size = os.fstat(file).st_size
                if parent is not None:
                    digest = hash_file(file, size, algorithm=digest.algorithm, pieces=pieces)
                manifest = self._manifest(looked, file, digest, size)
                os.fchmod(file, layout.READ_ONLY)
                os.fsync(file)
                return manifest, moved.how, os.fstat(file)
        finally:
            self.progress.end()

    # -- doing it ----------------------------------------------------------------------------------

    def _take(self, looked: Sequence[Looked], *, may_link: bool) -> CaptureResult:
        copied = [one for one in looked if not (may_link and self._can_link(one))]
        extents = [
            extent
            for one in copied
            for extent in data_extents(one.descriptor, one.size, limit=MAX_EXTENTS)
        ]
        require_space(self.cache.pool, sum(length for _, length in extents))
        made: list[_Prepared] = []
        try:
            for one in looked:
                made.append(self._copied(one) if one in copied else self._linked(one))
            prepared = list(_without_doubles(made))
            journal = self._journal([each.part for each in prepared])
            written = self.cache.pool.check_publishable(journal.manifests, replace=self.replace)
            staging = self.cache.stage(journal.digests, **journal.to_facts())
            if not self._gather(prepared, staging):
                return self._take(looked, may_link=False)
        finally:
            self._forget(made)
        self._finish(prepared, journal, staging)
        how = next((each.how for each in made if each.copied is not None), "hardlink")
        return self._result(
            journal,
            looked,
            written,
            how,
            sum(each.part.manifest.data_size for each in made if each.copied is not None),
        )

    def _forget(self, made: Sequence[_Prepared]) -> None:
        """
        End the stagings in which the copies were gathered; copies that are needed have another name
        by now.
        """
        for each in made:
            if each.copied is not None:
                self.cache.file(layout.gathered(each.copied.marker.nonce)).remove()
                each.copied.end()

    def _gather(self, prepared: Sequence[_Prepared], staging: Staging) -> bool:
        """
        :returns: whether all bytes are gathered; False if one of the files cannot be linked: then
            the staging has ended
        """
        try:
            for each in prepared:
                if each.part.source is not None:
                    require_same(each.looked.path, each.looked.descriptor)
                if each.part.linked:
                    # this very file, even if another file has its name by now
                    self.cache.tree.name(each.looked.descriptor, staging.path(each.part.digest))
                elif each.copied is not None:
                    self.cache.pool.transport.rename(
                        layout.gathered(each.copied.marker.nonce), staging.path(each.part.digest)
                    )
                staging.list_pieces(each.part.digest, each.part.manifest.size, each.pieces)
            # The journal, needed after a power cut, must be durable before an image is changed.
            self.cache.pool.transport.flush(layout.INCOMING)
        except BaseException as error:
            staging.end()
            if isinstance(error, OSError) and error.errno in CANNOT_LINK:
                return False
            raise
        return True

    def _finish(self, prepared: Sequence[_Prepared], journal: Journal, staging: Staging) -> None:
        linked = {each.part.digest: each.looked for each in prepared if each.part.linked}
        descriptors = {digest: looked.descriptor for digest, looked in linked.items()}
        hashed = {each.part.digest: each.status for each in prepared if each.status is not None}
        try:
            for digest, looked in linked.items():
                apply_patches(looked.descriptor, looked.patches or ())
                require_closed(looked.path, looked.descriptor, running=self.running)
                os.fsync(looked.descriptor)
                hashed[digest] = os.fstat(looked.descriptor)
            finish(self.cache, staging, journal, hashed, descriptors.values())
        except BaseException:
            # Another writer was faster, the disk is full, or the user interrupted: restore the
            # images, unless they are states by now.
            give_back(self.cache, staging.marker, journal, descriptors)
            raise

    def _journal(self, parts: Sequence[Part]) -> Journal:
        if not self._is_machine:
            return Journal(tuple(parts), replace=self.replace)
        members = {member_name(part.manifest.id): part.digest for part in parts}
        labels = dict(self.labels)
        return Journal(
            tuple(parts),
            Manifest(
                *self.state,
                created=self.clock(),
                creator=self._creator,
                labels=labels,
                members=members,
            ),
            self.replace,
        )

    def _result(
        self, journal: Journal, looked: Sequence[Looked], written: bool, how: str, size: int
    ) -> CaptureResult:
        manifests = tuple(part.manifest for part in journal.parts)
        told = tuple(dict.fromkeys(text for one in looked for text in one.warnings))
        return CaptureResult(
            journal.machine or manifests[0],
            manifests if self._is_machine else (),
            written,
            how,
            size,
            told,
        )


def _without_doubles(made: Sequence[_Prepared]) -> Iterator[_Prepared]:
    """
    Leave out doubles: two images can have the same bytes, as two empty ones do. Such bytes are
    gathered once.
    """
    seen: set[Digest] = set()
    for each in made:
        double = each.part.digest in seen
        seen.add(each.part.digest)
        yield (
            evolve(each, part=evolve(each.part, linked=False), copied=None, status=None)
            if double
            else each
        )


def can_link(cache: Cache, descriptor: int) -> bool:
    """
    :param descriptor: of a file, open for writing
    :returns: whether the file itself can become a state: whether it can get a name in the cache and
        be made read-only there
    """
    root = (
        cache.root
        if cache.root.exists()
        else next(path for path in cache.root.parents if path.exists())
    )
    found = os.fstat(descriptor)
    # An account that may read and write a file of another account may link it
    # (protected_hardlinks), but not change its mode: the owner could still write to the state.
    return (
        found.st_dev == os.stat(root).st_dev and found.st_nlink == 1 and may_become_ours(descriptor)
    )


def absolute(source: os.PathLike[str] | str) -> Path:
    """:returns: the absolute path of a working image"""
    return Path(os.path.abspath(os.fsdecode(source)))
