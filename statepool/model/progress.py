"""How long operations say how far they are."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """
    Told of every transfer. An exception raised in here stops the transfer, which then leaves
    nothing behind.

    Calls for one transfer come one after the other, possibly from several threads.
    """

    def begin(self, what: str, total: int) -> None:
        """A transfer of ``total`` bytes begins; ``what`` describes it to a person."""

    def advance(self, count: int) -> None:
        """``count`` more bytes are done. Holes count as the bytes that they stand for."""

    def end(self) -> None:
        """The transfer has ended, well or not."""


class NoProgress:
    """Says nothing."""

    def begin(self, what: str, total: int) -> None:
        """Nothing is said."""

    def advance(self, count: int) -> None:
        """Nothing is said."""

    def end(self) -> None:
        """Nothing is said."""


SILENT: Progress = NoProgress()
"""The progress of those who do not want to know."""
