"""
Flushing to stable storage while there is still data to write.

A process that writes a whole file and only then flushes it wastes time twice: first the disk is
idle, then everything else waits for the disk. So a separate thread flushes repeatedly what has been
written, and the flush at the end has little left to do. Where a server does the flushing, there is
also a timeout for that last flush: the writer never gets so far ahead that the flush could exceed
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from statepool.beneath import Descriptor

STEP = 64 << 20
"""Bytes that are worth a flush of their own."""

LEAD = 256 << 20
"""
The most bytes that the writer may write while a flush is under way. Together with the bytes of that
flush, twice as many may be unflushed.
"""


class FlushBehind:
    """
    A thread that flushes a file while its writer goes on, for the duration of a ``with`` block.
    Afterwards what was written last may still have to be flushed.

    An error of the thread is raised by the writer's next call, or at the end of the block. The
    kernel reports each error only once for a descriptor, so a later flush would not report it
    again.

    The user can interrupt the wait at the end of the block; the flush that is under way then ends
    by itself.

    :param begin: called by the writer; returns a function that flushes whatever has been written to
        stable storage. Another thread calls that function, never twice at a time. What it needs
        must stay valid until it ends.
    """

    def __init__(self, begin: Callable[[], Callable[[], object]]) -> None:
        self._begin = begin
        self._executor: ThreadPoolExecutor | None = None
        self._running: Future[object] | None = None
        self._waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        if error is None:
            self._settle()

    def wrote(self, count: int) -> None:
        """
        Note that more has been written.

        :param count: how many bytes
        :raises Exception: what an earlier flush raised
        """
        self._waiting += count
        if self._waiting < STEP:
            return
        if self._running is None or self._running.done() or self._waiting >= LEAD:
            self._settle()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix="statepool-flush")
            self._running = self._executor.submit(self._begin())
            self._waiting = 0

    def _settle(self) -> None:
        """Wait for the flush that is under way."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


@contextmanager
def flushed_beside(fd: int, size: int) -> Iterator[None]:
    """
    Flush a file that does not change while the caller reads it: at the end of the block it is on
    stable storage.

    :param size: in bytes; a small file is not worth a thread
    :raises OSError: flushing failed
    """
    if size < STEP:
        os.fsync(fd)
        yield
        return
    # If the wait for the thread is interrupted, the caller's descriptor may be closed, and its
    # number may be reused for another file.
    own = Descriptor(os.dup, fd)
    with ThreadPoolExecutor(1, thread_name_prefix="statepool-flush") as executor:
        done = executor.submit(flush_own, own)
        yield
    done.result()


def flush_own(own: Descriptor) -> None:
    """Flush a file, and close its descriptor."""
    with own as descriptor:
        os.fsync(descriptor)
