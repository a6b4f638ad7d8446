"""
The only event loop, in a thread of its own, that serves all monitors of this process.

It exists as long as it has users. Its thread also starts QEMU processes: the kernel ends them with
the thread that started them, so that must not be a thread of the caller, which may end sooner.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from statepool.errors import MachineError

T = TypeVar("T")


class Loop:
    """The event loop of this process. After a fork, the child makes its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._users = 0
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Register a user of the loop."""
        with self._lock:
            if self._pid != os.getpid():
                self._reset()
            if self._users == 0:
                self._start()
            self._users += 1

    def release(self) -> None:
        """Unregister a user of the loop; the last one ends its thread."""
        with self._lock:
            if self._pid != os.getpid():
                return  # the loop belonged to the parent process
            self._users -= 1
            if self._users == 0:
                self._stop()

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=_serve, args=(loop,), name="statepool-machines", daemon=True
        )
        thread.start()
        self._loop, self._thread = loop, thread

    def _stop(self) -> None:
        assert self._loop is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """
        :param work: the coroutine to run in the loop
        :returns: its result; an interruption of the caller cancels it
        :raises MachineError: this process is a child of the one that opened the machine
        """
        if self._loop is None or self._pid != os.getpid():
            work.close()
            raise MachineError(
                "this machine was opened by another process", hint="open it again after a fork"
            )
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                concurrent.futures.wait([future], timeout=5)
            raise

    def call(self, function: Callable[[], T]) -> T:
        """:returns: the result of a function that the loop's thread calls; it must be quick"""

        async def called() -> T:
            return function()

        return self.run(called())


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.run_until_complete(loop.shutdown_asyncgens())


LOOP = Loop()
"""The loop of this process."""
