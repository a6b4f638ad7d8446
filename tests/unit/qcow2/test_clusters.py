"""Whether a file is as long as its tables say."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from statepool.errors import UnsafeImage
from statepool.qcow2.checks import check_image
from statepool.qcow2.clusters import check_clusters
from tests.support.images import GOOD, Forged

COPIED = 1 << 63
COMPRESSED = 1 << 62


def look(
    forged: Forged,
    l1_entry: int,
    *l2_entries: int,
    l1_too: int = 0,
    puts: dict[int, bytes] | None = None,
) -> None:
    """
    An image with one L2 table, in its fifth cluster of 4 KiB. :param puts: what else is in the
    file, by offsets
    """
    data = bytearray(forged.build())
    data[3 << 12 : (3 << 12) + 16] = struct.pack(">QQ", l1_entry, l1_too)
    table = struct.pack(f">{len(l2_entries)}Q", *l2_entries)
    data[4 << 12 : (4 << 12) + len(table)] = table
    for offset, content in (puts or {}).items():
        data[offset : offset + len(content)] = content

    def read(offset: int, size: int) -> bytes:
        return bytes(data[offset : offset + size])

    check_clusters(read, check_image(read, len(data), "an image"), "an image")


SIZE = (6 << 12) + 100
IMAGE = evolve(GOOD, length=SIZE)
TABLE = COPIED | 4 << 12


def test_what_is_in_the_file_is_accepted() -> None:
    look(IMAGE, 0)
    packed = {SIZE - 1: b"\x03"}  # an empty deflate stream begins so
    look(
        IMAGE,
        TABLE,
        0,
        COPIED | 5 << 12,
        5 << 12,
        COPIED | 6 << 12,
        COMPRESSED | (SIZE - 1),
        1,
        COPIED | 7 << 12 | 1,
        puts=packed,
    )


@pytest.mark.parametrize("entry", [TABLE, TABLE | 512, COPIED | (4 << 12) + 2048])
def test_a_table_that_is_not_a_cluster_of_its_own_is_refused(entry: int) -> None:
    """QEMU would write to both; and reading one table a million times takes hours."""
    forged = evolve(IMAGE, l1_size=2, virtual_size=4 << 20)
    with pytest.raises(
        UnsafeImage, match="twice" if entry == TABLE else "inside a cluster"
    ) as caught:
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


@pytest.mark.parametrize(
    "entry",
    [COPIED | 7 << 12, 7 << 12, 1 << 50, COMPRESSED | SIZE, COPIED | COMPRESSED | (1 << 40)],
)
@pytest.mark.parametrize("place", [0, 511])
def test_data_behind_the_end_is_refused(entry: int, place: int) -> None:
    with pytest.raises(UnsafeImage) as caught:
        look(IMAGE, TABLE, *[0] * place, entry)
    assert caught.value.check == "clusters"


def refused(check: str, *arguments: int, forged: Forged = IMAGE, **options: Any) -> None:
    with pytest.raises(UnsafeImage) as caught:
        look(forged, *arguments, **options)
    assert caught.value.check == check


@pytest.mark.parametrize("place", [1 << 12, 2 << 12, 3 << 12])
def test_an_l2_table_in_the_place_of_another_table_is_refused(place: int) -> None:
    """On the refcount table, on its block, on the L1 table."""
    refused("l2-tables", COPIED | place)


@pytest.mark.parametrize("place", [1 << 12, 2 << 12, 3 << 12, 4 << 12])
@pytest.mark.parametrize("flags", [COPIED, 0, COMPRESSED])
def test_data_in_the_place_of_a_table_is_refused(place: int, flags: int) -> None:
    refused("cluster-overlap", TABLE, flags | place)


def test_data_in_the_place_of_the_header_is_refused() -> None:
    refused("cluster-overlap", TABLE, COMPRESSED | 600)


def test_data_in_the_place_of_a_table_that_comes_later_is_refused() -> None:
    forged = evolve(IMAGE, l1_size=2, virtual_size=4 << 20)
    refused("cluster-overlap", TABLE, COPIED | 5 << 12, forged=forged, l1_too=COPIED | 5 << 12)


@pytest.mark.parametrize("flags", [COPIED, COPIED | 1])
def test_data_inside_a_cluster_is_refused(flags: int) -> None:
    refused("cluster-alignment", TABLE, flags | (5 << 12) + 512)


def test_compressed_data_that_reaches_past_the_end_is_refused() -> None:
    refused("clusters", TABLE, COMPRESSED | 1 << 58 | (SIZE - 1), puts={SIZE - 1: b"\x03"})
    look(IMAGE, TABLE, COMPRESSED | (SIZE - 1), puts={SIZE - 1: b"\x03"})


@pytest.mark.parametrize("content", [bytes(100), b"\xff" * 100, b"\x05" + b"\xff" * 99])
def test_what_is_not_compressed_is_refused(content: bytes) -> None:
    refused("compressed", TABLE, COMPRESSED | 5 << 12, puts={5 << 12: content})
    check = evolve(IMAGE, incompatible=8, compression=1)
    refused("compressed", TABLE, COMPRESSED | 5 << 12, forged=check, puts={5 << 12: content})
    look(check, TABLE, COMPRESSED | 5 << 12, puts={5 << 12: b"\x28\xb5\x2f\xfd" + content})


def test_a_cluster_that_reads_as_zeros_before_there_were_any_is_refused() -> None:
    refused("l2-entries", TABLE, 1, forged=evolve(IMAGE, version=2))


def test_tables_in_holes_are_not_read(tmp_path: Path) -> None:
    """Each of a million tables would have to be read otherwise: 64 GiB of zeros."""
    tables, bits = 1 << 20, 16
    forged = Forged(
        cluster_bits=bits,
        virtual_size=tables << 29,
        l1_size=tables,
        l1_offset=3 << bits,
        refcount_offset=1 << bits,
        length=(200 + tables) << bits,
    )
    path = tmp_path / "holes.qcow2"
    with path.open("w+b") as file:
        file.write(evolve(forged, length=None).build()[: 3 << 12])
        file.seek(3 << bits)
        file.write(
            struct.pack(f">{tables}Q", *((200 + number) << bits for number in range(tables)))
        )
        file.truncate((200 + tables) << bits)
        file.flush()
        asked: list[int] = []

        def read(offset: int, size: int) -> bytes:
            asked.append(size)
            return os.pread(file.fileno(), size, offset)

        header = check_image(read, (200 + tables) << bits, "an image")
        check_clusters(read, header, "an image", descriptor=file.fileno())
    assert sum(asked) < 16 << 20


def test_bitmaps_of_subclusters_are_no_places() -> None:
    forged = Forged(
        cluster_bits=14, incompatible=16, length=7 << 14, l1_offset=3 << 14, refcount_offset=1 << 14
    )
    data = bytearray(forged.build())
    data[3 << 14 : (3 << 14) + 8] = struct.pack(">Q", COPIED | 4 << 14)
    data[4 << 14 : (4 << 14) + 16] = struct.pack(">QQ", COPIED | 5 << 14, 0xFFFFFFFF00000000)

    def read(offset: int, size: int) -> bytes:
        return bytes(data[offset : offset + size])

    check_clusters(read, check_image(read, len(data), "an image"), "an image")
    for entry, bitmap in ((COPIED | 5 << 14, 0x100000001), (0, 1)):
        data[4 << 14 : (4 << 14) + 16] = struct.pack(">QQ", entry, bitmap)
        with pytest.raises(UnsafeImage, match="contradicts itself"):
            check_clusters(read, check_image(read, len(data), "an image"), "an image")
    data[4 << 14 : (4 << 14) + 8] = struct.pack(">Q", COPIED | 7 << 14)
    with pytest.raises(UnsafeImage):
        check_clusters(read, check_image(read, len(data), "an image"), "an image")
