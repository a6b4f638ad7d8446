"""Text for people: sizes, escapes, columns, and tables on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.cli.output import aligned, moment, safe, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (64 << 20, "64.0 MiB"),
        (100 << 20, "100 MiB"),
        (1000 << 20, "1000 MiB"),
        (1 << 30, "1.00 GiB"),
        (1536 << 40, "1.50 PiB"),
        (1 << 80, "1048576 EiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_moments() -> None:
    assert moment(0) == ""
    assert moment(1e9) == "2001-09-09 01:46:40"


@given(st.text())
def test_nothing_that_controls_a_terminal_remains(text: str) -> None:
    assert not any(
        unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        for character in safe(text)
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe └──", "Größe └──"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202egpj", r"\u202egpj"),
        (os.fsdecode(b"\xff"), r"\udcff"),
    ],
)
def test_escapes(text: str, shown: str) -> None:
    assert safe(text) == shown


def test_columns() -> None:
    assert aligned([["A", "BB"], ["ccc", "d"]], [False, True]) == ["A    BB", "ccc   d"]
    assert aligned([["A", ""], ["ccc", "d"]], [True, False]) == ["  A", "ccc  d"]


def test_a_table_on_a_terminal_is_drawn_and_plain_elsewhere() -> None:
    child = (
        "import sys; from statepool.cli.output import emit_table\n"
        "emit_table(['NAME', 'SIZE'], [['[bold]/a\\x1b[2J[/bold]', '1']], right=['SIZE'])\n"
        "print('rich' in sys.modules, file=sys.stderr)"
    )
    master, slave = pty.openpty()
    try:
        drawn = subprocess.run(
            [sys.executable, "-c", child],
            stdout=slave,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=True,
        )
        shown = os.read(master, 65536).decode()
    finally:
        os.close(slave)
        os.close(master)
    plain = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, timeout=60, check=True
    )
    assert drawn.stderr == b"True\n"
    assert "[bold]/a\\x1b[2J[/bold]" in shown
    assert plain.stderr == b"False\n"
    assert plain.stdout.decode() == "NAME                    SIZE\n[bold]/a\\x1b[2J[/bold]     1\n"


def test_what_the_encoding_lacks_is_escaped() -> None:
    child = "from statepool.cli.output import emit; emit('└ ü')"
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [sys.executable, "-c", child], capture_output=True, timeout=60, check=True, env=env
    )
    assert done.stdout == b"\\u2514 \xfc\n"
