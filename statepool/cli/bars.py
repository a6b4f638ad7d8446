"""
Bars on a terminal for what is under way. It imports rich: only who really draws one imports this
module.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from statepool.cli.output import safe, size

_BAR = 20
"""Columns of the terminal that the bar itself has."""

_NUMBERS = 68
"""... and everything beside the description, at most, with what is between."""

_LEAST_DESCRIPTION = 16
"""... and the description at least."""


def _whole() -> Column:
    """
    :returns: a column of bars that stays on one line: it is the description that becomes shorter
    """
    return Column(no_wrap=True)


class _Amount(ProgressColumn):
    """How much of how much."""

    def render(self, task: Task) -> Text:
        total = f" of {size(task.total)}" if task.total else ""
        return Text(size(task.completed) + total)


class _Rate(ProgressColumn):
    """How fast."""

    def render(self, task: Task) -> Text:
        return Text(f"{size(task.speed)}/s" if task.speed else "")


class Bars:
    """
    One bar below the other on standard error, for what is under way now. They vanish at the end.
    """

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        described = Column(
            no_wrap=True,
            overflow="ellipsis",
            max_width=max(_LEAST_DESCRIPTION, console.width - _NUMBERS),
        )
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=described),
            BarColumn(bar_width=_BAR),
            TaskProgressColumn(table_column=_whole()),
            _Amount(table_column=_whole()),
            _Rate(table_column=_whole()),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            # standard output may be a pipe, and is none of our business here
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._progress.start()

    def add(self, what: str, total: int, done: int) -> TaskID:
        """:returns: what to call the new bar by"""
        return self._progress.add_task(safe(what), total=total or None, completed=done)

    def advance(self, bar: TaskID, count: int) -> None:
        """``count`` more bytes are done."""
        self._progress.advance(bar, count)

    def remove(self, bar: TaskID) -> None:
        """That transfer has ended."""
        self._progress.remove_task(bar)

    def stop(self) -> None:
        """Let go of the terminal."""
        self._progress.stop()
