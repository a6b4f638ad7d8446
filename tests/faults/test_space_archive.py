"""Full disks: an archive of a pool, and a restored pool, appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from statepool.archive.definition import BackupDefinition
from statepool.archive.pool_archiver import PoolArchiver
from statepool.archive.pool_reader import restore_pool
from statepool.errors import NoSpace
from tests.support.pool_archives import Store, states_of


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system of limited size")
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("size", [600_000, 5 << 20])
def test_an_archive_that_does_not_fit(tmp_path: Path, small: Path, size: int) -> None:
    store = Store(tmp_path)
    store.put("install", b"x" * 1000)
    archiver = PoolArchiver(tmp_path / "work")
    definition = BackupDefinition("pool", "tar", small, str(store.path))
    archiver.backup_files_incrementally(definition)
    store.put("large", os.urandom(size))
    store.put("larger", os.urandom(size))
    before = {path.name for path in small.iterdir()}
    for level in (1, 0):  # the older archive stays until the new one is whole
        with pytest.raises(NoSpace):
            archiver.backup_files_incrementally(definition, level=level)
        assert {path.name for path in small.iterdir()} == before
    restore_pool([small / "pool.tar"], tmp_path / "back")
    assert len(states_of(tmp_path / "back")) == 1


@pytest.mark.parametrize("size", [2 << 20, 5 << 20])
def test_a_pool_that_does_not_fit(tmp_path: Path, small: Path, size: int) -> None:
    store = Store(tmp_path)
    store.put("large", os.urandom(size))
    store.archive()
    with pytest.raises(NoSpace):
        restore_pool([store.archive_path(0)], small / "back")
    assert list(small.iterdir()) == []
