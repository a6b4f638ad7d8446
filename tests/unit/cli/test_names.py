"""Names as people say them: built states without their keys, slips, and words from elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool import StatePool

Run = Callable[..., Any]
OLD, NEW = "customize--0123456789ab", "customize--ba9876543210"


@pytest.fixture
def run(run_statepool: Run, make_image: Callable[..., Path], tmp_path: Path) -> Run:
    """The command, with a cache that has a state, and two that were built on it."""
    disk = StatePool(cache=tmp_path / "cache").image("vm1/disk")
    for name in ("install", OLD, NEW):
        work = make_image(tmp_path / name, 1 << 20, writes=[(0, 65536, len(name))])
        disk.set(name, source=work)

    def command(*words: str | Path, **rest: Any) -> Any:
        return run_statepool("--cache", "cache", *words, **rest)

    return command


def test_get_takes_the_newest_built_state_and_says_which(run: Run) -> None:
    done = run("get", "vm1/disk", "customize", "--to", "work.qcow2")
    assert f"vm1/disk {NEW}: in the cache" in done.out
    assert f"this is {NEW}, the newest" in done.err
    assert run("get", "vm1/disk", OLD).err == ""


def test_check_finds_a_built_state(run: Run) -> None:
    assert run("check", "vm1/disk", "customize", "--json").json == {
        "object": "vm1/disk",
        "state": NEW,
        "present": True,
    }
    run("check", "vm1/disk", "custom", code=3)


def test_a_state_of_exactly_this_name_is_taken(
    run: Run, tmp_path: Path, make_image: Callable[..., Path]
) -> None:
    exact = make_image(tmp_path / "exact", 1 << 20, writes=[(0, 65536, 99)])
    run("set", "vm1/disk", "customize", "--from", exact)
    done = run("get", "vm1/disk", "customize")
    assert "vm1/disk customize: in the cache" in done.out
    assert done.err == ""


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("vm1/disk", "instal"), "install"),
        (("vm1/dsik", "install"), "vm1/disk"),
        (("vm1/disk", "customise--0123456789ab"), OLD),
    ],
)
def test_slips_are_told(run: Run, words: tuple[str, str], meant: str) -> None:
    for command in ("get", "run"):
        assert f"did you mean {meant}?" in run(command, *words, code=3).err


def test_what_is_like_nothing_gets_the_hint_as_it_was(run: Run) -> None:
    told = run("get", "vm1/disk", "zzz", code=3).err
    assert "did you mean" not in told
    assert "show lists what there is" in told


@pytest.mark.parametrize(("word", "command"), [("list", "show"), ("ls", "show"), ("rm", "unset")])
def test_words_from_elsewhere(run: Run, word: str, command: str) -> None:
    words = ("vm1/disk", "install", "--dry-run") if command == "unset" else ("vm1/disk",)
    assert run(word, *words).out == run(command, *words).out != ""
