"""Where images are worked on: real ones, made by qemu-img and written to by qemu-io."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from statepool.backends.base import Context, StateBackend, Target
from statepool.cache.cache import Cache
from statepool.model.location import Location
from statepool.model.objects import Image
from statepool.model.settings import Settings
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.testing.backends import Bench
from statepool.transports.registry import open_transport

SIZE = 256 << 10


class ImageBench(Bench):
    """One image of a machine that is off."""

    def __init__(
        self, backend: StateBackend, directory: Path, tools: tuple[Callable[..., Any], ...]
    ) -> None:
        super().__init__(backend, [directory])
        self._directory = directory
        self._make, self._write, self._qemu_img = tools
        self._made = 0

    def target(self) -> Target:
        self._made += 1
        return Target(
            Image("vm1", "disk"),
            {"disk": self._make(self._directory / f"work-{self._made}.qcow2", SIZE)},
        )

    def write(self, target: Target, value: int) -> None:
        self._write(target.working["disk"], [(0, SIZE, value)])

    def read(self, target: Target, state: str) -> int:
        return self.value(target.working["disk"])

    def value(self, path: Path) -> int:
        """:returns: what a guest finds everywhere in an image"""
        raw = path.with_suffix(".raw")
        self._qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        (value,) = set(raw.read_bytes())
        raw.unlink()
        return value


def open_pool(location: Location) -> Pool:
    pool = Pool(open_transport(location))
    pool.create()
    return pool


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """An empty cache and an empty pool."""
    cache = Cache.open(open_pool(Location("file", str(tmp_path / "cache"))), Settings())
    pool = open_pool(Location("file", str(tmp_path / "pool")))
    return Context(cache, (PoolSource(pool, "pool"),), creator={"statepool": "of a test"})


@pytest.fixture
def image_bench(
    tmp_path: Path,
    make_image: Callable[..., Path],
    write_to_image: Callable[[Path, Iterable[tuple[int, int, int]]], None],
    qemu_img: Callable[..., str],
) -> Callable[[StateBackend], ImageBench]:
    """``image_bench(backend)``"""
    return lambda backend: ImageBench(backend, tmp_path, (make_image, write_to_image, qemu_img))
