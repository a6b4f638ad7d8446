"""
Every command of the page about tests with pytest does what it says there, on a real guest; the
examples are what it writes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines import Lab

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples/pytest").iterdir())

STAND_INS = {
    # The packages that tools/guest has fetched before, without asking the network for them each
    # time.
    "apt-cache": "echo '  Depends: linux-image-6.1.0-1-cloud-amd64'",
    "apt-get": "shift 2; for name; do : >$name.deb; done",
    "dpkg-deb": f'mkdir -p "$3" && cp -r --update "{ROOT}/.guest/." "$3"',
    "python": f'exec "{sys.executable}" "$@"',
    "pytest": (
        f'exec "{sys.executable}" -m pytest -p xdist -p pytest_statepool -p no:cacheprovider "$@"'
    ),
}


@pytest.mark.slow
def test_the_page_can_be_followed(
    open_page: Callable[..., Any],
    programs: Callable[[Any], Path],
    guests: Lab,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "plugins")]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    page = open_page("docs/pytest.rst", (ROOT / "docs/pytest.rst").read_text(encoding="utf-8"))
    for name, script in STAND_INS.items():
        path = programs(page) / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    assert page.run() > 15
    assert [path.name for path in EXAMPLES if path.suffix in (".py", ".toml")]
    for path in EXAMPLES:
        if path.suffix in (".py", ".toml"):
            assert (tmp_path / path.name).read_text() == path.read_text(), (
                f"examples/pytest/{path.name} is not what docs/pytest.rst writes"
            )
    running = subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False
    ).stdout.split()
    assert running == [], "something that the page has started still runs"


def test_the_options_are_all_there() -> None:
    text = (ROOT / "docs/pytest.rst").read_text(encoding="utf-8")
    sys.path.insert(0, str(ROOT / "plugins"))
    try:
        from pytest_statepool.options import NAMES
    finally:
        sys.path.remove(str(ROOT / "plugins"))
    assert len(NAMES) > 5
    assert [name for name in NAMES if f"``--{name.replace('_', '-')}``" not in text] == []
