"""
Working images whose backing name is not the usual one: taken where it is certain what they stand
on, and else refused with a cure that works.
"""

from __future__ import annotations

import pickle
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import statepool
from statepool.qcow2.header import read_header_file
from tests.support.privileges import permissions_count

SIZE = 4 << 20


def write(image: Path, value: int, offset: str) -> None:
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", f"write -q -P {value} {offset} 64k", str(image)],
        check=True,
    )


def reads(image: Path, *patterns: tuple[int, str]) -> bool:
    commands = [
        word for value, offset in patterns for word in ("-c", f"read -P {value} {offset} 64k")
    ]
    done = subprocess.run(
        ["qemu-io", "-r", "-f", "qcow2", *commands, str(image)],
        capture_output=True,
        text=True,
        check=True,
    )
    return "verification failed" not in done.stdout


def disk(cache: Path, name: str = "vm1/disk") -> statepool.ImageHandle:
    return statepool.StatePool(cache).image(name)


@pytest.fixture
def root(tmp_path: Path, make_image: Callable[..., Path]) -> Path:
    """
    A cache with ``install`` and ``customize``, and ``work.qcow2`` on the latter, which was written
    to.
    """
    states = disk(tmp_path / "old")
    work = make_image(tmp_path / "work.qcow2", SIZE, writes=[(0, 65536, 1)])
    states.set("install", source=work)
    write(work, 2, "64k")
    states.set("customize", source=work)
    write(work, 3, "128k")
    return tmp_path


ALL = ((1, "0"), (2, "64k"), (3, "128k"))


def check_set(root: Path, cache: Path, work: str = "work.qcow2") -> None:
    """The image can be set, is whole, and goes on in the cache."""
    disk(cache).set("top", source=root / work)
    disk(cache).get("top", to=root / "again.qcow2")
    assert reads(root / "again.qcow2", *ALL)
    assert reads(root / work, *ALL)
    assert disk(cache).get("top").chain == ("top", "customize", "install")
    assert str(cache) in (read_header_file(root / work).backing_name or b"").decode()


def test_a_cache_that_was_moved(root: Path) -> None:
    (root / "old").rename(root / "new")
    check_set(root, root / "new")


def test_a_cache_that_was_moved_without_its_chains(root: Path) -> None:
    (root / "old").rename(root / "new")
    shutil.rmtree(root / "new/.statepool/chains")
    check_set(root, root / "new")


def test_another_cache_that_has_the_same_states(root: Path) -> None:
    other = statepool.StatePool(root / "other", [root / "old"]).image("vm1/disk")
    other.get("customize")
    check_set(root, root / "other")


def test_a_moved_cache_and_a_squash(root: Path) -> None:
    (root / "old").rename(root / "new")
    disk(root / "new").set("customize", source=root / "work.qcow2", squash=True)
    assert reads(root / "work.qcow2", *ALL)


def test_an_overlay_on_the_view(root: Path) -> None:
    view = root / "old/vm1/disk/customize.qcow2"
    subprocess.run(
        [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            str(view),
            "-F",
            "qcow2",
            str(root / "mine.qcow2"),
        ],
        check=True,
    )
    write(root / "mine.qcow2", 3, "128k")
    check_set(root, root / "old", "mine.qcow2")


def refused(
    root: Path, cache: Path, work: str = "work.qcow2", object: str = "vm1/disk"
) -> statepool.StatePoolError:
    before = (root / work).read_bytes()
    with pytest.raises(statepool.StatePoolError) as caught:
        disk(cache, object).set("top", source=root / work)
    assert (root / work).read_bytes() == before
    return caught.value


def command(error: statepool.StatePoolError, begin: str) -> list[str]:
    text = (error.hint or "").partition(begin)[2].partition("; or")[0]
    return shlex.split(begin + text)


def run(words: list[str], cwd: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", *words] if words[0] == "statepool" else words,
        cwd=cwd,
        check=True,
        capture_output=True,
    )


def test_another_cache_that_has_what_this_one_lacks(root: Path) -> None:
    error = refused(root, root / "empty")
    assert isinstance(error, statepool.UnsafeImage)
    assert f"stands on customize of another cache, {root}/old" in error.message
    run(command(error, "qemu-img convert"), root)
    assert reads(root / "NEW.qcow2", *ALL)
    run(command(error, "statepool --cache"), root)
    assert disk(root / "old").check("top")


def test_a_state_of_another_object(root: Path) -> None:
    for name in ("work.qcow2", "mine.qcow2"):
        if name == "mine.qcow2":
            view = root / "old/vm1/disk/customize.qcow2"
            subprocess.run(
                [
                    "qemu-img",
                    "create",
                    "-q",
                    "-f",
                    "qcow2",
                    "-b",
                    str(view),
                    "-F",
                    "qcow2",
                    str(root / name),
                ],
                check=True,
            )
        error = refused(root, root / "old", name, "vm2/disk")
        assert isinstance(error, statepool.Conflict)
        assert "stands on customize of vm1/disk, not on a state of vm2/disk" in error.message
    error = refused(root, root / "old", object="vm2/disk")
    run(["statepool", "--cache", "old", *command(error, "statepool set")[1:]], root)
    assert disk(root / "old").check("top")


def test_a_state_that_was_removed(root: Path) -> None:
    disk(root / "old").unset("customize")
    error = refused(root, root / "old")
    assert isinstance(error, statepool.Conflict)
    assert "any more" in error.message
    run(command(error, "qemu-img convert"), root)
    assert reads(root / "NEW.qcow2", *ALL)


def test_a_file_that_is_gone(root: Path, make_image: Callable[..., Path]) -> None:
    base = make_image(root / "base.qcow2", SIZE)
    make_image(root / "mine.qcow2", SIZE, backing=base)
    base.unlink()
    error = refused(root, root / "old", "mine.qcow2")
    assert "which is not there" in error.message
    assert "convert" not in (error.hint or "")


def test_a_chain_of_other_bytes_under_the_same_names_is_not_this_one(
    root: Path, make_image: Callable[..., Path]
) -> None:
    states = disk(root / "other")
    work = make_image(root / "w.qcow2", SIZE, writes=[(0, 65536, 9)])
    states.set("install", source=work)
    states.set("customize", source=work)
    assert "another cache" in refused(root, root / "other").message


def test_files_of_the_user_that_cannot_be_used_are_no_trouble_with_a_pool(root: Path) -> None:
    """The exit codes say which of the two it is."""
    closed = root / "closed"
    closed.mkdir(mode=0o500)
    shutil.copy(root / "work.qcow2", root / "mine.qcow2")
    (root / "mine.qcow2").chmod(0)
    with permissions_count():
        for ask in (
            lambda: disk(root / "old").set("top", source=root / "mine.qcow2"),
            lambda: disk(root / "old").get("install", to=root / "mine.qcow2", overwrite=True),
            lambda: disk(root / "old").get("install", to=closed / "x.qcow2"),
        ):
            with pytest.raises(statepool.AccessDenied) as caught:
                ask()
            assert caught.value.exit_code == 4
            assert pickle.loads(pickle.dumps(caught.value)).exit_code == 4
