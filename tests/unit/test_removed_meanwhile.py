"""States that another process removes from the cache while this one is at work on them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.errors import NotFound
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Presence
from statepool.pools.pool import Pool

Write = Callable[..., None]


@pytest.fixture
def disk(filled: Path) -> statepool.ImageHandle:
    """The chain is in the cache, and a working image stands on it."""
    handle = statepool.StatePool(filled / "cache", [filled / "pool"]).image("vm1/disk")
    handle.get("customize", to=filled / "work.qcow2")
    return handle


@pytest.fixture
def state() -> str:
    """Whose chain is about to be looked at when another process removes it."""
    return "customize"


@pytest.fixture
def other(filled: Path, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a state is there, and then another process removes it."""
    real = Pool.chain_of

    def late(pool: Pool, manifest: Manifest) -> Any:
        if manifest.state != state:
            return real(pool, manifest)
        monkeypatch.setattr(Pool, "chain_of", real)
        statepool.StatePool(filled / "cache").image("vm1/disk").unset("install", cascade=True)
        return pool.chain_of(manifest)

    monkeypatch.setattr(Pool, "chain_of", late)


def test_before_it_is_used(disk: statepool.ImageHandle, other: None) -> None:
    with pytest.raises(NotFound, match="there is no state customize of vm1/disk in"):
        disk.get("customize")
    assert disk.get("customize").chain == ("customize", "install")


def test_before_it_is_compared_with_what_a_source_has(
    filled: Path, disk: statepool.ImageHandle, other: None
) -> None:
    shutil.rmtree(filled / "cache/.statepool/fresh")
    assert disk.get("customize").chain == ("customize", "install")
    assert statepool.StatePool(filled / "cache").image("vm1/disk").check("customize")


@pytest.mark.parametrize("state", ["connect"])
def test_before_it_is_stored_elsewhere(
    filled: Path, disk: statepool.ImageHandle, write_to_image: Write, other: None
) -> None:
    write_to_image(filled / "work.qcow2", [(0, 65536, 9)])
    own, there = disk.set("connect", source=filled / "work.qcow2").pools
    assert (own.result, there.result) == (Presence.STORED, Presence.FAILED)
    assert "there is no state connect of vm1/disk" in str(there.error)


def test_before_it_gets_new_content(
    filled: Path, disk: statepool.ImageHandle, write_to_image: Write, other: None
) -> None:
    write_to_image(filled / "work.qcow2", [(0, 65536, 9)])
    with pytest.raises(NotFound, match="there is no state customize of vm1/disk in"):
        disk.set("customize", source=filled / "work.qcow2", squash=True)
