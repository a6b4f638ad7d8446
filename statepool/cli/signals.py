"""Signals that end a command which has something to put in order first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """
    A signal is to end us. As of an interruption by the user, nobody on the way keeps it.

    :param number: of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def follow(self) -> None:
        """End by the signal, as who waits for us expects it."""
        signal.signal(self.number, signal.SIG_DFL)
        os.kill(os.getpid(), self.number)


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """
    For as long as a ``with`` block lasts, SIGTERM and SIGHUP leave it before they end us. One that
    is ignored, as by nohup, still is.

    :raises Ended: one came
    """
    ended = False

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal ended
        if not ended:  # a second one does not cut short what the first has begun
            ended = True
            raise Ended(number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
