"""What ``doctor`` does not call good."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import statepool
from statepool.model.settings import Settings
from tests.support.privileges import permissions_count

Make = Callable[..., Path]


def told(pool: statepool.StatePool, level: statepool.Level) -> dict[str, str | None]:
    return {finding.what: finding.cure for finding in pool.doctor() if finding.level is level}


def test_the_only_copy(tmp_path: Path, make_image: Make) -> None:
    statepool.init(tmp_path / "pool")
    cache = tmp_path / ".cache/statepool"
    alone = statepool.StatePool(cache)
    alone.image("vm1/disk").set("install", source=make_image(tmp_path / "work.qcow2", 1 << 20))
    what = (
        "no source has vm1/disk install: the cache has the only copy, and what is in this directory"
        " may be deleted at any time"
    )
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
        assert any(
            what.startswith("the cache cannot be written")
            for what in told(states, statepool.Level.ERROR)
        )
        assert any(
            "states can only be fetched from here" in what
            for what in told(states, statepool.Level.NOTE)
        )


def test_a_host_that_cannot_run_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert any(
        "no machine can be run" in what
        for what in told(statepool.StatePool(tmp_path / "cache"), statepool.Level.NOTE)
    )


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """:returns: where a file system of 1 MiB with 30 inodes is"""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=30", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def errors(cache: Path, *sources: Path, settings: Settings | None = None) -> str:
    return "\n".join(
        told(statepool.StatePool(cache, list(sources), settings=settings), statepool.Level.ERROR)
    )


@pytest.mark.parametrize("place", ["file", "file/cache", "dangling", "/proc/cache"])
def test_a_cache_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    assert re.search(r"the cache cannot be made: |is not a directory", errors(tmp_path / place))


def test_a_cache_that_can_be_made_is_not(tmp_path: Path) -> None:
    assert not errors(tmp_path / "new/cache")
    assert not list(tmp_path.iterdir())


def test_a_cache_that_may_not_be_made(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with permissions_count():
        assert "the cache cannot be made: " in errors(tmp_path / "new/cache")


def test_a_cache_where_no_link_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    statepool.init(tmp_path / "cache")
    monkeypatch.setattr(os, "symlink", refused)
    for place in ("cache", "new"):
        assert "cannot make the symbolic link" in errors(tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    assert not list((tmp_path / "cache/.statepool/incoming").iterdir())


def test_a_place_with_neither_hard_links_nor_exclusive_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    statepool.init(tmp_path / "pool")
    monkeypatch.setattr("statepool.beneath.Tree.name", refused)
    monkeypatch.setattr("statepool.transports.local.link_or_rename", refused)
    found = statepool.StatePool(tmp_path / "cache", [tmp_path / "pool"]).doctor()
    assert [finding.level for finding in found if "hard links" in (finding.cure or "")] == [
        statepool.Level.ERROR
    ] * 2


@pytest.mark.parametrize("what", ["bytes", "inodes"])
def test_a_place_that_is_full(tmp_path: Path, small: Path, what: str) -> None:
    for place in ("pool", "cache"):
        statepool.init(small / place)
    assert not errors(small / "cache", small / "pool")
    with pytest.raises(OSError, match="No space left"):
        for number in range(1000):
            (small / f"{number}").write_bytes(bytes(1 << 20 if what == "bytes" else 0))
    for cache, source in (("small/cache", "pool"), ("small/new", "pool"), ("cache", "small/pool")):
        statepool.init(tmp_path / "pool")
        assert "No space left on device" in errors(tmp_path / cache, tmp_path / source)


def test_a_file_system_that_is_smaller_than_what_is_to_stay_free(tmp_path: Path) -> None:
    statepool.init(tmp_path / "cache")
    assert "less than min-free" in errors(tmp_path / "cache", settings=Settings(min_free=1 << 60))
