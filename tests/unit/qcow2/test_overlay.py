"""Overlays that are written without qemu-img."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import FileInTheWay, MissingFile, NoSpace, ToolError, UsageError
from statepool.qcow2 import overlay
from statepool.qcow2.checks import Backing, check_file, check_image
from statepool.qcow2.header import is_empty_overlay, read_header
from statepool.qcow2.overlay import create_overlay, is_native, overlay_bytes
from statepool.qcow2.tool import QemuImg


class NoTool(QemuImg):
    """Says when it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def create_overlay(
        self, path: Path | str, backing_name: str, virtual_size: int, *, cluster_size: int = 65536
    ) -> None:
        self.asked += 1
        raise ToolError("there is no tool")


@given(size=st.integers(0, 1 << 44), bits=st.integers(13, 21))
def test_every_overlay_passes_the_checks_and_is_empty(size: int, bits: int) -> None:
    if not is_native(size, "parent.qcow2", cluster_size=1 << bits) or size >> bits > 1 << 22:
        return
    data = overlay_bytes(size, "parent.qcow2", cluster_size=1 << bits)

    def read(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    header = check_image(read, len(data), "an overlay", parent="parent")
    assert size <= header.virtual_size < size + 512
    assert header.virtual_size % 512 == 0
    assert header.cluster_bits == bits
    assert is_empty_overlay(read, header)


def test_a_file_is_what_the_bytes_are_and_mostly_holes(tmp_path: Path) -> None:
    path = tmp_path / "work.qcow2"
    create_overlay(path, 1 << 40, "/srv/cache/parent.qcow2", tool=NoTool())
    assert path.read_bytes() == overlay_bytes(1 << 40, "/srv/cache/parent.qcow2")
    assert check_file(path, backing=Backing.WORKING).backing_name == b"/srv/cache/parent.qcow2"
    assert path.stat().st_blocks * 512 < path.stat().st_size / 2


def test_the_mode_is_what_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        create_overlay(tmp_path / "work.qcow2", 1 << 30, "parent.qcow2")
    finally:
        os.umask(before)
    assert (tmp_path / "work.qcow2").stat().st_mode & 0o7777 == 0o640


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dead link"])
def test_what_is_there_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "work.qcow2"
    (tmp_path / "other").write_bytes(b"precious")
    if kind == "file":
        path.write_bytes(b"precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("other" if kind == "link" else "nothing")
    before = sorted((entry.name, entry.lstat().st_ino) for entry in tmp_path.iterdir())
    with pytest.raises(FileInTheWay) as caught:
        create_overlay(path, 1 << 30, "parent.qcow2")
    assert caught.value.path == str(path)
    assert sorted((entry.name, entry.lstat().st_ino) for entry in tmp_path.iterdir()) == before
    assert (tmp_path / "other").read_bytes() == b"precious"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        create_overlay(tmp_path / "nothing" / "work.qcow2", 1 << 30, "parent.qcow2")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_no_space_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int, __: object) -> None:
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(overlay, "apply_patches", full)
    with pytest.raises(NoSpace):
        create_overlay(tmp_path / "work.qcow2", 1 << 30, "parent.qcow2")
    assert list(tmp_path.iterdir()) == []


def test_what_would_be_laid_out_otherwise_is_left_to_the_tool(tmp_path: Path) -> None:
    assert not is_native(1 << 30, "parent.qcow2", cluster_size=4096)
    with pytest.raises(UsageError):
        overlay_bytes(1 << 30, "parent.qcow2", cluster_size=4096)
    tool = NoTool()
    with pytest.raises(ToolError):
        create_overlay(
            tmp_path / "work.qcow2", 1 << 30, "parent.qcow2", cluster_size=4096, tool=tool
        )
    assert tool.asked == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [-1, 1 << 63, (2 << 50) + 512])
def test_sizes_that_no_l1_table_covers(size: int) -> None:
    assert not is_native(size, "parent.qcow2")


@pytest.mark.parametrize("name", ["", "a" * 1024, "a\0b", "a\nb", "nbd:x", "json:{}"])
def test_bad_backing_names_make_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        create_overlay(tmp_path / "work.qcow2", 1 << 30, name)
    assert list(tmp_path.iterdir()) == []


def test_the_header_names_its_parts() -> None:
    data = overlay_bytes(1 << 30, "parent.qcow2")
    header = read_header(lambda offset, size: data[offset : offset + size], len(data), "an overlay")
    assert [kind for kind, _, _ in header.extensions] == [0xE2792ACA, 0x6803F857]


@pytest.mark.parametrize(
    ("size", "clusters"), [(1 << 51, 1 << 16), ((1 << 51) + 512, 1 << 17), (1 << 61, 1 << 21)]
)
def test_the_clusters_are_as_large_as_the_disk_demands(
    tmp_path: Path, size: int, clusters: int
) -> None:
    create_overlay(tmp_path / "work.qcow2", size, "parent.qcow2", tool=NoTool())
    header = check_file(tmp_path / "work.qcow2", "it", parent="parent", backing=Backing.SIBLING)
    assert (header.virtual_size, 1 << header.cluster_bits) == (size, clusters)


def test_what_the_tool_has_removed_is_no_error(tmp_path: Path) -> None:
    class Removing(NoTool):
        def create_overlay(
            self,
            path: Path | str,
            backing_name: str,
            virtual_size: int,
            *,
            cluster_size: int = 65536,
        ) -> None:
            (tmp_path / "work.qcow2").unlink()
            super().create_overlay(path, backing_name, virtual_size, cluster_size=cluster_size)

    with pytest.raises(ToolError, match="there is no tool"):
        create_overlay(
            tmp_path / "work.qcow2", 1 << 30, "parent.qcow2", cluster_size=4096, tool=Removing()
        )
