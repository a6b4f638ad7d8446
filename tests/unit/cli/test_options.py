"""Global options, help, and what is not imported for them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

from statepool.cli.main import COMMANDS, module_of
from statepool.model.location import Location
from statepool.model.progress import SILENT
from statepool.model.settings import Settings
from statepool.version import __version__

Run = Callable[..., Result]


def load_command(name: str) -> click.Command:
    command = importlib.import_module(module_of(name)).command
    assert isinstance(command, click.Command)
    return command


def test_help_lists_every_command(run: Run) -> None:
    text = run("--help").stdout
    for name, short in COMMANDS.items():
        assert any(line.split(maxsplit=1) == [name, short] for line in text.splitlines()), name
    assert run("-h").stdout == text


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_what_the_table_says(run: Run, name: str) -> None:
    command = load_command(name)
    assert command.name == name
    assert (command.help or "").strip().splitlines()[0] == COMMANDS[name]
    text = run(name, "--help").stdout
    assert text.startswith(f"Usage: statepool {name} ")
    assert "--json" in text
    assert COMMANDS[name] in text


@pytest.mark.parametrize("name", COMMANDS)
def test_what_changes_something_can_be_tried(name: str) -> None:
    changing = name in {
        "init",
        "get",
        "set",
        "unset",
        "push",
        "pop",
        "sync",
        "import",
        "adopt",
        "gc",
        "stage",
    }
    assert any("--dry-run" in parameter.opts for parameter in load_command(name).params) == changing


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"statepool {__version__}\n"


@pytest.mark.parametrize("before", [True, False])
def test_options_work_before_and_after_the_command(
    run: Run, api: Any, tmp_path: Path, before: bool
) -> None:
    (tmp_path / "mine.toml").write_text('sources = ["/not/this"]\nfresh = 7')
    options = [
        "--config",
        "mine.toml",
        "--cache",
        "c",
        "--source",
        "/a",
        "--source",
        "ssh://h/b",
        "--json",
        "--verbose",
    ]
    api.answers["show"] = []
    run(*options, "show") if before else run("show", *options)
    ((config, progress),) = api.made
    assert config.cache == f"{tmp_path}/c"
    assert [source.location for source in config.sources] == [
        Location("file", "/a"),
        Location("ssh", "/b", host="h"),
    ]
    assert config.settings == Settings(fresh=7)
    assert progress is SILENT


def test_sources_before_and_after_add_up(run: Run, api: Any) -> None:
    api.answers["show"] = []
    run("--source", "/a", "show", "--source", "/b")
    assert [source.name for source in api.made[0][0].sources] == ["file:///a", "file:///b"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", ""], "not a location: ''"),
        (["--source", "p", "--source", "p"], "two sources are named"),
    ],
)
def test_a_source_that_cannot_be_one(run: Run, words: list[str], said: str) -> None:
    assert run(*words, "show", code=2).stderr.startswith(
        f"statepool: the command line: --source: {said}"
    )


LOADED = """
import sys
from statepool.cli.main import cli
code = cli.main(sys.argv[1:], standalone_mode=False)
heavy = ["rich", "paramiko", "qemu", "tomllib", "asyncio"]
ours = ["statepool.cli.show", "statepool.cli.get", "statepool.cli.progress", "statepool.cli.forms"]
for name in heavy + ours:
    if name in sys.modules:
        print("loaded:", name, file=sys.stderr)
"""


def loaded(*words: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return {line.removeprefix("loaded: ") for line in done.stderr.splitlines()}


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_loads_nothing_that_it_does_not_need(words: list[str]) -> None:
    assert loaded(*words) == set()


def test_a_command_loads_no_other_one() -> None:
    assert loaded("get", "--help") == {"statepool.cli.get"}
