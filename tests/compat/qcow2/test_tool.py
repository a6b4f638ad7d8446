"""The caller of qemu-img, with the installed one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.errors import ToolError
from statepool.qcow2.checks import Backing, check_file
from statepool.qcow2.tool import QemuImg

MakeImage = Callable[..., Path]
STRANGE = [
    "-x.qcow2",
    "--output=json",
    "nbd:x.qcow2",
    "json:{}",
    "a,b=c.qcow2",
    "new\nline.qcow2",
    "sp ace.qcow2",
    "ü.qcow2",
    "%s.qcow2",
]


def test_the_version(qemu_img: Callable[..., str]) -> None:
    version = QemuImg().version()
    assert version[0].isdigit()
    assert version in qemu_img("--version")


@pytest.mark.parametrize("name", STRANGE)
def test_files_with_strange_names(
    tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = make_image(tmp_path / "made" / "plain.qcow2", 1 << 20, writes=[(0, 4096, 7)])
    monkeypatch.chdir(tmp_path)
    shutil.copy(made, tmp_path / name)
    tool = QemuImg()
    assert tool.info(name)["virtual-size"] == 1 << 20
    assert tool.check(name)["check-errors"] == 0
    assert tool.compare(name, made)
    tool.convert(name, f"{name}.copy")
    assert tool.compare(f"{name}.copy", made)
    tool.create_overlay(f"{name}.overlay", "plain.qcow2", 1 << 20)
    tool.rebase_unsafe(f"{name}.overlay", "other.qcow2")
    assert check_file(tmp_path / f"{name}.overlay", parent="other").virtual_size == 1 << 20
    assert sorted(os.listdir(tmp_path)) == sorted(["made", name, f"{name}.copy", f"{name}.overlay"])


def test_what_backs_an_image_need_not_be_there(tmp_path: Path) -> None:
    tool = QemuImg()
    tool.create_overlay(tmp_path / "x.qcow2", "nothing.qcow2", 1 << 20)
    assert tool.info(tmp_path / "x.qcow2")["backing-filename"] == "nothing.qcow2"
    tool.rebase_unsafe(tmp_path / "x.qcow2", "nothing-else.qcow2")
    info = tool.info(tmp_path / "x.qcow2")
    assert (info["backing-filename"], info["backing-filename-format"]) == (
        "nothing-else.qcow2",
        "qcow2",
    )
    with pytest.raises(ToolError, match="nothing-else"):
        tool.check(tmp_path / "x.qcow2")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="No such file"):
        QemuImg().info(tmp_path / "nothing.qcow2")


def test_formats_are_never_probed(tmp_path: Path) -> None:
    (tmp_path / "raw.qcow2").write_bytes(bytes(1 << 20))
    with pytest.raises(ToolError, match="not in qcow2 format"):
        QemuImg().info(tmp_path / "raw.qcow2")


def test_a_check_tells_of_leaks(tmp_path: Path, make_image: MakeImage) -> None:
    path = make_image(tmp_path / "x.qcow2", 1 << 20)
    with path.open("r+b") as file:
        file.seek((2 << 16) + 2 * 10)
        file.write(b"\0\1")
        file.truncate(11 << 16)
    assert QemuImg().check(path)["leaks"] == 1


def test_a_comparison(tmp_path: Path, make_image: MakeImage) -> None:
    one = make_image(tmp_path / "one.qcow2", writes=[(0, 65536, 1)])
    same = make_image(tmp_path / "same.qcow2", options="cluster_size=4096", writes=[(0, 65536, 1)])
    other = make_image(tmp_path / "other.qcow2", writes=[(0, 65536, 2)])
    assert QemuImg().compare(one, same)
    assert not QemuImg().compare(one, other)


def test_a_rebased_image_holds_what_lay_between(tmp_path: Path, make_image: MakeImage) -> None:
    tool = QemuImg()
    parent = make_image(tmp_path / "parent.qcow2", 8 << 20, writes=[(0, 6 << 20, 1)])
    middle = make_image(
        tmp_path / "middle.qcow2", None, backing="parent.qcow2", writes=[(0, 65536, 2)]
    )
    tip = make_image(
        tmp_path / "tip.qcow2", None, backing="middle.qcow2", writes=[(1 << 20, 65536, 3)]
    )
    squashed = tmp_path / "squashed.qcow2"
    shutil.copy(tip, squashed)
    tool.rebase(squashed, "parent.qcow2")
    assert check_file(squashed, parent="parent").backing_format == b"qcow2"
    assert tool.compare(squashed, tip)
    assert squashed.stat().st_size < middle.stat().st_size * 2 < parent.stat().st_size


def test_a_conversion_holds_everything_a_guest_sees(tmp_path: Path, make_image: MakeImage) -> None:
    tool = QemuImg()
    make_image(tmp_path / "parent.qcow2", 8 << 20, writes=[(0, 6 << 20, 1)])
    tip = make_image(
        tmp_path / "tip.qcow2", None, backing="parent.qcow2", writes=[(1 << 20, 65536, 3)]
    )
    tool.convert(tip, tmp_path / "whole.qcow2", options=["compat=0.10", "cluster_size=4096"])
    header = check_file(tmp_path / "whole.qcow2", backing=Backing.NONE)
    assert (header.version, header.cluster_size) == (2, 4096)
    assert tool.compare(tmp_path / "whole.qcow2", tip)


def test_a_raw_image_becomes_one_that_passes(tmp_path: Path) -> None:
    (tmp_path / "raw.img").write_bytes(os.urandom(1 << 20))
    QemuImg().convert(tmp_path / "raw.img", tmp_path / "x.qcow2", source_format="raw")
    check_file(tmp_path / "x.qcow2", backing=Backing.NONE)


@pytest.mark.parametrize("share", [False, True])
def test_an_image_that_somebody_writes_to(
    tmp_path: Path, make_image: MakeImage, share: bool
) -> None:
    path = make_image(tmp_path / "x.qcow2")
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        process.stdout.readline()
        if share:
            assert QemuImg().info(path, force_share=True)["virtual-size"] == 4 << 20
            assert QemuImg().check(path, force_share=True)["check-errors"] == 0
        else:
            with pytest.raises(ToolError, match="lock"):
                QemuImg().info(path, force_share=False)
            with pytest.raises(ToolError, match="lock"):
                QemuImg().check(path)
        process.communicate("quit\n")
