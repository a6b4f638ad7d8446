"""The names of an image while a machine goes from it to an overlay, cut off at every step."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from statepool.qcow2.header import read_header_file
from statepool.qcow2.tool import QemuImg
from statepool.transfer.frozen import Names, is_below, names_below, settle_names

MIB = 1 << 20
MakeImage = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


@pytest.fixture
def working(tmp_path: Path, make_image: MakeImage) -> Path:
    """A working image with 1 in its first cluster, over a state with 2 in its second one."""
    make_image(tmp_path / "state.qcow2", writes=[(65536, 65536, 2)])
    return make_image(tmp_path / "work.qcow2", backing=tmp_path / "state.qcow2", size=None, writes=[(0, 65536, 1)])


def content(path: Path) -> tuple[int, int, int]:
    raw = path.with_suffix(".raw")
    QemuImg().convert(path, raw, target_format="raw")
    data = raw.read_bytes()
    raw.unlink()
    return data[0], data[65536], data[131072]


def left(working: Path) -> list[str]:
    return [name for name in os.listdir(working.parent) if name not in ("work.qcow2", "state.qcow2")]


def test_before_qemu_goes_on_nothing_has_happened(working: Path) -> None:
    inode = working.stat().st_ino
    names = Names.new(working)
    names.prepare(4 * MIB)
    assert len(left(working)) == 2
    settle_names(working)
    assert left(working) == []
    assert working.stat().st_ino == inode


def test_what_is_left_of_the_first_and_of_the_last_step(working: Path, make_image: MakeImage) -> None:
    os.link(working, Names.new(working).below)
    make_image(Names.new(working).below, backing=working.parent / "state.qcow2", size=None)
    settle_names(working)
    assert left(working) == []


def test_what_was_written_after_qemu_went_on_is_not_lost(working: Path, write_to_image: Write) -> None:
    names = Names.new(working)
    names.prepare(4 * MIB)
    write_to_image(names.live, [(131072, 65536, 3)])  # as QEMU would
    settle_names(working)
    assert content(working) == (1, 2, 3)
    settle_names(working)
    assert content(working) == (1, 2, 3)
    assert left(working) == []
    assert read_header_file(working).backing_name == os.fsencode(working.parent / "state.qcow2")


def test_a_root_of_a_chain_stands_alone_again(tmp_path: Path, make_image: MakeImage, write_to_image: Write) -> None:
    working = make_image(tmp_path / "work.qcow2", writes=[(0, 65536, 1)])
    names = Names.new(working)
    names.prepare(4 * MIB)
    write_to_image(names.live, [(131072, 65536, 3)])
    names.switch()
    settle_names(working)
    assert content(working) == (1, 0, 3)
    assert left(working) == []
    assert read_header_file(working).backing_name is None


def test_an_overlay_stands_again_on_what_became_a_state(working: Path, write_to_image: Write, make_image: MakeImage) -> None:
    names = Names.new(working)
    names.prepare(4 * MIB)
    write_to_image(names.live, [(131072, 65536, 3)])
    names.switch()
    assert names_below(working) == names
    # The frozen image becomes a state, and an empty overlay takes its place.
    state = working.with_name("new.qcow2")
    names.below.rename(state)
    make_image(names.below, backing=state, size=None)
    settle_names(working)
    assert read_header_file(working).backing_name == os.fsencode(state)
    assert content(working) == (1, 2, 3)
    assert left(working) == ["new.qcow2"]
    assert names_below(working) is None


def test_while_somebody_runs_on_it_nothing_changes(working: Path, write_to_image: Write) -> None:
    names = Names.new(working)
    names.prepare(4 * MIB)
    write_to_image(names.live, [(131072, 65536, 3)])
    names.switch()
    with subprocess_that_has(names.live):
        settle_names(working)
        assert sorted(left(working)) == sorted([names.live.name, names.below.name])


@contextlib.contextmanager
def subprocess_that_has(path: Path) -> Iterator[None]:
    with open(path, "r+b") as file:
        process = subprocess.Popen(["sleep", "60"], stdin=file)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_second_set_forgets_the_name_of_the_first(working: Path, write_to_image: Write) -> None:
    first, second = Names.new(working), None
    first.prepare(4 * MIB)
    write_to_image(first.live, [(131072, 65536, 3)])
    first.switch()
    second = Names.new(working)
    second.prepare(4 * MIB)
    second.switch()
    assert not first.live.exists()
    assert os.path.samefile(working, second.live)


def test_taking_back(working: Path) -> None:
    inode = working.stat().st_ino
    names = Names.new(working)
    names.prepare(4 * MIB)
    names.switch()
    assert working.stat().st_ino != inode
    names.take_back()
    names.clear()
    assert working.stat().st_ino == inode
    assert left(working) == []


def test_names_of_others_are_left_alone(working: Path) -> None:
    for name in (".work.qcow2.0123456789abcdef.lives", ".other.qcow2.0123456789abcdef.live", ".work.qcow2.short.live"):
        (working.parent / name).touch()
    settle_names(working)
    settle_names(working.parent / "no such directory" / "x")
    assert len(left(working)) == 3
    assert is_below(Path(".work.qcow2.0123456789abcdef.below"))
    assert not is_below(working)
