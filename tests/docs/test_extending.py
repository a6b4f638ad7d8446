"""The package on the page about extending works, and passes the contract suites as it says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/extending.rst").read_text(encoding="utf-8")


@pytest.fixture
def package(reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files of the page, found by Python as an installed package would be."""
    lines = PAGE.splitlines()
    files: dict[str, list[str]] = {}
    for block in reader.blocks(PAGE):
        titles = [line for line in lines[: block.line] if line.startswith(".. file: ")]
        if block.language in ("python", "toml"):
            files.setdefault(titles[-1].removeprefix(".. file: "), []).append(block.text)
    for name, parts in files.items():
        (tmp_path / name).write_text("\n\n\n".join(parts) + "\n")
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "statepool_lab-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in found.items())])
        for group, found in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups) + "\n")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "plugins")])
    )
    return tmp_path


def run_tests(package: Path, name: str) -> int:
    """:returns: how many passed; none may fail"""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(package),
        name,
    ]
    done = subprocess.run(
        command, cwd=package, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search("([0-9]+) passed", done.stdout)
    return int(passed[1]) if passed else 0


def test_the_transport_passes_its_contract(package: Path) -> None:
    assert run_tests(package, "test_lab_transport.py") > 30
    assert run_tests(package, "test_archive_transport.py") > 15


@pytest.mark.slow
def test_the_backend_passes_its_contract(package: Path, qemu_img: Callable[..., str]) -> None:
    assert run_tests(package, "test_latest_backend.py") > 20


def test_only_public_names_are_used(reader: Any) -> None:
    """Those of ``statepool``, and the suites in ``statepool.testing``."""
    for block in reader.blocks(PAGE):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                assert [
                    name
                    for name in names
                    if name.startswith("statepool.") and not name.startswith("statepool.testing.")
                ] == []
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "statepool"
            ):
                assert node.attr in statepool.__all__


def test_the_commands(package: Path, open_page: Callable[..., Any]) -> None:
    assert open_page("docs/extending.rst", PAGE).run(("console",)) == 7
