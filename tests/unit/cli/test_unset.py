"""``unset`` of many states, by a pattern and their age."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool import StatePool

Run = Callable[..., Any]
DISK = "vm1/disk"


@pytest.fixture
def run(run_statepool: Run, make_image: Callable[..., Path], tmp_path: Path) -> Run:
    """The command, with a cache that has built states, one of them with a child, and another."""
    disk = StatePool(cache=tmp_path / "cache").image(DISK)
    for number, name in enumerate(("install", "built--1", "built--2")):
        disk.set(name, source=make_image(tmp_path / name, 1 << 20, writes=[(0, 65536, number)]))
    disk.get("built--1", to=tmp_path / "work")
    disk.set("child", source=_written(tmp_path / "work"))

    def command(*words: str | Path, **rest: Any) -> Any:
        return run_statepool("--cache", "cache", *words, **rest)

    return command


def _written(path: Path) -> Path:
    write = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 9 0 64k", path]
    subprocess.run(write, check=True, timeout=60)
    return path


def names(run: Run) -> list[str]:
    return [one["state"] for one in run("show", DISK, "--json").json["states"]]


def test_a_pattern_removes_all_but_those_with_dependants(run: Run) -> None:
    would = run("unset", DISK, "built--*", "--dry-run", code=4)
    assert "would remove built--2" in would.out
    assert names(run) == ["built--1", "built--2", "child", "install"]
    done = run("unset", DISK, "built--*", code=4)
    assert "removed built--2" in done.out
    assert "child" in done.err
    assert names(run) == ["built--1", "child", "install"]
    done = run("unset", DISK, "built--*", "--cascade", "--json")
    assert len(done.json["removed"]) == 1
    assert names(run) == ["install"]


def test_age_decides(run: Run) -> None:
    assert "no state" in run("unset", DISK, "*", "--older-than", "1h").out
    assert len(names(run)) == 4
    assert run("unset", DISK, "*", "--older-than", "0h").out.count("removed ") == 4
    run("show", DISK, code=3)


@pytest.mark.parametrize("span", ["", "30", "d", "1y", "-1d", "1.5d"])
def test_what_is_no_span_is_refused(run: Run, span: str) -> None:
    assert "such as 12h" in run("unset", DISK, "*", f"--older-than={span}", code=2).err
    assert len(names(run)) == 4


def test_an_age_needs_a_pattern(run: Run) -> None:
    assert "needs a pattern" in run("unset", DISK, "install", "--older-than", "1d", code=2).err
