"""
The interface of archivers, and what all of them do alike: names, levels, keeping, manifests.

The operations are those of the archiver of AutoArchive 2.1.1. An archiver of its own has one method
to write, :meth:`Archiver.produce`, and is registered in the entry point group
``statepool.archivers``.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import platform
from pathlib import Path
from typing import Any, ClassVar

from statepool.archive.definition import (
    MAX_COMPRESSION_STRENGTH,
    MIN_COMPRESSION_STRENGTH,
    BackupDefinition,
    BackupType,
    Feature,
    Listener,
    NoListener,
)
from statepool.archive.directory import (
    ArchiveDirectory,
    Move,
    Stored,
    moves_that_keep,
    renames,
)
from statepool.archive.manifest import Manifest, digest_of
from statepool.archive.names import (
    KEEPING_IDS,
    ArchiveName,
    check_backup_id,
    check_keeping_id,
    check_level,
    parse_snapshot_name,
    snapshot_name,
)
from statepool.archive.writing import Job, NewArchive, Order
from statepool.beneath import Tree
from statepool.errors import Conflict, NotFound, RefusedError, UsageError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.progress import SILENT, Progress
from statepool.transports.failures import Subject, translate_os_errors

_log = logging.getLogger(__name__)


class Archiver(abc.ABC):
    """
    A maker of archives.

    :param work_dir: a directory for what is kept between archives: the snapshot files. It must be
        one that only this account can write.
    :param listener: is told of each file and of each event
    :param progress: is told of the bytes of the tree
    :param threads: how many threads compress; one for each processor if 0
    """

    name: ClassVar[str]
    """The name of the archiver, in manifests and in the entry point group."""

    supported_backup_types: ClassVar[frozenset[BackupType]]
    """The types of archives that it can make."""

    incremental: ClassVar[bool] = False
    """Whether it makes levels."""

    scanned: ClassVar[bool] = True
    """
    Whether the manifest lists the members of the tar. False for archives that name their members
    and the digests of their contents themselves, so that they are not hashed twice.
    """

    def __init__(
        self,
        work_dir: str | os.PathLike[str],
        *,
        listener: Listener | None = None,
        progress: Progress = SILENT,
        threads: int = 0,
    ) -> None:
        self.work_dir = Path(os.path.abspath(work_dir))
        self.listener: Listener = listener if listener is not None else NoListener()
        self.progress = progress
        self.threads = threads

    # -- to be written by an archiver --------------------------------------------------------------

    @abc.abstractmethod
    def produce(self, job: Job) -> dict[str, Any]:
        """
        Write the tar of an archive.

        :returns: facts for the manifest, as JSON has them
        :raises StatePoolError: the tree cannot be read
        """

    def estimate(self, definition: BackupDefinition) -> int:
        """
        :returns: about how many bytes the tar of level 0 will have, for the display of progress; 0
            if that is not known
        """
        return 0

    def root_location(self, definition: BackupDefinition) -> str:
        """
        :returns: the location of what is archived, for the manifest
        :raises UsageError: it cannot be archived
        """
        return str(Location("file", os.path.abspath(definition.root)))

    # -- features ----------------------------------------------------------------------------------

    @classmethod
    def get_supported_features(cls, backup_type: BackupType | None = None) -> frozenset[Feature]:
        """
        :returns: the features for a type; all features if no type is given
        :raises UsageError: the archiver cannot make archives of this type
        """
        if backup_type is not None:
            cls._require_type(backup_type)
        found = {Feature.INCREMENTAL} if cls.incremental else set()
        if backup_type is not BackupType.TAR:
            found.add(Feature.COMPRESSION_STRENGTH)
        return frozenset(found)

    # -- making ------------------------------------------------------------------------------------

    def backup_files(
        self,
        definition: BackupDefinition,
        *,
        compression_strength: int | None = None,
        overwrite_at_start: bool = False,
        keep: int = 0,
    ) -> Path:
        """
        Make an archive without levels.

        :param compression_strength: 0 to 9; what the compression has by default if not given
        :param overwrite_at_start: whether to remove, or keep, the archive of this name first, which
            saves space; otherwise it stays until the new one is whole
        :param keep: how many archives that would be overwritten are kept
        :returns: the path of the archive
        :raises UsageError: the archiver cannot do this
        :raises LockTimeout: another process works on this backup
        """
        return self._make(definition, None, compression_strength, overwrite_at_start, keep, {})

    def backup_files_incrementally(
        self,
        definition: BackupDefinition,
        *,
        compression_strength: int | None = None,
        level: int | None = None,
        overwrite_at_start: bool = False,
        keep: int = 0,
        facts: dict[str, Any] | None = None,
    ) -> Path:
        """
        Make an archive of a level: of what has changed since the level below.

        Archives of this level and above are overwritten, or kept.

        :param level: the level; the next one if not given or higher, with a warning if higher
        :param facts: for the manifest, beside those of the archiver
        :returns: the path of the archive

        The other parameters and errors are those of :meth:`backup_files`.

        :raises RefusedError: the level below is of another root or of another host
        """
        if not self.incremental:
            raise UsageError(
                f"the archiver {self.name!r} makes no levels", hint="use the archiver 'external'"
            )
        if level is not None:
            check_level(level)
        return self._make(
            definition,
            -1 if level is None else level,
            compression_strength,
            overwrite_at_start,
            keep,
            facts or {},
        )

    # -- asking ------------------------------------------------------------------------------------

    def does_backup_exist(
        self, definition: BackupDefinition, level: int | None = None, keeping_id: str | None = None
    ) -> bool:
        """
        :param level: None for an archive without levels, whose name is that of level 0
        :param keeping_id: None for one that is not kept
        :returns: whether there is such an archive
        """
        name = self._name(definition, level, keeping_id)
        return name in self._directory(definition).stored()

    def does_any_backup_level_exist(
        self, definition: BackupDefinition, from_level: int = 0, keeping_id: str | None = None
    ) -> bool:
        """
        :returns: whether there is an archive of this level or a higher one
        """
        self._name(definition, from_level, keeping_id)
        return any(
            name.level >= from_level and name.keeping_id == keeping_id
            for name in self._directory(definition).stored()
            if name.extension == definition.backup_type
        )

    def get_max_backup_level(self, definition: BackupDefinition) -> int:
        """
        :returns: the highest level that can be made: all levels below it are there, and the
            snapshot file of the one below it is the one that was made with it
        """
        directory = self._directory(definition)
        return self._next_level(definition, directory, directory.stored())

    def get_stored_backup_ids(self) -> list[str]:
        """:returns: the ids of backups that have snapshot files, in order"""
        try:
            names = os.listdir(self._snapshots)
        except FileNotFoundError:
            return []
        return sorted({found[0] for name in names if (found := parse_snapshot_name(name))})

    # -- changing ----------------------------------------------------------------------------------

    def keep_backup(
        self,
        definition: BackupDefinition,
        keeping_id: str | None,
        new_keeping_id: str,
        level: int | None = None,
    ) -> None:
        """
        Keep an archive, or keep a kept one under another id.

        :param keeping_id: None of one that is not kept
        :param new_keeping_id: under which it is kept then
        :param level: only this one; if not given, all levels
        :raises Conflict: the new keeping id is taken
        :raises NotFound: there is no such archive
        """
        check_keeping_id(new_keeping_id)
        self._name(definition, level, keeping_id)
        directory = self._directory(definition, writing=True)
        with directory.locked():
            stored = directory.stored()
            chosen = self._chosen(definition, directory, stored, keeping_id)
            if level is not None:
                chosen = [name for name in chosen if name.level == level]
                if not chosen:
                    raise self._absent(definition, level, keeping_id)
            taken = [
                name
                for name in stored
                if name.keeping_id == new_keeping_id
                and any(name.level == one.level for one in chosen)
            ]
            if taken:
                raise Conflict(
                    f"the keeping id {new_keeping_id} is taken: {taken[0]} is in {directory.path}",
                    path=str(directory.path / str(taken[0])),
                    hint="choose another one, or remove that archive",
                )
            directory.commit([move for name in chosen for move in renames(name, new_keeping_id)])

    def keep_new(self, definition: BackupDefinition, most: int) -> None:
        """
        Keep what is current as ``aa``; what was kept before moves on by one letter.

        :param most: how many are kept at most
        :raises NotFound: there is no archive that is not kept
        """
        self._check_keep(most, least=1)
        directory = self._directory(definition, writing=True)
        with directory.locked():
            stored = directory.stored()
            self._chosen(definition, directory, stored, None)
            directory.commit(moves_that_keep(directory, self._ours(definition, stored), 0, most))

    def remove_backup(self, definition: BackupDefinition, keeping_id: str | None = None) -> None:
        """
        Remove an archive, with all its levels.

        :param keeping_id: None for what is not kept
        :raises NotFound: there is none
        """
        self._remove(definition, 0, keeping_id)

    def remove_backup_increments(
        self, definition: BackupDefinition, level: int | None = None, keeping_id: str | None = None
    ) -> None:
        """
        Remove archives of a level and above.

        :param level: if not given, the one that can be made next: what no level can stand on
        :param keeping_id: None for what is not kept
        :raises UsageError: the archiver makes no levels
        """
        if not self.incremental:
            raise UsageError(f"the archiver {self.name!r} makes no levels")
        if level is None:
            level = self.get_max_backup_level(definition)
        check_level(level)
        self._remove(definition, level, keeping_id, must_exist=False)

    def purge_stored_backup_data(self, backup_id: str) -> None:
        """
        Remove the snapshot files of a backup: its next archive is of level 0.

        :raises NotFound: there are none
        """
        check_backup_id(backup_id)
        if backup_id not in self.get_stored_backup_ids():
            raise NotFound(
                f"there are no snapshot files of {backup_id} in {self._snapshots}",
                path=str(self._snapshots),
            )
        tree = Tree(self._snapshots)
        with self._translated("purge"):
            for name in os.listdir(self._snapshots):
                found = parse_snapshot_name(name)
                if found is not None and found[0] == backup_id:
                    tree.remove(name)

    # -- parts -------------------------------------------------------------------------------------

    @property
    def _snapshots(self) -> Path:
        return self.work_dir / "snapshots"

    @classmethod
    def _require_type(cls, backup_type: BackupType) -> None:
        if backup_type not in cls.supported_backup_types:
            raise UsageError(
                f"the archiver {cls.name!r} cannot make a {backup_type}",
                hint="it can make " + ", ".join(sorted(cls.supported_backup_types)),
            )

    def _directory(
        self, definition: BackupDefinition, *, writing: bool = False
    ) -> ArchiveDirectory:
        self._require_type(definition.backup_type)
        if writing:
            with self._translated("make"):
                self._snapshots.mkdir(mode=0o700, parents=True, exist_ok=True)
        return ArchiveDirectory(
            definition.destination, definition.backup_id, self._snapshots if writing else None
        )

    def _translated(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return translate_os_errors(doing, Subject(str(self._snapshots), path=str(self._snapshots)))

    def _name(
        self, definition: BackupDefinition, level: int | None, keeping_id: str | None
    ) -> ArchiveName:
        if keeping_id is not None:
            check_keeping_id(keeping_id)
        check_level(level or 0)
        return ArchiveName(
            definition.backup_id, definition.backup_type.value, level or 0, keeping_id
        )

    @staticmethod
    def _ours(definition: BackupDefinition, stored: dict[ArchiveName, Stored]) -> list[ArchiveName]:
        return [name for name in stored if name.extension == definition.backup_type]

    def _chosen(
        self,
        definition: BackupDefinition,
        directory: ArchiveDirectory,
        stored: dict[ArchiveName, Stored],
        keeping_id: str | None,
    ) -> list[ArchiveName]:
        found = [name for name in self._ours(definition, stored) if name.keeping_id == keeping_id]
        if not found:
            raise self._absent(definition, None, keeping_id)
        return found

    def _absent(
        self, definition: BackupDefinition, level: int | None, keeping_id: str | None
    ) -> NotFound:
        name = self._name(definition, level, keeping_id)
        return NotFound(
            f"there is no archive {name} in {definition.destination}",
            path=str(definition.destination / str(name)),
        )

    @staticmethod
    def _check_keep(keep: int, least: int = 0) -> None:
        if not least <= keep <= len(KEEPING_IDS):
            raise UsageError(
                f"{keep} archives cannot be kept", hint=f"keep {least} to {len(KEEPING_IDS)}"
            )

    def _remove(
        self,
        definition: BackupDefinition,
        level: int,
        keeping_id: str | None,
        *,
        must_exist: bool = True,
    ) -> None:
        self._name(definition, level, keeping_id)
        directory = self._directory(definition, writing=True)
        with directory.locked():
            stored = directory.stored()
            names = [
                name
                for name in self._ours(definition, stored)
                if name.keeping_id == keeping_id and name.level >= level
            ]
            if not names and must_exist:
                raise self._absent(definition, level, keeping_id)
            moves = directory.removal(text for name in names for text in (str(name), name.manifest))
            if keeping_id is None:
                moves += self._without_snapshots(directory, level)
            directory.commit(moves)

    def _without_snapshots(self, directory: ArchiveDirectory, level: int) -> list[Move]:
        return [
            Move(name, directory.temporary("old"), snapshot=True)
            for name in os.listdir(self._snapshots)
            if (found := parse_snapshot_name(name)) is not None
            and found[0] == directory.backup_id
            and found[1] >= level
        ]

    # -- levels ------------------------------------------------------------------------------------

    def _next_level(
        self,
        definition: BackupDefinition,
        directory: ArchiveDirectory,
        stored: dict[ArchiveName, Stored],
    ) -> int:
        base: Manifest | None = None
        level = 0
        while True:
            one = stored.get(self._name(definition, level, None))
            manifest = one.manifest if one is not None else None
            if (
                manifest is None
                or one is None
                or manifest.level != level
                or manifest.size != one.size
                or manifest.base != (base.key if base is not None else None)
                or manifest.snapshot is None
                or manifest.snapshot != self._snapshot_digest(directory.backup_id, level)
            ):
                return level
            base, level = manifest, level + 1

    def _snapshot_digest(self, backup_id: str, level: int) -> Digest | None:
        try:
            opened = Tree(self._snapshots).open(snapshot_name(backup_id, level), os.O_RDONLY)
        except FileNotFoundError:
            return None
        with opened as descriptor:
            return digest_of(descriptor)

    def _choose_level(
        self,
        wanted: int,
        definition: BackupDefinition,
        directory: ArchiveDirectory,
        stored: dict[ArchiveName, Stored],
    ) -> int:
        possible = self._next_level(definition, directory, stored)
        if wanted > possible:
            _log.warning(
                "level %d of %s cannot be made before level %d: level %d is made",
                wanted,
                definition.backup_id,
                possible,
                possible,
            )
        there = [
            name.level
            for name in self._ours(definition, stored)
            if name.keeping_id is None
            and (manifest := stored[name].manifest) is not None
            and manifest.level is not None
        ]
        if wanted < 0 and possible <= max(there, default=-1):
            _log.warning(
                "level %d of %s is made again: its archive, or the snapshot file in %s, is not the"
                " one that was made with it",
                possible,
                definition.backup_id,
                self._snapshots,
            )
        return possible if wanted < 0 else min(wanted, possible)

    def _require_same_root(self, manifest: Manifest, definition: BackupDefinition) -> None:
        root, host = self.root_location(definition), platform.node()
        for what, theirs, ours in (
            ("root", manifest.root, root),
            ("host", manifest.host, host),
            ("archiver", manifest.provider, self.name),
        ):
            if theirs != ours:
                raise RefusedError(
                    f"the archives of {definition.backup_id} in {definition.destination} are of"
                    f" another {what}: {theirs}, not {ours}",
                    path=str(definition.destination),
                    hint="choose another id, or begin anew with level 0",
                )

    # -- writing -----------------------------------------------------------------------------------

    def _make(
        self,
        definition: BackupDefinition,
        wanted: int | None,
        strength: int | None,
        overwrite_at_start: bool,
        keep: int,
        facts: dict[str, Any],
    ) -> Path:
        self._check_strength(definition.backup_type, strength)
        self._check_keep(keep)
        location = self.root_location(definition)
        directory = self._directory(definition, writing=True)
        with directory.locked():
            stored = directory.stored()
            level = wanted
            if wanted is not None:
                level = self._choose_level(wanted, definition, directory, stored)
            base = stored[self._name(definition, level - 1, None)].manifest if level else None
            if base is not None:
                self._require_same_root(base, definition)
            before = [
                *moves_that_keep(directory, self._ours(definition, stored), level or 0, keep),
                *self._without_snapshots(directory, level or 0),
            ]
            if overwrite_at_start:
                directory.commit(before)
                before = []
            name = self._name(definition, level, None)
            order = Order(
                definition,
                level,
                base,
                location,
                self.name,
                strength,
                self.threads,
                self.listener,
                self.progress,
                self._total(definition),
                facts,
                self.scanned,
            )
            new = NewArchive(directory, self._snapshots, order)
            try:
                new.make(self.produce)
                directory.commit([*before, *new.moves(name)])
            finally:
                new.remove()
        return definition.destination / str(name)

    def _total(self, definition: BackupDefinition) -> int:
        return self.estimate(definition) if self.progress is not SILENT else 0

    def _check_strength(self, backup_type: BackupType, strength: int | None) -> None:
        self._require_type(backup_type)
        if strength is None:
            return
        if Feature.COMPRESSION_STRENGTH not in self.get_supported_features(backup_type):
            raise UsageError(f"a {backup_type} has no strength of compression")
        if not MIN_COMPRESSION_STRENGTH <= strength <= MAX_COMPRESSION_STRENGTH:
            raise UsageError(
                f"there is no strength {strength}",
                hint=f"strengths are {MIN_COMPRESSION_STRENGTH} to {MAX_COMPRESSION_STRENGTH}",
            )
