"""The reader of headers: what it takes apart, what it refuses, and how little it reads."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import AccessDenied, MissingFile, UnsafeImage, UsageError
from statepool.qcow2.checks import CHECKS, Backing, check_image, warnings
from statepool.qcow2.header import (
    EXTENSION_BITMAPS,
    HEADER_AREA,
    Header,
    Patch,
    Read,
    apply_patches,
    backing_patch,
    has_protocol,
    is_empty_overlay,
    read_header,
    read_header_fd,
    read_header_file,
)
from statepool.qcow2.overlay import overlay_bytes
from tests.support.images import CHILD, GOOD, HOSTILE, Forged
from tests.support.privileges import permissions_count


def in_memory(data: bytes) -> Read:
    return lambda offset, size: data[offset : offset + size]


def header_of(data: bytes) -> Header:
    return read_header(in_memory(data), len(data), "an image")


class Watched:
    """Reads bytes in memory, and remembers what was read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []

    def __call__(self, offset: int, size: int) -> bytes:
        self.reads.append((offset, size))
        return self.data[offset : offset + size]


def test_every_field_is_read() -> None:
    forged = Forged(
        backing=b"parent.qcow2",
        formats=(b"raw", b"qcow2"),
        extensions=(
            (EXTENSION_BITMAPS, struct.pack(">IIQQ", 3, 0, 96, 7 << 12)),
            (0x12345678, b"abc"),
        ),
        virtual_size=12345,
        crypt_method=2,
        l1_size=7,
        l1_offset=4 << 12,
        refcount_offset=5 << 12,
        refcount_clusters=2,
        snapshots=3,
        snapshots_offset=6 << 12,
        incompatible=0b11000,
        compatible=1,
        autoclear=3,
        refcount_order=6,
        compression=1,
    )
    header = header_of(forged.build())
    assert (header.version, header.virtual_size, header.cluster_bits, header.cluster_size) == (
        3,
        12345,
        12,
        4096,
    )
    assert (header.backing_name, header.backing_length) == (b"parent.qcow2", 12)
    assert (header.backing_format, header.backing_formats) == (b"qcow2", 2)
    assert (
        header.l1_size,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
    ) == (7, 4 << 12, 5 << 12, 2)
    assert (header.snapshots, header.snapshots_offset, header.crypt_method, header.compression) == (
        3,
        6 << 12,
        2,
        1,
    )
    assert (
        header.incompatible,
        header.compatible,
        header.autoclear,
        header.refcount_order,
        header.header_length,
    ) == (0b11000, 1, 3, 6, 112)
    assert header.bitmaps
    assert header.bitmap_directory is not None
    assert (
        header.bitmap_directory.count,
        header.bitmap_directory.directory_size,
        header.bitmap_directory.directory_offset,
    ) == (3, 96, 7 << 12)
    assert [(kind, length) for kind, _, length in header.extensions] == [
        (0xE2792ACA, 3),
        (0xE2792ACA, 5),
        (EXTENSION_BITMAPS, 24),
        (0x12345678, 3),
    ]
    assert header.file_size == (3 << 12) + 8


def test_version_2_has_the_defaults_of_its_time() -> None:
    header = header_of(evolve(CHILD, version=2).build())
    assert (header.version, header.header_length, header.refcount_order, header.incompatible) == (
        2,
        72,
        4,
        0,
    )
    assert (header.backing_name, header.backing_format) == (b"parent.qcow2", b"qcow2")


@pytest.mark.parametrize("lie", [{"backing_length": 0}, {"backing_offset": 0}])
def test_a_name_without_place_or_length_backs_nothing(lie: dict[str, int]) -> None:
    assert header_of(evolve(CHILD, **lie).build()).backing_name is None


def test_one_read_is_enough_for_a_usual_header() -> None:
    read = Watched(overlay_bytes(1 << 30, "parent.qcow2"))
    read_header(read, len(read.data), "an image")
    assert len(read.reads) == 1


def test_a_long_header_costs_a_second_read_and_no_more() -> None:
    extensions = ((0x12345678, bytes(6000)),)
    data = bytearray(evolve(CHILD, cluster_bits=16, extensions=extensions).build())
    forged = evolve(CHILD, cluster_bits=16, extensions=extensions, length=1 << 18)
    read = Watched(_relaid(forged))
    header = read_header(read, len(data), "an image")
    assert header.backing_name == b"parent.qcow2"
    assert len(read.reads) == 2
    assert sum(size for _, size in read.reads) <= HEADER_AREA


def _relaid(forged: Forged) -> bytes:
    """With a header so long that it lies where the tables of the small image would be."""
    whole = bytearray(forged.length or 0)
    start = struct.pack(">II", 0xE2792ACA, 5) + b"qcow2\0\0\0"
    for kind, data in forged.extensions:
        start += struct.pack(">II", kind, len(data)) + data
    start += bytes(8)
    fixed = forged.build()[:112]
    whole[: 112 + len(start) + 12] = fixed + start + b"parent.qcow2"
    return bytes(whole)


def test_a_name_behind_the_header_area_is_refused_without_reading_it() -> None:
    read = Watched(evolve(CHILD, cluster_bits=21, backing_offset=1 << 20).build())
    with pytest.raises(UnsafeImage) as caught:
        read_header(read, 1 << 30, "an image")
    assert caught.value.check == "backing-name-place"
    assert len(read.reads) == 1


def test_a_raw_image_is_told_how_to_become_one() -> None:
    with pytest.raises(UnsafeImage, match="qemu-img convert -f raw -O qcow2 IN OUT") as caught:
        header_of(bytes(4096))
    assert caught.value.check == "magic"


@given(data=st.binary(max_size=400))
def test_no_bytes_raise_anything_but_a_refusal(data: bytes) -> None:
    _only_refused(data)
    _only_refused(b"QFI\xfb\0\0\0\3" + data)


@given(
    name=st.sampled_from([None, *HOSTILE]),
    changes=st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=8)), max_size=6),
    cut=st.none() | st.integers(0, 13000),
)
def test_no_corruption_raises_anything_but_a_refusal(
    name: str | None, changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    data = bytearray(CHILD.build() if name is None else HOSTILE[name][0]())
    for offset, change in changes:
        data[offset : offset + len(change)] = change
    _only_refused(bytes(data[:cut]))


def _only_refused(data: bytes) -> None:
    read = Watched(data)
    refused = None
    try:
        warnings(check_image(read, len(data), "an image", backing=Backing.UNMANAGED))
    except UnsafeImage as error:
        refused = error.check
    assert refused is None or refused in CHECKS
    assert len(read.reads) <= 2
    assert all(offset + size <= HEADER_AREA for offset, size in read.reads)


# -- files -----------------------------------------------------------------------------------------


def test_files_and_descriptors_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "child.qcow2"
    path.write_bytes(CHILD.build())
    with path.open("rb") as file:
        assert (
            read_header_file(path)
            == read_header_file(str(path))
            == read_header_fd(file.fileno(), "it")
            == header_of(CHILD.build())
        )


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        os.mkdir,
        lambda path: os.symlink("good", path),
        lambda path: os.symlink("nowhere", path),
    ],
)
def test_only_regular_files_are_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "good").write_bytes(GOOD.build())
    make(tmp_path / "x.qcow2")
    with pytest.raises(UnsafeImage) as caught:
        read_header_file(tmp_path / "x.qcow2")
    assert caught.value.check == "regular-file"
    assert caught.value.path == str(tmp_path / "x.qcow2")


def test_what_is_not_there_or_not_ours_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(MissingFile) as caught:
        read_header_file(tmp_path / "nothing.qcow2")
    assert caught.value.path == str(tmp_path / "nothing.qcow2")
    with pytest.raises(MissingFile):
        read_header_file(tmp_path / "no-directory" / "nothing.qcow2")


def test_what_may_not_be_read_is_said_so(tmp_path: Path) -> None:
    path = tmp_path / "secret.qcow2"
    path.write_bytes(GOOD.build())
    path.chmod(0)
    with permissions_count(), pytest.raises(AccessDenied):
        read_header_file(path)


def test_messages_name_the_image_and_the_path(tmp_path: Path) -> None:
    path = tmp_path / "text.qcow2"
    path.write_text("hello")
    with pytest.raises(
        UnsafeImage, match="vm1/disk install is refused by the safety check 'magic'"
    ) as caught:
        read_header_file(path, "vm1/disk install")
    assert caught.value.path == str(path)


# -- empty overlays --------------------------------------------------------------------------------


def test_an_overlay_is_empty_until_something_is_written() -> None:
    data = bytearray(overlay_bytes(1 << 44, "parent.qcow2"))
    header = header_of(bytes(data))
    read = Watched(data)
    assert is_empty_overlay(read, header)
    assert sum(size for _, size in read.reads) == header.l1_size * 8
    data[header.l1_offset + header.l1_size * 8 - 1] = 1
    assert not is_empty_overlay(in_memory(bytes(data)), header)


def test_what_cannot_be_read_is_not_empty() -> None:
    data = overlay_bytes(1 << 30, "parent.qcow2")
    header = header_of(data)
    assert not is_empty_overlay(in_memory(data[:-8]), header)


def test_an_image_with_internal_snapshots_is_not_empty() -> None:
    data = overlay_bytes(1 << 30, "parent.qcow2")
    assert not is_empty_overlay(in_memory(data), evolve(header_of(data), snapshots=1))


# -- patches ---------------------------------------------------------------------------------------


def patched(data: bytes, patches: tuple[Patch, ...]) -> bytes:
    image = bytearray(data)
    for offset, change in patches:
        image[offset : offset + len(change)] = change
    assert len(image) == len(data)
    return bytes(image)


@pytest.mark.parametrize(
    "name", ["a.qcow2", "parent.qcow2", "b" * 12, "/srv/pool/vm1/disk/" + "c" * 500 + ".qcow2"]
)
def test_a_patch_changes_the_name_and_nothing_else(name: str) -> None:
    data = evolve(CHILD, backing=b"/srv/old/parent.qcow2").build()
    before = header_of(data)
    patches = backing_patch(in_memory(data), before, name)
    assert patches is not None
    after = patched(data, patches)
    header = header_of(after)
    assert header == evolve(before, backing_name=name.encode(), backing_length=len(name))
    assert all(offset in (16, before.backing_offset) for offset, _ in patches)
    rest = before.backing_offset + max(len(name), before.backing_length)
    assert after[20 : before.backing_offset] == data[20 : before.backing_offset]
    assert after[rest:] == data[rest:]
    assert after[before.backing_offset + len(name) : rest] == bytes(
        rest - before.backing_offset - len(name)
    )


def test_the_same_name_needs_no_patch() -> None:
    data = CHILD.build()
    assert backing_patch(in_memory(data), header_of(data), "parent.qcow2") == ()


def test_a_name_does_not_grow_over_something_or_out_of_its_cluster() -> None:
    data = bytearray(CHILD.build())
    header = header_of(bytes(data))
    data[header.backing_offset + header.backing_length + 3] = 1
    assert backing_patch(in_memory(bytes(data)), header, "grandparent.qcow2") is None
    narrow = evolve(CHILD, backing=b"p.qcow2", extensions=((0x12345678, bytes(3900)),)).build()
    assert backing_patch(in_memory(narrow), header_of(narrow), "x" * 100 + ".qcow2") is None


def test_an_image_without_a_backing_name_gets_none() -> None:
    data = GOOD.build()
    assert backing_patch(in_memory(data), header_of(data), "parent.qcow2") is None


@pytest.mark.parametrize(
    "name", ["", "a" * 1024, "a\0b", "a\nb", "nbd:x", "json:{}", "file:a.qcow2", "é" * 512]
)
def test_names_that_nothing_can_have_are_usage_errors(name: str) -> None:
    data = CHILD.build()
    with pytest.raises(UsageError):
        backing_patch(in_memory(data), header_of(data), name)


def test_patches_are_applied_to_files(tmp_path: Path) -> None:
    path = tmp_path / "child.qcow2"
    path.write_bytes(CHILD.build())
    patches = backing_patch(in_memory(CHILD.build()), header_of(CHILD.build()), "a.qcow2")
    assert patches is not None
    with path.open("r+b") as file:
        apply_patches(file.fileno(), patches)
    assert path.read_bytes() == patched(CHILD.build(), patches)


@pytest.mark.parametrize(
    ("name", "has"),
    [
        (b"a", False),
        (b"a:b", True),
        (b"/a:b", False),
        (b"d/a:b", False),
        (b":", True),
        (b"", False),
        (b"json:{}", True),
        (b"nbd://h/x", True),
    ],
)
def test_protocols_are_seen_as_qemu_sees_them(name: bytes, has: bool) -> None:
    assert has_protocol(name) is has
