"""
Taking all images of a machine into the cache as one machine state, with its RAM if it has some: all of it, or nothing.

Every image is looked at before anything changes. One record then publishes the states of all images, the RAM and the machine state that lists them.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path

from attrs import evolve, field, frozen

from statepool.beneath import Beneath, beside
from statepool.errors import NotFound, UsageError
from statepool.model.digest import Digest
from statepool.model.manifest import MAX_EXTENTS, Kind, Manifest, StateId
from statepool.model.names import check_state_name
from statepool.model.objects import Image
from statepool.model.progress import SILENT, Progress
from statepool.pools import layout
from statepool.pools.staging import Staging
from statepool.pools.writer import Writer
from statepool.qcow2 import opened
from statepool.qcow2.header import Patch, apply_patches
from statepool.transfer.cache import Cache
from statepool.transfer.fetch import READ_ONLY
from statepool.transfer.frozen import settle_names
from statepool.transfer.intake import CANNOT_LINK, Examined, Intake, can_link, require_closed, require_replaceable, require_same
from statepool.transfer.machine_takeover import MachineTakeover, Part, finish, give_back, members_of
from statepool.transfer.overlays import stamp
from statepool.transfer.space import require_space
from statepool.transports.copying import copy, data_extents, hash_file
from statepool.transports.flushing import flushed_beside


@frozen
class MachineTaken:
    """
    All images of a machine are states of the cache, and so is the machine.

    :param manifest: what is known of the machine state
    :param members: what is known of the states of its images, and of its RAM
    :param written: whether anything had to be changed; False if the same state was there
    :param bytes: how many had to be copied
    :param warnings: what the user should know
    """

    manifest: Manifest
    members: tuple[Manifest, ...]
    written: bool
    bytes: int = 0
    warnings: tuple[str, ...] = ()


@frozen
class _Looked:
    """A file that is open, and was found fit."""

    path: Path
    descriptor: int
    size: int
    intake: Intake | None = None
    examined: Examined | None = None

    @property
    def patches(self) -> tuple[Patch, ...] | None:
        """What gives an image the backing name of a state; None if only qemu-img can."""
        return self.examined.patches if self.examined is not None else ()


@frozen
class _Prepared:
    """What one file is to become, and if it was copied, the staging in which its copy lies, and the status of that."""

    part: Part
    looked: _Looked
    copied: Staging | None = None
    status: os.stat_result | None = None


@frozen
class MachineIntake:
    """
    Takes the working images of one machine.

    :param cache: where to
    :param machine: its id
    :param state: the name that the state gets
    :param images: the working images, absolute, by the names of the machine's images
    :param ram: the file with its RAM, absolute, which nobody writes any more; it is gone when it is a state
    :param fingerprint: what can load the RAM, and how it is compressed
    :param running: the images are frozen: a running machine reads them, below those that it writes to, and nobody else has them open
    :param replace: other content under the name gives way, if nothing stands on it
    :param labels: what its owner wants to remember
    :param creator: what made it
    :param clock: tells the time, in seconds since the epoch
    """

    cache: Cache
    machine: str
    state: str
    images: Mapping[str, Path]
    ram: Path | None = None
    fingerprint: Mapping[str, str] = field(factory=dict)
    running: bool = False
    replace: bool = False
    labels: Mapping[str, str] = field(factory=dict)
    creator: Mapping[str, str] = field(factory=dict)
    progress: Progress = SILENT
    clock: Callable[[], float] = time.time

    @property
    def id(self) -> StateId:
        """The machine state."""
        return StateId(self.machine, self.state, Kind.MACHINE)

    def run(self, *, dry_run: bool = False) -> MachineTaken:
        """
        :param dry_run: look at everything, and change nothing
        :raises UsageError: no image is named, or one file twice
        :raises NotFound: there is no such file
        :raises Conflict: a name exists with other content, or an image was written to on top of the very state it should become
        :raises AccessDenied: an image may not be written to, or not be replaced where it is
        :raises InUse: another process has an image open
        :raises UnsafeImage: an image is not fit to be a state
        """
        check_state_name(self.state)
        objects = {name: str(Image(self.machine, name)) for name in self.images}
        self._require_files()
        for path in self.images.values() if not dry_run else ():
            settle_names(path, self.cache.chains.leads_here)
        with ExitStack() as stack:
            mode = opened.unwritten if self.running else opened.exclusive
            descriptors = {name: stack.enter_context(mode(path)) for name, path in self.images.items()}
            for name, path in self.images.items():
                require_replaceable(path, descriptors[name])
            looked = [self._look(objects[name], path, descriptors[name]) for name, path in self.images.items()]
            if self.ram is not None:
                descriptor = stack.enter_context(opened.exclusive(self.ram))
                looked.append(_Looked(self.ram, descriptor, os.fstat(descriptor).st_size))
            self._require_all(looked)
            if dry_run:
                return self._planned(looked)
            self.cache.prepare()
            return self._take(looked, may_link=True)

    # -- looking -----------------------------------------------------------------------------------------------------------------------------------

    def _files(self) -> list[Path]:
        return [*self.images.values(), *([self.ram] if self.ram is not None else [])]

    def _require_files(self) -> None:
        if not self.images:
            raise UsageError(f"no working image of {self.machine} is named", hint="name one for each image of the machine")
        for path in self._files():
            if not os.path.lexists(path):
                raise NotFound(f"there is no file {path}", path=str(path), hint="name the working images that should become the state")
        for one, other in combinations(self._files(), 2):
            if os.path.samestat(os.lstat(one), os.lstat(other)):
                raise UsageError(f"{one} and {other} are one file", hint="name another file for each image of the machine")

    def _require_all(self, looked: list[_Looked]) -> None:
        """What stands on a machine state has all the images which that has."""
        fold = self.cache.pool.fold(self.machine)
        for one in looked:
            parent = one.examined.parent if one.examined is not None else None
            below = fold.states.get(StateId(self.machine, parent.state, Kind.MACHINE)) if parent is not None else None
            if parent is None or below is None or below.members.get(parent.object) != parent.digest:
                continue
            lacking = sorted(name.partition("/")[2] for name in below.members if "/" in name and name.partition("/")[2] not in self.images)
            if lacking:
                raise UsageError(
                    f"{one.path} stands on {below.id}, which has the images {', '.join(lacking)} too, and no working image of them is named",
                    object=self.machine,
                    state=self.state,
                    hint="name one for each image of the machine",
                )

    def _look(self, object: str, path: Path, descriptor: int) -> _Looked:
        intake = Intake(
            self.cache,
            StateId(object, self.state),
            path,
            replace=self.replace,
            labels=self.labels,
            creator=self.creator,
            progress=self.progress,
            clock=self.clock,
        )
        return _Looked(path, descriptor, os.fstat(descriptor).st_size, intake, intake.examine(descriptor))

    def _unchanged(self, looked: _Looked) -> Manifest | None:
        """:returns: the state that an image is already, if it stands on that and nothing was written to it since"""
        if looked.intake is None or looked.examined is None or not looked.intake.is_itself(looked.examined):
            return None
        return looked.intake.unchanged(looked.descriptor, looked.examined).manifest

    def _planned(self, looked: list[_Looked]) -> MachineTaken:
        parts = [self._linked(one) for one in looked]
        takeover = self._takeover(parts)
        size = sum(part.manifest.data_size for part, one in zip(parts, looked, strict=True) if not self._can_link(one))
        return self._taken(takeover, looked, self.cache.pool.check_publishable(takeover.manifests, replace=self.replace), size)

    def _can_link(self, looked: _Looked) -> bool:
        return looked.patches is not None and can_link(self.cache, looked.descriptor)

    # -- what each file is to become ---------------------------------------------------------------------------------------------------------------

    def _linked(self, looked: _Looked) -> Part:
        """:returns: what becomes of a file whose bytes are linked"""
        if (known := self._unchanged(looked)) is not None:
            return Part(None, known)
        with flushed_beside(looked.descriptor, looked.size):
            digest = self._hash(looked.descriptor, looked.size, [(patch.offset, patch.data) for patch in looked.patches or ()])
        return self._part(looked, self._manifest(looked, looked.descriptor, digest, looked.size), linked=True)

    def _part(self, looked: _Looked, manifest: Manifest, *, linked: bool) -> Part:
        header = looked.examined.header if looked.examined is not None else None
        return Part(
            source=looked.path,
            manifest=manifest,
            linked=linked,
            backing=os.fsdecode(header.backing_name or b"") if header is not None else "",
            mode=stat.S_IMODE(os.fstat(looked.descriptor).st_mode),
            owner=os.fstat(looked.descriptor).st_uid,
            stamp=stamp(beside(looked.path)),
        )

    def _manifest(self, looked: _Looked, descriptor: int, digest: Digest, size: int) -> Manifest:
        if looked.intake is not None and looked.examined is not None:
            return looked.intake.manifest(descriptor, looked.examined, digest, size)
        extents = data_extents(descriptor, size, limit=MAX_EXTENTS)
        return Manifest(
            object=self.machine,
            state=self.state,
            kind=Kind.RAM,
            size=size,
            digest=digest,
            extents=extents if extents != ((0, size),) else (),
            created=self.clock(),
            creator={"host": Writer.current().host, **self.creator},
            fingerprint=dict(self.fingerprint),
        )

    def _hash(self, descriptor: int, size: int, overlay: list[tuple[int, bytes]]) -> Digest:
        self.progress.begin(f"set {self.id}", size)
        try:
            return hash_file(descriptor, size, progress=self.progress, overlay=overlay)
        finally:
            self.progress.end()

    def _copied(self, looked: _Looked) -> _Prepared:
        """Copy a file into the cache, where it has no name yet."""
        if (known := self._unchanged(looked)) is not None:
            return _Prepared(Part(None, known), looked)
        gathering = self.cache.pool.stage([])
        path = self.cache.file(layout.gathered(gathering.marker.nonce))
        try:
            manifest, status = self._copy(looked, path)
        except BaseException:
            path.remove()
            gathering.end()
            raise
        return _Prepared(self._part(looked, manifest, linked=False), looked, gathering, status)

    def _copy(self, looked: _Looked, path: Beneath) -> tuple[Manifest, os.stat_result]:
        if looked.intake is not None and looked.examined is not None:
            manifest, _, status = looked.intake.copy_bytes(looked.descriptor, looked.examined, path)
            return manifest, status
        self.progress.begin(f"set {self.id}", looked.size)
        try:
            with path.open(os.O_RDWR | os.O_CREAT | os.O_EXCL) as file:
                moved = copy(looked.descriptor, file, looked.size, progress=self.progress, flush=True)
                manifest = self._manifest(looked, file, moved.digest, looked.size)
                os.fchmod(file, READ_ONLY)
                os.fsync(file)
                return manifest, os.fstat(file)
        finally:
            self.progress.end()

    # -- doing it ----------------------------------------------------------------------------------------------------------------------------------

    def _take(self, looked: list[_Looked], *, may_link: bool) -> MachineTaken:
        copied = {one.path for one in looked if not (may_link and self._can_link(one))}
        require_space(self.cache.pool, sum(_data_size(one) for one in looked if one.path in copied))
        prepared: list[_Prepared] = []
        try:
            for one in looked:
                prepared.append(self._copied(one) if one.path in copied else _Prepared(self._linked(one), one))
            prepared = list(_without_doubles(prepared))
            takeover = self._takeover([each.part for each in prepared])
            written = self.cache.pool.check_publishable(takeover.manifests, replace=self.replace)
            staging = self.cache.stage(takeover.digests, **takeover.to_facts())
            if not self._gather(prepared, staging):
                return self._take(looked, may_link=False)
        finally:
            self._forget(prepared)
        self._finish(prepared, takeover, staging)
        return self._taken(takeover, looked, written, sum(each.part.manifest.data_size for each in prepared if each.copied is not None))

    def _forget(self, prepared: list[_Prepared]) -> None:
        """End what the copies were gathered under; those that are needed have another name by now."""
        for each in prepared:
            if each.copied is not None:
                self.cache.file(layout.gathered(each.copied.marker.nonce)).remove()
                each.copied.end()

    def _gather(self, prepared: list[_Prepared], staging: Staging) -> bool:
        """:returns: whether all bytes are gathered; if one of the files cannot be linked, the staging has ended"""
        try:
            for each in prepared:
                if each.part.source is not None:
                    require_same(each.looked.path, each.looked.descriptor)
                if each.part.linked:
                    self.cache.tree.name(each.looked.descriptor, staging.path(each.part.digest))  # this very file, whatever has its name by now
                elif each.copied is not None:
                    self.cache.pool.transport.rename(layout.gathered(each.copied.marker.nonce), staging.path(each.part.digest))
            # What says how to go on after a power cut must be there before an image is changed.
            self.cache.pool.transport.flush(layout.INCOMING)
        except BaseException as error:
            staging.end()
            if isinstance(error, OSError) and error.errno in CANNOT_LINK:
                return False
            raise
        return True

    def _finish(self, prepared: list[_Prepared], takeover: MachineTakeover, staging: Staging) -> None:
        linked = [each for each in prepared if each.part.linked]
        descriptors = {each.looked.path: each.looked.descriptor for each in linked}
        hashed = {each.part.digest: each.status for each in prepared if each.status is not None}
        try:
            for each in linked:
                apply_patches(each.looked.descriptor, each.looked.patches or ())
                require_closed(each.looked.path, each.looked.descriptor, running=self.running)
                os.fsync(each.looked.descriptor)
                hashed[each.part.digest] = os.fstat(each.looked.descriptor)
            finish(self.cache, staging, takeover, hashed, descriptors.values())
        except BaseException:
            give_back(self.cache, staging.marker, takeover, descriptors)
            raise

    def _takeover(self, parts: list[Part]) -> MachineTakeover:
        manifests = [part.manifest for part in parts]
        machine = Manifest(
            object=self.machine,
            state=self.state,
            kind=Kind.MACHINE,
            created=self.clock(),
            creator={"host": Writer.current().host, **self.creator},
            labels=dict(self.labels),
            members=members_of(manifests),
        )
        return MachineTakeover(machine, tuple(parts), self.replace)

    def _taken(self, takeover: MachineTakeover, looked: list[_Looked], written: bool, size: int) -> MachineTaken:
        warnings = dict.fromkeys(text for one in looked if one.examined is not None for text in one.examined.warnings)
        return MachineTaken(takeover.machine, tuple(part.manifest for part in takeover.parts), written, size, tuple(warnings))


def _without_doubles(prepared: list[_Prepared]) -> Iterator[_Prepared]:
    """Two images can have the same bytes, as two empty ones have: these are gathered once."""
    seen: set[Digest] = set()
    for each in prepared:
        double = each.part.digest in seen and each.part.linked
        seen.add(each.part.digest)
        yield evolve(each, part=evolve(each.part, linked=False)) if double else each


def _data_size(looked: _Looked) -> int:
    return sum(length for _, length in data_extents(looked.descriptor, looked.size, limit=MAX_EXTENTS))
