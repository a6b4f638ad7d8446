"""
Text on standard output.

Names are validated, but paths and messages of other programs may contain anything: unprintable
characters are escaped before they reach a terminal.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator, Sequence

import click

from statepool.errors import StatePoolError

BROKEN_PIPE = 141
"""
Exit code if the reader of our output has closed it: the one that a shell reports for a program
ended by SIGPIPE (128 + 13).
"""

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def safe(text: str) -> str:
    """:returns: ``text`` on one line, with unprintable characters escaped as in a Python literal"""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def size(count: float) -> str:
    """
    :param count: in bytes
    :returns: the size with a binary unit and three significant digits, such as ``64.0 MiB``
    """
    if count < 1024:
        return f"{count:.0f} B"
    power = 0
    while count >= 1024 and power < len(_UNITS):
        count /= 1024
        power += 1
    return f"{count:.{max(0, 3 - len(f'{count:.0f}'))}f} {_UNITS[power - 1]}"


def moment(seconds: float) -> str:
    """
    :param seconds: since the epoch; 0 stands for unknown
    :returns: local date and time
    """
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def emit(text: str) -> None:
    """
    Write lines to standard output.

    :raises StatePoolError: they cannot be written
    """
    if sys.stdout is None:
        return
    rest = memoryview((text + "\n").encode(sys.stdout.encoding, "backslashreplace"))
    with _writing():
        sys.stdout.flush()
        stream = sys.stdout.buffer
        # Write in a loop: with PYTHONUNBUFFERED this is the raw file, which may write only a part
        # and return its length.
        while rest:
            taken = stream.write(rest)
            if taken is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            rest = rest[taken:]
        stream.flush()


def emit_table(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    heading: bool = True,
) -> None:
    """
    Write a table: drawn on a terminal, plain aligned text elsewhere.

    :param right: titles of the columns that are aligned to the right
    :param heading: whether to show the titles
    :raises StatePoolError: it cannot be written
    """
    cells = [[safe(cell) for cell in row] for row in rows]
    if not cells:
        return
    if sys.stdout is not None and sys.stdout.isatty():
        # rich takes longer to import than most commands to run
        from statepool.cli.drawing import draw_table

        with _writing():
            draw_table(titles, cells, right=right, heading=heading)
        return
    emit(
        "\n".join(
            aligned(
                [list(titles), *cells] if heading else cells, [title in right for title in titles]
            )
        )
    )


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """:returns: one line for each row, columns two blanks apart"""
    widths = [max(len(row[column]) for row in rows) for column in range(len(right))]
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        _abandon_output()
        raise click.exceptions.Exit(BROKEN_PIPE) from error
    except OSError as error:
        _abandon_output()
        raise StatePoolError(
            f"standard output cannot be written: {error.strerror}", hint="see where it leads"
        ) from error


def _abandon_output() -> None:
    """
    Discard what is still buffered. Otherwise the interpreter would fail to write it at its end, and
    print a message.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
