"""The overlays that we write against those of the installed qemu-img, byte by byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.qcow2.checks import check_file
from statepool.qcow2.overlay import create_overlay, is_native, matches_installed, overlay_bytes
from statepool.qcow2.tool import QemuImg

GIB = 1 << 30
TIB = 1 << 40

SIZES = [
    0,
    1,
    511,
    512,
    513,
    1000,
    65535,
    65536,
    (1 << 29) - 1,
    1 << 29,
    (1 << 29) + 1,
    GIB,
    10 * GIB,
    10 * GIB + 12345,
    TIB,
    4 * TIB,
    64 * TIB,
    2048 * TIB,
]
NAMES = [1, 7, 12, 100, 255, 256, 500, 1000, 1022, 1023]


def qemu_imgs(directory: Path, size: int, name: str, cluster_size: int = 65536) -> bytes:
    path = directory / "theirs.qcow2"
    QemuImg().create_overlay(path, name, size, cluster_size=cluster_size)
    return path.read_bytes()


@pytest.mark.parametrize("size", SIZES)
def test_sizes(tmp_path: Path, size: int) -> None:
    assert is_native(size, "parent.qcow2")
    assert overlay_bytes(size, "parent.qcow2") == qemu_imgs(tmp_path, size, "parent.qcow2")


@pytest.mark.parametrize("length", NAMES)
def test_names(tmp_path: Path, length: int) -> None:
    for name in ("n" * length, "/" + "é" * ((length - 1) // 2)):
        assert overlay_bytes(GIB, name) == qemu_imgs(tmp_path, GIB, name)


@pytest.mark.parametrize("bits", range(13, 22))
def test_cluster_sizes(tmp_path: Path, bits: int) -> None:
    compared = 0
    for size in (0, 1, 10 << 20, GIB, 64 * GIB, TIB, 16 * TIB):
        if is_native(size, "parent.qcow2", cluster_size=1 << bits):
            compared += 1
            assert overlay_bytes(size, "parent.qcow2", cluster_size=1 << bits) == qemu_imgs(
                tmp_path, size, "parent.qcow2", 1 << bits
            )
    assert compared >= 3


@pytest.mark.parametrize(
    ("size", "cluster_size"), [(GIB, 4096), (GIB, 512), (64 * GIB, 512), (32 * TIB, 8192)]
)
def test_what_qemu_img_lays_out_otherwise_is_made_by_it(
    tmp_path: Path, size: int, cluster_size: int
) -> None:
    assert not is_native(size, "parent.qcow2", cluster_size=cluster_size)
    create_overlay(tmp_path / "ours.qcow2", size, "parent.qcow2", cluster_size=cluster_size)
    assert (tmp_path / "ours.qcow2").read_bytes() == qemu_imgs(
        tmp_path, size, "parent.qcow2", cluster_size
    )
    assert check_file(tmp_path / "ours.qcow2", parent="parent").cluster_size == cluster_size


def test_an_overlay_is_a_sound_image_with_its_parents_content(
    tmp_path: Path,
    make_image: Callable[..., Path],
    qemu_img: Callable[..., str],
    write_to_image: Callable[..., None],
) -> None:
    tool = QemuImg()
    parent = make_image(tmp_path / "parent.qcow2", 5 << 20, writes=[(0, 3 << 20, 0x77)])
    for name in ("parent.qcow2", str(parent)):
        path = tmp_path / "work.qcow2"
        create_overlay(path, 5 << 20, name)
        assert tool.compare(path, parent)
        write_to_image(path, [(1 << 20, 1 << 20, 0x12)])
        assert not tool.compare(path, parent)
        assert {
            key: tool.check(path).get(key, 0) for key in ("corruptions", "leaks", "check-errors")
        } == {
            "corruptions": 0,
            "leaks": 0,
            "check-errors": 0,
        }
        info = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", path))
        assert (info["virtual-size"], info["full-backing-filename"]) == (5 << 20, str(parent))
        path.unlink()


def test_a_host_is_told_whether_its_qemu_img_agrees() -> None:
    assert matches_installed(QemuImg())
