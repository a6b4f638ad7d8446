"""How qemu-img is called, with a stand-in that says what it was given."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.errors import ToolError
from statepool.qcow2.tool import QemuImg

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(code)``: a qemu-img that runs this Python code."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))

    def write(code: str) -> None:
        path = directory / "qemu-img"
        path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{code}\n")
        path.chmod(0o755)

    return write


ECHO = (
    "print(json.dumps({'arguments': sys.argv[1:], 'environment': dict(os.environ), 'input':"
    " sys.stdin.read()}))"
)


def test_a_missing_binary_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    tool = QemuImg()
    with pytest.raises(ToolError, match="install qemu-utils"):
        tool.version()


def test_a_binary_that_vanishes_says_so_too(install: Install, tmp_path: Path) -> None:
    install("print('qemu-img version 1.2.3')")
    tool = QemuImg()
    assert tool.version() == "1.2.3"
    (tmp_path / "bin" / "qemu-img").unlink()
    with pytest.raises(ToolError, match="install qemu-utils"):
        tool.info("/x.qcow2")


def test_the_version_is_asked_for_once(install: Install) -> None:
    install("print('qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7)\\nCopyright')")
    tool = QemuImg()
    assert tool.version() == "7.2.22"
    install("sys.exit(1)")
    assert tool.version() == "7.2.22"


@pytest.mark.parametrize("text", ["", "qemu-img", "something else entirely"])
def test_another_program_of_that_name(install: Install, text: str) -> None:
    install(f"print({text!r})")
    with pytest.raises(ToolError, match="does not say its version"):
        QemuImg().version()


def test_nothing_of_the_caller_reaches_it(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    install(ECHO)
    said = QemuImg().info("/x.qcow2")
    assert said["environment"]["LC_ALL"] == "C"
    assert "SECRET" not in said["environment"]
    assert said["input"] == ""


@pytest.mark.parametrize(
    "name", ["-x.qcow2", "nbd:x.qcow2", "json:{}", "plain.qcow2", "a,b=c.qcow2", "new\nline.qcow2"]
)
def test_a_path_is_never_an_option_or_a_protocol(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    install(ECHO)
    for path in (name, Path(name)):
        assert QemuImg().info(path)["arguments"] == [
            "info",
            "-U",
            "-f",
            "qcow2",
            "--output=json",
            os.path.join(str(tmp_path), name),
        ]
        assert QemuImg().check(path)["arguments"] == [
            "check",
            "-f",
            "qcow2",
            "--output=json",
            os.path.join(str(tmp_path), name),
        ]


def test_a_failure_is_told_in_one_line(install: Install) -> None:
    install(
        "print('\\nqemu-img: Could not open it: No such file\\nmore', file=sys.stderr); sys.exit(1)"
    )
    with pytest.raises(ToolError) as caught:
        QemuImg().info("/x.qcow2")
    assert str(caught.value) == "qemu-img info failed: Could not open it: No such file"


@pytest.mark.parametrize(
    ("code", "said"), [("sys.exit(5)", "exit code 5"), ("os.kill(os.getpid(), 11)", "signal 11")]
)
def test_a_silent_failure_is_told_as_well(install: Install, code: str, said: str) -> None:
    install(code)
    with pytest.raises(ToolError, match=said):
        QemuImg().check("/x.qcow2")


@pytest.mark.parametrize("text", ["", "[]", "image: x", "{"])
def test_what_is_not_json_is_an_error(install: Install, text: str) -> None:
    install(f"print({text!r})")
    with pytest.raises(ToolError, match=r"not (a )?JSON"):
        QemuImg().info("/x.qcow2")


def test_one_that_hangs_is_stopped(install: Install, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    install(f"import signal; open({str(pid_file)!r}, 'w').write(str(os.getpid())); signal.pause()")
    with pytest.raises(ToolError, match="did not end within 2 s"):
        QemuImg(timeout=2).info("/x.qcow2")
    if pid_file.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid_file.read_text()), 0)


def test_a_check_that_finds_something_is_an_answer(install: Install) -> None:
    install("print(json.dumps({'corruptions': 1})); sys.exit(2)")
    assert QemuImg().check("/x.qcow2") == {"corruptions": 1}


@pytest.mark.parametrize(("code", "same"), [(0, True), (1, False)])
def test_a_comparison_has_two_answers(install: Install, code: int, same: bool) -> None:
    install(f"sys.exit({code})")
    assert QemuImg().compare("/a.qcow2", "/b.qcow2") is same
    install("sys.exit(2)")
    with pytest.raises(ToolError):
        QemuImg().compare("/a.qcow2", "/b.qcow2")


def test_a_watched_conversion_tells_what_is_done(install: Install, tmp_path: Path) -> None:
    install(
        "assert '-p' in sys.argv\n"
        "for part in ('0.00', '50.00', '100.00'): print(f'    ({part}/100%)', end='\\r')"
    )
    told: list[float] = []
    QemuImg().convert(tmp_path / "a", tmp_path / "b", watch=told.append)
    assert told[-1] == 1.0
    assert told == sorted(told)


def test_a_watched_conversion_that_fails_says_why(install: Install, tmp_path: Path) -> None:
    install("sys.exit('qemu-img: the disk is on fire')")
    with pytest.raises(ToolError, match="convert failed: the disk is on fire"):
        QemuImg().convert(tmp_path / "a", tmp_path / "b", watch=lambda part: None)


def test_a_watched_conversion_that_does_nothing_is_stopped(
    install: Install, tmp_path: Path
) -> None:
    install("import time\ntime.sleep(3600)")
    with pytest.raises(ToolError, match=r"did nothing for 0\.2 s"):
        QemuImg(timeout=0.2).convert(tmp_path / "a", tmp_path / "b", watch=lambda part: None)


def test_an_error_of_the_watcher_ends_the_conversion(install: Install, tmp_path: Path) -> None:
    install("import time\nprint('(1.00/100%)', flush=True)\ntime.sleep(3600)")

    def watch(part: float) -> None:
        raise KeyError(part)

    with pytest.raises(KeyError):
        QemuImg().convert(tmp_path / "a", tmp_path / "b", watch=watch)
