"""
The root state, by its name: the first image of a machine is set, shown, built on, got and removed
as any other state.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool

MIB = 1 << 20
Run = Callable[..., Any]


@pytest.fixture
def shell(run_statepool: Run, tmp_path: Path) -> Run:
    """``shell("show")``: with a pool."""
    run_statepool("init", "pool")
    return lambda *words, code=0: run_statepool(
        "--cache", tmp_path / "cache", "--source", tmp_path / "pool", *words, code=code
    )


def test_its_whole_life(
    shell: Run, make_image: Callable[..., Path], qemu_img: Callable[..., str], tmp_path: Path
) -> None:
    base = make_image(tmp_path / "base.qcow2", 4 * MIB, writes=[(0, 65536, 7)])
    qemu_img("convert", "-O", "raw", base, tmp_path / "base.raw")
    shell("check", "vm1/disk", "root", code=3)
    shell("get", "vm1/disk", "root", code=3)
    shell("set", "vm1/disk", "root", "--from", base)
    shell("check", "vm1/disk", "root")
    assert (tmp_path / "pool/vm1/disk.qcow2").is_file()
    shell("get", "vm1/disk", "root", "--to", "work.qcow2")
    qemu_img("compare", tmp_path / "work.qcow2", tmp_path / "base.raw")
    shell("set", "vm1/disk", "install", "--from", "work.qcow2")
    assert [line.split()[1] for line in shell("show").out.splitlines()[1:]] == ["install", "root"]
    assert "vm1/disk install depend on it" in shell("unset", "vm1/disk", "root", code=4).err
    shell("unset", "vm1/disk", "root", "--cascade", "--everywhere")
    shell("check", "vm1/disk", "root", code=3)
    assert not (tmp_path / "pool/vm1/disk.qcow2").is_symlink()


def test_it_stands_on_nothing(shell: Run, make_image: Callable[..., Path], tmp_path: Path) -> None:
    shell("set", "vm1/disk", "install", "--from", make_image(tmp_path / "base.qcow2", 4 * MIB))
    # the working image stands on install now
    told = shell("set", "vm1/disk", "root", "--from", "base.qcow2", code=5).err
    assert "it stands on vm1/disk install, and a root state stands on nothing" in told
    assert "qemu-img convert" in told


def test_it_can_be_set_again(
    shell: Run, make_image: Callable[..., Path], qemu_img: Callable[..., str], tmp_path: Path
) -> None:
    """
    The working image stands on the root state then: nothing was written to it, or it is replaced as
    a whole.
    """
    base = make_image(tmp_path / "base.qcow2", 4 * MIB, writes=[(0, 65536, 7)])
    shell("set", "vm1/disk", "root", "--from", base, "--scope", "own")
    shell("set", "vm1/disk", "root", "--from", base)
    assert (tmp_path / "pool/vm1/disk.qcow2").is_file()
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", base], check=True, capture_output=True
    )
    qemu_img("convert", "-O", "raw", base, tmp_path / "base.raw")
    assert "was written to since" in shell("set", "vm1/disk", "root", "--from", base, code=4).err
    shell("set", "vm1/disk", "root", "--from", base, "--squash", "--replace")
    shell("get", "vm1/disk", "root", "--to", "work.qcow2")
    qemu_img("compare", tmp_path / "work.qcow2", tmp_path / "base.raw")
    assert [line.split()[1] for line in shell("show").out.splitlines()[1:]] == ["root"]


def test_that_of_a_machine_is_that_of_its_images(
    shell: Run, make_image: Callable[..., Path], tmp_path: Path
) -> None:
    for image in ("data", "disk"):
        make_image(tmp_path / f"{image}.qcow2", 4 * MIB)
    shell("set", "vm1", "root", "--from", "disk=disk.qcow2", "--from", "data=data.qcow2")
    assert [line.split()[:2] for line in shell("show").out.splitlines()[1:]] == [
        ["vm1/data", "root"],
        ["vm1/disk", "root"],
    ]
    shell("get", "vm1", "root", "--to", "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "data.qcow2",
        "disk.qcow2",
    ]


def test_a_builder_can_start_from_it(make_image: Callable[..., Path], tmp_path: Path) -> None:
    statepool.init(tmp_path / "pool")
    disk = statepool.StatePool(cache=tmp_path / "cache", sources=[tmp_path / "pool"]).image(
        "vm1/disk"
    )
    disk.set("root", source=make_image(tmp_path / "base.qcow2", 4 * MIB))
    built = disk.ensure("install", lambda path: None, parent="root", key="1")
    assert [listed.manifest.parent and listed.manifest.parent.state for listed in disk.show()] == [
        "root",
        None,
    ]
    assert built.name.startswith("install--")
