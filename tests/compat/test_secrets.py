"""Passwords of the environment stay with us: no program that is started from here inherits them."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool.errors import StatePoolError
from statepool.machine.description import MachineConfig
from statepool.machine.running import RunningMachine
from statepool.model.secrets import SECRET_VARIABLES
from statepool.model.settings import Settings
from statepool.transports.ssh.carrier import Endpoint
from statepool.transports.ssh.connection import Connection

WORD = secrets.token_hex(16)

LOOK = f"""
for process in /proc/[0-9]*; do
    grep -qs {WORD} $process/environ && tr '\\0' ' ' <$process/cmdline && echo
done >found 2>/dev/null
true
"""


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    given = dict.fromkeys(SECRET_VARIABLES, WORD)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return given


def test_a_command_that_builds_inherits_none(
    tmp_path: Path, environ: dict[str, str], run_statepool: Callable[..., Any]
) -> None:
    (tmp_path / "build.sh").write_text('qemu-img create -q -f qcow2 "$1" 1M\nenv >environ\n' + LOOK)
    run_statepool(
        "--cache",
        "cache",
        "ensure",
        "vm1/disk",
        "bare",
        "--",
        "sh",
        "build.sh",
        "{image}",
        env={**environ, "OTHER": "seen"},
    )
    assert WORD not in (tmp_path / "environ").read_text()
    assert "OTHER=seen" in (tmp_path / "environ").read_text()
    # Only the command itself: what watches over the builder has none, either.
    assert [
        line
        for line in (tmp_path / "found").read_text().splitlines()
        if "ensure vm1/disk" not in line
    ] == []


@pytest.mark.usefixtures("environ")
def test_a_machine_inherits_none() -> None:
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("setpriv", "util-linux")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: {package})")
    with RunningMachine.start(MachineConfig(memory=64 << 20, machine="none")) as machine:
        assert WORD.encode() not in Path(f"/proc/{machine.pid}/environ").read_bytes()


@pytest.mark.usefixtures("environ")
def test_a_command_in_the_configuration_of_ssh_inherits_none(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(f'Match exec "env >{tmp_path}/environ"\n  Port 99\n')
    with pytest.raises(StatePoolError, match="port 99"):
        _ = Connection(
            Endpoint("127.0.0.1", None, None), Settings(ssh_config=str(tmp_path / "config"))
        ).carrier
    assert WORD not in (tmp_path / "environ").read_text()
    assert f"PATH={os.environ['PATH']}" in (tmp_path / "environ").read_text()
