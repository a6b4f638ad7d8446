"""
Every command of the page about tests with avocado does what it says there, on a real guest; the
examples are what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines import Lab

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path for path in (ROOT / "examples/avocado").iterdir() if path.is_file())
ENVIRONMENT = ROOT / ".venv-avocado/113/bin"

STAND_INS = {
    # The packages that tools/guest has fetched before, without asking the network for them each
    # time.
    "apt-cache": "echo '  Depends: linux-image-6.1.0-1-cloud-amd64'",
    "apt-get": "shift 2; for name; do : >$name.deb; done",
    "dpkg-deb": f'mkdir -p "$3" && cp -r --update "{ROOT}/.guest/." "$3"',
}


@pytest.mark.slow
def test_the_page_can_be_followed(
    open_page: Callable[..., Any],
    programs: Callable[[Any], Path],
    guests: Lab,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if not (ENVIRONMENT.parent / "complete").exists():
        pytest.skip("there is no environment with avocado: tools/setup test makes it")
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("PATH", str(ENVIRONMENT), prepend=":")
    page = open_page("docs/avocado.rst", (ROOT / "docs/avocado.rst").read_text(encoding="utf-8"))
    for name, script in STAND_INS.items():
        path = programs(page) / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    (programs(page) / "statepool").unlink()  # that of the environment
    assert page.run() > 12
    assert EXAMPLES
    for path in EXAMPLES:
        assert (tmp_path / path.name).read_text() == path.read_text(), (
            f"examples/avocado/{path.name} is not what docs/avocado.rst writes"
        )
