"""Errors: one line, the right exit code, and the same facts as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from statepool import errors
from statepool.errors import (
    ConfigError,
    Conflict,
    DigestMismatch,
    HasDependants,
    LockTimeout,
    NoSpace,
    NotFound,
    StatePoolError,
    TransportError,
    UnsafeImage,
)

Run = Callable[..., Result]

CODES = {
    "StatePoolError": 1,
    "ToolError": 1,
    "UsageError": 2,
    "NotFound": 3,
    "RefusedError": 4,
    "IntegrityError": 5,
    "LockTimeout": 6,
}
CODES |= {"TransportError": 7, "NoSpace": 8}


EVERY_ERROR: list[type[StatePoolError]] = [getattr(errors, name) for name in errors.__all__]


def line(result: Result) -> str:
    (text,) = result.stderr.splitlines()
    assert result.stdout == ""
    return str(text)


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_every_error_is_one_line_and_a_code(run: Run, api: Any, kind: type[StatePoolError]) -> None:
    expected = next(CODES[base.__name__] for base in kind.__mro__ if base.__name__ in CODES)
    api.answers["show"] = kind("vm1/disk is\nodd", hint="do this")
    assert line(run("show", code=expected)) == r"statepool: vm1/disk is\nodd (do this)"
    error = json.loads(line(run("show", "--json", code=expected)))["error"]
    assert (error["kind"], error["message"], error["hint"], error["exit_code"]) == (
        kind.__name__,
        "vm1/disk is\nodd",
        "do this",
        expected,
    )


@pytest.mark.parametrize(
    ("error", "facts"),
    [
        (
            NotFound("m", object="vm1/disk", state="s", pool="file:///p", path="/f"),
            {"object": "vm1/disk", "state": "s", "pool": "file:///p", "path": "/f"},
        ),
        (HasDependants("m", dependants=["a", "b"]), {"dependants": ["a", "b"]}),
        (DigestMismatch("m", expected="x", actual="y"), {"expected": "x", "actual": "y"}),
        (UnsafeImage("m", check="backing-name"), {"check": "backing-name"}),
        (LockTimeout("m", seconds=1.5), {"seconds": 1.5}),
        (NoSpace("m", needed=5, available=4), {"needed": 5, "available": 4}),
    ],
)
def test_facts_are_in_the_json(
    run: Run, api: Any, error: StatePoolError, facts: dict[str, Any]
) -> None:
    api.answers["show"] = error
    text = line(run("--json", "show", code=error.exit_code))
    common = {
        "kind": type(error).__name__,
        "message": "m",
        "hint": None,
        "exit_code": error.exit_code,
    }
    assert json.loads(text) == {"error": common | facts}


def test_verbose_adds_the_causes(run: Run, api: Any) -> None:
    error = TransportError("cannot read /a\x1b[2J", hint="look")
    error.__cause__ = PermissionError(13, "Permission denied")
    error.__cause__.__context__ = ValueError("first\nof all")
    api.answers["show"] = error
    assert run("show", "-v", code=7).stderr.splitlines() == [
        r"statepool: cannot read /a\x1b[2J (look)",
        "  because of PermissionError: [Errno 13] Permission denied",
        "  because of ValueError: first of all",
    ]
    found = json.loads(line(run("show", "-v", "--json", code=7)))["error"]
    assert found["causes"] == [
        "PermissionError: [Errno 13] Permission denied",
        "ValueError: first of all",
    ]


def test_causes_in_a_circle_end(run: Run, api: Any) -> None:
    error = Conflict("m")
    error.__cause__ = ValueError("x")
    error.__cause__.__cause__ = error
    api.answers["show"] = error
    assert len(run("show", "-v", code=4).stderr.splitlines()) == 2


def test_a_fault_of_ours_shows_its_traceback_when_asked(run: Run, api: Any) -> None:
    api.answers["show"] = ZeroDivisionError("oh\x07")
    text = line(run("show", code=1))
    assert text.startswith(r"statepool: internal error: ZeroDivisionError: oh\x07 (")
    assert "-v" in text
    lines = run("show", "-v", code=1).stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == text
    assert json.loads(line(run("show", "--json", code=1)))["error"]["kind"] == "InternalError"
    assert (
        "Traceback" in json.loads(line(run("show", "-v", "--json", code=1)))["error"]["traceback"]
    )


@pytest.mark.parametrize("fault", [EOFError(), OSError(28, "No space left on device")])
def test_foreign_errors_are_faults_of_ours(run: Run, api: Any, fault: Exception) -> None:
    api.answers["show"] = fault
    assert "internal error" in run("show", code=1).stderr


def test_interruption(run: Run, api: Any) -> None:
    api.answers["get"] = KeyboardInterrupt()
    assert line(run("get", "vm1/disk", "a", code=130)) == "statepool: interrupted"
    assert (
        json.loads(line(run("get", "vm1/disk", "a", "--json", code=130)))["error"]["kind"]
        == "Interrupted"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["--frobnicate"],
        ["show", "--frobnicate"],
        ["show", "a", "b"],
        ["get", "vm1/disk"],
        ["get"],
        ["set", "vm1/disk", "x"],
        ["completion"],
        ["--cache"],
        ["show", "--cache"],
        ["-q", "show", "-v"],
        ["--config", "missing.toml", "show"],
        ["--cache", "ssh://host/x", "show"],
        ["--source", "foo:bar", "show"],
        ["--source", "", "show"],
        ["--cache", "", "show"],
        ["show", "--config", ""],
    ],
)
def test_usage_errors(run: Run, words: list[str], tmp_path: Path) -> None:
    text = line(run(*words, code=2))
    assert text.startswith("statepool: ")
    assert text.endswith(")")
    error = json.loads(run("--json", *words, code=2).stderr)["error"]
    assert error["exit_code"] == 2
    assert error["hint"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "page"),
    [
        (["set", "vm1/disk", "x", "--from"], "statepool set --help"),
        (["get", "vm1/disk", "x", "--frobnicate"], "statepool get --help"),
        (["get"], "statepool get --help"),
        (["--cache"], "statepool --help"),
    ],
)
def test_usage_errors_name_the_help_that_helps(run: Run, words: list[str], page: str) -> None:
    assert line(run(*words, code=2)).endswith(f"(see {page})")


@pytest.mark.parametrize("words", [["true", "--json", "-v"], ["true", "--verbose", "--", "--json"]])
def test_the_words_of_another_program_are_not_ours(run: Run, words: list[str]) -> None:
    assert line(run("ensure", "vm1/disk", "a", "--", *words, code=2)).startswith(
        "statepool: COMMAND does not say"
    )
    assert (
        json.loads(run("ensure", "vm1/disk", "a", "--json", "--", *words, code=2).stderr)["error"][
            "kind"
        ]
        == "UsageError"
    )


def test_likely_commands_are_suggested(run: Run) -> None:
    assert "did you mean verify?" in run("verfy", code=2).stderr


def test_nothing_to_do_shows_the_help(run: Run) -> None:
    result = run(code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: statepool ")


def test_configuration_errors_name_the_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "statepool.toml").write_text("cash = 1")
    text = line(run("show", code=ConfigError.exit_code))
    assert f"{tmp_path}/statepool.toml: cash: " in text


WAITING = """
import sys, threading
import statepool.api
class StatePool:
    def __init__(self, *arguments, **options): pass
    def show(self, object, scope=None):
        print("ready", flush=True)
        while True:  # a signal that comes just before a wait does not end that wait
            threading.Event().wait(0.1)
statepool.api.from_config = StatePool
from statepool.cli.main import main
main()
"""


def test_interruption_from_the_keyboard() -> None:
    command = [sys.executable, "-c", WAITING, "show"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "", "statepool: interrupted\n")


def test_interruption_at_a_terminal() -> None:
    """The terminal shows ^C; what is said then begins on a line of its own."""
    master, slave = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, "show"], stdout=subprocess.PIPE, stderr=slave, text=True
    ) as child:
        os.close(slave)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == 130
    shown = b""
    with open(master, "rb", buffering=0) as terminal:
        while not shown.endswith(b"interrupted\r\n"):
            shown += terminal.read(4096)
    assert shown == b"\r\nstatepool: interrupted\r\n"


CONSOLE_SCRIPT = "import sys; from statepool.__main__ import main; sys.exit(main())"
"""What an installation makes of the entry point in setup.cfg."""


@pytest.mark.parametrize("words", [["-m", "statepool"], ["-c", CONSOLE_SCRIPT]])
def test_interruption_before_all_is_imported(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "click.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    for options, told in (
        ([], "statepool: interrupted\n"),
        (["--json"], None),
        (["--", "--json"], "statepool: interrupted\n"),
    ):
        done = subprocess.run(
            [sys.executable, *words, "show", *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (
            130,
            "",
            1,
        ), done.stderr
        if told is None:
            found = json.loads(done.stderr)["error"]
            assert (found["kind"], found["exit_code"], found["hint"], found["message"]) == (
                "Interrupted",
                130,
                None,
                "interrupted",
            )
        else:
            assert done.stderr == told


# -- streams that fail, in processes of their own

CHILD = """
import sys
import statepool.api
from statepool.model.manifest import Manifest
from statepool.model.digest import Digest
from statepool.model.outcomes import Listed, Listing
digest = Digest("blake3", "1" * 64)
manifests = [Manifest("vm1/disk", f"s{number}", digest=digest) for number in range(20000)]
listed = [Listed(manifest, ("file:///p",)) for manifest in manifests]
class StatePool:
    def __init__(self, *arguments, **options): pass
    def show(self, object, scope=None): return Listing(listed)
statepool.api.from_config = StatePool
from statepool.cli.main import main
main()
"""


def child(words: str, redirection: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'{before} "$0" -c "$1" {words} {redirection}', sys.executable, CHILD]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def _buffering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python hides partial writes of a file without a buffer, as containers often have it."""
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)


@pytest.mark.usefixtures("_buffering")
@pytest.mark.parametrize("words", ["show", "show --json", "tree", "tree --dot"])
def test_a_reader_that_goes_away_is_no_error(words: str) -> None:
    done = child(words, "| head -n 1; exit ${PIPESTATUS[0]}")
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
    assert done.returncode == 141


@pytest.mark.usefixtures("_buffering")
@pytest.mark.parametrize("words", ["--help", "show --help", "--version"])
def test_a_reader_of_the_help_that_goes_away_is_no_error(words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *words.split()],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.usefixtures("_buffering")
@pytest.mark.parametrize("words", ["show", "show --json", "--help", "get --help", "--version"])
def test_a_full_disk_under_the_output(words: str) -> None:
    done = child(words, "> /dev/full")
    assert done.returncode == 1
    assert "standard output cannot be written: No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("_buffering")
def test_output_is_not_cut_short_in_silence(tmp_path: Path) -> None:
    done = child("show --json", f"> {tmp_path}/out", before="ulimit -f 64;")
    assert (tmp_path / "out").stat().st_size > 0
    assert done.returncode == 1
    assert "standard output cannot be written: File too large" in done.stderr


def test_closed_streams() -> None:
    assert child("show", ">&-").returncode == 0
    assert child("frobnicate", "2>&-").returncode == 2
    assert child("frobnicate", "2> /dev/full").returncode == 2
