"""Pools in memory, and states that are only names and bytes: nothing here looks into them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, Parent
from statepool.pools.locks import NoLocks
from statepool.pools.pool import Pool
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.local import LocalTransport

State = Callable[..., Manifest]
Put = Callable[..., Manifest]


@pytest.fixture
def state() -> State:
    """
    ``state("customize", parent=install)``: a manifest whose bytes are those of its name, or of
    ``data``.
    """

    def make(
        name: str,
        data: str | None = None,
        *,
        parent: Manifest | None = None,
        object: str = "vm1/disk",
        **facts: object,
    ) -> Manifest:
        content = (data or name).encode()
        below = (
            Parent(parent.state, parent.digest)
            if parent is not None and parent.digest is not None
            else None
        )
        return Manifest(
            object, name, size=len(content), digest=Digest.of(content), parent=below, **facts
        )  # type: ignore[arg-type]

    return make


@pytest.fixture
def machine_state(state: State) -> Callable[..., list[Manifest]]:
    """``machine_state("on", disk)``: RAM and the machine state that lists it and the disks."""

    def make(name: str, *disks: Manifest) -> list[Manifest]:
        ram = state(name, f"{name} RAM", object="vm1", kind=Kind.RAM)
        members = {disk.object: disk.digest for disk in disks if disk.digest is not None}
        assert ram.digest is not None
        return [ram, Manifest("vm1", name, Kind.MACHINE, members={**members, "ram": ram.digest})]

    return make


@pytest.fixture
def transport() -> MemoryTransport:
    return MemoryTransport(MemoryStore())


@pytest.fixture
def pool(transport: MemoryTransport) -> Pool:
    """A pool in memory, with numbers for nonces and a clock that stands still."""
    numbers = itertools.count(1)
    pool = Pool(transport, locks=NoLocks(), nonce=lambda: f"n{next(numbers)}", clock=lambda: 1000.0)
    pool.create()
    return pool


@pytest.fixture
def local_pool(tmp_path: Path) -> Pool:
    """A pool in a directory."""
    (tmp_path / "pool").mkdir()
    pool = Pool(LocalTransport(Location("file", str(tmp_path / "pool"))))
    pool.create()
    return pool


@pytest.fixture
def put() -> Put:
    """``put(pool, manifest, data)``: publishes as a writer does, bytes and all."""

    def publish(pool: Pool, *manifests: Manifest, data: bytes | None = None, **how: bool) -> bool:
        staging = pool.stage(
            [manifest.digest for manifest in manifests if manifest.digest is not None]
        )
        try:
            for manifest in manifests:
                if manifest.digest is not None:
                    content = data or next(
                        text
                        for text in (manifest.state.encode(), f"{manifest.state} RAM".encode())
                        if Digest.of(text) == manifest.digest
                    )
                    pool.transport.create(staging.path(manifest.digest), content)
            return pool.publish(manifests, staging, **how)
        finally:
            staging.end()

    return publish
