"""The archiver of pools: an archive has their logs, and the bytes that no level below has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from statepool.archive.archiver import Archiver
from statepool.archive.definition import (
    BackupDefinition,
    BackupType,
    Event,
    EventKind,
    Listener,
    SubOperation,
)
from statepool.archive.pool_contents import MOST_INDEX, PROVIDER, Index, Selection
from statepool.archive.pool_writer import PoolWriter
from statepool.archive.writing import Job
from statepool.errors import BadRecord
from statepool.model.progress import SILENT, Progress
from statepool.model.settings import Settings
from statepool.pools.pool import Pool
from statepool.sources.pool_source import open_pool
from statepool.transports.failures import Subject, translating


class PoolArchiver(Archiver):
    """
    An archiver of pools. The root of a definition is the location of a pool, also on another host;
    what it includes and excludes are patterns of objects, see
    :class:`~statepool.archive.pool_contents.Selection`.

    The snapshot file of a level has the indexes of this level and of those below, one on each line.

    :param work_dir: as of every archiver
    :param settings: how pools are reached

    The other parameters are those of every archiver.
    """

    name: ClassVar[str] = PROVIDER
    supported_backup_types: ClassVar[frozenset[BackupType]] = frozenset(BackupType)
    incremental: ClassVar[bool] = True
    scanned: ClassVar[bool] = False

    def __init__(
        self,
        work_dir: str | os.PathLike[str],
        *,
        listener: Listener | None = None,
        progress: Progress = SILENT,
        threads: int = 0,
        settings: Settings | None = None,
    ) -> None:
        super().__init__(work_dir, listener=listener, progress=progress, threads=threads)
        self._settings = settings or Settings()

    def root_location(self, definition: BackupDefinition) -> str:
        """:returns: the location of the pool"""
        return str(self._pool(definition).location)

    def estimate(self, definition: BackupDefinition) -> int:
        """:returns: the bytes of all states whose log can be used, without holes"""
        pool = self._pool(definition)
        try:
            folds, _ = pool.usable_folds(pool.logged_machines())
        finally:
            pool.transport.close()
        sizes = {one.digest: one.data_size for fold in folds.values() for one in fold.manifests}
        return sum(sizes.values())

    def produce(self, job: Job) -> dict[str, Any]:
        """
        Write the logs of a pool, and the bytes that no level below has.

        :returns: facts: the checksum of the index, and the numbers of logs and states
        """
        below = read_snapshot(job.snapshot) if job.snapshot is not None and job.level else ()
        selection = Selection(
            tuple(sorted(job.definition.include_files)), tuple(sorted(job.definition.exclude_files))
        )
        pool = self._pool(job.definition)
        try:
            writer = PoolWriter(pool, below, selection)
            with writer.protected() as (contents, warnings):
                for text in warnings:
                    event = Event(EventKind.PERMISSION_DENIED, SubOperation.OPEN, text=text)
                    job.event(event)
                writer.write(contents, job.write, job.definition.destination)
        finally:
            pool.transport.close()
        if job.snapshot is not None:
            write_snapshot(job.snapshot, contents.head)
        index = contents.index
        return {
            "checksum": index.checksum,
            "machines": len(index.machines),
            "states": len(index.data),
        }

    def _pool(self, definition: BackupDefinition) -> Pool:
        return open_pool(definition.root, self._settings)


def read_snapshot(path: Path) -> tuple[Index, ...]:
    """
    :param path: of a snapshot file of this archiver
    :returns: the indexes of the levels, from level 0 on
    :raises BadRecord: it is not such a file
    """
    found: list[Index] = []
    with (
        translating("read", Subject(str(path), path=str(path))),
        open(path, "rb") as file,
    ):
        while line := file.readline(MOST_INDEX + 1):
            found.append(Index.read(line, f"the snapshot file {path}"))
    if [index.level for index in found] != list(range(len(found))):
        raise BadRecord(
            f"the snapshot file {path} has not the levels in their order",
            path=str(path),
            hint="begin again with level 0",
        )
    return tuple(found)


def write_snapshot(path: Path, head: bytes) -> None:
    """
    Add the index of a level to a snapshot file, or begin one.

    :param head: the content of the index, one line
    """
    with (
        translating("write", Subject(str(path), path=str(path)), needed=len(head)),
        open(path, "ab", opener=_private) as file,
    ):
        file.write(head)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
