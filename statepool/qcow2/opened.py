"""
Find the processes that have a file open.

The kernel knows them, and shows it by the leases that it grants (:mod:`statepool.leases`): but only
to the owner of a file, and not on every file system. Elsewhere we check the bytes that QEMU locks
in its images, and the descriptors of those processes that we may inspect. This shows less: a
process of another user is not seen unless it is a QEMU.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from statepool.beneath import Beneath, Descriptor
from statepool.errors import InUse
from statepool.leases import let_go, try_lease
from statepool.qcow2.files import open_regular

_FLOCK = struct.Struct("hhqqi0q")
"""``struct flock`` of Linux with 64-bit offsets: type, whence, start, length, process."""

_LOCK_BYTES = ((100, 32), (200, 32))
"""
The bytes that QEMU locks in an image, (offset, length): permissions that it has, and those that it
denies to other processes (``block/file-posix.c``, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE). A
byte for each permission; QEMU has fewer than 32.
"""

_WRITE_LOCK_BYTES = ((101, 3),)
"""Those of a writer: BLK_PERM_WRITE, BLK_PERM_WRITE_UNCHANGED and BLK_PERM_RESIZE."""

_NO_LOCKS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
)
"""The errors of the kernel where a file system has no locks."""


PATIENCE = 0.2
"""
Seconds for which a reader may be only a brief check, such as a command that finds the backing state
of each working image.
"""

_PAUSE = 0.01


@frozen
class Opener:
    """
    A process that has a file open.

    :param pid: its process id
    :param name: the name of its program
    :param writes: whether it can write to the file
    """

    pid: int
    name: str
    writes: bool

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"


@contextmanager
def exclusive(path: Path | str | Beneath) -> Iterator[int]:
    """
    Open a file that is not open anywhere else, not even in this process by another descriptor.

    :param path: a regular file
    :returns: a descriptor open for reading and writing
    :raises InUse: it is open elsewhere
    :raises UnsafeImage: it is not a regular file
    :raises MissingFile: there is no such file
    :raises AccessDenied: permissions do not allow writing to it
    """
    with _leased(path, os.O_RDWR, fcntl.F_WRLCK) as descriptor:
        yield descriptor


@contextmanager
def shared(path: Path | str | Beneath) -> Iterator[int]:
    """
    Open a file that no process has open for writing.

    :param path: a regular file
    :returns: a descriptor open for reading
    :raises InUse: a process can write to it
    :raises UnsafeImage: it is not a regular file
    :raises MissingFile: there is no such file
    :raises AccessDenied: permissions do not allow reading it
    """
    with _leased(path, os.O_RDONLY, fcntl.F_RDLCK) as descriptor:
        yield descriptor


@contextmanager
def unwritten(path: Path | str | Beneath) -> Iterator[int]:
    """
    Open a file for changes although another process may read it, if no process has it open for
    writing. This is for the backing file of the image that a running machine writes to: QEMU has
    read its header, and does not read it again.

    :param path: a regular file
    :returns: a descriptor open for reading and writing
    :raises InUse: a process can write to it
    :raises UnsafeImage: it is not a regular file
    :raises MissingFile: there is no such file
    :raises AccessDenied: permissions do not allow writing to it
    """
    with shared(path):
        pass  # a lease would also keep this process from opening it
    with open_regular(path, os.O_RDWR, wait=False) as descriptor:
        yield descriptor


def is_open(path: Path | str | Beneath) -> bool:
    """
    Tell whether any other process has a file open, and not only for a moment. The answer is True if
    this is unknown: if this process has it open as well, and there are processes that we may not
    inspect.

    :param path: a regular file
    :raises UnsafeImage: it is not a regular file
    :raises MissingFile: there is no such file
    :raises AccessDenied: permissions do not allow reading it
    """
    deadline = time.monotonic() + PATIENCE
    while (answer := _look(path)) is None and time.monotonic() < deadline:
        time.sleep(_PAUSE)
    return answer is not False


def _look(path: Path | str | Beneath) -> bool | None:
    """:returns: whether any other process has a file open; None if it may be only a brief check"""
    try:
        opened = open_regular(path, wait=False)
    except BlockingIOError:
        return None  # another process holds a lease on it
    with opened as descriptor:
        granted = try_lease(descriptor, fcntl.F_WRLCK)
        if granted:
            let_go(descriptor)
            return False
        found, all_seen = _openers(descriptor)
        others = [opener for opener in found if opener.pid != os.getpid()]
        if any(opener.writes for opener in others) or _locked_by_qemu(descriptor, _LOCK_BYTES):
            return True
        if others:
            return None
        if granted is None:
            return False
        # Only this process is visible. The other one may have ended, or be invisible to us, for
        # example in another container.
        return not all_seen if found else None


@contextmanager
def _leased(path: Path | str | Beneath, flags: int, kind: int) -> Iterator[int]:
    deadline = time.monotonic() + PATIENCE
    with _open(path, flags, deadline) as descriptor:
        leased = _claim(descriptor, path, kind, deadline)
        try:
            yield descriptor
        finally:
            if leased:
                let_go(descriptor)


def _open(path: Path | str | Beneath, flags: int, deadline: float) -> Descriptor:
    while True:
        try:
            return open_regular(path, flags, wait=False)
        except BlockingIOError as error:  # another process holds a lease on it
            if time.monotonic() >= deadline:
                raise _in_use(path, ()) from error
            time.sleep(_PAUSE)


def _claim(descriptor: int, path: Path | str | Beneath, kind: int, deadline: float) -> bool:
    """:returns: whether we got a lease, and did not only check other signs"""
    writing_matters = kind == fcntl.F_RDLCK
    while not (granted := try_lease(descriptor, kind)):
        found, _ = _openers(descriptor)
        openers = tuple(opener for opener in found if opener.writes or not writing_matters)
        locked = _locked_by_qemu(descriptor, _WRITE_LOCK_BYTES if writing_matters else _LOCK_BYTES)
        if granted is None and not openers and not locked:
            return False
        # The others may be brief checks. Also, a child that this process was just starting had all
        # our descriptors until its program began.
        if locked or any(opener.writes for opener in openers) or time.monotonic() >= deadline:
            raise _in_use(path, openers)
        time.sleep(_PAUSE)
    return True


def _locked_by_qemu(descriptor: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    for start, length in ranges:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        try:
            answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, question)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return False  # a file system without locks: QEMU has none there either
            raise
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            return True
    return False


def _openers(descriptor: int) -> tuple[list[Opener], bool]:
    """
    :returns: the processes that have the file open, besides this descriptor; and whether we could
        inspect every process
    """
    status = os.fstat(descriptor)
    identity = (status.st_dev, status.st_ino)
    ours = (os.getpid(), descriptor)
    found: dict[int, Opener] = {}
    all_seen = True
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        try:
            for number in os.listdir(f"/proc/{pid}/fd"):
                if (pid, int(number)) != ours and _is_file(f"/proc/{pid}/fd/{number}", identity):
                    writes = _writes(pid, number) or (pid in found and found[pid].writes)
                    found[pid] = Opener(pid, _program(pid), writes)
        except PermissionError:
            all_seen = False
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return list(found.values()), all_seen


def _is_file(link: str, identity: tuple[int, int]) -> bool:
    try:
        status = os.stat(link)
    except FileNotFoundError:
        return False  # it was closed meanwhile
    return (status.st_dev, status.st_ino) == identity


def _writes(pid: int, number: str) -> bool:
    try:
        with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as file:
            flags = next((line.split()[1] for line in file if line.startswith("flags:")), "0")
    except FileNotFoundError:
        return False
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _program(pid: int) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def _in_use(path: Path | str | Beneath, openers: tuple[Opener, ...]) -> InUse:
    who = ", ".join(str(opener) for opener in openers[:5]) or "another process"
    return InUse(
        f"{path} is open in {who}",
        path=str(path),
        hint="shut down the machine that runs on it, or close it there",
    )
