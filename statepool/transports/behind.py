"""Work that another thread does, in its order, while the caller goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class Behind:
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
