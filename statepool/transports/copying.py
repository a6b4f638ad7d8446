"""
Copy one local file to another: share blocks, or else copy them, and hash what arrives.

A copy in which every byte is checked costs less than an unchecked one, since each byte is read only
once, into a buffer of this process. It is hashed there, and a separate thread writes it from there.
So the digest is that of *our copy*, whatever other processes do to the source meanwhile. The file
is never mapped: if another process truncates a mapped file, the kernel kills this process by a
signal. The kernel's ``copy_file_range`` would require a second read of everything, and is no faster
by itself (docs/measurements.rst).

A clone shares its blocks with its source, but not the pages in the page cache. While the kernel
guarantees that no process can write to the source
(:class:`~statepool.transports.reading.Unchanging`), both have the same bytes, and the cached pages
of the source are read.

Descriptors stay the caller's, and their file offsets are not changed: all reads and writes here are
positional.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import cycle, islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from statepool.errors import IntegrityError
from statepool.model.digest import DEFAULT_ALGORITHM, Digest, new_hasher
from statepool.model.pieces import LENGTH, PIECE, PIECES, ZEROS, Pieces, count
from statepool.model.progress import SILENT, Progress
from statepool.transports.base import Moved, Transfer
from statepool.transports.failures import (
    A_FILE,
    Subject,
    not_regular,
    require_few_holes,
    translating,
    wrong_length,
)
from statepool.transports.flushing import FlushBehind
from statepool.transports.reading import (
    SLICE,
    CloneReader,
    DirectReader,
    Extent,
    Reader,
    Slice,
    Unchanging,
    data_in,
    new_buffers,
)
from statepool.transports.reserving import Reserver

BEHIND = 3
"""
The most slices that hashing may lag behind reading, and writing behind hashing. Each of them needs
a buffer.
"""

WRITE = 128 << 10
"""
Bytes that are written at a time. Less costs system calls. From twice as many on, kernels with large
folios in the page cache allocate huge ones, which takes three times as long if no such piece of
memory is free (docs/measurements.rst).
"""

MAX_THREADS = 4
"""
The most threads that hash together when no copying needs the processor. A slice cannot occupy more,
and four threads that hash pieces exceed the throughput of most memory.
"""

FICLONE = 0x40049409
"""
The ioctl that shares all blocks of another file: ``_IOW(0x94, 9, int)`` in ``linux/fs.h``. On a
platform where the number differs, the kernel refuses it, and the file is copied.
"""

_REAL_FAILURES = frozenset(
    {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EINTR}
)
"""Errors of FICLONE that are real failures, not just the answer that it is not supported."""


def copy(
    source: int,
    target: int,
    transfer: Transfer,
    *,
    reflink: bool = True,
    flush: bool = False,
    subject: Subject = A_FILE,
) -> Moved:
    """
    Copy a whole local file, holes as holes.

    :param source: descriptor of a regular file, open for reading
    :param target: descriptor of a file of our own, open for reading and writing; its content is
        replaced
    :param transfer: gives the length of the source, the algorithm of the copy's digest, and the
        progress, which is advanced in the calling thread, for holes too; if it raises, the copy
        ends. The extents are ignored: the file system lists the data itself.
    :param reflink: whether the two may share blocks
    :param flush: whether the caller will flush the copy: then it is flushed during the copy, so
        that little is left to flush
    :param subject: the source in messages
    :returns: ``reflink`` or ``copy``, with the digest of what is in ``target`` now. The last bytes
        may not have been flushed.
    :raises IntegrityError: the source is not a regular file of this size, or did not stay so
    :raises NoSpace: the copy does not fit
    :raises TransportError: reading or writing failed
    """
    size = transfer.size
    _check_length(source, size, subject)
    if reflink and size > 0 and (digest := _clone(source, target, transfer, subject)) is not None:
        return Moved(digest, "reflink", 0)
    with translating("write a copy of", subject, needed=size, descriptor=target):
        _empty(target)
        os.ftruncate(target, size)
    moved = _copy_slices(source, target, transfer, subject, flush)
    _check_length(source, size, subject)
    return moved


def hash_file(
    fd: int,
    size: int,
    *,
    algorithm: str = DEFAULT_ALGORITHM,
    progress: Progress = SILENT,
    overlay: Sequence[tuple[int, bytes]] = (),
    subject: Subject = A_FILE,
    pieces: Pieces | None = None,
) -> Digest:
    """
    Return the digest of a local file. Holes are not read.

    :param fd: descriptor of a regular file, open for reading
    :param size: how long it must be, in bytes
    :param progress: told of the bytes, holes included, in the calling thread; if it raises, hashing
        ends
    :param overlay: offsets, and the bytes to hash there in place of the file's content: for the
        digest that it will have after a small change
    :param subject: what messages say of the file
    :param pieces: gets the digests of its pieces, where the algorithm has some
    :raises IntegrityError: it is not a regular file of this size, or the overlay exceeds it
    :raises TransportError: reading failed
    """
    _check_length(fd, size, subject)
    for offset, data in overlay:
        if offset < 0 or offset + len(data) > size:
            raise IntegrityError(
                f"{subject.text} has {size} bytes: nothing can be put at {offset}",
                pool=subject.pool,
                path=subject.path,
            )
    return _hash(
        Reader(fd, subject),
        size,
        algorithm,
        progress,
        pieces if pieces is not None else Pieces(),
        overlay,
    )


def data_extents(fd: int, size: int, *, limit: int) -> tuple[Extent, ...]:
    """
    :param fd: descriptor of a local file
    :param size: how much of it to look at, in bytes
    :param limit: most extents to return; if there are more, those with the smallest gaps between
        them become one
    :returns: its data as (offset, length), in order. A file without holes, or on a file system that
        does not report them, has one extent.
    :raises TransportError: the file system failed
    """
    return merged(data_in(fd, size, A_FILE), limit=limit)


def merged(extents: Iterable[Extent], *, limit: int) -> tuple[Extent, ...]:
    """
    :param extents: in order
    :param limit: most extents to return; if there are more, those with the smallest gaps between
        them become one
    """
    found: list[Extent] = []
    for extent in extents:
        found.append(extent)
        # Merge often enough to bound memory, rarely enough to be fast. The largest gaps survive
        # each round, so the result is the same as that of one round at the end.
        if len(found) >= 8 * limit:
            found = _closed(found, 2 * limit)
    return tuple(_closed(found, limit))


def _closed(extents: list[Extent], limit: int) -> list[Extent]:
    """:returns: at most ``limit`` extents: the smallest gaps are closed"""
    if len(extents) <= limit:
        return extents
    gaps = sorted(
        range(1, len(extents)),
        key=lambda index: extents[index][0] - sum(extents[index - 1]),
        reverse=True,
    )
    starts = [0, *sorted(gaps[: limit - 1]), len(extents)]
    return [
        (extents[first][0], sum(extents[after - 1]) - extents[first][0])
        for first, after in pairwise(starts)
    ]


# -- hashing ---------------------------------------------------------------------------------------


class _Behind:
    """
    A bounded queue of work for one or several threads, which stay close behind the caller.

    An error in a thread is raised by the caller's next call. Leaving the block, for any reason,
    ends the threads and waits for them. The user can interrupt this wait, and the thread then ends
    by itself. So it must not work with anything that the caller closes.

    :param depth: how many pieces of work the caller may be ahead
    :param threads: how many threads; with 0, everything is done in the calling thread, for work
        that is not worth a thread
    :param last: is called in the thread after all work, whether that failed or not; only with one
        thread
    """

    def __init__(
        self, depth: int, *, threads: int, last: Callable[[], object] = lambda: None
    ) -> None:
        self._depth = depth
        self._last = last
        self._executor = (
            ThreadPoolExecutor(threads, thread_name_prefix="statepool-hash") if threads else None
        )
        self._pending: deque[Future[object]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for future in self._pending:
            future.cancel()
        if self._executor is None:
            self._last()
            return
        ended = self._executor.submit(self._last)
        self._executor.shutdown(wait=True)
        if error is None:
            ended.result()

    def do(self, work: Callable[[], object]) -> None:
        """
        Queue the next piece of work.

        :raises Exception: what an earlier piece of work raised
        """
        if self._executor is None:
            work()
            return
        if len(self._pending) >= self._depth:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(work))

    def finish(self) -> None:
        """
        Wait until all work is done.

        :raises Exception: what a piece of work raised
        """
        while self._pending:
            self._pending.popleft().result()


def _buffers(size: int) -> list[memoryview]:
    """
    :returns: the buffers of the ring: one is being filled while up to :data:`BEHIND` are waiting
    """
    return new_buffers(min(BEHIND + 1, -(-size // SLICE)))


def _threads(size: int) -> int:
    """:returns: how many threads may hash together while no other work needs the processor"""
    return min(len(os.sched_getaffinity(0)), MAX_THREADS) if size > SLICE else 1


def _hash(
    reader: Reader,
    size: int,
    algorithm: str,
    progress: Progress,
    pieces: Pieces,
    overlay: Sequence[tuple[int, bytes]] = (),
) -> Digest:
    if algorithm == PIECES:
        pieces.become(_hash_pieces(reader, size, progress, overlay))
        return Digest.of_pieces(pieces, size)
    return hash_read(
        reader,
        size,
        algorithm=algorithm,
        progress=progress,
        overlay=overlay,
        threads=_threads(size),
    )


def hash_read(
    reader: Reader,
    size: int,
    *,
    algorithm: str,
    progress: Progress = SILENT,
    overlay: Sequence[tuple[int, bytes]] = (),
    threads: int = 1,
    each: Callable[[Slice, memoryview], object] = lambda part, content: None,
) -> Digest:
    """
    Hash what a reader reads, in a thread of its own.

    :param overlay: as for :func:`hash_file`
    :param threads: how many threads may hash together
    :param each: is called with each slice meanwhile, in the calling thread; if it raises, hashing
        ends
    """
    hasher = new_hasher(algorithm, threads=threads)
    with _Behind(BEHIND, threads=1 if size > SLICE else 0) as behind:
        for part, buffer in zip(reader.slices(size), cycle(_buffers(size))):
            content = _overlaid(reader.read(part, buffer), part, overlay, buffer)
            behind.do(partial(hasher.update, content))
            each(part, content)
            progress.advance(part.length)
        behind.finish()
    return Digest(algorithm, hasher.hexdigest())


def _hash_pieces(
    reader: Reader, size: int, progress: Progress, overlay: Sequence[tuple[int, bytes]]
) -> bytearray:
    """
    Hash pieces of a file in several threads, which also read them. If the wait for the threads is
    interrupted, they end by themselves. By then the descriptor may have been closed and its number
    reused, so that they read another file; this does no harm.

    :returns: the digests of all pieces
    """
    found = bytearray(ZEROS * count(size))
    # Also with one processor: one thread reads while the other one hashes.
    threads = max(_threads(size), 2) if size > PIECE else 0
    buffers = deque(new_buffers(max(threads, 1)))

    def hash_piece(index: int, parts: Sequence[Slice]) -> None:
        hasher, buffer = new_hasher("blake3"), buffers.pop()
        try:
            for part in parts:
                hasher.update(_overlaid(reader.read(part, buffer), part, overlay, buffer))
        finally:
            buffers.append(buffer)
        found[index * LENGTH : (index + 1) * LENGTH] = bytes.fromhex(hasher.hexdigest())

    slices = reader.slices(size)
    with _Behind(2 * threads, threads=threads) as behind:
        for index in range(count(size)):
            parts = list(islice(slices, PIECE // SLICE))
            if sum(part.length for part in parts) < PIECE or any(
                part.data or _is_overlaid(part, overlay) for part in parts
            ):
                behind.do(partial(hash_piece, index, parts))
            for part in parts:
                progress.advance(part.length)
        behind.finish()
    return found


def _is_overlaid(part: Slice, overlay: Sequence[tuple[int, bytes]]) -> bool:
    return any(
        offset < part.start + part.length and part.start < offset + len(data)
        for offset, data in overlay
    )


def _overlaid(
    content: memoryview, part: Slice, overlay: Sequence[tuple[int, bytes]], buffer: memoryview
) -> memoryview:
    """
    :returns: the content of the slice with those parts of ``overlay`` applied that fall into it
    """
    for offset, data in overlay:
        first, last = max(offset, part.start), min(offset + len(data), part.start + part.length)
        if first < last:
            if content.readonly:
                buffer[: part.length] = content
                content = buffer[: part.length]
            content[first - part.start : last - part.start] = data[first - offset : last - offset]
    return content


# -- copying ---------------------------------------------------------------------------------------


def _check_length(fd: int, size: int, subject: Subject) -> None:
    with translating("look at", subject):
        found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise not_regular(subject)
    if found.st_size != size:
        raise wrong_length(subject, size, found.st_size)
    require_few_holes(size - found.st_blocks * 512, subject)


def _empty(target: int) -> None:
    if os.fstat(target).st_size:
        # Never truncate to empty: ext4 takes such a file for one that is being replaced, and begins
        # to write all of it to the disk as soon as it is closed.
        os.ftruncate(target, 0)


def _clone(source: int, target: int, transfer: Transfer, subject: Subject) -> Digest | None:
    """
    :returns: the digest of the target, which shares all blocks of the source now; None where they
        cannot share any
    """
    size = transfer.size
    with translating("write a copy of", subject, needed=size, descriptor=target):
        _empty(target)
    # The lease is taken before the cloning, so that whatever is read from the source later was in
    # it when it was cloned.
    with Unchanging(source) as unchanging:
        with translating("write a copy of", subject, needed=size, descriptor=target):
            shared = _share_blocks(source, target)
        if not shared:
            return None
        _check_length(target, size, subject)
        # Reading our clone into the page cache costs several times as much as direct I/O.
        direct = _open_direct(target)
        try:
            clone = (
                DirectReader(target, direct, subject)
                if direct is not None
                else Reader(target, subject)
            )
            return _hash(
                CloneReader(target, clone, source, unchanging, subject),
                size,
                transfer.algorithm,
                transfer.progress,
                transfer.pieces,
            )
        finally:
            if direct is not None:
                os.close(direct)


def _open_direct(fd: int) -> int | None:
    """
    :returns: a descriptor of the same file for direct I/O, which bypasses the page cache, or None
        where the file system does not support that
    """
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


def _share_blocks(source: int, target: int) -> bool:
    """:returns: whether the target now shares all blocks of the source, without moving a byte"""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in _REAL_FAILURES:
            raise
        return False
    return True


def _copy_slices(
    source: int, target: int, transfer: Transfer, subject: Subject, flush: bool
) -> Moved:
    size = transfer.size
    with translating("look at", subject):
        is_mostly_holes = os.fstat(source).st_blocks * 512 < size // 2
    # The writer needs a processor too, unless there is almost nothing to write.
    threads = _threads(size) if is_mostly_holes else 1
    return copy_read(
        Reader(source, subject), target, transfer, flush=flush, threads=threads, subject=subject
    )


def copy_read(
    reader: Reader,
    target: int,
    transfer: Transfer,
    *,
    flush: bool = False,
    threads: int = 1,
    subject: Subject = A_FILE,
) -> Moved:
    """
    Write what a reader reads into a local file, holes as holes, and hash it meanwhile.

    :param target: descriptor of a file of our own that has this length, and only holes; open for
        reading and writing
    :param transfer: as for :func:`copy`
    :param flush: likewise
    :param threads: how many threads may hash together
    """
    size = transfer.size
    hasher = new_hasher(transfer.algorithm, threads=threads, pieces=transfer.pieces)
    with translating("write a copy of", subject, descriptor=target):
        writer = _Writer(target, size, subject)
    buffers = cycle(_buffers(size))
    sent = 0
    with (
        FlushBehind(writer.begin_flush) if flush else nullcontext() as flushing,
        _Behind(BEHIND, threads=1 if size > SLICE else 0, last=writer.close) as behind,
        writer,
    ):
        for part in reader.slices(size):
            if part.data:
                content = reader.read(part, next(buffers))
                hasher.update(content)
                behind.do(partial(writer.write, part, content, flushing))
                sent += sum(length for _, length in part.data)
            # It takes no buffer: otherwise the ring would reuse a buffer that is still to be
            # written.
            else:
                hasher.zeros(part.length)
            transfer.progress.advance(part.length)
        behind.finish()
    return Moved(Digest(transfer.algorithm, hasher.hexdigest()), "copy", sent)


class _Writer:
    """
    A writer of what was read from one file to the same offsets in another, for the duration of a
    ``with`` block. Leaving the block does not wait for a write that is under way in another thread.
    So each thread has its own descriptor, which it closes itself: by then the number of the
    caller's descriptor may belong to another file.

    :raises OSError: no further descriptor is available
    """

    def __init__(self, target: int, size: int, subject: Subject) -> None:
        self._target = os.dup(target)
        self._size = size
        self._subject = subject
        self._reserver = Reserver(self._target)
        self._is_over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over = True

    def close(self) -> None:
        """Close the descriptor; the writing thread calls this last."""
        _close(self._target, self._subject)

    def begin_flush(self) -> Callable[[], None]:
        """
        Begin a flush; the writing thread calls this.

        :returns: a function that flushes what has been written so far; any thread may call it
        """
        with translating("flush", self._subject):
            return partial(_flush_own, os.dup(self._target), self._size, self._subject)

    def write(self, part: Slice, content: memoryview, flushing: FlushBehind | None) -> None:
        """
        :param part: says where its data is; holes are left out
        :param content: all of it
        :param flushing: is told what was written
        """
        with translating("copy", self._subject, needed=self._size, descriptor=self._target):
            for offset, length in part.data:
                self._reserver.reserve(offset, length)
                self._put(content[offset - part.start :][:length], offset)
        if flushing is not None and not self._is_over:
            flushing.wrote(sum(length for _, length in part.data))

    def _put(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data) and not self._is_over:
            done += os.pwrite(self._target, data[done : done + WRITE], offset + done)


def _flush_own(descriptor: int, size: int, subject: Subject) -> None:
    try:
        with translating("flush", subject, needed=size, descriptor=descriptor):
            os.fdatasync(descriptor)
    finally:
        _close(descriptor, subject)


def _close(descriptor: int, subject: Subject) -> None:
    # An error of close counts: a file server may report only now that a write failed, and reports
    # it once.
    with translating("copy", subject):
        os.close(descriptor)


def can_share_blocks(directory: Path) -> bool:
    """
    :param directory: where to try it, with two temporary files
    :returns: whether files there can share blocks, so that a copy takes no room
    """
    import tempfile  # imported only here: nothing else needs it, and it imports much

    with (
        tempfile.TemporaryFile(dir=directory) as source,
        tempfile.TemporaryFile(dir=directory) as target,
    ):
        source.write(b"shared")
        source.flush()
        return _share_blocks(source.fileno(), target.fileno())
