"""Detection, during a transfer, of a source that is much slower than another one would be."""

from __future__ import annotations

import time
from collections.abc import Callable

from statepool.model.progress import Progress
from statepool.sources.ranking import ALIKE

TRIAL = 0.5
"""How long a source is measured before it is judged, in seconds."""

WORTH = 1.0
"""Seconds that must be saved for a switch to another source."""


class TooSlow(Exception):
    """
    The error that ends a transfer, since another source would be faster. Callers never see it.

    :param done: how many bytes have arrived
    :param rate: the throughput, in bytes per second
    """

    def __init__(self, done: int, rate: float) -> None:
        super().__init__(f"{rate:.0f} bytes in a second")
        self.done = done
        self.rate = rate


class Watch:
    """
    A progress that passes all calls on, and ends the transfer if it is not worth waiting for.

    :param progress: the progress to which calls are passed
    :param pace: the estimated throughput of another source, in bytes per second; None: there is no
        other source
    :param clock: returns the time, in seconds
    """

    def __init__(
        self, progress: Progress, pace: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress = progress
        self._pace = pace
        self._clock = clock
        self._total = 0
        self._done = 0
        # When each of the transfers in progress began. They can be nested: during a transfer, files
        # that are in the cache already can be hashed, which says nothing about a source.
        self._begun: list[float] = []

    def begin(self, what: str, total: int) -> None:
        if not self._begun:
            self._total, self._done = total, 0
        self._begun.append(self._clock())
        self._progress.begin(what, total)

    def advance(self, count: int) -> None:
        """
        Pass the call on, and judge the source.

        :raises TooSlow: the source is several times slower than another one would be
        """
        self._progress.advance(count)
        if len(self._begun) != 1:
            return
        self._done += count
        seconds = self._clock() - self._begun[0]
        if self._pace is None or seconds < TRIAL:
            return
        rate = self._done / seconds
        left = self._total - self._done
        if rate * ALIKE < self._pace and left / max(rate, 1.0) - left / self._pace > WORTH:
            raise TooSlow(self._done, rate)

    def end(self) -> None:
        begun = self._begun.pop()
        if self._begun:
            self._begun[0] += self._clock() - begun
        self._progress.end()
