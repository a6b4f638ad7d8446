"""The archiver without other programs: Python's tarfile. It makes no levels."""

from __future__ import annotations

import errno
import functools
import grp
import io
import os
import pwd
import stat
import tarfile
from typing import Any, ClassVar

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

_STEP = 1 << 20
"""Bytes that are passed on at a time."""


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
        out = _Output(job.write)
        adder = _Adder(out, job)
        for name in names:
            adder.add_all(name)
        out.end()
        return {}


class _Output:
    """A tar that is written, in large steps."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._buffer = memoryview(bytearray(_STEP))
        self._used = 0
        self._passed = 0

    def room(self) -> memoryview:
        """:returns: memory for the next bytes; none of it counts before :meth:`advance`"""
        if self._used == _STEP:
            self._pass_on()
        return self._buffer[self._used :]

    def advance(self, count: int) -> None:
        """Count the first bytes of that memory as written."""
        self._used += count

    def put(self, data: bytes) -> None:
        """Write bytes."""
        while data:
            room = self.room()[: len(data)]
            room[:] = data[: len(room)]
            self.advance(len(room))
            data = data[len(room) :]

    def pad(self, block: int) -> None:
        """Write zeros up to a multiple of a number of bytes."""
        self.put(bytes(-(self._passed + self._used) % block))

    def end(self) -> None:
        """Write the end of the tar, padded to a record as other programs do."""
        self.put(bytes(2 * tarfile.BLOCKSIZE))
        self.pad(tarfile.RECORDSIZE)
        self._pass_on()

    def _pass_on(self) -> None:
        self._write(self._buffer[: self._used])
        self._passed += self._used
        self._used = 0


class _Adder:
    """Adds files to a tar, and tells the events."""

    def __init__(self, out: _Output, job: Job) -> None:
        self._out, self._job = out, job
        self._root = job.definition.root
        self._linked: dict[tuple[int, int], str] = {}  # names of files that have several

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
        above = f"{path}/" if path != "." else ""
        return [above + name for name in sorted(names, reverse=True)]

    def _add(self, path: str) -> bool:
        """:returns: whether it is a directory"""
        full = os.path.join(self._root, path)
        try:
            found = os.lstat(full)
            if stat.S_ISREG(found.st_mode):
                self._add_file(full, path, found)
                return False
            info = _described(path, found)
            if info is None:
                self._ignore(found, path)
                return False
            if stat.S_ISLNK(found.st_mode):
                info.linkname = os.readlink(full)
        except OSError as error:
            self._tell(error, SubOperation.STAT, path)
            return False
        self._put_header(info)
        return info.isdir()

    def _add_file(self, full: str, path: str, found: os.stat_result) -> None:
        inode = (found.st_dev, found.st_ino)
        info = _described(path, found)
        assert info is not None
        if found.st_nlink > 1 and (first := self._linked.get(inode)) is not None:
            info.type, info.linkname, info.size = tarfile.LNKTYPE, first, 0
            self._put_header(info)
            return
        try:
            # without waiting for a writer, should it have become a FIFO
            opened = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self._tell(error, SubOperation.OPEN, path)
            return
        with open(opened, "rb", buffering=0) as file:
            before = os.fstat(opened)
            if not stat.S_ISREG(before.st_mode):
                self._changed(path, "it is another kind of file now")
                return
            info.size = before.st_size
            self._put_header(info)
            failure = self._put_data(file, info.size)
            after = os.fstat(opened)
        if found.st_nlink > 1:
            self._linked[inode] = path
        if failure is not None:
            self._tell(failure, SubOperation.READ, path)
        elif (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            self._changed(path, "file changed as it was read")

    def _put_header(self, info: tarfile.TarInfo) -> None:
        self._out.put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _put_data(self, file: io.FileIO, left: int) -> OSError | None:
        """
        Write as many bytes of a file as its header says: of one that shrinks while it is read, or
        cannot be read, the rest is zeros, as GNU tar writes it.
        """
        failure = None
        while left:
            room = self._out.room()[:left]
            try:
                count = file.readinto(room) if failure is None else 0
            except OSError as error:
                failure, count = error, 0
            if not count:
                count = len(room)
                room[:] = bytes(count)
            self._out.advance(count)
            left -= count
        self._out.pad(tarfile.BLOCKSIZE)
        return failure

    def _changed(self, path: str, text: str) -> None:
        self._job.event(Event(EventKind.FILE_CHANGED, SubOperation.READ, path, f"{path}: {text}"))

    def _ignore(self, found: os.stat_result, path: str) -> None:
        kind = EventKind.UNKNOWN_TYPE_IGNORED
        if stat.S_ISSOCK(found.st_mode):
            kind = EventKind.SOCKET_IGNORED
        self._job.event(Event(kind, SubOperation.UNKNOWN, path, f"{path}: {kind}"))

    def _tell(self, error: OSError, operation: SubOperation, path: str) -> None:
        kind = {
            errno.ENOENT: EventKind.FILE_VANISHED,
            errno.EACCES: EventKind.PERMISSION_DENIED,
            errno.EPERM: EventKind.PERMISSION_DENIED,
            errno.ELOOP: EventKind.FILE_CHANGED,
        }.get(error.errno or 0, EventKind.UNKNOWN_OS_ERROR)
        self._job.event(Event(kind, operation, path, f"{path}: {error.strerror}"))


_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


def _described(path: str, found: os.stat_result) -> tarfile.TarInfo | None:
    """:returns: the header of a file; None if it is of a kind that no tar has"""
    kind = _TYPES.get(stat.S_IFMT(found.st_mode))
    if kind is None:
        return None
    info = tarfile.TarInfo(path if path != "." else "./")
    info.type, info.mode = kind, stat.S_IMODE(found.st_mode)
    info.uid, info.gid = found.st_uid, found.st_gid
    info.uname, info.gname = _user(found.st_uid), _group(found.st_gid)
    seconds, fraction = divmod(abs(found.st_mtime_ns), 10**9)
    sign = "-" if found.st_mtime_ns < 0 else ""
    info.mtime = int(f"{sign}{seconds}")
    if fraction:
        info.pax_headers = {"mtime": f"{sign}{seconds}.{fraction:09d}"}
    if kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        info.devmajor, info.devminor = os.major(found.st_rdev), os.minor(found.st_rdev)
    return info


@functools.cache
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


@functools.cache
def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""
