"""Words that a shell completes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Listed

Run = Callable[..., Result]

ONE = Digest("blake3", "1" * 64)
INSTALL = Manifest("vm1/disk", "install", digest=ONE)
CUSTOMIZE = Manifest("vm1/disk", "customize", digest=ONE)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(run: Run, shell: str) -> None:
    script = run("completion", shell).stdout
    assert "_STATEPOOL_COMPLETE" in script
    assert json.loads(run("completion", shell, "--json").stdout) == {
        "shell": shell,
        "script": script.removesuffix("\n"),
    }


def test_completion_of_another_shell(run: Run) -> None:
    assert len(run("completion", "tcsh", code=2).stderr.splitlines()) == 1


def test_completion_is_bash(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(run("completion", "bash").stdout)
    subprocess.run(["bash", "-n", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("statepool ver", {"verify"}),
        ("statepool get ", {"vm1/disk", "vm2/disk"}),
        ("statepool get vm1", {"vm1/disk"}),
        ("statepool get vm1/disk ", {"install", "customize"}),
        ("statepool --cache CACHE get vm1/disk c", {"customize"}),
        ("statepool get vm3/disk ", set()),
        ("statepool get vm1/disk install --from ", {"near", "file:///far"}),
        ("statepool get vm1/disk install --from n", {"near"}),
    ],
)
def test_words_that_a_shell_completes(
    run: Run, api: Any, tmp_path: Path, words: str, expected: set[str]
) -> None:
    from click.shell_completion import ShellComplete

    from statepool.cli.main import cli
    from statepool.cli.session import Session

    (tmp_path / "cache").mkdir()
    (tmp_path / "statepool.toml").write_text(
        'cache = "cache"\nsources = [{location = "ssh://not/asked", name = "near"}, "/far"]'
    )
    api.answers["show"] = [
        Listed(INSTALL, ("file:///cache",)),
        Listed(CUSTOMIZE, ("file:///cache",)),
        Listed(Manifest("vm2/disk", "x", digest=ONE), ("file:///cache",)),
    ]
    *arguments, incomplete = words.replace("CACHE", str(tmp_path / "cache")).split(" ")[1:]
    completer = ShellComplete(cli, {"obj": Session()}, "statepool", "_STATEPOOL_COMPLETE")
    assert {item.value for item in completer.get_completions(arguments, incomplete)} == expected
    assert all(config.sources == () for config, _ in api.made)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("set vm1/disk new --from ", "file"),
        ("push vm1/disk new --from ", "file"),
        ("set vm1/disk new --monitor ", "file"),
        ("get vm1/disk install --to ", "file"),
        ("--config ", "file"),
        ("show --config ", "file"),
        ("--cache ", "dir"),
        ("show --source ", "dir"),
        ("init ", "dir"),
    ],
)
def test_files_are_left_to_the_shell(words: str, kind: str) -> None:
    env = {
        **os.environ,
        "_STATEPOOL_COMPLETE": "bash_complete",
        "COMP_WORDS": f"statepool {words}",
        "COMP_CWORD": str(len(words.split()) + 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "statepool"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"{kind},\n", "")


def test_a_shell_is_answered() -> None:
    env = {
        **os.environ,
        "_STATEPOOL_COMPLETE": "bash_complete",
        "COMP_WORDS": "statepool un",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "statepool"],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("plain,unset\n", "")


def test_completion_makes_no_cache_and_no_noise(run: Run, api: Any, tmp_path: Path) -> None:
    from click.shell_completion import ShellComplete

    from statepool.cli.main import cli
    from statepool.cli.session import Session

    completer = ShellComplete(cli, {"obj": Session()}, "statepool", "_STATEPOOL_COMPLETE")
    (tmp_path / "statepool.toml").write_text('cache = "absent"')
    assert completer.get_completions(["get"], "") == []
    (tmp_path / "statepool.toml").write_text("nonsense")
    assert completer.get_completions(["get"], "") == []
    assert api.made == []
