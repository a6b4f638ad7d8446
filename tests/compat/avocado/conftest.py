"""
Suites of somebody who uses the plugin, run by the real avocado; and the real avocado-i2n. Each is
in an environment of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

import statepool

ROOT = Path(__file__).resolve().parents[3]
SIZE = 4 << 20
LIMIT = 1200
"""Seconds that a job may take; one that takes longer hangs."""


def programs_of(name: str) -> Path:
    """:returns: where the programs of an environment with avocado are"""
    place = ROOT / ".venv-avocado" / name
    if not (place / "complete").exists():
        pytest.skip(f"there is no environment {place.name} with avocado: tools/setup test makes it")
    return place / "bin"


def environ_of(name: str) -> dict[str, str]:
    path = os.pathsep.join([str(programs_of(name)), os.environ["PATH"]])
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PATH": path,
        "PYTHONWARNINGS": "ignore",
    }


@frozen
class Job:
    """
    What a job did.

    :param code: its exit code
    :param out: what it printed
    :param results: where its results are
    """

    code: int
    out: str
    results: Path

    @property
    def statuses(self) -> dict[str, str]:
        """How each test ended, by its name."""
        return {
            test["name"].rpartition(".")[2]: test["status"]
            for test in json.loads((self.results / "results.json").read_text())["tests"]
        }

    @property
    def given(self) -> list[dict[str, Any]]:
        """What its tests were given, in the order in which they ended."""
        return [
            given
            for record in json.loads((self.results / "vm-states.json").read_text()).values()
            for given in record["given"]
        ]


@frozen
class Suite:
    """
    A directory with tests.

    :param root: where; it has a pool with ``vm1/disk`` in the states ``install`` and ``customize``,
        and ``vm2`` with two images in ``ready``
    """

    root: Path

    def write(self, text: str, name: str = "test_suite.py") -> None:
        header = (
            "import subprocess\nfrom avocado import Test\nfrom avocado_statepool import working\n\n"
        )
        header += (
            "def io(path, *commands):\n    words = [word for command in commands for word in ('-c',"
            " command)]\n"
        )
        header += "    subprocess.run(['qemu-io', '-f', 'qcow2', *words, path], check=True)\n\n"
        (self.root / name).write_text(header + text)

    def avocado(self, version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(programs_of(version) / "avocado"), *arguments]
        return subprocess.run(
            command,
            cwd=self.root,
            env=environ_of(version),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def run(self, version: str, *arguments: str, pool: str = "pool", code: int = 0) -> Job:
        options = ["--disable-sysinfo", "--vm-state-cache", "cache", "--vm-state-pool", pool]
        done = self.avocado(version, "run", *arguments, *options, "--", "test_suite.py")
        out = done.stdout + done.stderr
        assert done.returncode == code, out
        return Job(
            done.returncode,
            out,
            (Path(os.environ["HOME"]) / "avocado/job-results/latest").resolve(),
        )

    def images(self) -> list[str]:
        """:returns: the working images that are there"""
        return [str(path) for path in self.root.glob("cache/.statepool/working/**/*.qcow2")]


@pytest.fixture
def suite(
    tmp_path: Path, make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Suite:
    root = tmp_path / "suite"
    root.mkdir()
    monkeypatch.chdir(root)
    statepool.init("pool")
    author = statepool.StatePool(tmp_path / "author", ["pool"])
    disk = author.image("vm1/disk")
    disk.set("install", source=make_image(root / "base.qcow2", SIZE, writes=[(0, 65536, 1)]))
    disk.get("install", to="child.qcow2")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -q -P 2 64k 64k", "child.qcow2"], check=True
    )
    disk.set("customize", source="child.qcow2")
    two = {
        name: make_image(root / f"{name}.qcow2", SIZE, writes=[(0, 65536, 3)])
        for name in ("disk", "data")
    }
    author.machine("vm2", ["disk", "data"]).set("ready", source=two)
    return Suite(root)


@pytest.fixture
def run_i2n(tmp_path: Path) -> Callable[..., None]:
    """``run_i2n("images")``: a scenario with the real avocado-i2n, in a directory of its own."""

    def run(scenario: str, *arguments: str, **environ: str) -> None:
        command = [
            str(programs_of("i2n-103") / "python"),
            str(Path(__file__).with_name("i2n_scenarios.py")),
            scenario,
            *arguments,
        ]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environ_of("i2n-103") | environ,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture
def run_python() -> Callable[..., str]:
    """
    ``run_python("113", code, argument)``: what a program prints in an environment with avocado.
    """

    def run(name: str, code: str, *arguments: str) -> str:
        command = [str(programs_of(name) / "python"), "-c", code, *arguments]
        return subprocess.run(
            command,
            env=environ_of(name),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        ).stdout.strip()

    return run
