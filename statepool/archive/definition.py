"""What is to be archived, what an archiver can do, and the events of its work."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Protocol

from attrs import field, frozen

from statepool.archive.names import check_backup_id
from statepool.errors import UsageError

MIN_COMPRESSION_STRENGTH = 0
"""The weakest compression, as AutoArchive counts it."""

MAX_COMPRESSION_STRENGTH = 9
"""The strongest compression, as AutoArchive counts it."""


class BackupType(enum.StrEnum):
    """The type of an archive. The value is the extension of its file."""

    TAR = "tar"
    TAR_GZ = "tar.gz"
    TAR_BZ2 = "tar.bz2"
    TAR_XZ = "tar.xz"
    TAR_ZST = "tar.zst"


class Feature(enum.StrEnum):
    """A feature that an archiver may have."""

    COMPRESSION_STRENGTH = "compression-strength"
    INCREMENTAL = "incremental"


class SubOperation(enum.StrEnum):
    """The part of the work during which an event occurred."""

    UNKNOWN = "unknown"
    UNKNOWN_FILE_OPERATION = "unknown-file-operation"
    STAT = "stat"
    OPEN = "open"
    READ = "read"
    FINISH = "finish"


class EventKind(enum.StrEnum):
    """What an archiver reports of a file that is not in the archive as it is in the tree."""

    UNKNOWN_ERROR = "unknown-error"
    UNKNOWN_OS_ERROR = "unknown-os-error"
    PERMISSION_DENIED = "permission-denied"
    SOCKET_IGNORED = "socket-ignored"
    UNKNOWN_TYPE_IGNORED = "unknown-type-ignored"
    FILE_CHANGED = "file-changed"
    SOME_FILES_CHANGED = "some-files-changed"
    DIRECTORY_RENAMED = "directory-renamed"
    FILE_VANISHED = "file-vanished"
    EXCLUDED = "excluded"

    @property
    def is_warning(self) -> bool:
        """Whether the archive lacks something that was to be in it."""
        return self not in (EventKind.EXCLUDED, EventKind.DIRECTORY_RENAMED)


@frozen
class Event:
    """
    Something that occurred to a file while it was archived.

    :param kind: what it was
    :param operation: during which part of the work
    :param path: of the file, relative to the root; empty if it concerns the archive as a whole
    :param text: the message of the operating system or of the program, for people
    """

    kind: EventKind
    operation: SubOperation
    path: str = ""
    text: str = ""


class Listener(Protocol):
    """A receiver of events. An exception raised in it stops the archiver, and nothing is left."""

    def file_added(self, path: str) -> None:
        """Note that a file was added; ``path`` is its name in the archive."""

    def event(self, event: Event) -> None:
        """Note that something occurred to a file."""


class NoListener:
    """A listener that does nothing."""

    def file_added(self, path: str) -> None:
        """Do nothing."""

    def event(self, event: Event) -> None:
        """Do nothing."""


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(path))


def _text(path: str | os.PathLike[str]) -> str:
    return os.fspath(path)


def _relative(paths: object) -> frozenset[str]:
    if isinstance(paths, str) or not hasattr(paths, "__iter__"):
        raise UsageError(f"not a set of paths: {paths!r}")
    found = set()
    for path in paths:
        parts = os.fspath(path).split("/")
        if path.startswith("/") or ".." in parts or "\0" in path:
            raise UsageError(
                f"{path!r} is not a path below the root",
                hint="included and excluded paths are relative to the root, without '..'",
            )
        kept = "/".join(part for part in parts if part not in ("", "."))
        found.add(kept or ".")
    return frozenset(found)


@frozen
class BackupDefinition:
    """
    What is archived, and to where.

    :param backup_id: the name of the backup
    :param backup_type: the type of its archives
    :param destination: the directory with its archives
    :param root: the directory that is archived, or the location of a pool
    :param include_files: paths relative to the root that are archived; all if there are none
    :param exclude_files: paths relative to the root that are left out, with all below them
    :raises UsageError: a path leads out of the root
    :raises InvalidName: the id cannot be used
    """

    backup_id: str
    backup_type: BackupType = field(converter=BackupType)
    destination: Path = field(converter=_absolute)
    root: str = field(default="", converter=_text)
    include_files: frozenset[str] = field(default=frozenset(), converter=_relative)
    exclude_files: frozenset[str] = field(default=frozenset(), converter=_relative)

    def __attrs_post_init__(self) -> None:
        check_backup_id(self.backup_id)
