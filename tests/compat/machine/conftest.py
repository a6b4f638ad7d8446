"""Backends on a cache and a pool, and the guest's disks as a chain in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import frozen

from statepool.api import StatePool, init
from statepool.backends.base import Context, Target
from statepool.cache.cache import Cache
from statepool.model.objects import Image, Machine
from tests.support.machines import IMAGES, Lab

MACHINE = Machine("vm1", tuple(IMAGES))


@frozen
class World:
    """
    A cache and a pool.

    :param place: a directory of its own
    :param states: both
    """

    place: Path
    states: StatePool

    @property
    def context(self) -> Context:
        return self.states._context

    @property
    def cache(self) -> Cache:
        return self.context.cache

    def images(self, state: str, *, to: str = "run") -> dict[str, Path]:
        """:returns: working images on a state of the whole machine"""
        self.states.machine(MACHINE).get(state, to=self.place / to)
        return {name: self.place / to / f"{name}.qcow2" for name in IMAGES}

    def target(self, images: dict[str, Path] | None = None, monitor: Path | None = None) -> Target:
        return Target(MACHINE, images or {}, monitor)

    def disk(self, images: dict[str, Path] | None = None, monitor: Path | None = None) -> Target:
        return Target(Image("vm1", "disk"), {"disk": images["disk"]} if images else {}, monitor)


@pytest.fixture
def world(guests: Lab, tmp_path: Path) -> World:
    """With the disks of the booted guest as the state ``install``."""
    init(tmp_path / "pool")
    world = World(tmp_path, StatePool(cache=tmp_path / "cache", sources=[tmp_path / "pool"]))
    world.states.machine(MACHINE).set("install", source=guests.copies(tmp_path / "first"))
    return world
