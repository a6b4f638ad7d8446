"""Every command and every example of the how-to does what it says there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

OpenPage = Callable[..., Any]


@pytest.mark.slow
def test_the_how_to_can_be_followed(open_page: OpenPage) -> None:
    page = open_page("docs/howto.rst", (ROOT / "docs/howto.rst").read_text(encoding="utf-8"))
    assert page.run() > 60


# -- the runner itself can fail --------------------------------------------------------------------


def page_of(language: str, *lines: str) -> str:
    return (
        "Text.\n\n.. code-block:: "
        + language
        + "\n\n"
        + "".join(f"   {line}\n" for line in lines)
        + "\nMore text.\n"
    )


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (["a"], ["a"]),
        ([], []),
        (["a  b"], ["a b"]),
        (["a ... z"], ["a b c z"]),
        (["...z"], ["z"]),
        (["..."], []),
        (["a", "...", "z"], ["a", "b", "c", "z"]),
        (["a", "...", "z"], ["a", "z"]),
        (["a.c ($x)"], ["a.c ($x)"]),
    ],
)
def test_output_as_expected_is_accepted(
    reader: Any, expected: list[str], actual: list[str]
) -> None:
    assert reader.matches(expected, actual)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (["a"], ["b"]),
        (["a"], []),
        ([], ["a"]),
        (["a"], ["a", "b"]),
        (["a", "b"], ["a"]),
        (["a ... z"], ["a b c"]),
        (["a ... z"], ["a b", "c z"]),
        (["a", "...", "z"], ["a", "b"]),
        (["a.c"], ["abc"]),
        (["ab"], ["a b"]),
    ],
)
def test_other_output_is_not_accepted(reader: Any, expected: list[str], actual: list[str]) -> None:
    assert not reader.matches(expected, actual)


@pytest.mark.parametrize(
    ("language", "lines"),
    [
        ("console", ["$ echo one", "two"]),
        ("console", ["$ echo one"]),
        ("console", ["$ true", "one"]),
        ("console", ["$ false"]),
        ("console", ["$ true", "# exit 1"]),
        ("console", ["$ (exit 3)", "# exit 4"]),
        ("console", ["output without a command"]),
        ("console", ["$ exit 0"]),
        ("shell", ["true", "false"]),
        ("pycon", [">>> 1 + 1", "3"]),
        ("pycon", [">>> 1 + 1"]),
        ("pycon", [">>> raise ValueError"]),
        ("python", ["assert False"]),
    ],
)
def test_a_page_that_is_wrong_fails(open_page: OpenPage, language: str, lines: list[str]) -> None:
    page = open_page("page.rst", page_of(language, *lines))
    with pytest.raises(AssertionError):
        page.run()


def test_a_failure_says_where_and_what(open_page: OpenPage) -> None:
    page = open_page("page.rst", page_of("console", "$ true", "$ echo seen", "expected"))
    with pytest.raises(AssertionError, match=r"(?s)page\.rst:6: \$ echo seen.*seen.*not.*expected"):
        page.run()


def test_commands_share_a_shell_and_examples_a_namespace(
    open_page: OpenPage, tmp_path: Path
) -> None:
    text = page_of(
        "console", "$ mkdir d; cd d; name=value", "$ echo $name in ${PWD##*/}", "value in d"
    )
    text += page_of(
        "console",
        "$ cat > ../f <<'END'",
        "> one",
        "> ",
        "> three",
        "> END",
        "$ printf 'no end of line'",
        "no end of line",
    )
    text += page_of("console", "$ echo wrong >&2; (exit 4)", "wrong", "# exit 4")
    text += page_of("pycon", ">>> import pathlib", ">>> x = 1")
    text += page_of(
        "python", "x += 1", "assert pathlib.Path('f').read_text() == 'one\\n\\nthree\\n'"
    )
    text += page_of("pycon", ">>> x", "2")
    assert open_page("page.rst", text).run() == 9


def test_blocks_of_other_languages_are_left_alone(open_page: OpenPage) -> None:
    assert open_page("page.rst", page_of("json", "$ false")).run() == 0
