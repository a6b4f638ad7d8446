"""
Flushes whose answer nobody has heard.

The kernel tells an error of writing once for each descriptor. If the connection was lost while a
server flushed a file, the error went to one that is gone: whoever opens the file anew and flushes
it finds nothing wrong, and its bytes can be read there, from memory alone.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class UnheardFlushes:
    """
    Which files of other hosts this process has asked to flush, without hearing that it was done.
    Several threads can use it.
    """

    def __init__(self) -> None:
        self._files: set[Hashable] = set()
        self._lock = threading.Lock()

    def __contains__(self, file: Hashable) -> bool:
        with self._lock:
            return file in self._files

    @contextmanager
    def asking(self, file: Hashable) -> Iterator[None]:
        """Within a ``with`` block it is asked for; unless that raises, it was done."""
        with self._lock:
            self._files.add(file)
        yield
        self.forget(file)

    def rename(self, file: Hashable, name: Hashable) -> None:
        """
        Before a file gets another name: the answer to that can be lost too, so both names are
        remembered.
        """
        with self._lock:
            if file in self._files:
                self._files.add(name)

    def forget(self, file: Hashable) -> None:
        """It is gone, or its bytes have been flushed."""
        with self._lock:
            self._files.discard(file)
