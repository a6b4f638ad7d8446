"""A suite of somebody who uses the plugin, run by a pytest of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import frozen

import statepool

ROOT = Path(__file__).resolve().parents[3]
SIZE = 4 << 20


@frozen
class Outcome:
    """
    What a run of pytest did.

    :param code: its exit code
    :param out: what it printed
    :param tests: how each test ended, by its name
    """

    code: int
    out: str
    tests: dict[str, str]


RECORDER = """
import json
def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        outcome = report.outcome if report.when == "call" else f"{report.when} {report.outcome}"
        with open("outcomes.jsonl", "a") as file:
            file.write(json.dumps([report.nodeid.partition("::")[2], outcome]) + "\\n")

def pytest_terminal_summary(config):
    from pytest_statepool.tally import TALLY
    with open("tally.json", "w") as file:
        json.dump(config.stash[TALLY].to_worker_output()["rows"], file)
"""


@frozen
class Suite:
    """
    A directory with tests.

    :param root: where; it has a pool with ``vm1/disk`` in the states ``install`` and ``customize``
    """

    root: Path

    def write(self, text: str, name: str = "test_suite.py") -> None:
        header = (
            "import os, subprocess\nfrom pathlib import Path\nimport pytest\nfrom pytest_statepool"
            " import vm_state_builder\n\n"
        )
        (self.root / name).write_text(header + text)

    def command(self, *arguments: str) -> list[str]:
        plugins = [
            word
            for name in ("xdist", "pytest_statepool", "recorder", "no:cacheprovider")
            for word in ("-p", name)
        ]
        return [sys.executable, "-m", "pytest", *plugins, *arguments]

    @property
    def environ(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.root), str(ROOT), str(ROOT / "plugins")])
        # Plugins that are installed and that nobody here asks for take a second to load.
        # there pytest says much of it twice
        ours = {
            name: value for name, value in os.environ.items() if name not in ("CI", "BUILD_NUMBER")
        }
        return {**ours, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def run(self, *arguments: str, code: int | None = 0) -> Outcome:
        (self.root / "outcomes.jsonl").unlink(missing_ok=True)
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        out = done.stdout + done.stderr
        assert code is None or done.returncode == code, out
        path = self.root / "outcomes.jsonl"
        tests = (
            dict(json.loads(line) for line in path.read_text().splitlines())
            if path.exists()
            else {}
        )
        return Outcome(done.returncode, out, tests)

    def built(self) -> list[str]:
        """:returns: what builders wrote into ``built.log``"""
        path = self.root / "built.log"
        return path.read_text().split() if path.exists() else []

    def images(self) -> list[str]:
        """:returns: the working images that are there"""
        return [str(path) for path in (self.root / "cache").glob(".statepool/working/**/*.qcow2")]


@pytest.fixture(scope="session")
def guests_programs() -> None:
    """What machines of ours need is installed."""
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("setpriv", "util-linux")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: {package})")


@pytest.fixture
def suite(
    tmp_path: Path, make_image: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Suite:
    root = tmp_path / "suite"
    root.mkdir()
    monkeypatch.chdir(root)
    statepool.init("pool")
    disk = statepool.StatePool(tmp_path / "author", ["pool"]).image("vm1/disk")
    disk.set("install", source=make_image(root / "base.qcow2", SIZE, writes=[(0, 65536, 1)]))
    disk.get("install", to="child.qcow2")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -q -P 2 64k 64k", "child.qcow2"], check=True
    )
    disk.set("customize", source="child.qcow2")
    (root / "pytest.ini").write_text("[pytest]\nvm_state_pool = pool\nvm_state_cache = cache\n")
    (root / "recorder.py").write_text(RECORDER)
    return Suite(root)
