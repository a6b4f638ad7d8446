"""Every page is sound: its syntax, its links, its commands, and what it says of the house."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").glob("*.rst"),
        *ROOT.glob("*.rst"),
        *(ROOT / "changelog.d").glob("*.rst"),
        ROOT / "plugins/README.rst",
    ]
)
WIDTH = 150


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def problems(text: str) -> list[str]:
    """:returns: what docutils has to say against a page"""
    core = pytest.importorskip("docutils.core", reason="docutils is not installed")
    from docutils.utils import Reporter

    heard: list[str] = []

    class Stream:
        def write(self, text: str) -> None:
            heard.append(text)

    settings = {
        "report_level": Reporter.WARNING_LEVEL,
        "halt_level": Reporter.SEVERE_LEVEL + 1,
        "warning_stream": Stream(),
        "syntax_highlight": "none",
        "file_insertion_enabled": False,
        "_disable_config": True,
    }
    core.publish_doctree(text, settings_overrides=settings)
    return [line for line in "".join(heard).splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_the_syntax_is_right(page: Path) -> None:
    assert problems(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "Title of it\n=====\n",
        "`nowhere`_\n",
        "*open\n",
        "- a\nb\n",
        ".. no-such::\n",
        "== ==\na b\n",
    ],
)
def test_wrong_syntax_is_found(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"<([^<>`\s]+)>`_", page.read_text(encoding="utf-8")):
        if "://" in target or target.endswith("_"):
            continue
        found = (page.parent / target).resolve()
        # The benchmarks bring their own results.
        assert found.exists() or found == ROOT / "benchmarks/RESULTS.md", (
            f"{page.name} links to {target}, which is not there"
        )


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_lines_are_not_too_long(page: Path) -> None:
    long = [
        number
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDTH and not _must_be_long(line)
    ]
    assert long == []


def _must_be_long(line: str) -> bool:
    """Output as it is printed, and rows of tables."""
    return line.startswith("   statepool: ") or '": "' in line or "   " in line.strip()


@pytest.mark.parametrize("name", ["index", "avocado-i2n"])
def test_the_commands_do_what_the_page_says(open_page: Callable[..., Any], name: str) -> None:
    assert (
        open_page(f"docs/{name}.rst", (ROOT / f"docs/{name}.rst").read_text(encoding="utf-8")).run()
        > 3
    )


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.rst").read_text(encoding="utf-8")
    assert [
        page.name
        for page in (ROOT / "docs").glob("*.rst")
        if page.name != "index.rst" and f"<{page.name}>" not in index
    ] == []


def test_no_page_has_commands_that_nobody_runs(reader: Any) -> None:
    pages = (
        "archive",
        "archive-pools",
        "howto",
        "index",
        "archive",
        "avocado",
        "avocado-i2n",
        "bundles",
        "extending",
        "formats",
        "machines",
        "pytest",
        "running",
        "serve",
        "ssh",
        "staging",
    )
    run = {"README.rst", *(f"docs/{name}.rst" for name in pages)}
    for page in PAGES:
        languages = {block.language for block in reader.blocks(page.read_text(encoding="utf-8"))}
        if str(page.relative_to(ROOT)) not in run:
            assert not languages & set(reader.LANGUAGES), (
                f"{page.name} shows commands; run them in a test"
            )


# -- docstrings ------------------------------------------------------------------------------------


def modules() -> list[str]:
    return [
        module.name
        for module in pkgutil.walk_packages(statepool.__path__, "statepool.")
        if not module.name.endswith("__main__")
    ]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


# -- what the pages say of the house ---------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_modules_and_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(
        r"``((?:statepool|tests|tools|plugins|docs)/(?!statepool\.toml)[\w./-]*)``", text
    ):
        assert (ROOT / path).exists() or "*" in path, (
            f"{page.name} names {path}, which is not there"
        )
    for name in set(re.findall(r"``statepool\.([\w.]+)``", text)) - {
        "toml",
        "archivers",
        "archives",
    }:
        assert _found(f"statepool.{name}"), (
            f"{page.name} names statepool.{name}, which is not there"
        )


def _found(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return ".".join(parts) in (
                    "statepool.archives",
                    "statepool.backends",
                    "statepool.transports",
                )
            found = getattr(found, part)
        return True
    return False


def test_every_exit_code_is_in_the_how_to() -> None:
    from statepool import errors

    table = (
        (ROOT / "docs/howto.rst")
        .read_text(encoding="utf-8")
        .partition("code  meaning")[2]
        .partition(".. code-block")[0]
    )
    rows = {int(row[1]): row[2] for row in re.finditer(r"^([0-9]+) +\S(.*)$", table, re.MULTILINE)}
    classes = [getattr(errors, name) for name in errors.__all__]
    for cls in classes:
        assert cls.exit_code in rows
        if cls.__mro__[1] is errors.StatePoolError:
            assert f"``{cls.__name__}``" in rows[cls.exit_code]


def test_every_setting_is_in_the_how_to() -> None:
    from statepool.config import _READERS

    page = (ROOT / "docs/howto.rst").read_text(encoding="utf-8")
    assert [key for key in _READERS if f"> {key} = " not in page] == []
