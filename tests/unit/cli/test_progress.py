"""The progress bar: on a terminal, when something takes long, and nowhere else."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from statepool.cli.progress import TerminalProgress, choose_progress
from statepool.model.progress import SILENT

LIMIT = 600.0
"""Seconds after which something that was to be drawn counts as missing."""

CHILD = """
import sys
import statepool.api
from statepool.model.outcomes import GetResult

class Handle:
    def __init__(self, progress): self.progress = progress
    def get(self, state, **options):
        self.progress.begin("vm1/disk inst\\x1ball", 64 << 20)
        self.progress.advance(16 << 20)
        {wait}
        self.progress.advance(48 << 20)
        self.progress.end()
        return GetResult("vm1/disk", "install", ("install",), "blake3:" + "1" * 64)

class StatePool:
    def __init__(self, *arguments, progress, **options): self.progress = progress
    def image(self, name): return Handle(self.progress)

statepool.api.from_config = StatePool
from statepool.cli.main import cli
code = cli.main(["get", "vm1/disk", "install", *sys.argv[1:]], standalone_mode=False)
print("rich" in sys.modules)
sys.exit(code)
"""

UNTIL_TOLD = "sys.stdin.readline()"
LONGER_THAN_A_SECOND = "__import__('threading').Event().wait(1.5)"


class Terminal:
    """A pseudo-terminal, and what was written to it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.shown = ""

    def read(self, timeout: float) -> bool:
        """:returns: whether there was something"""
        if not select.select([self.master], [], [], timeout)[0]:
            return False
        self.shown += os.read(self.master, 65536).decode()
        return True

    def wait_for(self, pattern: str) -> None:
        while not re.search(pattern, self.shown):
            assert self.read(LIMIT), f"{pattern!r} was never drawn, only {self.shown!r}"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    yield terminal
    os.close(terminal.master)
    os.close(terminal.slave)


def start(terminal: Terminal, wait: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD.replace("{wait}", wait), *words]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=terminal.slave, text=True
    )


def test_a_slow_transfer_is_drawn_and_wiped_off(terminal: Terminal) -> None:
    with start(terminal, UNTIL_TOLD) as child:
        terminal.wait_for(r"vm1/disk inst\\x1ball.*25%.*16\.0 MiB of 64\.0 MiB")
        out, _ = child.communicate("go on\n", timeout=LIMIT)
    while terminal.read(0):
        pass
    assert child.returncode == 0
    assert out.splitlines()[-1] == "True"
    assert "in the cache" in out
    assert "\x1b[2K" in terminal.shown[terminal.shown.rindex("MiB of 64.0 MiB") :], (
        "the line of the bar is erased at the end"
    )
    assert "\x1b[?25h" in terminal.shown, "the cursor is shown again"


def test_a_quick_transfer_is_not_drawn(terminal: Terminal) -> None:
    with start(terminal, "pass") as child:
        out, _ = child.communicate(timeout=LIMIT)
    assert child.returncode == 0
    assert not terminal.read(0)
    assert out.splitlines()[-1] == "False"


def test_nothing_is_drawn_with_quiet(terminal: Terminal) -> None:
    with start(terminal, LONGER_THAN_A_SECOND, "-q") as child:
        out, _ = child.communicate(timeout=LIMIT)
    assert child.returncode == 0
    assert not terminal.read(0)
    assert out == "False\n"


def test_nothing_is_drawn_into_a_pipe() -> None:
    command = [sys.executable, "-c", CHILD.replace("{wait}", LONGER_THAN_A_SECOND)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "False"


def test_an_error_wipes_the_bar_off_first(terminal: Terminal) -> None:
    with start(terminal, UNTIL_TOLD + "; raise OSError('x')") as child:
        terminal.wait_for("16.0 MiB of 64.0 MiB")
        child.communicate("go on\n", timeout=LIMIT)
    terminal.wait_for("\x1b\\[2K.*internal error: OSError: x")
    assert child.returncode == 1


def test_silence_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    assert choose_progress(quiet=False) is SILENT
    with os.fdopen(os.dup(terminal.slave), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert isinstance(choose_progress(quiet=False), TerminalProgress)
        assert choose_progress(quiet=True) is SILENT
    monkeypatch.setattr(sys, "stderr", None)
    assert choose_progress(quiet=False) is SILENT


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of the bars; the last entry is that they stopped."""
    asked: list[tuple[Any, ...]] = []

    class Bars:
        def add(self, what: str, total: int, done: int) -> str:
            asked.append(("add", what, total, done))
            return what

        def advance(self, bar: str, count: int) -> None:
            asked.append(("advance", bar, count))

        def remove(self, bar: str) -> None:
            asked.append(("remove", bar))

        def stop(self) -> None:
            asked.append(("stop",))

    monkeypatch.setattr("statepool.cli.bars.Bars", Bars)
    return asked


def showing(delay: float = 0.0) -> TerminalProgress:
    """One that has begun to draw: its timer has fired."""
    progress = TerminalProgress(delay)
    progress.begin("outer", 100)
    timer = progress._timer
    assert timer is not None
    timer.join(LIMIT)
    assert not timer.is_alive()
    return progress


def test_nested_transfers(drawn: list[tuple[Any, ...]]) -> None:
    progress = showing()
    progress.advance(1)
    progress.begin("inner", 10)
    progress.advance(2)
    progress.end()
    progress.advance(3)
    progress.end()
    progress.close()
    assert drawn == [
        ("add", "outer", 100, 0),
        ("advance", "outer", 1),
        ("add", "inner", 10, 0),
        ("advance", "inner", 2),
        ("remove", "inner"),
        ("advance", "outer", 3),
        ("remove", "outer"),
        ("stop",),
    ]


def test_calls_that_do_not_match_are_harmless(drawn: list[tuple[Any, ...]]) -> None:
    progress = TerminalProgress()
    progress.advance(1)
    progress.end()
    progress.close()
    progress.close()
    progress.begin("late", 1)
    progress.advance(1)
    progress.end()
    assert drawn == []


def test_closed_before_the_delay_is_over(drawn: list[tuple[Any, ...]]) -> None:
    progress = TerminalProgress(delay=3600)
    progress.begin("short", 1)
    timer = progress._timer
    assert timer is not None
    progress.close()
    timer.join(LIMIT)
    assert not timer.is_alive()
    assert drawn == []


def test_bytes_from_many_threads_all_count(drawn: list[tuple[Any, ...]]) -> None:
    progress = showing()
    barrier = threading.Barrier(8)

    def work(_: int) -> None:
        barrier.wait(LIMIT)
        for _ in range(100):
            progress.advance(1)
            progress.begin("x", 1)
            progress.end()

    with ThreadPoolExecutor(8) as workers:
        list(workers.map(work, range(8)))
    progress.close()
    assert sum(entry[2] for entry in drawn if entry[0] == "advance") == 800
    assert (
        len([entry for entry in drawn if entry[0] == "add"])
        == len([entry for entry in drawn if entry[0] == "remove"]) + 1
    )
