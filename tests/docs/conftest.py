"""
Running what documentation shows.

The blocks of a page are run in their order, in one directory and, for the commands, in one shell:

- ``console``: lines that begin with ``$`` are commands, ``>`` continues one; below stands all that
  it prints, on either stream. A last line ``# exit 4`` gives the exit code where it is not 0.
- ``pycon``: as for doctests, in one namespace for the page.
- ``python``: run in the same namespace; it must not raise.
- ``shell``: commands without their output; none may fail.

In expected output ``...`` stands for anything, on a line by itself for any number of lines; runs of
blanks count as one, since the width of a column depends on the names in it.
"""

from __future__ import annotations

import contextlib
import doctest
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field, frozen

ROOT = Path(__file__).resolve().parents[2]

LANGUAGES = ("console", "pycon", "python", "shell")

_BLOCK = re.compile(r"( *)\.\. code-block:: (\S+)\Z")
_ENDED = "\x01ended "


@frozen
class Block:
    """
    A code block of a page: its language, the line where its text begins (from 1), and the text.
    """

    language: str
    line: int
    text: str


@frozen
class Step:
    """One command with all that it should print."""

    line: int
    command: str
    expected: tuple[str, ...]
    code: int = 0


def blocks(text: str) -> list[Block]:
    """:returns: the code blocks of a page, in their order"""
    found = []
    lines = text.splitlines()
    for index, line in enumerate(lines):
        match = _BLOCK.match(line)
        if match is None:
            continue
        margin = len(match[1])
        body = []
        for inner in lines[index + 1 :]:
            if inner.strip() and len(inner) - len(inner.lstrip()) <= margin:
                break
            body.append(inner)
        start = next(
            (
                number
                for number, inner in enumerate(body)
                if inner.strip() and not inner.strip().startswith(":")
            ),
            0,
        )
        width = min(
            (len(inner) - len(inner.lstrip()) for inner in body if inner.strip()), default=0
        )
        inside = [inner[width:] for inner in body[start:]]
        while inside and not inside[-1].strip():
            inside.pop()
        found.append(Block(match[2], index + 2 + start, "\n".join(inside)))
    return found


def steps(block: Block) -> list[Step]:
    """:returns: the commands of a ``console`` block"""
    found: list[Step] = []
    commands: list[str] = []
    expected: list[str] = []
    code = line = 0

    def done() -> None:
        if commands:
            found.append(Step(line, "\n".join(commands), tuple(expected), code))

    for offset, text in enumerate(block.text.splitlines()):
        if text.startswith("$ "):
            done()
            commands, expected, code, line = [text[2:]], [], 0, block.line + offset
        elif not commands:
            raise AssertionError(f"line {block.line + offset}: output without a command: {text!r}")
        elif text == ">" or (text.startswith("> ") and not expected):
            commands.append(text[2:])
        elif re.fullmatch("# exit [0-9]+", text):
            code = int(text.split()[2])
        else:
            expected.append(text)
    done()
    return found


def matches(expected: tuple[str, ...] | list[str], actual: list[str]) -> bool:
    """:returns: whether lines are as expected, where ``...`` stands for anything"""
    pattern = ""
    for text in map(_squeezed, expected):
        if text == "...":
            pattern += r"(?:[^\n]*\n)*"
        else:
            pattern += "[^\n]*".join(map(re.escape, text.split("..."))) + r"\n"
    return re.fullmatch(pattern, "".join(_squeezed(text) + "\n" for text in actual)) is not None


def _squeezed(text: str) -> str:
    return " ".join(text.split())


@define
class Shell:
    """One bash, which keeps its directory and its variables from one command to the next."""

    directory: Path
    environment: dict[str, str]
    process: subprocess.Popen[str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> tuple[int, list[str]]:
        """:returns: the exit code, and what was printed on either stream"""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{{ {command}\n}} </dev/null; printf '\\n{_ENDED}%d\\n' $?\n")
        self.process.stdin.flush()
        printed: list[str] = []
        for line in self.process.stdout:
            if line.startswith(_ENDED):
                # Our own mark begins on a line of its own: the last line of the output may have had
                # no end.
                output = "".join(printed)
                return int(line.removeprefix(_ENDED)), output.removesuffix("\n").splitlines()
            printed.append(line)
        raise AssertionError(f"the shell ended in {command!r}:\n{''.join(printed)}")

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@define
class Page:
    """Runs the blocks of one page."""

    name: str
    text: str
    shell: Shell
    namespace: dict[str, Any] = field(factory=lambda: {"__name__": "__page__"})

    def run(self, languages: tuple[str, ...] = LANGUAGES) -> int:
        """:returns: how many commands and examples were run"""
        count = 0
        for block in blocks(self.text):
            if block.language in languages:
                count += getattr(self, f"_run_{block.language}")(block)
        return count

    def _run_console(self, block: Block) -> int:
        for step in (found := steps(block)):
            code, printed = self.shell.run(step.command)
            told = f"{self.name}:{step.line}: $ {step.command}\n"
            shown = "\n".join(printed)
            assert code == step.code, f"{told}ended with {code}, not {step.code}:\n{shown}"
            assert matches(step.expected, printed), f"{told}printed\n{shown}\nnot\n" + "\n".join(
                step.expected
            )
        return len(found)

    def _run_shell(self, block: Block) -> int:
        commands = [line for line in block.text.splitlines() if line.strip()]
        for offset, command in enumerate(commands):
            code, printed = self.shell.run(command)
            assert code == 0, (
                f"{self.name}:{block.line + offset}: {command}\nended with {code}:\n"
                + "\n".join(printed)
            )
        return len(commands)

    def _run_python(self, block: Block) -> int:
        with contextlib.chdir(self.shell.directory):
            # this is what the test is for
            exec(compile("\n" * (block.line - 1) + block.text, self.name, "exec"), self.namespace)  # noqa: S102
        return 1

    def _run_pycon(self, block: Block) -> int:
        test = doctest.DocTestParser().get_doctest(
            block.text + "\n", self.namespace, self.name, self.name, block.line - 1
        )
        test.globs = self.namespace  # one for the page: the parser has made a copy
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        with contextlib.chdir(self.shell.directory):
            results = runner.run(test, out=report.append, clear_globs=False)
        assert not results.failed, "".join(report)
        return results.attempted


@pytest.fixture
def open_page(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Page]]:
    """
    ``open_page(name, text)``: a page to run in a directory of its own, with the command
    ``statepool`` of this source tree.
    """
    shells: list[Shell] = []
    programs = tmp_path_factory.mktemp("programs")
    statepool = programs / "statepool"
    statepool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m statepool "$@"\n')
    statepool.chmod(0o755)

    def make(name: str, text: str, directory: Path | None = None) -> Page:
        if shutil.which("qemu-img") is None:
            pytest.skip("qemu-img is not installed (Debian: qemu-utils)")
        shell = Shell(
            directory or tmp_path, {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        )
        shells.append(shell)
        return Page(name, text, shell)

    yield make
    for shell in shells:
        shell.close()


@pytest.fixture
def programs(open_page: Callable[..., Page]) -> Callable[[Page], Path]:
    """Where stand-ins for programs can be put that come first in a page's path."""
    return lambda page: Path(page.shell.environment["PATH"].partition(":")[0])


@pytest.fixture
def reader() -> Any:
    """The parts of the runner, to be tested themselves."""
    return sys.modules[__name__]
