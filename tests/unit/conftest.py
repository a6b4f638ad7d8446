"""What several rooms are tested on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import statepool
from statepool.cache.cache import Cache
from statepool.model.manifest import Manifest
from statepool.pools.pool import Pool
from tests.support.lab import Lab

SIZE = 1 << 20
BLOCK = 64 << 10

Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


@pytest.fixture
def filled(tmp_path: Path, make_image: Make, write_to_image: Write) -> Path:
    """A directory with a pool that has a chain of two."""
    statepool.init(tmp_path / "pool")
    work = make_image(tmp_path / "seed.qcow2", SIZE, writes=[(0, BLOCK, 1)])
    disk = statepool.StatePool(tmp_path / "seed", [tmp_path / "pool"]).image("vm1/disk")
    disk.set("install", source=work)
    write_to_image(work, [(BLOCK, BLOCK, 2)])
    disk.set("customize", source=work)
    work.unlink()
    shutil.rmtree(tmp_path / "seed")
    return tmp_path


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def cache(lab: Lab) -> Cache:
    return lab.cache()


@pytest.fixture
def pool(lab: Lab) -> Pool:
    return lab.pool()


@pytest.fixture
def chain(lab: Lab, cache: Cache) -> tuple[Manifest, ...]:
    """A chain of two in the cache."""
    return lab.chain(cache.pool, "install", "customize")
