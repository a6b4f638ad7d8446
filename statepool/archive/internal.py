"""The archiver without other programs: Python's tarfile. It makes no levels."""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from typing import IO, Any, ClassVar, cast

from statepool.archive.archiver import Archiver
from statepool.archive.definition import (
    BackupDefinition,
    BackupType,
    Event,
    EventKind,
    SubOperation,
)
from statepool.archive.tree import excluded_events, included, is_excluded, size_of_tree
from statepool.archive.writing import Job, Write

_READ = 1 << 20
"""Bytes that are read from a file at a time."""


class InternalArchiver(Archiver):
    """An archiver that uses Python's tarfile. Holes are stored as zeros."""

    name: ClassVar[str] = "internal"
    supported_backup_types: ClassVar[frozenset[BackupType]] = frozenset(BackupType)

    def estimate(self, definition: BackupDefinition) -> int:
        """:returns: the bytes of all files"""
        return size_of_tree(definition)

    def produce(self, job: Job) -> dict[str, Any]:
        """Read the tree, and write its tar."""
        names = included(job.definition)
        for event in excluded_events(job.definition):
            job.event(event)
        stream = cast("IO[bytes]", _Stream(job.write))
        with tarfile.open(
            fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_READ
        ) as tar:
            adder = _Adder(tar, job)
            for name in names:
                adder.add_all(name)
        return {}


class _Stream:
    def __init__(self, write: Write) -> None:
        self._write = write

    def write(self, data: bytes) -> int:
        self._write(data)
        return len(data)


class _Adder:
    """Adds files to a tar, and tells the events."""

    def __init__(self, tar: tarfile.TarFile, job: Job) -> None:
        self._tar, self._job = tar, job
        self._root = job.definition.root

    def add_all(self, name: str) -> None:
        """Add a file, or a directory with all below it, in the order of names."""
        waiting = [name]
        while waiting:
            path = waiting.pop()
            if is_excluded(self._job.definition, path):
                continue
            if self._add(path):
                waiting += self._below(path)

    def _below(self, path: str) -> list[str]:
        try:
            names = os.listdir(os.path.join(self._root, path))
        except OSError as error:
            self._tell(error, SubOperation.OPEN, path)
            return []
        return [os.path.normpath(os.path.join(path, name)) for name in sorted(names, reverse=True)]

    def _add(self, path: str) -> bool:
        """:returns: whether it is a directory"""
        full = os.path.join(self._root, path)
        try:
            info = self._tar.gettarinfo(full, arcname=path)
        except OSError as error:
            self._tell(error, SubOperation.STAT, path)
            return False
        if cast("tarfile.TarInfo | None", info) is None:  # of a kind that no tar has
            self._ignore(full, path)
            return False
        info.name = path if path != "." else "./"
        if (seconds := _exact_mtime(full)) is not None:
            info.mtime = int(info.mtime)
            info.pax_headers = {"mtime": seconds}
        if info.isreg():
            return self._add_file(full, path, info)
        self._tar.addfile(info)
        return info.isdir()

    def _add_file(self, full: str, path: str, info: tarfile.TarInfo) -> bool:
        try:
            # without waiting for a writer, should it have become a FIFO
            descriptor = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._tell(error, SubOperation.OPEN, path)
            return False
        with open(descriptor, "rb", buffering=0) as file:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                self._changed(path, "it is another kind of file now")
                return False
            info.size = before.st_size
            padded = _Padded(file, info.size)
            self._tar.addfile(info, cast("IO[bytes]", padded))
            after = os.fstat(descriptor)
        if padded.error is not None:
            self._tell(padded.error, SubOperation.READ, path)
        elif (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            self._changed(path, "file changed as it was read")
        return False

    def _changed(self, path: str, text: str) -> None:
        self._job.event(Event(EventKind.FILE_CHANGED, SubOperation.READ, path, f"{path}: {text}"))

    def _ignore(self, full: str, path: str) -> None:
        kind = EventKind.UNKNOWN_TYPE_IGNORED
        try:
            if stat.S_ISSOCK(os.lstat(full).st_mode):
                kind = EventKind.SOCKET_IGNORED
        except OSError as error:
            self._tell(error, SubOperation.STAT, path)
            return
        self._job.event(Event(kind, SubOperation.UNKNOWN, path, f"{path}: {kind}"))

    def _tell(self, error: OSError, operation: SubOperation, path: str) -> None:
        kind = {
            errno.ENOENT: EventKind.FILE_VANISHED,
            errno.EACCES: EventKind.PERMISSION_DENIED,
            errno.EPERM: EventKind.PERMISSION_DENIED,
            errno.ELOOP: EventKind.FILE_CHANGED,
        }.get(error.errno or 0, EventKind.UNKNOWN_OS_ERROR)
        self._job.event(Event(kind, operation, path, f"{path}: {error.strerror}"))


def _exact_mtime(path: str) -> str | None:
    """:returns: the mtime in seconds, where it has fractions, which a float cannot hold"""
    try:
        seconds, rest = divmod(os.lstat(path).st_mtime_ns, 10**9)
    except OSError:
        return None  # it has vanished since; what follows tells
    return f"{seconds}.{rest:09d}" if rest and seconds >= 0 else None


class _Padded:
    """
    A file that has as many bytes as its header says: of one that shrinks while it is read, or
    cannot be read, the rest is zeros, as GNU tar writes it.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size
        self.error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        """Read from the file."""
        wanted = self._left if size < 0 else min(size, self._left)
        data = b""
        if self.error is None:
            try:
                while len(data) < wanted and (more := self._file.read(wanted - len(data))):
                    data += more
            except OSError as error:
                self.error = error
        self._left -= wanted
        return data + bytes(wanted - len(data))
