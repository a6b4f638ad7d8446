"""
Reading a local file in slices: finding its data, reading through the page cache or bypassing it,
and reading the one of two equal files that is in memory.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from attrs import frozen

from statepool.leases import held_lease, let_go, try_lease
from statepool.model.digest import Digest, new_hasher
from statepool.transports.failures import Subject, translated, translating, wrong_length

SLICE = 2 << 20
"""
Bytes that are copied, read and hashed at a time. Less costs system calls and interpreter overhead;
more does not fit into the processor's cache.
"""

PAGE = 4096
"""The alignment, in bytes, of offsets and lengths in direct I/O."""

_ZEROS = memoryview(bytes(SLICE))


def zeros(length: int) -> memoryview:
    """:returns: so many zeros, at most a slice"""
    return _ZEROS[:length]


Extent = tuple[int, int]
"""An offset and a length, in bytes."""


def hash_part(descriptor: int, start: int, end: int, algorithm: str) -> Digest:
    """
    :param descriptor: of a local file
    :param start: the offset of the first byte to hash
    :param end: the offset of the first byte after the range
    :returns: the digest of the range; if the file ends in it, of the bytes up to its end
    """
    hasher = new_hasher(algorithm)
    while start < end and (data := os.pread(descriptor, min(SLICE, end - start), start)):
        hasher.update(data)
        start += len(data)
    return Digest(algorithm, hasher.hexdigest())


# -- where the data is -----------------------------------------------------------------------------


def data_in(fd: int, size: int, subject: Subject) -> Iterator[Extent]:
    """
    :returns: the extents that hold data, one at a time: a file can have more of them than should be
        held in memory
    """
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            if start >= size:
                return
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # no data behind this offset
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise translated(error, "look for holes in", subject) from error
            yield end, size - end
            return
        yield start, end - start


@frozen
class Slice:
    """
    A part of a file that is processed at a time.

    :param start: its offset
    :param length: at most :data:`SLICE`
    :param data: the extents in it that hold data
    """

    start: int
    length: int
    data: tuple[Extent, ...]


def are_in_order(extents: tuple[Extent, ...]) -> bool:
    """
    Return whether the extents are in order, so that they can be requested: a manifest is not
    trusted.
    """
    end = 0
    for offset, length in extents:
        if offset < end or length <= 0:
            return False
        end = offset + length
    return True


def within(extents: Iterable[Extent], begin: int, end: int) -> Iterator[Extent]:
    """:returns: the parts of the extents between two offsets"""
    for offset, length in extents:
        first, last = max(offset, begin), min(offset + length, end)
        if first < last:
            yield first, last - first


def slices(extents: Iterable[Extent], end: int, begin: int = 0) -> Iterator[Slice]:
    """
    Cut a file, or the part of it between two offsets, into slices.

    :param extents: where it has data between the offsets, in order
    """
    coming = iter(extents)
    current = next(coming, None)
    for start in range(begin, end, SLICE):
        length = min(SLICE, end - start)
        data = []
        while current is not None and current[0] < start + length:
            first, last = max(current[0], start), min(sum(current), start + length)
            data.append((first, last - first))
            if sum(current) > start + length:
                break
            current = next(coming, None)
        yield Slice(start, length, tuple(data))


# -- reading ---------------------------------------------------------------------------------------


def new_buffers(count: int) -> list[memoryview]:
    """:returns: buffers for ``count`` slices, each aligned to pages"""
    room = mmap.mmap(-1, max(count, 1) * SLICE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        # With huge pages the first access to a buffer causes one page fault, not five hundred. For
        # a small file the page faults would dominate.
        room.madvise(mmap.MADV_HUGEPAGE)
    return [memoryview(room)[start : start + SLICE] for start in range(0, count * SLICE, SLICE)]


class Reader:
    """A reader of slices of a file."""

    def __init__(self, fd: int, subject: Subject) -> None:
        self._fd = fd
        self._subject = subject

    def slices(self, size: int) -> Iterator[Slice]:
        """:returns: the slices of the file"""
        return slices(data_in(self._fd, size, self._subject), size)

    def read(self, part: Slice, into: memoryview) -> memoryview:
        """:returns: the content of the slice. It is in ``into``, or is a constant."""
        if not part.data:
            return zeros(part.length)
        end = part.start
        for offset, length in part.data:
            into[end - part.start : offset - part.start] = _ZEROS[: offset - end]
            end = offset + length
            self._fill(into[offset - part.start : end - part.start], offset)
        into[end - part.start : part.length] = _ZEROS[: part.start + part.length - end]
        return into[: part.length]

    def _fill(self, into: memoryview, offset: int) -> None:
        done = 0
        while done < len(into):
            with translating("read", self._subject):
                count = os.preadv(self._fd, [into[done:]], offset + done)
            if not count:
                raise wrong_length(self._subject, offset + len(into), offset + done)
            done += count


class DirectReader(Reader):
    """
    A reader by direct I/O, which bypasses the page cache, in whole slices.

    :param direct: a second descriptor of the file, opened with ``O_DIRECT``
    """

    def __init__(self, fd: int, direct: int, subject: Subject) -> None:
        super().__init__(fd, subject)
        self._direct = direct

    def read(self, part: Slice, into: memoryview) -> memoryview:
        """
        Read a slice. What cannot be read by direct I/O, because of its alignment or of the file
        system, is read through the page cache.
        """
        if not part.data:
            return zeros(part.length)
        try:
            # Round up to a whole page, beyond the end of the file if need be: the read is then
            # short.
            count = os.preadv(self._direct, [into[: -(-part.length // PAGE) * PAGE]], part.start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise translated(error, "read", self._subject) from error
            count = 0
        return into[: part.length] if count == part.length else super().read(part, into)


# -- clones ----------------------------------------------------------------------------------------


class Unchanging:
    """
    A guard that tells whether a file has not changed since the guard was made.

    It relies on a lease of the kernel. A read lease is granted only while no process has the file
    open for writing, in whatever way it would write: a mapping keeps its file open, and so does a
    write that was requested and has not ended. Afterwards a writer has to open the file first, and
    a process that truncates it by its name waits as if it opened it. From then on the lease does
    not count as held, and is released. So the bytes cannot change while the lease is held. A write
    lease of the caller is as good: no other process has the file open at all.

    Timestamps alone would not suffice: a write to a mapping updates them when it begins, and the
    process may store to the mapping much later. They are compared in addition, against other causes
    of change.

    Where no lease is granted, as for a file of another account, the answer is no. Several threads
    may ask.

    :param fd: of a regular file
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._ending = threading.Lock()
        self._lease = held_lease(fd)
        self._ours = self._lease == fcntl.F_UNLCK and bool(try_lease(fd, fcntl.F_RDLCK))
        if self._ours:
            self._lease = fcntl.F_RDLCK
        self._seen = self._signature()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()

    def holds(self) -> bool:
        """
        :returns: whether the file has certainly not changed up to now. Once this is uncertain, it
            stays uncertain, and the lease is released so that no other process waits for it.
        """
        if self._lease == fcntl.F_UNLCK:
            return False
        if held_lease(self._fd) == self._lease and self._signature() == self._seen:
            return True
        self.end()
        return False

    def end(self) -> None:
        """Release the lease, if this guard took it."""
        with self._ending:
            self._lease = fcntl.F_UNLCK
            if self._ours:
                self._ours = False
                let_go(self._fd)

    def _signature(self) -> tuple[int, int, int]:
        found = os.fstat(self._fd)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class _InMemory(Reader):
    """A reader of what is in the page cache; raises :class:`BlockingIOError` for what is not."""

    def _fill(self, into: memoryview, offset: int) -> None:
        try:
            count = os.preadv(self._fd, [into], offset, os.RWF_NOWAIT)
        except OSError as error:
            raise BlockingIOError from error  # not in memory, or this file system cannot tell
        if count < len(into):
            raise BlockingIOError


class CloneReader(Reader):
    """
    A reader of a clone. It reads bytes from the cached pages of the origin where there are some, as
    long as the origin has not changed since the cloning.

    A new clone has nothing in the page cache: the cached pages of the file with which it shares its
    blocks do not count for it.

    :param fd: the clone
    :param clone: the reader of the clone
    :param origin: what it was cloned of
    :param unchanging: guards the origin; made before the cloning
    """

    def __init__(
        self, fd: int, clone: Reader, origin: int, unchanging: Unchanging, subject: Subject
    ) -> None:
        super().__init__(fd, subject)
        self._clone = clone
        self._origin = _InMemory(origin, subject)
        self._unchanging = unchanging

    def read(self, part: Slice, into: memoryview) -> memoryview:
        if part.data and self._unchanging.holds():
            try:
                content = self._origin.read(part, into)
            except BlockingIOError:
                return self._clone.read(part, into)
            # Asked after the read: if the origin is unchanged now, what was read is what the clone
            # has, whatever happens next.
            if self._unchanging.holds():
                return content
        return self._clone.read(part, into)
