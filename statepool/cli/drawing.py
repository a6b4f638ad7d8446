"""What is drawn on a terminal. The only module that imports rich: others import this one where something is really drawn."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from statepool.cli.output import safe, size

_GAP = 2
"""Columns of the terminal between those of a table."""

_SHORT = 20
"""Columns of the terminal that a cell may have and stays in one piece, such as a time or a size."""

_LONGEST_WORD = 80
"""Columns of the terminal beyond which a word is broken all the same: some path."""


_BAR = 20
"""Columns of the terminal that the bar itself has."""

_NUMBERS = 68
"""... and everything beside the description, at most, with what is between."""

_LEAST_DESCRIPTION = 16
"""... and the description at least."""


def draw_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str], heading: bool) -> None:
    """
    Draw a table on standard output. No word is broken, since names are there to be copied: where a terminal is too narrow for them, its lines are.

    :param right: titles of the columns that are aligned to the right
    :param heading: whether to show the titles
    """
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold", show_header=heading)
    console = Console(highlight=False)
    columns = [(title, *cells) for title, cells in zip(titles, zip(*rows, strict=True), strict=True)]
    widths = _widths(columns, console.width - _GAP * len(columns))
    for title, width in zip(titles, widths, strict=True):
        table.add_column(Text(title), justify="right" if title in right else "left", overflow="fold", width=width)
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, since a path may look like markup
    console.width = max(console.width, sum(widths) + _GAP * len(widths))
    console.print(table)


def _pieces(cell: str) -> Sequence[str]:
    """:returns: what of a cell stays on one line"""
    return cell.split() if cell_len(cell) > _SHORT else (cell,)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """:returns: as much for each column as its longest word needs, and what is left of the room for whole lines of those that lack least of them"""
    widths = [min(max(cell_len(piece) for cell in cells for piece in _pieces(cell)), _LONGEST_WORD) for cells in columns]
    lacking = [max(map(cell_len, cells)) - width for cells, width in zip(columns, widths, strict=True)]
    left = max(0, room - sum(widths))
    for index in sorted(range(len(columns)), key=lambda index: lacking[index]):
        more = min(lacking[index], left)
        widths[index] += more
        left -= more
    return widths


def _whole() -> Column:
    """:returns: a column of bars that stays on one line: it is the description that becomes shorter"""
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
    """One bar below the other on standard error, for what is under way now. They vanish at the end."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        described = Column(no_wrap=True, overflow="ellipsis", max_width=max(_LEAST_DESCRIPTION, console.width - _NUMBERS))
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=described),
            BarColumn(bar_width=_BAR),
            TaskProgressColumn(table_column=_whole()),
            _Amount(table_column=_whole()),
            _Rate(table_column=_whole()),
            TimeRemainingColumn(compact=True),
            console=console,
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
