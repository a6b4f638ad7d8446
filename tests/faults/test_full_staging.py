"""A staging directory on a full disk: the error says so, and no half file is under its name."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.sshd import Sshd

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system of limited size")
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.err.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("remote", [False, True])
def test_a_full_disk(
    tmp_path: Path, small: Path, sshd: Sshd, remote: bool, run_statepool: Callable[..., Any]
) -> None:
    source = tmp_path / "collect"
    source.mkdir()
    for name, size in (("a", MIB), ("b", 20 * MIB), ("c", MIB)):
        (source / name).write_bytes(os.urandom(size))
    (source / "cback.collect").touch()
    place = f"ssh://store{source}" if remote else str(source)
    config = tmp_path / "own.toml"
    config.write_text(
        f'[stage]\ndirectory = "{small}/staging"\nssh-config = "{sshd.ssh_config}"\n'
        f'[[stage.peers]]\nname = "one"\nlocation = "{place}"\n'
    )
    done = run_statepool("--config", str(config), "stage", code=8)
    assert "one: " in done.err
    (day,) = (small / "staging").glob("????/??/??")
    assert not (day / "one/b").exists()
    assert not (day / "cback.stage").exists()
    assert not (source / "cback.stage").exists()
    for path in (day / "one").iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()
    assert (day / "staged.json").exists()  # what did not fit was removed
    (source / "b").write_bytes(b"small")
    run_statepool("--config", str(config), "stage", code=0)
    assert (day / "one/b").read_bytes() == b"small"
    assert (day / "cback.stage").exists()
