"""Our reader of headers against the installed qemu-img."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool.errors import ToolError, UnsafeImage
from statepool.qcow2.checks import Backing, check_file, warnings
from statepool.qcow2.clusters import check_clusters
from statepool.qcow2.header import (
    apply_patches,
    backing_patch,
    is_empty_overlay,
    read_header_file,
    reader,
)
from statepool.qcow2.tool import QemuImg

QemuImgRun = Callable[..., str]
MakeImage = Callable[..., Path]

OPTIONS = [
    "",
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "cluster_size=512",
    "cluster_size=1024",
    "cluster_size=4096",
    "cluster_size=8192",
    "cluster_size=65536",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=8",
    "refcount_bits=64",
    "lazy_refcounts=on",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16384",
    "extended_l2=on,cluster_size=2M",
    "compression_type=zstd",
    "compression_type=zstd,extended_l2=on,lazy_refcounts=on,refcount_bits=32",
    "extended_l2=on,preallocation=metadata",
]

CASES = [(options, backed) for options in OPTIONS for backed in (False, True)]
# qemu-img refuses these over a backing file
CASES += [("preallocation=metadata", False), ("preallocation=falloc", False)]


@pytest.fixture
def said(qemu_img: QemuImgRun) -> Callable[[Path], dict[str, Any]]:
    def info(path: Path) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", path))
        return answer

    return info


@pytest.mark.parametrize(("options", "backed"), CASES)
def test_what_qemu_img_makes_is_read_as_qemu_img_reads_it(
    tmp_path: Path,
    make_image: MakeImage,
    said: Callable[[Path], dict[str, Any]],
    options: str,
    backed: bool,
) -> None:
    make_image(tmp_path / "parent.qcow2", 5 << 20)
    path = make_image(
        tmp_path / "x.qcow2",
        (5 << 20) + 512,
        options=options or None,
        backing="parent.qcow2" if backed else None,
        writes=[(1 << 20, 70000, 0x5A), (0, 512, 1)],
    )
    info = said(path)
    data = info["format-specific"]["data"]
    header = check_file(path, parent="parent" if backed else None)
    assert header.virtual_size == info["virtual-size"]
    assert header.cluster_size == info["cluster-size"]
    assert header.version == {"0.10": 2, "1.1": 3}[data["compat"]]
    assert bool(header.incompatible & 1) == info["dirty-flag"]
    assert header.backing_name == (info["backing-filename"].encode() if backed else None)
    assert header.backing_format == (info["backing-filename-format"].encode() if backed else None)
    assert 1 << header.refcount_order == data.get("refcount-bits", 16)
    assert bool(header.compatible & 1) == data.get("lazy-refcounts", False)
    assert bool(header.incompatible & 16) == data.get("extended-l2", False)
    assert bool(header.incompatible & 2) == data.get("corrupt", False)
    assert ["zlib", "zstd"][header.compression] == data["compression-type"]
    assert header.snapshots == len(info.get("snapshots", []))
    assert header.file_size == path.stat().st_size
    with path.open("rb") as file:
        assert not is_empty_overlay(reader(file.fileno()), header)
        check_clusters(reader(file.fileno()), header, "it")


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_images(
    tmp_path: Path, make_image: MakeImage, qemu_img: QemuImgRun, compression: str
) -> None:
    source = make_image(tmp_path / "source.qcow2", 4 << 20, writes=[(0, 3 << 20, 0x11)])
    path = tmp_path / "x.qcow2"
    qemu_img(
        "convert",
        "-f",
        "qcow2",
        "-O",
        "qcow2",
        "-c",
        "-o",
        f"compression_type={compression}",
        source,
        path,
    )
    header = check_file(path, parent=None)
    with path.open("rb") as file:
        check_clusters(reader(file.fileno()), header, "it")


def test_snapshots_and_bitmaps_are_seen_as_qemu_img_sees_them(
    tmp_path: Path,
    make_image: MakeImage,
    qemu_img: QemuImgRun,
    said: Callable[[Path], dict[str, Any]],
) -> None:
    path = make_image(tmp_path / "x.qcow2", writes=[(0, 65536, 1)])
    assert warnings(check_file(path)) == ()
    qemu_img("snapshot", "-c", "one", path)
    qemu_img("snapshot", "-c", "two", path)
    qemu_img("bitmap", "--add", "-f", "qcow2", path, "changes")
    header = check_file(path)
    assert header.snapshots == len(said(path)["snapshots"]) == 2
    assert header.bitmap_directory is not None
    assert (
        header.bitmap_directory.count == len(said(path)["format-specific"]["data"]["bitmaps"]) == 1
    )
    assert len(warnings(header)) == 2
    qemu_img("bitmap", "--remove", "-f", "qcow2", path, "changes")
    qemu_img("snapshot", "-d", "one", path)
    qemu_img("snapshot", "-d", "two", path)
    assert warnings(check_file(path)) == ()


def test_an_image_that_has_lost_its_backing_name_has_none(
    tmp_path: Path, make_image: MakeImage, qemu_img: QemuImgRun
) -> None:
    make_image(tmp_path / "parent.qcow2")
    path = make_image(tmp_path / "x.qcow2", None, backing="parent.qcow2")
    qemu_img("rebase", "-f", "qcow2", "-b", "", path)
    assert check_file(path, parent=None).backing_name is None


def test_an_image_that_is_encrypted_by_luks(tmp_path: Path, qemu_img: QemuImgRun) -> None:
    path = tmp_path / "x.qcow2"
    secret = "secret,id=key,data=abc"
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    create = (
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        secret,
        "-o",
        options,
        str(path),
        "1M",
    )
    # qemu-img measures how fast this machine derives keys. Where the CPU's time is counted in
    # coarse ticks, that fails now and then.
    for _ in range(50):
        done = subprocess.run(create, capture_output=True, text=True, check=False)
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    with pytest.raises(UnsafeImage) as caught:
        check_file(path)
    assert caught.value.check == "encryption"


def test_an_image_with_an_external_data_file(tmp_path: Path, qemu_img: QemuImgRun) -> None:
    path = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data.raw'}", path, "1M")
    with pytest.raises(UnsafeImage) as caught:
        check_file(path)
    assert caught.value.check == "data-file"


def test_a_backing_format_that_qemu_img_was_told_falsely(
    tmp_path: Path, make_image: MakeImage, qemu_img: QemuImgRun
) -> None:
    make_image(tmp_path / "parent.qcow2")
    path = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "parent.qcow2", "-F", "raw", path)
    with pytest.raises(UnsafeImage) as caught:
        check_file(path)
    assert caught.value.check == "backing-format-false"


def test_a_lazy_image_that_was_not_closed_is_dirty(
    tmp_path: Path, make_image: MakeImage, qemu_img: QemuImgRun
) -> None:
    path = make_image(tmp_path / "x.qcow2", options="lazy_refcounts=on")
    # Ends itself by SIGABRT after the write, before it could close the image.
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 64k", "-c", "flush", "-c", "abort", str(path)],
        capture_output=True,
        check=False,
    )
    with pytest.raises(UnsafeImage) as caught:
        check_file(path)
    assert caught.value.check == "dirty"
    qemu_img("check", "-q", "-f", "qcow2", "-r", "all", path)
    check_file(path)


def test_data_that_was_cut_off_is_missed(tmp_path: Path, make_image: MakeImage) -> None:
    path = make_image(
        tmp_path / "x.qcow2", 8 << 20, writes=[(number << 16, 65536, 0x5A) for number in range(128)]
    )
    whole = path.stat().st_size
    refused = 0
    for length in range(5 << 16, whole, 1 << 16):
        os.truncate(path, length)
        header = check_file(path)
        with path.open("rb") as file, pytest.raises(UnsafeImage) as caught:
            check_clusters(reader(file.fileno()), header, "it")
        assert caught.value.check == "clusters"
        refused += 1
    assert refused > 100


# -- patches ---------------------------------------------------------------------------------------

NAMES = [
    "p.qcow2",
    "parent.qcow2",
    "a-name-that-is-much-longer-than-the-one-which-was-there-before.qcow2",
    "/" + "directory/" * 90 + "parent.qcow2",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "cluster_size=2M",
        "cluster_size=4096",
        "extended_l2=on,compression_type=zstd",
    ],
)
def test_a_patched_image_has_its_new_name_and_its_old_content(
    tmp_path: Path,
    make_image: MakeImage,
    said: Callable[[Path], dict[str, Any]],
    options: str,
    name: str,
) -> None:
    tool = QemuImg()
    old = make_image(tmp_path / "old" / "parent.qcow2", 4 << 20, writes=[(0, 1 << 20, 0x33)])
    path = make_image(
        tmp_path / "x.qcow2",
        None,
        backing=old,
        options=options or None,
        writes=[(1 << 19, 70000, 0x44)],
    )
    before = tmp_path / "before.qcow2"
    before.write_bytes(path.read_bytes())
    header = check_file(path, backing=Backing.WORKING)
    with path.open("r+b") as file:
        patches = backing_patch(reader(file.fileno()), header, name)
        assert patches is not None
        apply_patches(file.fileno(), patches)
    assert said(path)["backing-filename"] == name
    assert said(path)["backing-filename-format"] == "qcow2"
    assert read_header_file(path).extensions == header.extensions
    assert path.stat().st_size == before.stat().st_size
    if not name.startswith("/"):
        (tmp_path / name).write_bytes(old.read_bytes())
        assert tool.check(path).get("check-errors") == 0
        assert "corruptions" not in tool.check(path)
        assert tool.compare(path, before)


def test_what_cannot_be_patched_can_be_rebased(
    tmp_path: Path, make_image: MakeImage, said: Callable[[Path], dict[str, Any]]
) -> None:
    make_image(tmp_path / "p.qcow2")
    path = make_image(tmp_path / "x.qcow2", None, backing="p.qcow2", options="cluster_size=512")
    name = "a" * 100 + ".qcow2"
    header = read_header_file(path)
    with path.open("rb") as file:
        while backing_patch(reader(file.fileno()), header, name) is not None:
            name = "a" + name
    assert len(name) > 300
    with pytest.raises(ToolError):
        QemuImg().rebase_unsafe(path, name)
    QemuImg().rebase_unsafe(path, "b" * 100 + ".qcow2")
    assert said(path)["backing-filename"] == "b" * 100 + ".qcow2"
