"""
The directory with the archives of a backup.

What changes together, such as an archive with its manifest and its snapshot file, or all archives
that are kept, is a list of renames. The list is written to a journal first, and flushed; that is
the moment of the change. Then the renames are made, and the journal is removed. After a crash a
writer makes the rest of them, and a reader takes them for made.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from attrs import evolve, frozen

from statepool.archive.manifest import Manifest, read_manifest
from statepool.archive.names import (
    KEEPING_IDS,
    MANIFEST,
    ArchiveName,
    age_of,
    parse_snapshot_name,
)
from statepool.beneath import Descriptor, Tree
from statepool.errors import BadRecord, IntegrityError, LockTimeout, NotFound
from statepool.pools.log import random_nonce
from statepool.transports.failures import Subject, translate_os_errors

_LONGEST_JOURNAL = 64 << 20
"""Bytes. A list of all archives that can be kept, of ten thousand levels each, is shorter."""


@frozen
class Stored:
    """
    An archive in the directory.

    :param name: its name
    :param file: the name of its file; another one while a journal is open
    :param manifest_file: the name of the file of its manifest
    :param manifest: None if there is none that can be used
    :param size: of its file, in bytes
    :param problem: why its manifest cannot be used
    """

    name: ArchiveName
    file: str
    manifest_file: str
    manifest: Manifest | None
    size: int
    problem: str = ""


@frozen
class Move:
    """
    A rename, to a name that is free when its turn comes.

    :param old: the name before it
    :param new: the name after it
    :param snapshot: whether it concerns a snapshot file
    """

    old: str
    new: str
    snapshot: bool = False


def backup_ids(path: Path) -> list[str]:
    """
    :returns: the ids of all backups with archives in a directory, in order
    :raises TransportError: the directory cannot be read
    """
    with translate_os_errors("list", Subject(f"the archives in {path}", path=str(path))):
        names = (ArchiveName.parse(name) for name in os.listdir(path))
        return sorted({name.backup_id for name in names if name is not None})


class ArchiveDirectory:
    """
    The archives of one backup.

    :param path: the directory
    :param backup_id: the id of the backup
    :param snapshots: the directory with its snapshot files; None for readers
    """

    def __init__(self, path: Path, backup_id: str, snapshots: Path | None = None) -> None:
        self.path, self.backup_id = path, backup_id
        self.tree = Tree(path)
        self.snapshots = Tree(snapshots) if snapshots is not None else None

    # -- reading -----------------------------------------------------------------------------------

    def stored(self) -> dict[ArchiveName, Stored]:
        """:returns: the archives of this backup, by their names"""
        with self._translated("list"):
            files = self._files()
            found = {}
            for name in sorted(files):
                archive = ArchiveName.parse(name)
                if archive is not None and archive.backup_id == self.backup_id:
                    found[archive] = self._look(archive, files)
            return found

    def open(self, file: str) -> Descriptor:
        """:returns: a file of the directory, open for reading"""
        with self._translated(f"read {file}"):
            return self.tree.open(file, os.O_RDONLY)

    @contextlib.contextmanager
    def manifest(self, stored: Stored) -> Iterator[IO[bytes]]:
        """Yield the manifest of an archive, open for reading."""
        with self._translated(f"read {stored.manifest_file}"):
            opened = self.tree.open(stored.manifest_file, os.O_RDONLY)
        with opened as descriptor, open(descriptor, "rb", closefd=False) as file:
            yield file

    def chain(self, name: ArchiveName, stored: dict[ArchiveName, Stored]) -> list[Stored]:
        """
        :param stored: all archives
        :returns: the archives that this one is restored from, the lowest level first
        :raises NotFound: there is no such archive, or one that it stands on is missing
        :raises IntegrityError: the manifest of one of them is missing or altered
        """
        by_key = {one.manifest.key: one for one in stored.values() if one.manifest is not None}
        one = stored.get(name)
        if one is None:
            raise NotFound(
                f"there is no archive {name} in {self.path}", path=str(self.path / str(name))
            )
        found = [self._usable(one)]
        while (manifest := found[-1].manifest) is not None and manifest.base is not None:
            below = by_key.get(manifest.base)
            if below is None or below in found:
                raise NotFound(
                    f"level {(manifest.level or 0) - 1} that {found[-1].name} stands on is not"
                    f" in {self.path}",
                    path=str(self.path),
                    hint="choose a lower level, or an older archive that is kept",
                )
            found.append(self._usable(below))
        return found[::-1]

    def _usable(self, stored: Stored) -> Stored:
        if stored.manifest is None or stored.manifest.size != stored.size:
            problem = stored.problem or "it has another length than its manifest says"
            raise IntegrityError(
                f"{stored.name} in {self.path} cannot be used: {problem}",
                path=str(self.path / stored.file),
                hint="choose a lower level, or an older archive that is kept",
            )
        return stored

    def _files(self) -> dict[str, str]:
        """:returns: the names of all files as they are after the journal, and as they are now"""
        top = self.tree.top()
        files = {name: name for name in os.listdir(f"/proc/self/fd/{top.number}")}
        for move in self._journal():
            if not move.snapshot and move.new not in files and move.old in files:
                files[move.new] = files.pop(move.old)
        return files

    def _look(self, name: ArchiveName, files: dict[str, str]) -> Stored:
        file = files[str(name)]
        manifest_file = files.get(name.manifest, name.manifest)
        size = self.tree.stat(file).st_size
        manifest, problem = None, ""
        try:
            opened = self.tree.open(manifest_file, os.O_RDONLY)
            with opened as descriptor, open(descriptor, "rb", closefd=False) as source:
                manifest = read_manifest(source, f"the manifest of {name}")
            if manifest.backup_id != self.backup_id or manifest.extension != name.extension:
                problem = f"its manifest is that of {manifest.name}"
                manifest = None
        except FileNotFoundError:
            problem = "it has no manifest"
        except IntegrityError as error:
            problem = error.message
        return Stored(name, file, manifest_file, manifest, size, problem)

    # -- writing -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """
        Keep other writers of this backup out for the duration of a ``with`` block. What a writer
        that was killed has left is completed, or removed.

        :raises LockTimeout: another process works on this backup
        """
        with self._translated("lock"):
            opened = self.tree.open(f".{self.backup_id}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        with opened as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockTimeout(
                    f"another process works on the backup {self.backup_id} in {self.path}",
                    path=str(self.path),
                    hint="wait until it has ended",
                ) from error
            with self._translated("complete what was interrupted in"):
                self._follow(self._journal())
                self._sweep()
            yield

    def temporary(self, ending: str) -> str:
        """:returns: the name of a new temporary file of this backup"""
        return f".{self.backup_id}.{random_nonce()}.{ending}"

    def removal(self, names: Iterable[str]) -> list[Move]:
        """:returns: the moves that remove files"""
        return [Move(name, self.temporary("old")) for name in names]

    def commit(self, moves: Sequence[Move]) -> None:
        """Make renames, all or none of them."""
        with self._translated("change"):
            content = json.dumps([[move.old, move.new, move.snapshot] for move in moves])
            temporary = self.temporary("tmp")
            opened = self.tree.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with opened as descriptor, open(descriptor, "w", closefd=False) as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            self._flush()
            self.tree.rename(temporary, self._journal_name)
            self._flush()
            self._follow(moves)
            self._sweep()

    @property
    def _journal_name(self) -> str:
        return f".{self.backup_id}.journal"

    def _journal(self) -> list[Move]:
        try:
            opened = self.tree.open(self._journal_name, os.O_RDONLY)
        except FileNotFoundError:
            return []
        with opened as descriptor, open(descriptor, "rb", closefd=False) as file:
            content = file.read(_LONGEST_JOURNAL)
        try:
            moves = [Move(*fields) for fields in json.loads(content)]
        except (ValueError, TypeError, RecursionError) as error:
            raise self._bad_journal() from error
        for move in moves:
            if not (self._is_ours(move.old, move) and self._is_ours(move.new, move)):
                raise self._bad_journal()
        return moves

    def _is_ours(self, name: object, move: Move) -> bool:
        if not isinstance(name, str) or "/" in name or "\0" in name:
            return False
        if name.startswith("."):
            return self._is_temporary(name)
        if move.snapshot is True:
            found = parse_snapshot_name(name)
            return found is not None and found[0] == self.backup_id
        archive = ArchiveName.parse(name.removesuffix(MANIFEST))
        return archive is not None and archive.backup_id == self.backup_id

    def _is_temporary(self, name: str) -> bool:
        beginning = f".{self.backup_id}."
        nonce, _, ending = name.removeprefix(beginning).partition(".")
        return (
            name.startswith(beginning)
            and len(nonce) == 16
            and all(letter in "0123456789abcdef" for letter in nonce)
            and ending in ("tmp", "old")
        )

    def _bad_journal(self) -> BadRecord:
        return BadRecord(
            f"{self._journal_name} in {self.path} is not a journal of this program",
            path=str(self.path / self._journal_name),
            hint="find out who put it there, and remove it",
        )

    def _follow(self, moves: Sequence[Move]) -> None:
        if not moves:
            return
        for move in moves:
            tree = self._tree_of(move)
            # made already, before a crash
            if tree is None or _exists(tree, move.new):
                continue
            with contextlib.suppress(FileNotFoundError):  # another program has removed it
                tree.rename(move.old, move.new)
        self._flush()
        self.tree.remove(self._journal_name)
        self._flush()

    def _tree_of(self, move: Move) -> Tree | None:
        return self.snapshots if move.snapshot else self.tree

    def _sweep(self) -> None:
        """Remove the temporary files of a writer that was killed."""
        for tree in (self.tree, self.snapshots):
            if tree is None:
                continue
            top = tree.top()
            for name in os.listdir(f"/proc/self/fd/{top.number}"):
                if self._is_temporary(name):
                    tree.remove(name)

    def _flush(self) -> None:
        for tree in (self.tree, self.snapshots):
            if tree is not None:
                with tree.open("", os.O_RDONLY | os.O_DIRECTORY) as directory:
                    os.fsync(directory)

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        subject = Subject(f"the archives in {self.path}", path=str(self.path))
        with translate_os_errors(doing, subject):
            yield


def _exists(tree: Tree, name: str) -> bool:
    try:
        tree.stat(name)
    except FileNotFoundError:
        return False
    return True


# -- keeping ---------------------------------------------------------------------------------------


def moves_that_keep(
    directory: ArchiveDirectory, stored: Iterable[ArchiveName], level: int, most: int
) -> list[Move]:
    """
    Plan what happens to archives that are about to be overwritten.

    The archives of this level and above are kept as ``aa``. Each set that was kept before moves on
    by one letter, with all its levels, and sets beyond ``most`` are removed.

    :param stored: the names of all archives of the backup
    :param level: the level that will be written
    :param most: how many sets are kept at most; 0 to remove what is overwritten
    :returns: the renames, in their order
    """
    current = [name for name in stored if name.keeping_id is None and name.level >= level]
    if not current:
        return []
    if not most:
        return directory.removal(_with_manifests(current))
    kept = [name for name in stored if name.keeping_id is not None]
    kept.sort(key=lambda name: -age_of(name.keeping_id))
    moves: list[Move] = []
    for name in [*kept, *current]:
        if age_of(name.keeping_id) >= most:
            moves += directory.removal(_with_manifests([name]))
        else:
            moves += renames(name, KEEPING_IDS[age_of(name.keeping_id)])
    return moves


def renames(name: ArchiveName, keeping_id: str) -> list[Move]:
    """:returns: the renames of an archive and its manifest to another keeping id"""
    new = evolve(name, keeping_id=keeping_id)
    return [Move(str(name), str(new)), Move(name.manifest, new.manifest)]


def _with_manifests(names: Iterable[ArchiveName]) -> Iterator[str]:
    for name in names:
        yield str(name)
        yield name.manifest
