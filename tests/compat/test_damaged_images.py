"""
Images whose headers are good and whose tables lead astray: a guest would read errors from them.
Refused wherever they come in.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import statepool
from statepool.errors import UnsafeImage
from statepool.qcow2.header import read_header_file
from statepool.testing.trees import photograph

if TYPE_CHECKING:
    from conftest import Make, Place

SIZE = 4 << 20
BLOCK = 64 << 10
COPIED = 1 << 63
COMPRESSED = 1 << 62


class Image:
    """A qcow2 image whose tables can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header_file(path)
        self.l2 = self.number(self.header.l1_offset) & 0x00FFFFFFFFFFFE00

    def number(self, offset: int) -> int:
        return int.from_bytes(self.path.read_bytes()[offset : offset + 8])

    def put(self, offset: int, content: bytes | int) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(content if isinstance(content, bytes) else struct.pack(">Q", content))

    @property
    def end(self) -> int:
        return -(-os.stat(self.path).st_size // BLOCK) * BLOCK


def l1(image: Image, place: int) -> None:
    image.put(image.header.l1_offset, COPIED | place)


def l2(image: Image, entry: int) -> None:
    image.put(image.l2, entry)


def packed_place(image: Image) -> int:
    return image.number(image.l2) & ((1 << 54) - 1)


DAMAGED: dict[str, tuple[Callable[[Image], None], str]] = {
    "table-past-end": (lambda image: l1(image, image.end + BLOCK), "clusters"),
    "table-at-header": (lambda image: l1(image, 512), "l2-tables"),
    "table-on-l1": (lambda image: l1(image, image.header.l1_offset), "l2-tables"),
    "table-on-refcounts": (
        lambda image: l1(image, image.header.refcount_table_offset),
        "l2-tables",
    ),
    "data-past-end": (lambda image: l2(image, COPIED | image.end + BLOCK), "clusters"),
    "data-on-refcounts": (
        lambda image: l2(image, COPIED | image.header.refcount_table_offset),
        "cluster-overlap",
    ),
    "data-on-l1": (lambda image: l2(image, COPIED | image.header.l1_offset), "cluster-overlap"),
    "data-on-l2": (lambda image: l2(image, COPIED | image.l2), "cluster-overlap"),
    "data-unaligned": (
        lambda image: l2(image, COPIED | image.l2 + BLOCK + 512),
        "cluster-alignment",
    ),
    "compressed-past-end": (lambda image: l2(image, COMPRESSED | image.end + BLOCK), "clusters"),
    "compressed-longer": (
        lambda image: l2(image, COMPRESSED | 0xFF << 54 | image.end - BLOCK + 1),
        "clusters",
    ),
}

BROKEN_STARTS = {"zeros": bytes(16), "ones": b"\xff" * 16}


@pytest.fixture(params=[*DAMAGED, *BROKEN_STARTS])
def damaged(
    request: pytest.FixtureRequest, tmp_path: Path, make_image: Make, qemu_img: Callable[..., str]
) -> tuple[Path, str]:
    """:returns: an image, and the check that refuses it"""
    path = make_image(tmp_path / "plain.qcow2", SIZE, writes=[(0, 2 * BLOCK, 7)])
    if request.param in BROKEN_STARTS:
        noise = tmp_path / "noise.raw"
        noise.write_bytes(
            (b"".join(b"%d," % number for number in range(20000)) + bytes(SIZE))[:SIZE]
        )
        qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", noise, tmp_path / "packed.qcow2")
        noise.unlink()
        path.unlink()
        image = Image(tmp_path / "packed.qcow2")
        image.put(packed_place(image), BROKEN_STARTS[request.param])
        return image.path, "compressed"
    damage, check = DAMAGED[request.param]
    damage(Image(path))
    return path, check


def test_it_is_not_fetched_from_a_pool_of_another_tool(
    damaged: tuple[Path, str], tmp_path: Path
) -> None:
    path, check = damaged
    (tmp_path / "loose/vm1/disk").mkdir(parents=True)
    path.rename(tmp_path / "loose/vm1/disk/base.qcow2")
    before = photograph(tmp_path)
    for scheme in ("", "link://"):
        with pytest.raises(UnsafeImage) as caught:
            statepool.StatePool(tmp_path / "cache", [f"{scheme}{tmp_path / 'loose'}"]).image(
                "vm1/disk"
            ).get("base", to=tmp_path / "work.qcow2")
        assert caught.value.check == check
    assert photograph(tmp_path) == before


def test_it_is_neither_set_nor_adopted(damaged: tuple[Path, str], tmp_path: Path) -> None:
    path, check = damaged
    with pytest.raises(UnsafeImage) as caught:
        statepool.StatePool(tmp_path / "cache").image("vm1/disk").set("base", source=path)
    assert caught.value.check == check
    statepool.init(tmp_path / "pool")
    (tmp_path / "pool/vm1/disk").mkdir(parents=True)
    path.rename(tmp_path / "pool/vm1/disk/base.qcow2")
    (adopted,) = statepool.adopt(tmp_path / "pool")
    assert f"check {check!r}" in str(adopted.problem)


def test_what_a_log_vouches_for_is_looked_at_as_well(
    empty: Place, damaged: tuple[Path, str]
) -> None:
    """
    Published by somebody who had not looked: not fetched, and not passed on. Only what compressed
    data begins with, its first owner looks at.
    """
    path, check = damaged
    empty.forge(empty.pool, "base", path.read_bytes())
    cache: Any = statepool.StatePool(empty.root / "another", [empty.pool]).image("vm1/disk")
    if check == "compressed":
        assert cache.get("base").verified == "arrived"
    else:
        with pytest.raises(UnsafeImage) as caught:
            cache.get("base")
        assert caught.value.check == check
    statepool.init(empty.root / "mirror")
    (state,) = statepool.sync(empty.pool, empty.root / "mirror").states
    assert state.action == "failed"
    assert f"check {check!r}" in str(state.error)


def test_good_ones_pass(tmp_path: Path, make_image: Make, qemu_img: Callable[..., str]) -> None:
    """Whatever qemu-img makes of an image that is in order."""
    plain = make_image(
        tmp_path / "plain.qcow2", SIZE, writes=[(0, 2 * BLOCK, 7), (SIZE - BLOCK, BLOCK, 9)]
    )
    place = tmp_path / "loose/vm1/disk"
    place.mkdir(parents=True)
    kinds = [
        ["-c"],
        ["-c", "-o", "compression_type=zstd"],
        ["-c", "-o", "cluster_size=512"],
        ["-o", "cluster_size=2M"],
        ["-o", "extended_l2=on"],
        ["-c", "-o", "extended_l2=on"],
        ["-o", "preallocation=metadata"],
        ["-o", "preallocation=full"],
        ["-o", "compat=0.10"],
        ["-o", "refcount_bits=1"],
        ["-o", "lazy_refcounts=on"],
    ]
    for number, options in enumerate(kinds):
        qemu_img(
            "convert", "-f", "qcow2", "-O", "qcow2", *options, plain, place / f"s{number}.qcow2"
        )
    disk = statepool.StatePool(tmp_path / "cache", [tmp_path / "loose"]).image("vm1/disk")
    for number in range(len(kinds)):
        assert disk.get(f"s{number}").verified == "unmanaged"
