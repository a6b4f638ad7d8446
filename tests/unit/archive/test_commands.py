"""``statepool archive``: answers as JSON, and exit codes for mistakes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool.cli.main import cli
from tests.support.archives import Place, flip, write_all

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path, backup_type="tar.gz")
    write_all(made.root, ["a", "b/c"])
    return made


@pytest.fixture
def run(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """:returns: a function that runs a command, and returns its exit code and what it printed"""
    monkeypatch.setenv("XDG_STATE_HOME", str(place.path / "state"))

    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main(["archive", *map(str, words)], standalone_mode=False)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def _json(answer: tuple[int, str, str]) -> Any:
    assert answer[0] == 0, answer
    return json.loads(answer[1])


def test_answers_as_json(place: Place, run: Run) -> None:
    create = ("create", "one", place.root, "--to", place.to, "--json")
    os.mkfifo(place.root / "fifo")
    made = _json(run(*create, "--level", "0", "--exclude", "b"))
    assert made["archive"]["archive"] == "one.tar.gz"
    assert made["archive"]["level"] == 0
    assert [event["kind"] for event in made["events"]] == ["excluded"]
    assert _json(run(*create, "-i"))["archive"]["archive"] == "one.1.tar.gz"
    listed = _json(run("list", place.to, "--json"))["archives"]
    assert [one["archive"] for one in listed] == ["one.1.tar.gz", "one.tar.gz"]
    verified = _json(run("verify", place.to, "one", "--json"))["verified"]
    assert [one["error"] for one in verified] == [None, None]
    restored = _json(run("restore", place.to, "one", "--to", place.path / "t", "--json"))
    assert restored["restored"]["archives"] == ["one.tar.gz", "one.1.tar.gz"]
    assert _json(run("keep", place.to, "one", "--json")) == {"kept": True}
    assert _json(run("remove", place.to, "one", "--keeping-id", "aa", "--json", "--dry-run")) == {
        "removed": ["one.1.aa.tar.gz", "one.aa.tar.gz"],
        "dry_run": True,
    }
    assert len(_json(run("list", place.to, "--json"))["archives"]) == 2
    assert _json(run("purge", "--json")) == {"stored": ["one"]}
    assert _json(run("purge", "one", "--json")) == {"purged": True}


def test_exit_codes(place: Place, run: Run) -> None:
    create = ("create", "one", place.root, "--to", place.to)
    assert run(*create, "--level", "0")[0] == 0
    for code, words in (
        (2, ("create", "a.1", place.root, "--to", place.to)),
        (2, (*create, "--archiver", "internal", "-i")),
        (2, (*create, "--archiver", "nope")),
        (2, (*create, "--exclude", "../x")),
        (2, (*create, "--keep", "677")),
        (2, ("restore", place.to, "one", "--to", place.path / "t", "--at", "yesterday")),
        (2, ("restore", place.to, "one", "--to", place.path / "t", "--keeping-id", "x")),
        (2, ("keep", place.to, "one", "--level", "1")),
        (3, ("restore", place.to, "one", "--to", place.path / "t", "--level", "7")),
        (3, ("list", place.to, "two")),
        (3, ("purge", "two")),
        (3, ("create", "one", place.path / "nope", "--to", place.to)),
        (4, ("restore", place.to, "one", "--to", place.root)),
        (4, ("create", "one", place.path, "--to", place.to, "-i")),
        (5, ("restore", place.to, "one", "--to", place.path / "t", "--level", "0")),
        (5, ("verify", place.to)),
    ):
        if code == 5:
            flip(place.to / "one.tar.gz", 100)
        found, out, err = run(*words)
        assert (found, "Traceback" in err, "internal error" in err) == (code, False, False), words
        assert err.startswith("statepool: "), (words, out, err)
        if code == 5:
            flip(place.to / "one.tar.gz", 100)
    assert not (place.path / "t").exists()


def test_warnings_do_not_fail_the_command(place: Place, run: Run) -> None:
    os.mknod(place.root / "socket", 0o140600)
    code, out, err = run("create", "one", place.root, "--to", place.to)
    assert code == 0
    assert out.endswith("1 warning\n")
    assert err == "statepool: warning: ./socket: socket ignored\n"
