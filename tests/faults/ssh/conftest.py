"""A cache here, a pool behind a proxy, and what must be true of both whatever happened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

import statepool
from statepool.cache.cache import Cache
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest, StateId
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.transports.local import LocalTransport
from statepool.transports.registry import open_transport
from tests.support.proxy import Proxy
from tests.support.sshd import Sshd

MIB = 1 << 20
OBJECT = "vm1/disk"


@frozen
class Lab:
    """
    A cache and a pool.

    :param root: where caches are
    :param there: the directory of the pool, as this host sees it
    :param server: in front of it
    :param proxy: in front of the server
    """

    root: Path
    there: Path
    server: Sshd
    proxy: Proxy

    def settings(self, **knobs: Any) -> Settings:
        """:returns: settings in which nothing is asked twice"""
        return self.server.settings(
            **{"retries": 0, "timeout": 10.0, "fresh": 0.0, "compress": "off", **knobs}
        )

    @property
    def location(self) -> Location:
        """The pool, through the proxy."""
        return self.server.location(self.there, self.proxy.port)

    def pool(self, **knobs: Any) -> Pool:
        """:returns: the pool, as another host sees it"""
        return Pool(open_transport(self.location, self.settings(**knobs)))

    def image(self, cache: str, *, alone: bool = False, **knobs: Any) -> Any:
        """:returns: the image, as a host with this cache sees it"""
        sources = [] if alone else [str(self.location)]
        return statepool.StatePool(
            cache=self.root / cache, sources=sources, settings=self.settings(**knobs)
        ).image(OBJECT)

    def cache(self, name: str) -> Cache:
        """:returns: a cache, with what it knows"""
        return Cache.open(
            Pool(LocalTransport(Location("file", str(self.root / name)))), self.settings()
        )

    def chain(self, cache: str, state: str) -> tuple[Manifest, ...]:
        """:returns: what a cache knows of a state, tip first"""
        return self.cache(cache).pool.chain(StateId(OBJECT, state))

    def parts(self) -> list[Path]:
        """:returns: what interrupted transfers have left in the pool"""
        return [
            path for path in (self.there / layout.INCOMING).iterdir() if layout.part_of(path.name)
        ]

    def states(self, place: Path) -> set[str]:
        """
        :returns: the states in a cache or pool; the test fails unless all that is visible there is
            whole
        """
        pool = Pool(LocalTransport(Location("file", str(place))))
        found = set()
        for machine in pool.logged_machines():
            for manifest in pool.fold(machine).states.values():
                for link in pool.chain(manifest.id):
                    assert link.digest is not None
                    assert (place / layout.data(link.digest)).is_file(), f"{link.id} has no bytes"
                found.add(manifest.state)
        for path in (place / layout.DATA).glob("*[0-9a-f]"):
            assert Digest.of(path.read_bytes()).file_name == path.name
        return found


@pytest.fixture
def lab(sshd: Sshd, tmp_path: Path) -> Iterator[Lab]:
    there = sshd.directory_for(f"{tmp_path.name}-{os.urandom(4).hex()}")
    statepool.init(there)
    with Proxy(sshd.port) as proxy:
        yield Lab(tmp_path, there, sshd, proxy)


@pytest.fixture
def filled(lab: Lab, make_image: Callable[..., Path]) -> Lab:
    """With a state of 12 MiB in a cache named ``cache``, and nowhere else."""
    work = make_image(
        lab.root / "work.qcow2",
        32 * MIB,
        writes=[(number * MIB, MIB, number + 1) for number in range(12)],
    )
    assert lab.image("cache", alone=True).set("install", source=work).complete
    return lab
