"""The files of an archive while it is made: whole and flushed before they get their names."""

from __future__ import annotations

import collections
import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import blake3
from attrs import evolve, field, frozen

from statepool.archive.compress import compressing
from statepool.archive.definition import BackupDefinition, Event, Listener
from statepool.archive.directory import ArchiveDirectory, Move
from statepool.archive.manifest import Manifest, Member, digest_of, write_manifest
from statepool.archive.names import ArchiveName, snapshot_name
from statepool.archive.scan import Scanner
from statepool.beneath import Descriptor, Tree
from statepool.model.digest import Digest
from statepool.model.progress import Progress
from statepool.pools.log import random_nonce
from statepool.transports.behind import Behind
from statepool.transports.failures import Subject, translate_os_errors
from statepool.transports.flushing import FlushBehind, flush_own, flushed_beside

Write = Callable[[bytes | memoryview], object]
"""A function that takes the bytes of a tar, in their order."""

_GATHERED = 1 << 20
"""Bytes of an archive that are hashed and written at once, at least."""

_AHEAD = 4
"""How many times as many may be waiting for that."""

_BUFFER = 1 << 20
"""Bytes of the list of members that are written at once."""


@frozen
class Job:
    """
    One archive that is being made.

    :param definition: what is archived
    :param level: None for an archive without levels
    :param base: the manifest of the level below; None for level 0
    :param snapshot: the path of the snapshot file. At the beginning it has what the level below
        left in it, or does not exist; at the end, what the next level begins with. None for an
        archive without levels.
    :param write: takes the tar
    :param event: is to be called for each event
    """

    definition: BackupDefinition
    level: int | None
    base: Manifest | None
    snapshot: Path | None
    write: Write = field(repr=False)
    event: Callable[[Event], None] = field(repr=False)


Produce = Callable[[Job], dict[str, Any]]
"""A function that writes the tar of a job, and returns facts for the manifest."""


@frozen
class Order:
    """
    What is to be made, and how.

    :param definition: what is archived
    :param level: None for an archive without levels
    :param base: the manifest of the level below; None for level 0
    :param root: the location of what is archived
    :param provider: the name of the archiver
    :param strength: of the compression; its default if None
    :param threads: that compress; one for each processor if 0
    :param listener: is told of each file and of each event
    :param progress: is told of the bytes of the tar
    :param total: bytes of the tar, as estimated; 0 if not known
    :param facts: for the manifest
    :param scanned: whether the manifest lists the members
    """

    definition: BackupDefinition
    level: int | None
    base: Manifest | None
    root: str
    provider: str
    strength: int | None
    threads: int
    listener: Listener
    progress: Progress
    total: int
    facts: dict[str, Any]
    scanned: bool = True

    def draft(self) -> Manifest:
        """:returns: the manifest, as far as it is known at the start"""
        return Manifest(
            self.definition.backup_id,
            self.definition.backup_type.value,
            self.level,
            created=time.time(),
            host=platform.node(),
            root=self.root,
            provider=self.provider,
            size=0,
            content_size=0,
            digest=Digest.of_text(b""),
            nonce=random_nonce(),
            base=self.base.key if self.base is not None else None,
        )


class NewArchive:
    """
    An archive that is being made, under temporary names.

    :param directory: the directory it will be in; its lock is held
    :param snapshots: the directory of snapshot files
    :param order: what is to be made
    """

    def __init__(self, directory: ArchiveDirectory, snapshots: Path, order: Order) -> None:
        self._directory, self._order, self._level = directory, order, order.level
        self._snapshots = Tree(snapshots)
        self._archive, self._manifest, self._snapshot = (
            directory.temporary("tmp") for _ in range(3)
        )

    def make(self, produce: Produce) -> Manifest:
        """
        Write the archive, its manifest and its snapshot file, and flush them.

        :param produce: writes the tar
        :returns: the manifest
        """
        order, draft = self._order, self._order.draft()
        events: collections.Counter[str] = collections.Counter()

        def event(found: Event) -> None:
            events[found.kind] += 1
            order.listener.event(found)

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._translated())
            lines = stack.enter_context(
                tempfile.TemporaryFile(dir=self._directory.path, buffering=_BUFFER)
            )
            members = 0

            def take(member: Member) -> None:
                nonlocal members
                members += 1
                lines.write(member.line())
                order.listener.file_added(member.name)

            scanner = Scanner(f"the new archive {draft.name}", take)
            descriptor = stack.enter_context(self._opened())
            if self._level:
                self._copy_snapshot(self._level - 1)
            order.progress.begin(f"archive {draft.backup_id}", order.total)
            stack.callback(order.progress.end)
            with _writing(descriptor, order) as out:

                def write(data: bytes | memoryview) -> None:
                    if order.scanned:
                        scanner.feed(data)
                    out.write(data)
                    order.progress.advance(len(data))

                snapshot = self._path_of_snapshot() if self._level is not None else None
                facts = produce(
                    Job(
                        order.definition,
                        order.level,
                        order.base,
                        snapshot,
                        write,
                        event,
                    )
                )
                if order.scanned:
                    scanner.finish()
            with flushed_beside(descriptor, out.size):
                manifest = evolve(
                    draft,
                    size=out.size,
                    content_size=out.content_size,
                    digest=out.digest,
                    snapshot=self._flush_snapshot(),
                    renames=scanner.renames,
                    members=members,
                    events=dict(events),
                    facts={**order.facts, **facts},
                )
                lines.seek(0)
                with self._created(self._manifest) as file:
                    write_manifest(file, manifest, lines)
        return manifest

    def moves(self, name: ArchiveName) -> list[Move]:
        """:returns: the renames that give the files their names"""
        found = [Move(self._archive, str(name)), Move(self._manifest, name.manifest)]
        if self._level is not None:
            snapshot = snapshot_name(name.backup_id, self._level)
            found.append(Move(self._snapshot, snapshot, snapshot=True))
        return found

    def remove(self) -> None:
        """Remove the files that have not got their names."""
        with self._translated():
            self._directory.tree.remove(self._archive)
            self._directory.tree.remove(self._manifest)
            self._snapshots.remove(self._snapshot)

    # -- parts -------------------------------------------------------------------------------------

    def _translated(self) -> contextlib.AbstractContextManager[None]:
        path = str(self._directory.path)
        return translate_os_errors("write", Subject(f"an archive in {path}", path=path))

    def _opened(self) -> Descriptor:
        return self._directory.tree.open(self._archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    @contextlib.contextmanager
    def _created(self, name: str) -> Iterator[IO[bytes]]:
        opened = self._directory.tree.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with opened as descriptor, open(descriptor, "wb", closefd=False) as file:
            yield file
            file.flush()
            os.fsync(descriptor)

    def _path_of_snapshot(self) -> Path:
        return Path(self._snapshots.root) / self._snapshot

    def _copy_snapshot(self, level: int) -> None:
        name = snapshot_name(self._directory.backup_id, level)
        old = self._snapshots.open(name, os.O_RDONLY)
        new = self._snapshots.open(self._snapshot, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with (
            old as source,
            new as target,
            open(source, "rb", closefd=False) as reader,
            open(target, "wb", closefd=False) as writer,
        ):
            shutil.copyfileobj(reader, writer, 1 << 20)

    def _flush_snapshot(self) -> Digest | None:
        if self._level is None:
            return None
        with self._snapshots.open(self._snapshot, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)
            return digest_of(descriptor)


@contextlib.contextmanager
def _writing(descriptor: int, order: Order) -> Iterator[_Output]:
    """
    Yield what takes the bytes of a tar, for the duration of a ``with`` block.

    :param descriptor: of the file of the archive
    """
    # If the wait for a thread is interrupted, the caller's descriptor is closed, and its number may
    # be reused for another file.
    own = Descriptor(os.dup, descriptor)
    with (
        FlushBehind(lambda: partial(flush_own, Descriptor(os.dup, own.number))) as flushing,
        Behind(_AHEAD, threads=1, last=own.close) as behind,
    ):
        file = _File(own, flushing)
        with compressing(
            order.definition.backup_type, file.write, strength=order.strength, threads=order.threads
        ) as compress:
            out = _Output(file, behind, compress)
            yield out
            out.finish()


class _File:
    """The file of an archive."""

    def __init__(self, own: Descriptor, flushing: FlushBehind) -> None:
        self._own, self._flushing = own, flushing
        self.hasher = blake3.blake3()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.hasher.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._own.number, rest) :]
        self.size += len(data)
        self._flushing.wrote(len(data))


class _Output:
    """
    The bytes of a tar, which another thread compresses, hashes and writes while the next ones are
    made.
    """

    def __init__(self, file: _File, behind: Behind, compress: Write) -> None:
        self._file, self._behind, self._compress = file, behind, compress
        self._gathered = bytearray()
        self.content_size = 0
        """Bytes of the tar."""

    @property
    def size(self) -> int:
        """Bytes of the archive; final after the block."""
        return self._file.size

    @property
    def digest(self) -> Digest:
        """The digest of the archive; final after the block."""
        return Digest("blake3", self._file.hasher.hexdigest())

    def write(self, data: bytes | memoryview) -> None:
        """Take bytes, whose memory may be used again afterwards."""
        self._gathered += data
        self.content_size += len(data)
        if len(self._gathered) >= _GATHERED:
            self._pass_on()

    def finish(self) -> None:
        """Wait until all bytes were compressed."""
        self._pass_on()
        self._behind.finish()

    def _pass_on(self) -> None:
        gathered, self._gathered = self._gathered, bytearray()
        self._behind.do(partial(self._compress, memoryview(gathered)))
