"""Every command of the page about staging does what it says; its tables are complete."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool.staging import settings

PAGE = Path(__file__).resolve().parents[2] / "docs/staging.rst"


def test_the_page_can_be_followed(open_page: Callable[..., Any]) -> None:
    page = open_page("docs/staging.rst", PAGE.read_text(encoding="utf-8"))
    assert page.run() > 20


@pytest.mark.parametrize(
    ("heading", "readers"),
    [
        ("Section ``[stage]``:", settings._STAGE),
        ("Each table in ``peers``:", settings._PEER),
        ("Section ``[collect]``:", settings._COLLECT),
        ("Each table in ``items``:", settings._ITEM),
    ],
)
def test_every_setting_is_in_its_table(heading: str, readers: dict[str, object]) -> None:
    table = PAGE.read_text(encoding="utf-8").partition(heading)[2].split("\n\n")[1]
    first = [line[:20] for line in table.splitlines()]
    assert set(re.findall("``([a-z-]+)``", " ".join(first))) == set(readers)


def test_units_of_systemd(run_statepool: Callable[..., Any], tmp_path: Path) -> None:
    """They are sound, and what they start is a command of ours."""
    place = PAGE.parents[1] / "examples/systemd"
    unit = (place / "statepool-stage.service").read_text(encoding="utf-8")
    found = re.search(r"^ExecStart=/opt/statepool/bin/statepool (.*)$", unit, re.MULTILINE)
    assert found is not None
    command, config = found[1].split(" --config ")
    assert config == "/etc/statepool/stage.toml"
    assert "Usage: statepool stage" in run_statepool(*command.split(), "--help").out
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed (Debian: systemd)")
    path = tmp_path / "statepool-stage.service"
    path.write_text(unit.replace("/opt/statepool/bin/statepool", sys.executable))
    timer = tmp_path / "statepool-stage.timer"
    timer.write_text((place / timer.name).read_text(encoding="utf-8"))
    verify = ["systemd-analyze", "verify", str(path), str(timer)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
