"""What ``doctor`` does not call good."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import statepool
from statepool.testing.privileges import permissions_count

Make = Callable[..., Path]


def told(pool: statepool.StatePool, level: statepool.Level) -> dict[str, str | None]:
    return {finding.what: finding.cure for finding in pool.doctor() if finding.level is level}


def test_the_only_copy(tmp_path: Path, make_image: Make) -> None:
    statepool.init(tmp_path / "pool")
    cache = tmp_path / ".cache/statepool"
    alone = statepool.StatePool(cache)
    alone.image("vm1/disk").set("install", source=make_image(tmp_path / "work.qcow2", 1 << 20))
    what = "no source has vm1/disk install: the cache has the only copy, and what is in this directory may be deleted at any time"
    assert told(alone, statepool.Level.WARNING).keys() >= {what}
    both = statepool.StatePool(cache, [tmp_path / "pool"])
    cure = told(both, statepool.Level.WARNING)[what]
    assert cure is not None
    subprocess.run([sys.executable, "-m", *cure.split()], check=True, stdout=subprocess.DEVNULL)
    assert what not in told(both, statepool.Level.WARNING)


@pytest.mark.parametrize("place", ["", ".statepool", ".statepool/data", ".statepool/log"])
def test_an_account_without_rights(tmp_path: Path, place: str) -> None:
    statepool.init(tmp_path / "pool")
    statepool.init(tmp_path / "cache")
    states = statepool.StatePool(tmp_path / "cache", [tmp_path / "pool"])
    (tmp_path / "cache" / place).chmod(0o555)
    (tmp_path / "pool" / place).chmod(0o555)
    with permissions_count():
        assert any(what.startswith("the cache cannot be written") for what in told(states, statepool.Level.ERROR))
        assert any("states can only be fetched from here" in what for what in told(states, statepool.Level.NOTE))


def test_a_host_that_cannot_run_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert any("no machine can be run" in what for what in told(statepool.StatePool(tmp_path / "cache"), statepool.Level.NOTE))
