"""
Stable storage, while there is still something to write.

Whoever writes a whole file and flushes it then waits twice: first nothing goes to the disk, and
then nothing else happens. So what has been written is flushed by a thread of its own, time and
again, and the flush at the end has little left to do. Where a server does it, that one may also be
waited for only so long: the writer never gets so far ahead that it could take longer.
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
Bytes that the writer may have written since a flush began which has not ended: with those that it
speaks of, twice as many are not flushed yet.
"""


class FlushBehind:
    """
    Flushes a file behind its writer's back, as long as a ``with`` block lasts. Afterwards what was
    written last may still have to be flushed.

    An error of the thread comes out of the writer's next call, or out of the end of the block: the
    kernel tells each error once for a descriptor, so a later flush would not see it any more.

    Who does not want to wait for the end can interrupt that, and the flush that is under way ends
    by itself.

    :param begin: called by who writes; returns what puts on stable storage whatever has been
        written, which another thread calls, never twice at a time. What that needs must stay until
        it ends.
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
        Some more has been written.

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
    A file that does not change is flushed while the caller reads it: at the end of the block it is
    on stable storage.

    :param size: in bytes: a small one is not worth a thread
    :raises OSError: flushing failed
    """
    if size < STEP:
        os.fsync(fd)
        yield
        return
    # if waiting for the thread is interrupted, the caller's one may be closed, and its number be
    # that of another file
    own = Descriptor(os.dup, fd)
    with ThreadPoolExecutor(1, thread_name_prefix="statepool-flush") as executor:
        done = executor.submit(_flush_own, own)
        yield
    done.result()


def _flush_own(own: Descriptor) -> None:
    with own as descriptor:
        os.fsync(descriptor)
