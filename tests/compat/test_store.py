"""A state of the cache, stored in one pool that is named: a source, or any other one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import statepool
from statepool import Presence, StatePool

MIB = 1 << 20


@pytest.fixture
def pool(tmp_path: Path, make_image: Callable[..., Path]) -> StatePool:
    """
    A cache with ``install`` and ``customize``, and with two empty pools, of which one is a source
    called ``near``.
    """
    for name in ("near", "far"):
        statepool.init(tmp_path / name)
    config = statepool.Config.load(
        {
            "cache": str(tmp_path / "cache"),
            "sources": [{"location": str(tmp_path / "near"), "name": "near"}],
        }
    )
    opened = statepool.from_config(config)
    image = make_image(tmp_path / "work.qcow2", 4 * MIB, writes=[(0, 65536, 7)])
    for state in ("install", "customize"):
        opened.image("vm1/disk").set(state, source=image, scope="own")
    return opened


def states(directory: Path) -> list[str]:
    return sorted(
        listed.manifest.state for listed in StatePool(cache=directory).image("vm1/disk").show()
    )


def test_its_chain_goes_with_it(pool: StatePool, tmp_path: Path) -> None:
    disk = pool.image("vm1/disk")
    assert disk.store("install", to="near").complete
    assert states(tmp_path / "near") == ["install"]
    would = disk.store("customize", to=tmp_path / "far", dry_run=True)
    assert [at.result for at in would.pools] == [Presence.STORED]
    assert states(tmp_path / "far") == []
    stored = disk.store("customize", to=tmp_path / "far")
    assert (stored.state, stored.complete, stored.pools[0].durable) == ("customize", True, True)
    assert states(tmp_path / "far") == ["customize", "install"]
    assert [at.result for at in disk.store("customize", to=f"file://{tmp_path}/far").pools] == [
        Presence.PRESENT
    ]
    other = StatePool(cache=tmp_path / "other", sources=[tmp_path / "far"])
    assert other.image("vm1/disk").get("customize").digest == stored.digest


def test_other_content_gives_way_when_told_to(
    pool: StatePool, make_image: Callable[..., Path], tmp_path: Path
) -> None:
    other = StatePool(cache=tmp_path / "other", sources=[tmp_path / "far"])
    other.image("vm1/disk").set(
        "install", source=make_image(tmp_path / "other.qcow2", 4 * MIB, writes=[(0, 65536, 8)])
    )
    disk = pool.image("vm1/disk")
    refused = disk.store("install", to=tmp_path / "far")
    assert not refused.complete
    assert "exists" in (refused.pools[0].error or "")
    assert disk.store("install", to=tmp_path / "far", replace=True).complete


def test_what_cannot_be(pool: StatePool, tmp_path: Path) -> None:
    disk = pool.image("vm1/disk")
    with pytest.raises(statepool.NotFound, match="there is no state nothing"):
        disk.store("nothing", to="near")
    with pytest.raises(statepool.UsageError, match="is the cache itself"):
        disk.store("install", to=tmp_path / "cache")
    missing = disk.store("install", to=tmp_path / "nowhere").pools[0]
    assert missing.result is Presence.FAILED
    assert "nowhere" in (missing.error or "")
    assert not (tmp_path / "nowhere").exists()


def test_machines_and_their_root_images(
    pool: StatePool, make_image: Callable[..., Path], tmp_path: Path
) -> None:
    vm = pool.machine("vm2", ["data", "disk"])
    for state in ("root", "install"):
        images = {
            image: make_image(tmp_path / f"{state}-{image}.qcow2", 4 * MIB)
            for image in ("data", "disk")
        }
        vm.set(state, source=images, scope="own")
        assert vm.store(state, to=tmp_path / "far").complete
    far = StatePool(cache=tmp_path / "far").machine("vm2")
    assert far.check("install")
    assert far.check("root")
    with pytest.raises(statepool.NotFound):
        vm.store("nothing", to="near")
