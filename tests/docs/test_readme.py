"""Every command of the README can be typed as it stands there, and its Python runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.rst").read_text(encoding="utf-8")

QEMU = """#!/bin/sh
# Stands in for a machine: takes the image that -drive names, as QEMU would, writes to it, and ends.
for argument; do
    case "$argument" in
    file=*,format=qcow2)
        file="${argument#file=}"
        exec qemu-io -f qcow2 -c "write -q -P 9 0 64K" "${file%,format=qcow2}"
        ;;
    esac
done
exit 1
"""


def literal_blocks() -> list[str]:
    """:returns: the commands in the blocks behind ``::``"""
    found: list[list[str]] = []
    inside = False
    for line in README.splitlines():
        if line and not line.startswith(" "):
            inside = line.endswith("::") and not line.startswith("..")
            found.append([])
        elif inside and line:
            found[-1].append(line.strip())
    # The picture is no command.
    return [line for block in found if "".join(block).isascii() for line in block]


def test_ten_lines_at_the_shell_and_the_same_in_python(
    open_page: Callable[..., Any],
    programs: Callable[[Any], Path],
    nobodys_environment: Path,
    tmp_path: Path,
) -> None:
    text = README.replace("/srv/pool", str(tmp_path / "srv/pool"))
    assert text.count(str(tmp_path / "srv/pool")) >= 3
    (tmp_path / "srv").mkdir()
    (tmp_path / "home").mkdir()
    page = open_page("README.rst", text, tmp_path / "home")
    (programs(page) / "qemu-system-x86_64").write_text(QEMU)
    (programs(page) / "qemu-system-x86_64").chmod(0o755)
    assert page.run(("shell",)) == 7
    assert page.run(("python",)) == 1
    assert page.namespace["disk"].check("install")
    assert (nobodys_environment / "states/.statepool/pool.json").exists()


def test_the_other_commands_are_these() -> None:
    assert [command.partition("  ")[0] for command in literal_blocks()] == [
        "make demo",
        "make test",
        "pip install .",
    ]


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_has_the_target(target: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tools/setup" in done.stdout


@pytest.mark.slow
def test_the_demo(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """What ``make demo`` runs after it has set itself up."""
    code, printed = open_page("tools/demo", "").shell.run(str(ROOT / "tools/demo"))
    assert code == 0, "\n".join(printed)
    assert printed[-1] == "That was it. Next: docs/howto.rst"


def can_build() -> bool:
    """Whether a package can be built here without asking the package index for the means."""
    found = {
        name: version(name)
        for name in ("pip", "setuptools", "wheel")
        if any(distributions(name=name))
    }
    if "pip" not in found or "setuptools" not in found:
        return False
    # The one makes wheels by itself since 70.1, see its change log.
    return "wheel" in found or tuple(map(int, found["setuptools"].split(".")[:2])) >= (70, 1)


@pytest.mark.skipif(
    not can_build(), reason="pip, setuptools >= 70.1 or wheel are not installed here"
)
def test_pip_install(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("statepool", "plugins", "setup.cfg", "pyproject.toml", "README.rst", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(tmp_path / "site"),
        ".",
    ]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        command,
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    installed = {**environment, "PYTHONPATH": str(tmp_path / "site")}
    script = [sys.executable, str(tmp_path / "site/bin/statepool"), "--version"]
    shown = subprocess.run(
        script, cwd=tmp_path, env=installed, capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout.startswith("statepool ")
