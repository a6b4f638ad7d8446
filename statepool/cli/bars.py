"""
Progress bars on a terminal. This module imports rich, so it is imported only when a bar is drawn.
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
"""The width of the bar itself, in columns of the terminal."""

_NUMBERS = 68
"""The most columns of everything beside the description, gaps included."""

_LEAST_DESCRIPTION = 16
"""The fewest columns of the description."""


def _whole() -> Column:
    """:returns: a column of bars that stays on one line: the description becomes shorter instead"""
    return Column(no_wrap=True)


class _Amount(ProgressColumn):
    """A column with the bytes done and the total."""

    def render(self, task: Task) -> Text:
        total = f" of {size(task.total)}" if task.total else ""
        return Text(size(task.completed) + total)


class _Rate(ProgressColumn):
    """A column with the rate."""

    def render(self, task: Task) -> Text:
        return Text(f"{size(task.speed)}/s" if task.speed else "")


class Bars:
    """Bars on standard error, one for each transfer that is under way. They vanish at the end."""

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
            # standard output may be a pipe, and is left alone here
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._progress.start()

    def add(self, what: str, total: int, done: int) -> TaskID:
        """:returns: the id of the new bar"""
        return self._progress.add_task(safe(what), total=total or None, completed=done)

    def advance(self, bar: TaskID, count: int) -> None:
        """Advance a bar by ``count`` bytes."""
        self._progress.advance(bar, count)

    def remove(self, bar: TaskID) -> None:
        """Remove the bar of a transfer that has ended."""
        self._progress.remove_task(bar)

    def stop(self) -> None:
        """Release the terminal."""
        self._progress.stop()
