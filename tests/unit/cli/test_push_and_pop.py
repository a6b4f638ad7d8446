"""
``push`` and ``pop``, for images and machines, with all their modes' exit codes; and machines in the
other commands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool

Run = Callable[..., Any]


@pytest.fixture
def run(run_statepool: Run, make_image: Callable[..., Path], tmp_path: Path) -> Run:
    """The command, with a cache, a pool, ``one.qcow2``, and ``vm`` with two images."""
    statepool.init(tmp_path / "pool")
    for name in ("one.qcow2", "vm/disk.qcow2", "vm/data.qcow2"):
        make_image(tmp_path / name, 1 << 20, writes=[(0, 65536, len(name))])

    def command(*words: str | Path, **rest: Any) -> Any:
        return run_statepool("--cache", "cache", "--source", "pool", *words, **rest)

    return command


def test_an_image(run: Run, tmp_path: Path) -> None:
    would = run("push", "vm1/disk", "step", "--from", "one.qcow2", "--dry-run", "--json").json
    assert would["dry_run"] is True
    assert would["outcome"]["items"][0]["why"].startswith("it would be")
    assert not (tmp_path / "cache").exists()
    pushed = run("push", "vm1/disk", "step", "--from", "one.qcow2", "--json").json["outcome"]
    assert (pushed["operation"], pushed["mode"], pushed["complete"]) == ("push", "af", True)
    assert [at["result"] for at in pushed["items"][0]["answers"][0]["pools"]] == [
        "stored",
        "stored",
    ]
    ran = run("push", "vm1/disk", "step", "--from", "one.qcow2", code=4)
    assert "the state is there, and the mode says abort" in ran.err
    assert "kept" in run("push", "vm1/disk", "step", "--from", "one.qcow2", "--mode", "rf").out
    would = run("pop", "vm1/disk", "step", "--to", "new.qcow2", "--dry-run", "--json").json[
        "outcome"
    ]
    assert [sorted(answer)[:3] for answer in would["items"][0]["answers"]] == [
        ["again", "bytes", "chain"],
        ["errors", "object", "states"],
    ]
    assert not (tmp_path / "new.qcow2").exists()
    popped = run("pop", "vm1/disk", "step", "--to", "new.qcow2").out
    assert "working image" in popped
    assert popped.count("removed step") == 2
    run("check", "vm1/disk", "step", code=3)
    assert "mode says abort" in run("pop", "vm1/disk", "step", code=3).err
    assert "ignored" in run("pop", "vm1/disk", "step", "--mode", "ri").out


def test_what_fails_says_what_to_do(run: Run) -> None:
    run("set", "vm1/disk", "install", "--from", "one.qcow2")
    run("set", "vm1/disk", "child", "--from", "one.qcow2")
    said = run("unset", "vm1/disk", "install", code=4).err.rstrip("\n")
    hint = said[said.rindex("(") :]
    assert run("pop", "vm1/disk", "install", code=4).err.rstrip("\n").endswith(hint)
    (item,) = run("pop", "vm1/disk", "install", "--json", code=4).json["outcome"]["items"]
    assert f"({item['hint']})" == hint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("push", "vm1/disk", "step", "--from", "one.qcow2", "--mode", "xf"), "push has no mode"),
        (("pop", "vm1/disk", "step", "--mode", "rf"), "pop has no mode"),
        (("push", "vm1/disk", "../step", "--from", "one.qcow2"), "step"),
        (("push", "vm1/disk", "step", "--from", "one.qcow2", "--from", "two.qcow2"), "one image"),
        (("push", "vm1", "step", "--from", "one.qcow2"), "IMAGE=FILE"),
        (("set", "vm1", "step", "--from", "disk=one.qcow2", "--from", "disk=two.qcow2"), "twice"),
        (("set", "vm1", "step", "--from", "disk="), "IMAGE=FILE"),
        (("pop", "vm1/disk", "step", "--overwrite"), "--to"),
        (("push", "vm1/disk", "step", "--from", "one.qcow2", "--scope", "moon"), "moon"),
    ],
)
def test_bad_input_changes_nothing(
    run: Run, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in run(*words, code=2).err
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "one.qcow2").stat().st_nlink == 1


def test_a_machine(run: Run, tmp_path: Path) -> None:
    assert run("set", "vm1", "install", "--from", "vm").out.count("stored") == 2
    run("check", "vm1", "install")
    assert {state["object"] for state in run("show", "vm1", "--json").json["states"]} == {
        "vm1",
        "vm1/disk",
        "vm1/data",
    }
    got = run("get", "vm1", "install", "--to", "run", "--json").json["got"]
    assert set(got["images"]) == {"disk", "data"}
    assert (got["digest"], got["chain"], got["working"]) == ("", ["install"], str(tmp_path / "run"))
    run("push", "vm1", "step", "--from", "disk=run/disk.qcow2", "--from", "data=run/data.qcow2")
    (tmp_path / "again").mkdir()
    popped = run("pop", "vm1", "step", "--to", "again", "--json").json["outcome"]
    assert set(popped["items"][0]["answers"][0]["images"]) == {"disk", "data"}
    assert "ignored" in run("pop", "vm1", "step", "--to", "again", "--mode", "ri").out
    removed = run("unset", "vm1", "install", "--everywhere", "--json").json["removed"]
    assert set(map(tuple, removed["states"].values())) == {("install",)}
