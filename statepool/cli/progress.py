"""A progress bar on a terminal for transfers that take longer than a second."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from statepool.model.progress import SILENT, Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

    from statepool.cli.bars import Bars

DELAY = 1.0
"""How long an operation runs before anything is drawn, in seconds."""


def choose_progress(*, quiet: bool) -> Progress:
    """
    :returns: a progress that draws on standard error if that is a terminal and ``quiet`` is not set
    """
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        return SILENT
    return TerminalProgress()


class _Transfer:
    """A transfer that is under way."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self.done = 0
        self.bar: TaskID | None = None


class TerminalProgress:
    """
    A progress that draws bars, from :data:`DELAY` after the first transfer began until
    :meth:`close`.

    Transfers may be nested: bytes count for the one that began last. Calls may come from any
    thread.
    """

    def __init__(self, delay: float = DELAY) -> None:
        self._delay = delay
        self._lock = threading.Lock()
        self._transfers: list[_Transfer] = []
        self._timer: threading.Timer | None = None
        self._bars: Bars | None = None
        self._closed = False

    def begin(self, what: str, total: int) -> None:
        """Begin a transfer of ``total`` bytes."""
        with self._lock:
            transfer = _Transfer(what, total)
            self._transfers.append(transfer)
            if self._timer is None and not self._closed:
                # A timer, since a transfer may stall from its first byte on, and the user needs to
                # see that.
                self._timer = threading.Timer(self._delay, self._show)
                self._timer.daemon = True
                self._timer.start()
            self._draw(transfer)

    def advance(self, count: int) -> None:
        """Advance the transfer by ``count`` bytes."""
        with self._lock:
            if not self._transfers:
                return
            transfer = self._transfers[-1]
            transfer.done += count
            if self._bars is not None and transfer.bar is not None:
                self._bars.advance(transfer.bar, count)

    def end(self) -> None:
        """End the transfer that began last."""
        with self._lock:
            if not self._transfers:
                return
            transfer = self._transfers.pop()
            if self._bars is not None and transfer.bar is not None:
                self._bars.remove(transfer.bar)

    def close(self) -> None:
        """Release the terminal. Nothing is drawn any more."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            bars, self._bars = self._bars, None
        if bars is not None:
            bars.stop()

    def _show(self) -> None:
        # Outside the lock: the import takes a tenth of a second, and no transfer should wait for
        # it.
        from statepool.cli.bars import Bars

        with self._lock:
            if self._closed:
                return
            self._bars = Bars()
            for transfer in self._transfers:
                self._draw(transfer)

    def _draw(self, transfer: _Transfer) -> None:
        if self._bars is not None:
            transfer.bar = self._bars.add(transfer.what, transfer.total, transfer.done)
