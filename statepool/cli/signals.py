"""Signals that end a command which has to clean up first."""

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
    An exception for a signal that ends this process. Like an interruption by the user, it is not
    caught on the way.

    :param number: of the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def follow(self) -> None:
        """End this process by the signal, as its parent process expects."""
        signal.signal(self.number, signal.SIG_DFL)
        os.kill(os.getpid(), self.number)


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """
    Make SIGTERM and SIGHUP raise inside a ``with`` block before they end this process. An ignored
    signal, as by nohup, stays ignored.

    :raises Ended: a signal came
    """
    ended = False

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal ended
        if not ended:  # a second signal does not interrupt the cleanup of the first
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
