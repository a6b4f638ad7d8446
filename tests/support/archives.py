"""Trees to archive, and what they are compared by."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statepool.archive.archiver import Archiver
from statepool.archive.definition import BackupDefinition, Event
from statepool.archive.directory import ArchiveDirectory
from statepool.archive.names import ArchiveName
from statepool.archive.registry import archiver_class


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.files: list[str] = []

    def file_added(self, path: str) -> None:
        self.files.append(path)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def kinds(self) -> list[str]:
        return sorted(event.kind.value for event in self.events)


class Place:
    """A tree, a directory for its archives, and an archiver."""

    def __init__(self, path: Path, archiver: str = "external", backup_type: str = "tar") -> None:
        self.path, self.root, self.to = path, path / "root", path / "to"
        for directory in (self.root, self.to):
            directory.mkdir(parents=True, exist_ok=True)
        self.heard = Heard()
        self.archiver: Archiver = archiver_class(archiver)(path / "work", listener=self.heard)
        self.definition = BackupDefinition("one", backup_type, self.to, self.root)
        self.directory = ArchiveDirectory(self.to, "one")

    def make(self, level: int | None = None, keep: int = 0, **options: Any) -> Path:
        return self.archiver.backup_files_incrementally(
            self.definition, level=level, keep=keep, **options
        )

    def names(self) -> list[str]:
        return sorted(str(name) for name in self.directory.stored())

    def name(self, level: int = 0, keeping_id: str | None = None) -> ArchiveName:
        return ArchiveName("one", self.definition.backup_type.value, level, keeping_id)

    def files(self) -> list[str]:
        """:returns: all files of the directory but the lock"""
        return sorted(name for name in os.listdir(self.to) if not name.endswith(".lock"))


def facts_of(top: Path, *, sockets: bool = False) -> dict[str, tuple[object, ...]]:
    """
    :param sockets: whether sockets count: no tar has them
    :returns: all of a tree that a restore should bring back
    """
    found: dict[str, tuple[object, ...]] = {}
    groups: dict[tuple[int, int], str] = {}
    for above, directories, files in os.walk(os.fsencode(top)):
        directories.sort()  # the order of the walk, by which the first name of a file is chosen
        for name in [b".", *directories, *sorted(files)]:
            path = os.path.join(above, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            if kind == stat.S_IFSOCK and not sockets:
                continue
            relative = os.fsdecode(os.path.relpath(path, os.fsencode(top)))
            content: object = None
            if kind == stat.S_IFREG:
                with open(path, "rb") as file:
                    content = file.read()
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            first = groups.setdefault((status.st_dev, status.st_ino), relative)
            group = first if kind == stat.S_IFREG and status.st_nlink > 1 else None
            found[relative] = (
                kind,
                stat.S_IMODE(status.st_mode),
                status.st_uid,
                status.st_mtime_ns,
                content,
                group,
            )
    return found


def flip(path: Path, *positions: int) -> None:
    """Change bytes of a file."""
    content = bytearray(path.read_bytes())
    for position in positions:
        content[position] ^= 0x55
    path.write_bytes(content)


def write_all(root: Path, names: Sequence[str]) -> None:
    """Make files that have their names as content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
