"""The names of an image while a machine goes from it to an overlay, cut off at every step."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from statepool.capture.frozen import Names, is_below, names_below, settle_names
from statepool.errors import AccessDenied, UnsafeImage
from statepool.qcow2.header import read_header_file
from statepool.qcow2.tool import QemuImg

MIB = 1 << 20
MakeImage = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


@pytest.fixture
def working(tmp_path: Path, make_image: MakeImage) -> Path:
    """A working image with 1 in its first cluster, over a state with 2 in its second one."""
    make_image(tmp_path / "state.qcow2", writes=[(65536, 65536, 2)])
    return make_image(
        tmp_path / "work.qcow2", backing=tmp_path / "state.qcow2", size=None, writes=[(0, 65536, 1)]
    )


def content(path: Path) -> tuple[int, int, int]:
    raw = path.with_suffix(".raw")
    QemuImg().convert(path, raw, target_format="raw")
    data = raw.read_bytes()
    raw.unlink()
    return data[0], data[65536], data[131072]


def left(working: Path) -> list[str]:
    return [
        name for name in os.listdir(working.parent) if name not in ("work.qcow2", "state.qcow2")
    ]


def test_before_qemu_goes_on_nothing_has_happened(working: Path) -> None:
    inode = working.stat().st_ino
    names = Names.new(working)
    names.prepare(4 * MIB)
    assert len(left(working)) == 2
    settle_names(working, lambda _: True)
    assert left(working) == []
    assert working.stat().st_ino == inode


def test_what_is_left_of_the_first_and_of_the_last_step(
    working: Path, make_image: MakeImage
) -> None:
    os.link(working, Names.new(working).below)
    make_image(Path(Names.new(working).below), backing=working.parent / "state.qcow2", size=None)
    settle_names(working, lambda _: True)
    assert left(working) == []


def test_what_was_written_after_qemu_went_on_is_not_lost(
    working: Path, write_to_image: Write
) -> None:
    names = Names.new(working)
    names.prepare(4 * MIB)
    write_to_image(names.live, [(131072, 65536, 3)])  # as QEMU would
    settle_names(working, lambda _: True)
    assert content(working) == (1, 2, 3)
    settle_names(working, lambda _: True)
    assert content(working) == (1, 2, 3)
    assert left(working) == []
    assert read_header_file(working).backing_name == os.fsencode(working.parent / "state.qcow2")


def test_a_root_of_a_chain_stands_alone_again(
    tmp_path: Path, make_image: MakeImage, write_to_image: Write
) -> None:
    working = make_image(tmp_path / "work.qcow2", writes=[(0, 65536, 1)])
    names = Names.new(working)
    names.prepare(4 * MIB)
    write_to_image(names.live, [(131072, 65536, 3)])
    names.switch()
    settle_names(working, lambda _: True)
    assert content(working) == (1, 0, 3)
    assert left(working) == []
    assert read_header_file(working).backing_name is None


def test_an_overlay_stands_again_on_what_became_a_state(
    working: Path, write_to_image: Write, make_image: MakeImage
) -> None:
    names = Names.new(working)
    names.prepare(4 * MIB)
    write_to_image(names.live, [(131072, 65536, 3)])
    names.switch()
    assert names_below(working) == names
    # The frozen image becomes a state, and an empty overlay takes its place.
    state = working.with_name("new.qcow2")
    Path(names.below).rename(state)
    make_image(Path(names.below), backing=state, size=None)
    settle_names(working, lambda _: True)
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
        settle_names(working, lambda _: True)
        assert sorted(left(working)) == sorted([names.live.path, names.below.path])


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
    assert not Path(first.live).exists()
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
    for name in (
        ".work.qcow2.0123456789abcdef.lives",
        ".other.qcow2.0123456789abcdef.live",
        ".work.qcow2.short.live",
    ):
        (working.parent / name).touch()
    settle_names(working, lambda _: True)
    settle_names(working.parent / "no such directory" / "x", lambda _: True)
    assert len(left(working)) == 3
    assert is_below(Path(".work.qcow2.0123456789abcdef.below"))
    assert not is_below(working)


OTHER = 64_321
"""The number of an account that no host has."""

as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a file to another account"
)


@as_root
@pytest.mark.parametrize("suffix", [".below", ".live"])
def test_what_another_account_has_put_beside_an_image(working: Path, suffix: str) -> None:
    """A FIFO is not waited for."""
    planted = working.with_name(f".work.qcow2.0123456789abcdef{suffix}")
    os.mkfifo(planted)
    os.chown(planted, OTHER, OTHER)
    settle_names(working, lambda _: True)
    assert planted.is_fifo()


@as_root
def test_an_image_of_another_account_does_not_take_the_place(
    working: Path, make_image: MakeImage
) -> None:
    inode = working.stat().st_ino
    names = Names.new(working)
    os.link(working, names.below)
    os.chown(make_image(Path(names.live), writes=[(0, 65536, 9)]), OTHER, OTHER)
    settle_names(working, lambda _: True)
    assert working.stat().st_ino == inode
    assert content(working) == (1, 2, 0)


def cut_off(working: Path, write_to_image: Write) -> Names:
    """:returns: the names of an image over a frozen one, as a crash leaves it"""
    names = Names.new(working)
    names.prepare(4 * MIB)
    write_to_image(Path(names.live), [(131072, 65536, 3)])
    names.switch()
    names.live.remove()
    return names


@as_root
@pytest.mark.parametrize("of", ["owner", "mode"])
def test_an_image_that_others_can_exchange_is_not_opened_by_its_name(
    working: Path, write_to_image: Write, of: str
) -> None:
    names = cut_off(working, write_to_image)
    if of == "owner":
        os.chown(working.parent, OTHER, OTHER)
    else:
        working.parent.chmod(0o777)
    with pytest.raises(AccessDenied, match="could exchange"):
        settle_names(working, lambda _: True)
    assert Path(names.below).exists()
    working.parent.chmod(0o1777)  # as /tmp is
    os.chown(working.parent, 0, 0)
    settle_names(working, lambda _: True)
    assert content(working) == (1, 2, 3)


def test_a_frozen_image_that_leads_elsewhere_is_not_opened(
    working: Path, write_to_image: Write
) -> None:
    names = cut_off(working, write_to_image)
    settle_names(working, lambda name: name != str(working.parent / "state.qcow2"))
    assert Path(names.below).exists()
    assert names_below(working) == names


def test_a_frozen_image_with_its_data_elsewhere_is_not_opened(
    working: Path, write_to_image: Write
) -> None:
    """What is in that other file would become part of the image."""
    names = cut_off(working, write_to_image)
    QemuImg().rebase_unsafe(working, "state.qcow2")
    secret = working.parent / "secret"
    secret.write_bytes(bytes(4 * MIB))
    Path(names.below).unlink()
    subprocess.run(
        [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            f"data_file={secret}",
            Path(names.below),
            "4M",
        ],
        check=True,
        timeout=60,
    )
    QemuImg().rebase_unsafe(working, str(names.below))
    with pytest.raises(UnsafeImage, match="data"):
        settle_names(working, lambda _: True)
    assert names_below(working) == names


def test_a_directory_that_is_exchanged_for_a_link(
    working: Path, tmp_path: Path, make_image: MakeImage
) -> None:
    """What is named was in the directory when it was looked at."""
    names = Names.new(working)
    names.prepare(4 * MIB)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in left(working):
        if name.startswith("."):
            make_image(elsewhere / name, size=MIB)
    make_image(elsewhere / "work.qcow2", size=MIB)
    before = {path.name: path.stat().st_ino for path in elsewhere.iterdir()}
    tmp_path.rename(tmp_path.with_name("real"))
    tmp_path.symlink_to(tmp_path.with_name("real") / "elsewhere")
    names.switch()
    names.clear()
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before
