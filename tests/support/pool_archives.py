"""A pool whose states are any bytes at all, and its archives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from statepool.archive.definition import BackupDefinition, Event, NoListener
from statepool.archive.manifest import Manifest as ArchiveManifest
from statepool.archive.manifest import read_manifest
from statepool.archive.pool_archiver import PoolArchiver
from statepool.archive.pool_reader import RestoredPool, restore_pool
from statepool.care.gc import gc_pool
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, Parent, StateId
from statepool.model.progress import SILENT, Progress
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.transports.base import Transport
from statepool.transports.local import LocalTransport

DISK = "vm1/disk"

States = dict[StateId, tuple[Manifest, bytes]]
"""The states of a pool, with their bytes."""


class Heard(NoListener):
    """Remembers the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)


@frozen
class Archived:
    """
    An archive that was made.

    :param path: of it
    :param manifest: of it
    :param events: what the archiver told
    """

    path: Path
    manifest: ArchiveManifest
    events: list[Event]

    @property
    def states(self) -> int:
        """How many states have bytes in it."""
        found = self.manifest.facts["states"]
        assert isinstance(found, int)
        return found

    @property
    def machines(self) -> int:
        """How many logs it was made of."""
        found = self.manifest.facts["machines"]
        assert isinstance(found, int)
        return found


class Store:
    """
    A pool to archive.

    :param root: a directory for the pool and its archives
    """

    def __init__(self, root: Path, name: str = "pool") -> None:
        self.root, self.path = root, root / name
        self.path.mkdir(parents=True)
        self.pool = open_local(self.path)
        self.pool.create()

    # -- changing it ---------------------------------------------------------------------------

    def put(
        self,
        state: str,
        data: bytes,
        *,
        object: str = DISK,
        on: str | None = None,
        kind: Kind = Kind.IMAGE,
        extents: Sequence[tuple[int, int]] = (),
        **how: Any,
    ) -> Manifest:
        """
        Publish a state.

        :param on: the state that backs it
        """
        digest = Digest.of(data)
        below = self.pool.find(StateId(object, on)) if on is not None else None
        parent = Parent(below.state, below.digest) if below and below.digest else None
        manifest = Manifest(
            object, state, kind, len(data), digest, parent=parent, extents=tuple(extents)
        )
        self._publish([manifest], {digest: data}, **how)
        return manifest

    def put_machine(self, state: str, data: bytes, *, machine: str = "vm1") -> Manifest:
        """Publish a state of a machine: one image, and its RAM."""
        disk, ram = Digest.of(data), Digest.of(data + b"R")
        manifests = [
            Manifest(f"{machine}/disk", state, Kind.IMAGE, len(data), disk),
            Manifest(machine, state, Kind.RAM, len(data) + 1, ram),
            Manifest(machine, state, Kind.MACHINE, members={f"{machine}/disk": disk, "ram": ram}),
        ]
        self._publish(manifests, {disk: data, ram: data + b"R"})
        return manifests[-1]

    def _publish(
        self, manifests: Sequence[Manifest], data: dict[Digest, bytes], **how: Any
    ) -> None:
        staging = self.pool.stage(data)
        for digest, content in data.items():
            self.pool.transport.create(staging.path(digest), content, flush=False)
        self.pool.publish(manifests, staging, durable=False, **how)
        staging.end()

    def remove(self, state: str, *, object: str = DISK, cascade: bool = False) -> None:
        """Remove a state; its bytes stay until they are collected."""
        self.pool.remove(StateId(object, state), cascade=cascade)

    def collect(self) -> None:
        """Remove all bytes that no state needs."""
        gc_pool(self.pool)

    def file(self, manifest: Manifest) -> Path:
        """:returns: the file with the bytes of a state"""
        assert manifest.digest is not None
        return self.path / layout.data(manifest.digest)

    # -- its archives --------------------------------------------------------------------------

    def archive_path(self, level: int, kind: str = "tar") -> Path:
        return self.root / (f"pool.{level}.{kind}" if level else f"pool.{kind}")

    def definition(
        self,
        *,
        objects: Sequence[str] = (),
        exclude: Sequence[str] = (),
        root: str | None = None,
        kind: str = "tar",
    ) -> BackupDefinition:
        return BackupDefinition(
            "pool", kind, self.root, root or str(self.path), frozenset(objects), frozenset(exclude)
        )

    def archive(
        self,
        level: int = 0,
        *,
        progress: Progress = SILENT,
        settings: Settings | None = None,
        keep: int = 0,
        **definition: Any,
    ) -> Archived:
        """Archive a level, as another process would, which knows nothing of the pool."""
        heard = Heard()
        archiver = PoolArchiver(
            self.root / "work", listener=heard, progress=progress, settings=settings
        )
        found = self.definition(**definition)
        path = archiver.backup_files_incrementally(found, level=level, keep=keep)
        with open(f"{path}.manifest", "rb") as file:
            manifest = read_manifest(file, path.name)
        assert path == self.archive_path(level, str(found.backup_type))
        return Archived(path, manifest, heard.events)

    def restore(self, level: int = 0, name: str = "back", kind: str = "tar") -> RestoredPool:
        paths = [self.archive_path(number, kind) for number in range(level + 1)]
        return restore_pool(paths, self.root / name)


def open_local(path: Path) -> Pool:
    """:returns: a pool in a directory, of which nothing is known yet"""
    return Pool(LocalTransport(Location("file", str(path))))


def states_of(path: Path, transport: Transport | None = None) -> States:
    """:returns: the states of a pool, with the bytes that are there under their digests"""
    pool = Pool(transport) if transport is not None else open_local(path)
    found: States = {}
    for fold in pool.folds(pool.logged_machines()).values():
        for manifest in fold.states.values():
            data = b""
            if manifest.digest is not None:
                data = (path / layout.data(manifest.digest)).read_bytes()
                assert Digest.of(data, manifest.digest.algorithm) == manifest.digest
                assert len(data) == manifest.size
                shown = path / layout.view(manifest.id)
                assert shown.is_symlink()
                assert shown.read_bytes() == data
            found[manifest.id] = manifest, data
    return found


def superseded_of(path: Path) -> set[Digest]:
    """:returns: the bytes of states without a name"""
    pool = open_local(path)
    folds = pool.folds(pool.logged_machines()).values()
    return {one.digest for fold in folds for one in fold.superseded if one.digest is not None}
