"""``statepool stage`` and ``statepool collect`` at the shell: what is printed, and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.staging import Backup, PeerDirectory

Run = Callable[..., Any]


@pytest.fixture
def backup(tmp_path: Path) -> Backup:
    good = PeerDirectory("good", tmp_path / "good").fill({"a": b"a"})
    return Backup(tmp_path, [good, PeerDirectory("bad", tmp_path / "bad")])


def toml(backup: Backup, more: str = "") -> str:
    path = backup.place / "own.toml"
    peers = "".join(
        f'[[stage.peers]]\nname = "{peer.name}"\nlocation = "{peer.directory}"\n'
        for peer in backup.peers
    )
    path.write_text(f'[stage]\ndirectory = "{backup.staging}"\n{peers}{more}')
    return str(path)


def test_exit_codes_of_this_package(backup: Backup, run_statepool: Run) -> None:
    config = toml(backup)
    done = run_statepool("stage", "--config", config, "--json", code=3)
    staged = done.json["staged"]
    assert [one["outcome"] for one in staged["peers"]] == ["staged", "not-ready"]
    assert staged["complete"] is False
    config = toml(backup, 'ignore-failures = "all"\n')
    done = run_statepool("stage", "--config", config, "-j", "1", code=0)
    good, bad = done.out.splitlines()
    assert good == "good: 3 files (1 B), 1 of them new"
    assert bad.startswith("bad: the peer bad is not ready: there is no cback.collect in ")
    assert bad.endswith(", which is ignored (its collect has not ended, or failed)")
    assert run_statepool("stage", "--config", config, "-q", code=0).out == ""
    assert run_statepool("stage", "--config", config, "--store", str(backup.place), code=7)
    run_statepool("stage", "--config", config, "--store", "x", "--purge", "3", code=2)
    run_statepool("stage", "--config", config, "--dry-run", code=2)
    run_statepool("stage", "--config", config, "--purge", "-1", code=2)
    run_statepool("stage", "--config", toml(backup, "[stage.x]\n"), code=2)
    (backup.place / "none.toml").touch()
    run_statepool("stage", "--config", str(backup.place / "none.toml"), code=2)
    run_statepool("collect", "--config", str(backup.place / "none.toml"), code=2)


def test_exit_codes_of_cedar_backup(backup: Backup, run_statepool: Run) -> None:
    config = str(backup.config())
    done = run_statepool("stage", "--cback", config, code=6)
    assert "good: 2 files" in done.out
    assert "bad is not ready" in done.err
    run_statepool("stage", "--cback", config, "--store", str(backup.place), code=6)
    run_statepool("collect", "--cback", config, code=4)  # there is no such section
    Path(config).write_text("<cb_config>")
    assert "is no XML" in run_statepool("stage", "--cback", config, code=4).err
    run_statepool("stage", "--cback", config, "--jobs", "0", code=2)
    backup.extra = f"""<collect><collect_dir>{backup.place}/c</collect_dir>
    <file><abs_path>{backup.place}/none</abs_path></file></collect>"""
    run_statepool("collect", "--cback", str(backup.config()), code=6)


@pytest.mark.parametrize(("cback", "code"), [(False, 130), (True, 5)])
def test_an_interruption_ends_a_copy_command(backup: Backup, cback: bool, code: int) -> None:
    started = backup.place / "started"
    slow = f"sh -c 'touch {started}; exec sleep 1000'"
    if cback:
        script = backup.place / "slow"
        script.write_text(f"#!/bin/sh\ntouch {started}\nexec sleep 1000\n")
        script.chmod(0o755)
        backup.peers = [PeerDirectory("far", backup.place / "x", True, copy_command=str(script))]
        words = ["--cback", str(backup.config())]
    else:
        more = f'[[stage.peers]]\nname = "far"\nlocation = "ssh://far/x"\ncopy-command = "{slow}"\n'
        words = ["--config", toml(backup, more)]
    with subprocess.Popen(
        [sys.executable, "-m", "statepool", "stage", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": str(backup.place)},
    ) as process:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
    assert process.returncode == code, said
    assert "interrupted" in said
    (day,) = backup.staging.glob("????/??/??")
    assert not (day / "cback.stage").exists()
