"""Noticing, while bytes move, that they come much more slowly than they would from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from statepool.model.progress import Progress
from statepool.sources.ranking import ALIKE

TRIAL = 0.5
"""How long a source is watched before it is judged, in seconds."""

WORTH = 1.0
"""How many seconds must be saved for a source to be left."""


class TooSlow(Exception):
    """
    A source is left for a faster one. Never seen by a caller.

    :param done: how many bytes have come
    :param rate: how many of them in a second
    """

    def __init__(self, done: int, rate: float) -> None:
        super().__init__(f"{rate:.0f} bytes in a second")
        self.done = done
        self.rate = rate


class Watch:
    """
    Is told of the bytes, passes it on, and ends the transfer if it is not worth waiting for.

    :param progress: whom it tells
    :param pace: how many bytes a second another source is thought to deliver; None: there is no
        other
    :param clock: tells the time, in seconds
    """

    def __init__(
        self, progress: Progress, pace: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress = progress
        self._pace = pace
        self._clock = clock
        self._total = 0
        self._done = 0
        # When each of the transfers began that are under way: within one, files that are here
        # already can be hashed, which says nothing of a source.
        self._begun: list[float] = []

    def begin(self, what: str, total: int) -> None:
        """As the progress."""
        if not self._begun:
            self._total, self._done = total, 0
        self._begun.append(self._clock())
        self._progress.begin(what, total)

    def advance(self, count: int) -> None:
        """
        As the progress.

        :raises TooSlow: it takes more than a few times as long as it would elsewhere
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
        """As the progress."""
        begun = self._begun.pop()
        if self._begun:
            self._begun[0] += self._clock() - begun
        self._progress.end()
