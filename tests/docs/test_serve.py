"""Every command of the page about carts does what it says; its table of settings is complete."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import fields_dict

PAGE = Path(__file__).resolve().parents[2] / "docs/serve.rst"


def test_the_page_can_be_followed(open_page: Callable[..., Any]) -> None:
    pytest.importorskip(
        "flask",
        reason="the service is not installed: pip install statepool[serve]",
    )
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (Debian: curl)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = PAGE.read_text(encoding="utf-8").replace("8081", str(port))
    page = open_page("docs/serve.rst", text)
    try:
        assert page.run() > 10
    finally:
        page.shell.run("kill $(cat serve.pid) 2>/dev/null; true")


def test_every_setting_is_in_the_table() -> None:
    pytest.importorskip(
        "flask",
        reason="the service is not installed: pip install statepool[serve]",
    )
    from statepool.carts.settings import ServeSettings

    page = PAGE.read_text(encoding="utf-8")
    section = page.partition("\nSettings\n")[2].partition("**Room.**")[0]
    documented = set(re.findall(r"^``([a-z-]+)`` ", section, re.MULTILINE))
    assert documented == {name.replace("_", "-") for name in fields_dict(ServeSettings)}


@pytest.mark.parametrize("name", ["statepool-carts", "statepool-carts-worker"])
def test_units_of_systemd(run_statepool: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """They are sound, and what they start is a command of ours."""
    unit = (PAGE.parents[1] / f"examples/systemd/{name}.service").read_text(encoding="utf-8")
    found = re.search(r"^ExecStart=/opt/statepool/bin/statepool (.*)$", unit, re.MULTILINE)
    assert found is not None
    command, config = found[1].split(" --config ")
    assert config == "/etc/statepool/carts.toml"
    assert "Usage: statepool " + command in run_statepool(*command.split(), "--help").out
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed (Debian: systemd)")
    path = tmp_path / f"{name}.service"
    path.write_text(unit.replace("/opt/statepool/bin/statepool", sys.executable))
    verify = ["systemd-analyze", "verify", path]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
