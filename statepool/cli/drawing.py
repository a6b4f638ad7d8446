"""Tables on a terminal. This module imports rich, so it is imported only when a table is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = 2
"""Columns of the terminal between the columns of a table."""

_SHORT = 20
"""
The widest cell that is never broken, in columns of the terminal: for example a time or a size.
"""

_LONGEST_WORD = 80
"""The widest word that is not broken, in columns of the terminal. A path can be longer."""


def draw_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str], heading: bool
) -> None:
    """
    Draw a table on standard output. Words are not broken, since users copy names: if the terminal
    is too narrow, whole lines are wrapped instead.

    :param right: titles of the columns that are aligned to the right
    :param heading: whether to show the titles
    """
    table = Table(
        box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold", show_header=heading
    )
    console = Console(highlight=False)
    columns = [
        (title, *cells) for title, cells in zip(titles, zip(*rows, strict=True), strict=True)
    ]
    widths = _widths(columns, console.width - _GAP * len(columns))
    for title, width in zip(titles, widths, strict=True):
        table.add_column(
            Text(title), justify="right" if title in right else "left", overflow="fold", width=width
        )
    for row in rows:
        table.add_row(*map(Text, row))  # as Text, since rich could take a path for markup
    console.width = max(console.width, sum(widths) + _GAP * len(widths))
    console.print(table)


def _pieces(cell: str) -> Sequence[str]:
    """:returns: the parts of a cell that each stay on one line"""
    return cell.split() if cell_len(cell) > _SHORT else (cell,)


def _widths(columns: Sequence[Sequence[str]], room: int) -> list[int]:
    """
    :returns: the width of each column: as much as its longest word needs; what is left goes to
        columns that need least to show whole lines
    """
    widths = [
        min(max(cell_len(piece) for cell in cells for piece in _pieces(cell)), _LONGEST_WORD)
        for cells in columns
    ]
    lacking = [
        max(map(cell_len, cells)) - width for cells, width in zip(columns, widths, strict=True)
    ]
    left = max(0, room - sum(widths))
    for index in sorted(range(len(columns)), key=lambda index: lacking[index]):
        more = min(lacking[index], left)
        widths[index] += more
        left -= more
    return widths
