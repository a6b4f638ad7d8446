"""What is drawn on a terminal. The only module that imports rich: others import this one where something is really drawn."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from statepool.cli.output import safe, size


def draw_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str], heading: bool) -> None:
    """
    Draw a table on standard output.

    :param right: titles of the columns that are aligned to the right
    :param heading: whether to show the titles
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=heading)
    for title in titles:
        table.add_column(Text(title), justify="right" if title in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, since a path may look like markup
    Console(highlight=False).print(table)


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
    """One bar below the other on standard error, for what is under way now. They vanish at the end."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            _Amount(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True, highlight=False),
            transient=True,
            redirect_stdout=False,  # standard output may be a pipe, and is none of our business here
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
