"""The files around the package say the same as the package."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import docutils.core
import docutils.utils
import pytest

ROOT = Path(__file__).resolve().parents[2]

PAGES = [
    "README.rst",
    "CONTRIBUTING.rst",
    "FILES.rst",
    "plugins/README.rst",
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "changelog.d").glob("*")),
]


def ini(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / name, encoding="utf-8")
    return parser


def words(text: str) -> list[str]:
    return text.strip().splitlines()


def entry_points() -> list[tuple[str, str, str]]:
    groups = ini("setup.cfg")["options.entry_points"]
    return [
        (group, *(part.strip() for part in line.split("=")))
        for group in groups
        for line in words(groups[group])
    ]


@pytest.mark.parametrize(("group", "name", "target"), entry_points())
def test_entry_points_lead_somewhere(group: str, name: str, target: str) -> None:
    module, _, attribute = target.partition(":")
    if target.startswith("avocado_statepool"):
        # Only where avocado is installed can it be imported, and tests/compat/avocado does so.
        source = (
            (ROOT / "plugins" / module.replace(".", "/"))
            .with_suffix(".py")
            .read_text(encoding="utf-8")
        )
        assert re.search(rf"^(class|def) {attribute}\b", source, re.MULTILINE)
        return
    found = importlib.import_module(module)
    assert not attribute or callable(getattr(found, attribute))


def test_the_command_begins_where_interruptions_are_looked_after() -> None:
    assert ("console_scripts", "statepool", "statepool.__main__:main") in entry_points()


def test_all_groups_are_there() -> None:
    others = {group for group, _, _ in entry_points() if not group.startswith("avocado.plugins.")}
    assert others == {
        "console_scripts",
        "statepool.transports",
        "statepool.backends",
        "statepool.archives",
        "statepool.archivers",
        "pytest11",
    }


def test_every_room_is_packaged() -> None:
    """
    What lacks an ``__init__.py`` is found here by chance, and missing where the package is
    installed.
    """
    rooms = {path.parent for path in (ROOT / "statepool").rglob("*.py")}
    assert [str(room) for room in sorted(rooms) if not (room / "__init__.py").exists()] == []
    packages = {".".join(room.relative_to(ROOT).parts) for room in rooms} | {
        ".".join(path.parent.relative_to(ROOT / "plugins").parts)
        for path in ROOT.glob("plugins/*/**/__init__.py")
    }
    assert set(words(ini("setup.cfg")["options"]["packages"])) == packages


def test_what_is_no_module_is_packaged() -> None:
    data = ini("setup.cfg")["options.package_data"]
    patterns = [f"{name.replace('.', '/')}/{one}" for name in data for one in words(data[name])]
    found = [path.relative_to(ROOT) for path in (ROOT / "statepool").rglob("*") if path.is_file()]
    others = [
        path
        for path in found
        if path.suffix not in (".py", ".pyc") and path.name != "ruff.toml"
        if not any(part.startswith(".") for part in path.parts)  # what a tool has left there
    ]
    assert len(others) > 10
    assert [path for path in others if not any(map(path.match, patterns))] == []


def test_oldest_dependencies_are_the_lower_bounds() -> None:
    bounds = words(ini("setup.cfg")["options"]["install_requires"])
    pins = words(ini("tox.ini")["testenv:oldest"]["deps"])
    assert sorted(bound.replace(">=", "==") for bound in bounds) == sorted(pins)
    assert all("==" in pin for pin in pins)


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    help_text = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert re.findall(r"^  ([a-z-]+) +\w", help_text, re.MULTILINE) == phony[1].split()


@pytest.mark.parametrize("name", [".ci/run", "tools/setup", "tools/guest", "tools/demo"])
def test_scripts_can_be_run(name: str) -> None:
    script = ROOT / name
    assert script.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_right(name: str) -> None:
    """docutils finds nothing to complain of, and links to other pages lead somewhere."""
    text = (ROOT / name).read_text(encoding="utf-8")
    settings = {
        "report_level": 2,
        "halt_level": 2,
        "warning_stream": False,
        "syntax_highlight": "none",
    }
    docutils.core.publish_doctree(text, source_path=name, settings_overrides=settings)
    for target in re.findall(r"<([\w./-]+)>`_", text):
        assert (ROOT / name).parent.joinpath(target).exists(), (
            f"{name} links to {target}, which is not there"
        )


def listed() -> set[str]:
    return set(
        re.findall(
            r"^``([^`]+)``  ", (ROOT / "FILES.rst").read_text(encoding="utf-8"), re.MULTILINE
        )
    )


def test_list_of_files_is_true() -> None:
    missing = [
        name
        for name in listed()
        if not (ROOT / name).exists() or name.endswith("/") != (ROOT / name).is_dir()
    ]
    assert missing == []


def test_list_of_files_is_complete() -> None:
    package = {
        f"statepool/{entry.name}{'/' if entry.is_dir() else ''}"
        for entry in os.scandir(ROOT / "statepool")
        if entry.name != "__pycache__"
    }
    assert package - listed() == set()


def test_readme_names_files_as_they_are() -> None:
    readme = (ROOT / "README.rst").read_text(encoding="utf-8")
    assert "    make demo\n" in readme
    assert "    make test\n" in readme


def test_signals_that_who_starts_the_tests_ignores_are_not_ignored_by_what_they_start() -> None:
    """As in the background of a shell, or under nohup: tests of interruption would wait in vain."""
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/unit/cli/test_errors.py",
        "-k",
        "from_the_keyboard or at_a_terminal",
    ]
    command = ["sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", *tests]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
