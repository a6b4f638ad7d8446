"""
Files beneath a directory, never through a symbolic link; by openat2, and where the kernel does not
know it.
"""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from statepool import beneath
from statepool.beneath import Beneath, Descriptor, Tree, beside, link


@pytest.fixture(params=["openat2", "part by part"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    before = set(beneath._calls)
    if request.param == "part by part":
        beneath._calls.clear()
    yield request.param
    beneath._calls.update(before)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "root/a/b").mkdir(parents=True)
    (tmp_path / "root/a/b/file").write_bytes(b"inside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"outside")
    (tmp_path / "root/out").symlink_to(tmp_path / "outside")
    (tmp_path / "root/a/up").symlink_to("../../outside")
    (tmp_path / "root/in").symlink_to("a")
    return Tree(tmp_path / "root")


def read(tree: Tree, path: str) -> bytes:
    with tree.open(path, os.O_RDONLY) as file:
        return os.read(file, 100)


def photograph(directory: Path) -> set[tuple[str, bytes]]:
    return {
        (str(path), path.read_bytes() if path.is_file() else b"") for path in directory.rglob("*")
    }


def test_what_is_inside(tree: Tree) -> None:
    assert read(tree, "a/b/file") == b"inside"
    assert tree.stat("a/b/file").st_size == 6
    assert tree.stat("").st_ino == os.stat(tree.root).st_ino


@pytest.mark.parametrize(
    "path",
    [
        "out/file",
        "a/up/file",
        "in/b/file",
        "../outside/file",
        "a/../../outside/file",
        "a/b/file/x",
        "/etc/hostname",
    ],
)
def test_no_path_leads_out(tree: Tree, path: str, tmp_path: Path) -> None:
    before = photograph(tmp_path)
    for attempt in (
        lambda: tree.open(path, os.O_RDONLY),
        lambda: tree.open(path, os.O_WRONLY | os.O_CREAT),
        lambda: tree.open(path, os.O_PATH),
        lambda: tree.stat(path),
        lambda: tree.make_directory(f"{path}-new", 0o700),
        lambda: tree.link("a/b/file", f"{path}-new"),
        lambda: tree.link(path, "a/new"),
        lambda: tree.rename("a/b/file", path),
        lambda: tree.rename(path, "a/new"),
        lambda: tree.symlink("x", f"{path}-new"),
        lambda: tree.readlink(path),
        lambda: tree.remove_all(path),
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011  # which of them depends on the way
            attempt()
        assert caught.value.errno in (errno.ELOOP, errno.EXDEV, errno.ENOTDIR, errno.ENOENT)
    assert photograph(tmp_path) == before


@pytest.mark.parametrize("name", ["out", "a/up", "in"])
def test_a_link_itself(tree: Tree, name: str, tmp_path: Path) -> None:
    """
    It can be looked at, read, renamed and removed, and nothing else: opening it, also as a
    directory, tells that it is one.
    """
    for flags in (
        os.O_RDONLY,
        os.O_RDONLY | os.O_DIRECTORY,
        os.O_PATH | os.O_DIRECTORY,
        os.O_WRONLY | os.O_CREAT,
        os.O_PATH,
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            tree.open(name, flags)
        assert caught.value.errno == errno.ELOOP
    assert tree.readlink(name) == os.readlink(tmp_path / "root" / name)
    tree.rename(name, "other")
    assert tree.remove("other")
    assert (tmp_path / "outside/file").read_bytes() == b"outside"


def test_a_directory_that_is_swapped_meanwhile(tree: Tree, tmp_path: Path) -> None:
    """
    What was opened stays what it was: the names in it are those of the directory, wherever that is
    now.
    """
    place, name = tree.place("a/b/file")
    (tmp_path / "root/a").rename(tmp_path / "root/real")
    (tmp_path / "root/a").symlink_to(tmp_path / "outside")
    with place as directory:
        os.unlink(name, dir_fd=directory)
    assert not (tmp_path / "root/real/b/file").exists()
    assert (tmp_path / "outside/file").exists()


def test_the_directory_itself_may_be_behind_a_link(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("root")
    assert read(Tree(tmp_path / "link"), "a/b/file") == b"inside"


def test_a_directory_that_was_deleted_and_made_again(tree: Tree, tmp_path: Path) -> None:
    assert read(tree, "a/b/file") == b"inside"
    for path in sorted((tmp_path / "root").rglob("*"), reverse=True):
        path.unlink() if path.is_symlink() or path.is_file() else path.rmdir()
    (tmp_path / "root").rmdir()
    with pytest.raises(FileNotFoundError):
        tree.open("x", os.O_RDONLY)
    (tmp_path / "root").mkdir()
    (tmp_path / "root/x").write_bytes(b"anew")
    assert read(tree, "x") == b"anew"


def test_a_directory_in_whose_place_another_is(tree: Tree, tmp_path: Path) -> None:
    """As after a mount: what was opened once is used until the end."""
    assert read(tree, "a/b/file") == b"inside"
    (tmp_path / "root").rename(tmp_path / "moved")
    (tmp_path / "root").mkdir()
    assert read(tree, "a/b/file") == b"inside"


def test_modes_are_exact(tree: Tree, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        tree.make_directory("made", 0o2775)
        tree.make_directory("made", 0o700)
    finally:
        os.umask(before)
    assert (tmp_path / "root/made").stat().st_mode & 0o7777 == 0o2775


def test_a_second_name_elsewhere(tree: Tree, tmp_path: Path) -> None:
    link(beside(tmp_path / "outside/file"), Beneath(tree, "a/linked"))
    assert (tmp_path / "root/a/linked").samefile(tmp_path / "outside/file")
    with pytest.raises(OSError, match="symbolic links"):
        link(beside(tmp_path / "outside/file"), Beneath(tree, "out/linked"))


def test_nothing_is_left_open(tree: Tree) -> None:
    tree.stat("")
    before = sorted(os.listdir("/proc/self/fd"))
    for path in ("a/b/file", "out", "out/file", "nothing", "nothing/below"):
        try:
            tree.stat(path)
            tree.readlink(path)
        except OSError:
            continue
    assert set(os.listdir("/proc/self/fd")) <= set(before)
    tree.close()


def test_it_survives_pickling(tree: Tree) -> None:
    assert read(pickle.loads(pickle.dumps(tree)), "a/b/file") == b"inside"


class Interrupted(Exception):
    """What the handler of a signal raises in these tests."""


@contextmanager
def interruptions() -> Iterator[None]:
    """Raise out of the handler of a timer, again and again, wherever the main thread is."""

    def handler(number: int, frame: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt(work: Callable[[], object], times: int = 300) -> None:
    """Interrupt ``work`` so often, at any of its steps."""
    random = Random(1)
    for _ in range(times):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))
            try:
                for _ in range(1000):  # by then it has struck, unless it was lost
                    work()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            continue


def test_an_interruption_leaves_nothing_open(tree: Tree, unraisable: list[object]) -> None:
    def work() -> None:
        tree.stat("a/b/file")
        with tree.open("a/b/file", os.O_RDONLY) as file:
            os.fstat(file)

    tree.stat("")
    before = set(os.listdir("/proc/self/fd"))
    with interruptions():
        interrupt(work)
    assert set(os.listdir("/proc/self/fd")) <= before
    assert not unraisable, "an interruption was lost in a finalizer"


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    found: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    return found


def test_a_descriptor_keeps_what_its_call_opened() -> None:
    opened = Descriptor(os.open, "/", os.O_RDONLY)
    with opened as number:
        assert os.path.samestat(os.fstat(number), os.stat("/"))
        assert not os.get_inheritable(number)
    assert opened.number < 0
    opened.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    with pytest.raises(FileNotFoundError):
        Descriptor(os.open, "/nothing/here", os.O_RDONLY)
    assert Descriptor(int, "-1").number < 0


def test_a_descriptor_tells_what_went_wrong_when_it_was_closed() -> None:
    opened = Descriptor(os.open, "/", os.O_RDONLY)
    os.close(opened.number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        opened.close()
