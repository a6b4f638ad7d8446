"""
Files of other tools whose names no state can have: they are named, and nothing stands on them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.errors import UnsafeImage

SIZE = 1 << 20

Make = Callable[..., Path]


@pytest.fixture
def pool(tmp_path: Path, make_image: Make) -> Path:
    """A pool with a root image and a state that another tool put there."""
    statepool.init(tmp_path / "pool")
    make_image(tmp_path / "pool/vm1/disk.qcow2", SIZE)
    make_image(tmp_path / "pool/vm1/disk/install.qcow2", SIZE)
    return tmp_path / "pool"


def test_they_are_named_and_left_alone(
    pool: Path, make_image: Make, run_statepool: Callable[..., Any]
) -> None:
    for name in ("with space", "root", "boot"):
        make_image(pool / f"vm1/disk/{name}.qcow2", SIZE)
    told = run_statepool("--cache", "cache", "--source", "pool", "doctor").out
    assert "a file of vm1/disk is no state: 'with space' is not a valid name for a state" in told
    assert "a file of vm1/disk is no state: 'boot' is reserved" in told
    found = statepool.adopt(pool)
    # the root image, which is above
    assert [one.state for one in found if one.problem is None] == ["install", "root"]
    assert [(one.object, one.state) for one in found if one.problem is not None] == [
        ("vm1/disk", "boot"),
        ("vm1/disk", "root"),
        ("vm1/disk", "with space"),
    ]
    assert (
        "left alone: 'with space' is not a valid name for a state"
        in run_statepool("adopt", "pool", code=5).out
    )


@pytest.mark.parametrize("name", ["root", "boot"])
@pytest.mark.parametrize("root_image", [False, True])
def test_nothing_stands_on_them(
    pool: Path, tmp_path: Path, make_image: Make, name: str, root_image: bool
) -> None:
    """
    Whether or not there is a root image, which is another file. No log gets a name with which it
    could not be read.
    """
    if not root_image:
        (pool / "vm1/disk.qcow2").unlink()
    make_image(pool / f"vm1/disk/{name}.qcow2", SIZE)
    make_image(pool / "vm1/disk/top.qcow2", None, backing=f"{name}.qcow2")
    disk = statepool.StatePool(tmp_path / "cache", [pool]).image("vm1/disk")
    with pytest.raises(
        UnsafeImage, match=f"vm1/disk top in .* is backed by {name}.qcow2, and '{name}' is reserved"
    ) as caught:
        disk.get("top", to=tmp_path / "work.qcow2")
    assert caught.value.check == "missing-parent"
    assert f"'{name}' is reserved" in (
        {one.manifest.state: one.problem for one in disk.show()}["top"] or ""
    )
    assert f"'{name}' is reserved" in (
        {one.state: one.problem for one in statepool.adopt(pool)}["top"] or ""
    )
    assert disk.get("install").verified == "arrived"
