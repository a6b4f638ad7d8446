"""Benchmarks that end early, by an error or by a signal, leave nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.bench import Bench

ROOT = Path(__file__).resolve().parents[2]


def processes_in(place: Path) -> list[str]:
    """:returns: the command lines of the processes that name a directory"""
    lines = [
        path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists()
    ]
    return [line for line in lines if str(place) in line]


@pytest.mark.parametrize("number", command.ENDING)
def test_ended_by_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    run = [sys.executable, "-m", "benchmarks", "--place", str(tmp_path), "locks"]
    with subprocess.Popen(
        run, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        # As large as they are measured, so that it lasts long enough: it is ended while the images
        # are made.
        while not list(tmp_path.glob("benchmarks-*/pool/vm1/disk/*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []
    # a program that was just being started finds nothing, and ends by itself
    while processes_in(tmp_path):
        time.sleep(0.01)


def test_ended_by_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench) -> None:
        with bench.directory() as place:
            program = bench.start_python("-c", "import sys; sys.stdin.read()", str(place))
            (place / "file").write_bytes(b"x")
            assert program.poll() is None
            raise RuntimeError("the table cannot be made")

    monkeypatch.setitem(command.TABLES, "locks", fail)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(RuntimeError, match="cannot be made"):
        command.main(["--place", str(tmp_path), "--tiny", "locks"])
    assert list(tmp_path.iterdir()) == []
    assert processes_in(tmp_path) == []
