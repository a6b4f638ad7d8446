"""A cache with states to export, made byte by byte, and caches to import them into."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from statepool import StatePool
from statepool.bundles import contents
from statepool.bundles.contents import Contents
from statepool.cache.cache import Cache
from statepool.capture.capture import Capture, files_of
from statepool.model.carried import Imported
from statepool.model.manifest import Kind, StateId
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.sources.pool_source import open_pool
from statepool.testing.trees import photograph
from tests.support.images import GOOD

DISK = "vm1/disk"


class World:
    """
    Where states are exported and imported.

    :ivar home: a cache with ``vm1/disk`` ``install`` and ``customize``, and ``vm1`` ``loggedin``
    :ivar away: an empty cache
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home, self.away = StatePool(root / "home"), StatePool(root / "away")
        image = root / "work.qcow2"
        image.write_bytes(GOOD.build() + b"install" * 2000)
        for state in ("install", "customize"):
            self.home.image(DISK).set(state, source=image, labels={"about": state})
        self.away.working_directory()  # as any command that has put something into it leaves it

    def log_in(self) -> None:
        """Set a state of the machine, with its RAM."""
        images = {}
        for name in ("data", "disk"):
            images[name] = self.root / f"{name}.qcow2"
            images[name].write_bytes(GOOD.build() + name.encode() * 300)
        (self.root / "ram").write_bytes(b"R" * 100_000 + bytes(1 << 20) + b"AM")
        wanted = StateId("vm1", "loggedin", Kind.MACHINE)
        files = files_of(wanted, images, self.root / "ram")
        cache = self.cache("home")
        Capture(cache, wanted, files, fingerprint={"qemu": "7.2.22", "cpu": "max"}).run()

    def cache(self, name: str) -> Cache:
        return Cache.open(open_pool(self.root / name, Settings()), Settings())

    def export(self, state: str = "customize", *, pool: str = "home", **how: Any) -> bytes:
        """:returns: a bundle"""
        opened, path = StatePool(self.root / pool), self.root / "bundle"
        if state == "loggedin":
            opened.machine("vm1").export(state, to=path, overwrite=True, **how)
        else:
            opened.image(DISK).export(state, to=path, overwrite=True, **how)
        return path.read_bytes()

    def bring(self, bundle: bytes, *, into: str = "away", **how: Any) -> Imported:
        """Import a bundle."""
        path = self.root / "brought"
        path.write_bytes(bundle)
        return StatePool(self.root / into).import_bundle(path, **how)

    def contents(self, state: str = "customize") -> Contents:
        """:returns: what the bundle of a state has in it"""
        bundle = io.BytesIO(self.export(state, compress="none"))
        bundle.seek(len(contents.PRELUDE))
        header = bundle.read(contents.BLOCK)
        return Contents.read(bundle.read(contents.record_size(header) or 0), "the bundle")

    def data(self, pool: str = "home") -> dict[str, bytes]:
        """:returns: the bytes of the states in a cache, by their digests"""
        directory = self.root / pool / layout.DATA
        return {path.name.replace("-", ":", 1): path.read_bytes() for path in directory.iterdir()}

    def photograph(self, name: str = "away") -> dict[str, str]:
        return photograph(self.root / name)


def names(pool: StatePool) -> list[str]:
    """:returns: the states of a cache"""
    return sorted(f"{one.manifest.object} {one.manifest.state}" for one in pool.show())
