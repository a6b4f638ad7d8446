"""The commands for archives of pools, for pruning, and for AutoArchive's configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from statepool.cli.main import cli
from tests.support.pool_archives import Store, states_of


class Shell:
    """Runs commands with archives in one directory."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = store
        monkeypatch.setenv("XDG_STATE_HOME", str(store.root / "state"))
        monkeypatch.chdir(store.root)
        (store.root / "archives").mkdir()

    def run(self, *words: str, code: int = 0) -> Result:
        done = CliRunner().invoke(cli, ["archive", *words], catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done

    def json(self, *words: str) -> Any:
        done = CliRunner().invoke(cli, ["--json", "archive", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def create(self, *words: str) -> str:
        return self.run("create", "lab", "pool", "--to", "archives", *words).stdout

    @property
    def archives(self) -> set[str]:
        names = {path.name for path in (self.store.root / "archives").iterdir()}
        return {name for name in names if not name.startswith(".") and "manifest" not in name}


@pytest.fixture
def shell(store: Store, monkeypatch: pytest.MonkeyPatch) -> Shell:
    return Shell(store, monkeypatch)


POOL = ("--archiver", "pool", "--type", "tar")


def test_from_a_pool_to_a_pool(shell: Shell) -> None:
    assert shell.create("-i", *POOL).endswith("5 states of 2 machines\n")
    shell.store.put("new", b"new")
    assert shell.create("-i", *POOL).endswith("1 state of 2 machines\n")
    assert shell.archives == {"lab.tar", "lab.1.tar"}
    assert shell.run("verify", "archives").stdout.count("every byte is right") == 2
    shell.run("restore", "archives", "lab", "--to", "back")
    assert states_of(shell.store.root / "back") == states_of(shell.store.path)
    shell.run("restore", "archives", "lab", "--to", "back", code=4)


def test_patterns_choose_a_pool(shell: Shell) -> None:
    assert "1 state of 1 machine" in shell.create("--type", "tar", "--object", "vm2/*")
    shell.create("--type", "tar", "--object", "vm1*", "--exclude", "*:customize")
    shell.run("restore", "archives", "lab", "--to", "back")
    assert "customize" not in {state.state for state in states_of(shell.store.root / "back")}
    words = ("create", "x", "pool", "--to", "archives", "--archiver", "external", "--object", "x")
    assert "--include" in shell.run(*words, code=2).stderr


def test_pruning_is_shown_before_it_is_done(shell: Shell) -> None:
    shell.create("-i", *POOL)
    shell.create("-i", *POOL)
    shell.create("--level", "0", "--keep", "3", *POOL)
    before = shell.archives
    assert before == {"lab.tar", "lab.aa.tar", "lab.1.aa.tar"}
    lines = shell.run("prune", "archives", "--kept", "0", "--dry-run").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["lab.aa", "lab.1.aa", "lab", "lab:"]
    assert lines[1].startswith("  lab.1.aa")
    assert lines[1].endswith("goes: no rule keeps it")
    assert "would remove 2 archives" in lines[-1]
    assert shell.archives == before
    found = shell.json("prune", "archives", "lab", "--levels", "1=1", "--dry-run")
    (one,) = found["pruned"]
    assert {entry["archive"]: entry["stays"] for entry in one["archives"]} == {
        "lab": True,
        "lab.aa": True,
        "lab.1.aa": True,
    }
    assert "removed 2 archives" in shell.run("prune", "archives", "--kept", "0").stdout
    assert shell.archives == {"lab.tar"}
    (shell.store.root / "archives/lab.3.tar.manifest").touch()
    assert "lab.3.tar.manifest: removed" in shell.run("prune", "archives").stdout


def test_ages_are_in_days(shell: Shell) -> None:
    shell.create("-i", *POOL)
    shell.create("--level", "0", "--keep", "3", *POOL)
    shell.run("prune", "archives", "--within", "0.5")
    assert len(shell.archives) == 2
    shell.run("prune", "archives", "--within", "0")
    assert len(shell.archives) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("--last", "-1"),
        ("--levels", "0"),
        ("--levels", "x=1"),
        ("--orphans",),
        ("--kept", "677"),
        ("--within", "nan"),
    ],
)
def test_a_rule_that_makes_no_sense(shell: Shell, words: tuple[str, ...]) -> None:
    shell.create("-i", *POOL)
    shell.run("prune", "archives", *words, code=2)
    assert shell.archives == {"lab.tar"}


def test_autoarchive_s_configuration(shell: Shell) -> None:
    root = shell.store.root
    (root / "tree").mkdir()
    (root / "tree/file").write_text("x")
    (root / "archive_specs").mkdir()
    (root / "archive_specs/mine.aa").write_text(
        f"[Content]\npath = {root}/tree\ninclude-files = file\nexclude-files =\n"
        "[Archive]\ncommand-after-backup = true\nincremental = yes\nrestarting = yes\n"
    )
    (root / "aa.conf").write_text(
        "[Archive]\narchiver = tar\ndest-dir = archives\n[General]\nquiet=\n"
    )
    done = shell.run("run", "--aaconfig", "aa.conf", "--dry-run")
    assert "[Archive] command-after-backup is not used" in done.stderr
    assert "[General] quiet is not used" in done.stderr
    assert "would archive" in done.stdout
    assert shell.archives == set()
    for _ in range(2):
        shell.run("run", "--aaconfig", "aa.conf")
    assert shell.archives == {"mine.tar", "mine.1.tar"}
    found = shell.json("run", "--aaconfig", "archive_specs/mine.aa", "mine", "--dry-run")
    assert found["archives"] == [{"id": "mine", "archive": None}]
    assert len(found["unused"]) == 1
    assert "mine" in shell.run("run", "--aaconfig", "aa.conf", "other", code=3).stderr
    (root / "aa.conf").write_text("[Archive]\nincremental = perhaps\n")
    shell.run("run", "--aaconfig", "aa.conf", code=2)
    shell.run("run", "--aaconfig", "missing.conf", code=3)
