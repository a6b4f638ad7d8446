"""
Files that are nearly nothing but holes: a pool can have them by the terabyte without any room for
them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.errors import IntegrityError, UnsafeImage
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.pools import layout
from statepool.transports import copying, failures
from statepool.transports.base import Transfer
from statepool.transports.local import LocalTransport
from tests.support.images import GOOD

HOLE = 1 << 37
"""Bytes: more than any file system of tests refuses, and too many to be hashed in a test."""


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each file had that was hashed here: files of such a length never are."""
    lengths: list[int] = []
    real = copying.hash_read

    def watched(reader: copying.Reader, size: int, **how: Any) -> Digest:
        lengths.append(size)
        assert size < HOLE
        return real(reader, size, **how)

    monkeypatch.setattr(copying, "hash_read", watched)
    return lengths


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Has ``vm1/disk`` ``a``: the header of a small disk, and then a hole."""
    place = tmp_path / "pool"
    statepool.init(str(place))
    digest = Digest.of(b"never seen")
    manifest = {
        "object": "vm1/disk",
        "state": "a",
        "kind": "image",
        "size": HOLE,
        "digest": str(digest),
        "virtual_size": 1 << 20,
        "cluster_size": 4096,
        "extents": [[0, 65536]],
    }
    data = place / layout.data(digest)
    data.write_bytes(GOOD.build())
    os.truncate(data, HOLE)
    (place / layout.log("vm1")).mkdir()
    record = {"format": 1, "nonce": "n", "time": 1.0, "by": "x", "changes": [{"publish": manifest}]}
    (place / layout.record("vm1", 1)).write_text(json.dumps(record))
    return place


@pytest.mark.parametrize("made", [True, False])
def test_an_image_far_longer_than_its_disk_is_not_read(
    pool: Path, tmp_path: Path, hashed: list[int], made: bool
) -> None:
    states = statepool.StatePool(cache=str(tmp_path / "cache"), sources=[str(pool)])
    if made:
        statepool.init(str(tmp_path / "cache"))
    with pytest.raises(UnsafeImage, match="safety check 'proportion'"):
        states.image("vm1/disk").get("a", to=str(tmp_path / "work.qcow2"))
    problems = [one.problem or "" for one in states.verify()]
    assert len(problems) == 1
    assert "proportion" in problems[0]
    statepool.init(str(tmp_path / "other"))
    (copied,) = statepool.sync(str(pool), str(tmp_path / "other")).states
    assert "proportion" in (copied.error or "")
    assert not hashed


@pytest.mark.parametrize("what", ["fetch", "digest", "store"])
def test_holes_of_a_terabyte_are_not_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """RAM has no header that says how long it can be."""
    monkeypatch.setattr(failures, "MOST_HOLES", 4 << 20)
    transport = LocalTransport(Location("file", str(tmp_path)))
    for name, length in (("some", 4 << 20), ("more", 8 << 20)):
        with (tmp_path / name).open("w+b") as file, (tmp_path / f"{name}.copy").open("w+b") as copy:
            file.truncate(length)
            works = {
                # called at once
                "fetch": lambda: transport.fetch(name, copy.fileno(), Transfer(length)),  # noqa: B023
                "digest": lambda: transport.digest(name, Transfer(length)),  # noqa: B023
                "store": lambda: transport.store(file.fileno(), "stored", Transfer(length)),  # noqa: B023
            }
            if name == "some":
                works[what]()
                continue
            with pytest.raises(IntegrityError, match=f"has {8 << 20} bytes of holes"):
                works[what]()
