"""Whether a file is as long as its tables say."""

from __future__ import annotations

import struct

import pytest
from attrs import evolve

from statepool.errors import UnsafeImage
from statepool.qcow2.checks import check_image
from statepool.qcow2.clusters import check_clusters
from statepool.testing.images import GOOD, Forged

COPIED = 1 << 63
COMPRESSED = 1 << 62


def look(forged: Forged, l1_entry: int, *l2_entries: int, l1_too: int = 0) -> None:
    """An image with one L2 table, in its fifth cluster of 4 KiB."""
    data = bytearray(forged.build())
    data[3 << 12 : (3 << 12) + 16] = struct.pack(">QQ", l1_entry, l1_too)
    table = struct.pack(f">{len(l2_entries)}Q", *l2_entries)
    data[4 << 12 : (4 << 12) + len(table)] = table

    def read(offset: int, size: int) -> bytes:
        return bytes(data[offset : offset + size])

    check_clusters(read, check_image(read, len(data), "an image"), "an image")


SIZE = (6 << 12) + 100
IMAGE = evolve(GOOD, length=SIZE)
TABLE = COPIED | 4 << 12


def test_what_is_in_the_file_is_accepted() -> None:
    look(IMAGE, 0)
    look(IMAGE, TABLE, 0, COPIED | 5 << 12, 5 << 12, COPIED | 6 << 12, COMPRESSED | (SIZE - 1), 1, COPIED | 7 << 12 | 1)


@pytest.mark.parametrize("entry", [TABLE, TABLE | 512, COPIED | (4 << 12) + 2048])
def test_a_table_that_is_not_a_cluster_of_its_own_is_refused(entry: int) -> None:
    """QEMU would write to both; and reading one table a million times takes hours."""
    forged = evolve(IMAGE, l1_size=2, virtual_size=4 << 20)
    with pytest.raises(UnsafeImage, match="twice" if entry == TABLE else "inside a cluster") as caught:
        look(forged, TABLE, l1_too=entry)
    assert caught.value.check == "l2-tables"


def test_what_the_disk_does_not_need_is_not_read() -> None:
    look(evolve(IMAGE, l1_size=2, virtual_size=2 << 20), TABLE, l1_too=COPIED | 7 << 12)
    with pytest.raises(UnsafeImage):
        look(evolve(IMAGE, l1_size=2, virtual_size=(2 << 20) + 512), TABLE, l1_too=COPIED | 7 << 12)


@pytest.mark.parametrize("l1_entry", [COPIED | 6 << 12, COPIED | 7 << 12, (1 << 55) | 4 << 12])
def test_a_table_behind_the_end_is_refused(l1_entry: int) -> None:
    with pytest.raises(UnsafeImage) as caught:
        look(IMAGE, l1_entry)
    assert caught.value.check == "clusters"


@pytest.mark.parametrize("entry", [COPIED | 7 << 12, 7 << 12, 1 << 50, COMPRESSED | SIZE, COPIED | COMPRESSED | (1 << 40)])
@pytest.mark.parametrize("place", [0, 511])
def test_data_behind_the_end_is_refused(entry: int, place: int) -> None:
    with pytest.raises(UnsafeImage) as caught:
        look(IMAGE, TABLE, *[0] * place, entry)
    assert caught.value.check == "clusters"


def test_bitmaps_of_subclusters_are_no_places() -> None:
    forged = Forged(cluster_bits=14, incompatible=16, length=7 << 14, l1_offset=3 << 14, refcount_offset=1 << 14)
    data = bytearray(forged.build())
    data[3 << 14 : (3 << 14) + 8] = struct.pack(">Q", COPIED | 4 << 14)
    data[4 << 14 : (4 << 14) + 16] = struct.pack(">QQ", COPIED | 5 << 14, 0xFFFFFFFF00000000)

    def read(offset: int, size: int) -> bytes:
        return bytes(data[offset : offset + size])

    check_clusters(read, check_image(read, len(data), "an image"), "an image")
    data[4 << 14 : (4 << 14) + 8] = struct.pack(">Q", COPIED | 7 << 14)
    with pytest.raises(UnsafeImage):
        check_clusters(read, check_image(read, len(data), "an image"), "an image")
