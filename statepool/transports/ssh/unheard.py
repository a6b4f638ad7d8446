"""
Flushes whose answer was lost.

The kernel reports a write error once for each descriptor. If the connection was lost while a server
flushed a file, the error was reported to a descriptor that has been closed. A later flush on a new
descriptor reports no error, and the bytes can be read there although they are only in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class UnheardFlushes:
    """
    The files of other hosts for which this process has requested a flush without getting a
    confirmation. Several threads can use it.
    """

    def __init__(self) -> None:
        self._files: set[Hashable] = set()
        self._lock = threading.Lock()

    def __contains__(self, file: Hashable) -> bool:
        with self._lock:
            return file in self._files

    @contextmanager
    def asking(self, file: Hashable) -> Iterator[None]:
        """
        Note a flush that is requested inside the block; unless the block raises, the flush was
        confirmed.
        """
        with self._lock:
            self._files.add(file)
        yield
        self.forget(file)

    def rename(self, file: Hashable, name: Hashable) -> None:
        """
        Note that a file is about to be renamed: the answer to the rename can be lost too, so both
        names are remembered.
        """
        with self._lock:
            if file in self._files:
                self._files.add(name)

    def forget(self, file: Hashable) -> None:
        """Forget a file: it was removed, or its bytes have been flushed."""
        with self._lock:
            self._files.discard(file)
