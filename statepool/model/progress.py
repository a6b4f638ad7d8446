"""Progress of long operations."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """
    A receiver of the progress of every transfer. An exception raised in it stops the transfer,
    which then leaves nothing behind.

    Calls for one transfer do not overlap, but may come from several threads.
    """

    def begin(self, what: str, total: int) -> None:
        """Note that a transfer of ``total`` bytes begins; ``what`` describes it to a person."""

    def advance(self, count: int) -> None:
        """Note that ``count`` more bytes are done. Holes count with their length."""

    def end(self) -> None:
        """Note that the transfer has ended, with success or without."""


class NoProgress:
    """A progress that reports nothing."""

    def begin(self, what: str, total: int) -> None:
        """Report nothing."""

    def advance(self, count: int) -> None:
        """Report nothing."""

    def end(self) -> None:
        """Report nothing."""


SILENT: Progress = NoProgress()
"""The progress for callers that want no reports."""
