"""
Names in tables are there to be copied, however narrow the terminal is; a bar stays on one line.
"""

from __future__ import annotations

import pytest

from statepool.cli.bars import Bars
from statepool.cli.drawing import draw_table

TITLES = ["OBJECT", "STATE", "SIZE", "CREATED", "WHERE", "NOTE"]
ROW = [
    "vm1/disk",
    "connect--b9db94acf07c",
    "196 KiB",
    "2026-11-28 08:32:44",
    "cache /srv/pools/of/the/lab",
    "unmanaged: a long explanation of what is wrong",
]


@pytest.mark.parametrize("columns", [20, 40, 80, 100, 150, 200])
def test_no_word_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    draw_table(TITLES, [ROW, ROW], right=["SIZE"], heading=True)
    shown = capsys.readouterr().out
    assert all(
        shown.count(word) == 2
        for cell in ROW
        for word in cell.split()
        if word not in ("a", "is", "of")
    )
    assert "2026-11-28 08:32:44" in shown
    if columns >= 150:
        assert len(shown.splitlines()) == 3, "there is room for whole lines"


def test_a_word_without_end_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    draw_table(["WHERE"], [["x" * 400]], right=[], heading=False)
    assert [len(line.strip()) for line in capsys.readouterr().out.splitlines()] == [80] * 5


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_a_bar_has_one_line(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    bars = Bars()
    try:
        bar = bars.add(
            "get vm1/disk connect--b9db94acf07c from file:///srv/pools/of/the/lab", 9 << 30, 0
        )
        bars.advance(bar, 1 << 30)
        console = bars._progress.console
        lines = console.render_lines(bars._progress.get_renderable())
    finally:
        bars.stop()
    assert len(lines) == 1
    assert "1.00 GiB of 9.00 GiB" in "".join(segment.text for segment in lines[0])
