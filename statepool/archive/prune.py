"""
Removing archives that no rule keeps, and what was left of archives that are gone.

What goes is decided by one function (:mod:`~statepool.archive.retention`). All of it goes in one
change of the directory: after a crash, all of it is there or none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from attrs import frozen

from statepool.archive.directory import ArchiveDirectory, Move, Stored
from statepool.archive.names import (
    MANIFEST,
    ArchiveName,
    check_backup_id,
    parse_snapshot_name,
    snapshot_name,
)
from statepool.archive.retention import Archive, Plan, Rules, plan
from statepool.beneath import Tree
from statepool.errors import NotFound
from statepool.transports.failures import Subject, translating

SNAPSHOTS = "snapshots"
"""The directory of snapshot files, in the working directory of archivers."""


@frozen
class Pruned:
    """
    What was removed of one backup, or would be.

    :param backup_id: of the backup
    :param plan: about its archives; None if no rule was given, so that all stay
    :param files: the files of archives that were removed
    :param leftovers: manifests and snapshot files that were removed, which belonged to no archive
    :param bytes: of the archives
    """

    backup_id: str
    plan: Plan | None
    files: tuple[str, ...]
    leftovers: tuple[str, ...]
    bytes: int


def backups_in(path: Path) -> list[str]:
    """
    :param path: a directory with archives
    :returns: the ids of the backups that have archives or manifests in it
    :raises NotFound: there is no such directory
    """
    with translating("list", Subject(str(path), path=str(path))):
        if not path.is_dir():
            raise NotFound(f"there is no directory {path}", path=str(path))
        names = [ArchiveName.parse(name.removesuffix(MANIFEST)) for name in os.listdir(path)]
    return sorted({name.backup_id for name in names if name is not None})


def prune(
    path: Path,
    backup_id: str,
    work_dir: Path,
    rules: Rules | None = None,
    *,
    dry_run: bool = False,
    now: Callable[[], float] = time.time,
) -> Pruned:
    """
    Remove manifests and snapshot files that belong to no archive, and archives that no rule keeps.

    :param path: the directory with the archives, absolute
    :param backup_id: of the backup
    :param work_dir: the working directory of archivers, with the snapshot files
    :param rules: which archives stay; all if not given
    :param dry_run: only say what would be removed
    :param now: the clock, in seconds since the epoch
    :returns: what was removed
    :raises LockTimeout: another process works on this backup
    :raises NotFound: there is no such directory
    :raises UsageError: a rule makes no sense
    """
    check_backup_id(backup_id)
    if rules is not None:
        rules.check()
    if not path.is_dir():
        raise NotFound(f"there is no directory {path}", path=str(path))
    snapshots = work_dir / SNAPSHOTS
    directory = ArchiveDirectory(path, backup_id, snapshots if snapshots.is_dir() else None)
    if dry_run:
        return _Prune(directory, rules, now()).found()
    with directory.locked():
        work = _Prune(directory, rules, now())
        if moves := work.moves():
            directory.commit(moves)
        return work.found()


class _Prune:
    """What is to be removed of one backup."""

    def __init__(self, directory: ArchiveDirectory, rules: Rules | None, now: float) -> None:
        self._directory = directory
        self._stored = {_archive(one): one for one in directory.stored().values()}
        self._plan = plan(self._stored, rules, now) if rules is not None else None
        going = self._plan.going if self._plan is not None else ()
        self._going = [self._stored[archive] for archive in going]
        self._staying = [one for one in self._stored.values() if one not in self._going]
        self._manifests = list(self._orphaned_manifests())
        self._snapshots = list(self._orphaned_snapshots())

    def found(self) -> Pruned:
        """:returns: what is removed"""
        return Pruned(
            self._directory.backup_id,
            self._plan,
            tuple(str(one.name) for one in self._going),
            (*self._manifests, *self._snapshots),
            sum(one.size for one in self._going),
        )

    def moves(self) -> list[Move]:
        """:returns: the moves that remove it"""
        files = [name for one in self._going for name in (str(one.name), one.name.manifest)]
        removal = self._directory.removal([*files, *self._manifests])
        removal += [
            Move(name, self._directory.temporary("old"), snapshot=True) for name in self._snapshots
        ]
        return removal

    def _orphaned_manifests(self) -> Iterator[str]:
        there = {one.name.manifest for one in self._stored.values()}
        there |= {one.manifest_file for one in self._stored.values()}  # while a journal is open
        for name in sorted(os.listdir(self._directory.path)):
            archive = ArchiveName.parse(name.removesuffix(MANIFEST))
            if (
                name.endswith(MANIFEST)
                and archive is not None
                and archive.backup_id == self._directory.backup_id
                and name not in there
            ):
                yield name

    def _orphaned_snapshots(self) -> Iterator[str]:
        """
        Find the snapshot files of levels that are not there. Archives that are kept need none: no
        level is made above them.
        """
        if self._directory.snapshots is None:
            return
        levels = {one.name.level for one in self._staying if one.name.keeping_id is None}
        for name in _names(self._directory.snapshots):
            found = parse_snapshot_name(name)
            if (
                found is not None
                and found[0] == self._directory.backup_id
                and found[1] not in levels
                and name == snapshot_name(*found)
            ):
                yield name


def _names(tree: Tree) -> Iterable[str]:
    top = tree.top()
    return sorted(os.listdir(f"/proc/self/fd/{top.number}"))


def _archive(stored: Stored) -> Archive:
    """:returns: what retention has to know of an archive"""
    name, manifest = stored.name, stored.manifest
    if manifest is None:
        problem = stored.problem or "its manifest cannot be used"
        return Archive(
            name.backup_id, name.level, name.keeping_id, 0.0, stored.size, None, None,
            name.extension, problem,
        )  # fmt: skip
    problem = "" if manifest.size == stored.size else "it has another length than its manifest says"
    return Archive(
        name.backup_id,
        manifest.level,
        name.keeping_id,
        manifest.created,
        stored.size,
        str(manifest.key),
        str(manifest.base) if manifest.base is not None else None,
        name.extension,
        problem,
    )
