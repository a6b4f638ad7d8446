"""What holds for the set of one image holds for that of a machine: they are one path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.model.manifest import Kind, StateId
from statepool.pools.pool import Pool

NAMES = ("a", "b")


@pytest.fixture
def vm(lab: Any) -> Path:
    """Working images of a machine: roots of chains."""
    place: Path = lab.root / "vm"
    place.mkdir()
    for name in NAMES:
        (place / f"{name}.qcow2").write_bytes(lab.image(name))
    return place


def machine(lab: Any) -> statepool.MachineHandle:
    lab.pool()
    return statepool.StatePool(cache=lab.root / "cache", sources=[lab.root / "pool"]).machine(
        "vm1", NAMES
    )


def test_what_a_file_is_that_is_no_image(lab: Any, vm: Path) -> None:
    (vm / "b.qcow2").write_bytes(bytes(1 << 16) + b"conectix".ljust(512, b"\0"))
    before = (vm / "a.qcow2").read_bytes()
    with pytest.raises(statepool.UnsafeImage, match=r"b\.qcow2 is refused .* it is a VHD image"):
        machine(lab).set("install", source=vm)
    assert (vm / "a.qcow2").read_bytes() == before


def test_a_machine_state_has_no_bytes_of_its_own(lab: Any, vm: Path) -> None:
    """Also if its images had to be copied."""
    for name in NAMES:
        os.link(vm / f"{name}.qcow2", vm / f"{name}-too.qcow2")
    stored = machine(lab).set("install", source=vm, dry_run=True)
    sizes = [(vm / f"{name}.qcow2").stat().st_size for name in NAMES]
    assert [at.bytes for at in stored.pools] == [sum(sizes), sum(sizes)]
    stored = machine(lab).set("install", source=vm)
    assert [at.bytes for at in stored.pools] == [sum(sizes), sum(sizes)]
    for pool in (lab.pool("cache"), lab.pool()):
        manifest = pool.find(StateId("vm1", "install", Kind.MACHINE))
        assert manifest is not None
        assert manifest.size == 0


def test_a_copy_of_the_same_bytes_does_not_take_the_place_of_a_link(
    lab: Any, vm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images that are alike, of which the second has to be copied: both are given back."""
    for name in NAMES:
        (vm / f"{name}.qcow2").write_bytes(lab.image("alike"))
    vm1 = machine(lab)
    vm1.set("install", source=vm)
    content = (vm / "a.qcow2").read_bytes()
    assert (vm / "b.qcow2").read_bytes() == content
    os.link(vm / "b.qcow2", lab.root / "second")

    def fail(*arguments: object, **options: object) -> bool:
        raise statepool.Conflict("somebody else was faster")

    with monkeypatch.context() as patched:
        patched.setattr(Pool, "publish", fail)
        with pytest.raises(statepool.Conflict, match="faster"):
            vm1.set("customize", source=vm)
    assert [(vm / f"{name}.qcow2").read_bytes() for name in NAMES] == [content, content]
