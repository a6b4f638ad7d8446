"""
Full disks: refused before a byte moves where that can be known, and otherwise nothing half, nothing
left over, and the working image as it was.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import statepool
from statepool.pools import layout

if TYPE_CHECKING:
    from conftest import Lab

PAGE = 4096
KIB = 1 << 10


@pytest.fixture
def small(lab: Lab) -> Iterator[Callable[[int], None]]:
    """
    ``small(n)``: from now on a file system in memory is in the lab's directory, with as much room;
    first 8 MiB.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system of limited size")

    def mount(option: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(lab.root)],
            capture_output=True,
            text=True,
            check=False,
        )

    done = mount("size=8M")
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        subprocess.run(["cp", "-a", f"{lab.template}/.", str(lab.root)], check=True)
        yield lambda size: mount(f"remount,size={size}").check_returncode()
    finally:
        subprocess.run(["umount", "-l", str(lab.root)], check=True)


def fill(root: Path, pages: int) -> None:
    """Leave only so many pages."""
    with open(root / "ballast", "wb", buffering=0) as file:
        left = os.statvfs(root).f_bavail - pages
        file.write(bytes(left * PAGE))
    assert os.statvfs(root).f_bavail == pages


def leftovers(root: Path) -> list[Path]:
    ours = root / layout.OURS
    return [
        path for directory in ("incoming", "trash") for path in (ours / directory).glob("*")
    ] + list(root.parent.glob(".statepool-*"))


def chains(root: Path) -> set[str]:
    return {path.name for path in (root / layout.OURS / "chains").iterdir()}


def is_used(lab: Lab) -> int:
    found = os.statvfs(lab.root)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


@pytest.mark.usefixtures("small")
def test_get_is_refused_before_a_byte_moves(lab: Lab) -> None:
    fill(lab.root, 256)
    statepool.init(lab.root / "other")
    used = is_used(lab)
    with pytest.raises(statepool.NoSpace) as caught:
        lab.handle("other").get("leaf", to=lab.root / "far.qcow2")
    assert caught.value.exit_code == 8
    assert caught.value.needed > caught.value.available > 0
    assert is_used(lab) <= used + 16 * PAGE, "nothing but directories and notes"
    assert not list((lab.root / "other" / layout.DATA).iterdir())
    assert not leftovers(lab.root / "other")
    assert not (lab.root / "far.qcow2").exists()


@pytest.mark.usefixtures("small")
def test_no_cache_is_made_for_what_does_not_fit(lab: Lab) -> None:
    fill(lab.root, 256)
    used = is_used(lab)
    with pytest.raises(statepool.NoSpace) as caught:
        lab.handle("new").get("leaf", to=lab.root / "far.qcow2")
    assert caught.value.needed > caught.value.available > 0
    assert is_used(lab) == used
    assert not (lab.root / "new").exists()


@pytest.mark.usefixtures("small")
def test_copied_set_is_refused_before_a_byte_moves(lab: Lab) -> None:
    fill(lab.root, 256)
    used = is_used(lab)
    with pytest.raises(statepool.NoSpace):
        lab.handle("cache").set("connect", source=lab.root / "linked.qcow2")
    assert is_used(lab) <= used + 4 * PAGE
    assert not leftovers(lab.root / "cache")
    lab.require_usable("linked.qcow2", "linked")


@pytest.mark.usefixtures("small")
def test_full_source_does_not_hide_what_was_stored(lab: Lab, small: Callable[[int], None]) -> None:
    fill(lab.root, 64)
    stored = lab.handle("cache").set("connect", source=lab.root / "work.qcow2")
    assert [at.result for at in stored.pools] == [
        statepool.Presence.STORED,
        statepool.Presence.FAILED,
    ]
    assert "do not fit" in str(stored.pools[1].error)
    assert not leftovers(lab.root / "pool")
    lab.require_usable("work.qcow2", "work")
    small(16 << 20)
    assert lab.handle("cache").set("connect", source=lab.root / "work.qcow2").complete
    lab.require_clean()


@pytest.mark.parametrize("image", ["work", "linked"])
@pytest.mark.usefixtures("small")
def test_set_with_any_number_of_pages(
    lab: Lab, small: Callable[[int], None], image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody knew before that it would not fit."""
    monkeypatch.setattr("statepool.capture.capture.require_space", lambda *arguments, **rest: None)
    path, before, used = (
        lab.root / f"{image}.qcow2",
        lab.digests("cache"),
        chains(lab.root / "cache"),
    )
    disk = statepool.StatePool(cache=lab.root / "cache").image("vm1/disk")
    pages = [*range(24)] if image == "work" else [*range(0, 300, 9)]
    failed = 0
    for count in pages:
        fill(lab.root, count)
        try:
            disk.set("connect", source=path)
        except statepool.NoSpace:
            failed += 1
            lab.require_whole()
            # at once, though there is no room for anything, and whether it is a state by now or not
            lab.require_usable(path.name, image)
            assert not leftovers(lab.root / "cache")
            assert not list(lab.root.glob(".statepool-*"))
            if "connect" not in lab.digests("cache"):
                assert lab.digests("cache") == before
                assert chains(lab.root / "cache") == used
        (lab.root / "ballast").unlink()
        disk.get("install")  # the next command, with room again
        lab.require_usable(path.name, image)
        lab.require_whole()
        if "connect" in lab.digests("cache"):
            break
    else:
        pytest.fail("it never fitted")
    assert failed >= 3


@pytest.mark.usefixtures("small")
def test_get_with_any_number_of_pages(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("statepool.copying.fetch.make_room", lambda *arguments, **rest: None)
    statepool.init(lab.root / "other")
    failed = 0
    for count in range(0, 500, 11):
        fill(lab.root, count)
        try:
            lab.handle("other").get("customize", to=lab.root / "far.qcow2")
        except statepool.NoSpace:
            failed += 1
            assert not leftovers(lab.root / "other")
            assert not (lab.root / "far.qcow2").exists()
            lab.require_whole()
            (lab.root / "ballast").unlink()
            continue
        break
    else:
        pytest.fail("it never fitted")
    assert failed >= 3
    (lab.root / "ballast").unlink()
    lab.require_usable("far.qcow2", "customize")
    lab.require_clean()


KILLED = """
import os, sys, statepool
from statepool.pools.pool import Pool
from statepool.cache.working import Fresh
where, name, cache, source = sys.argv[1:]
setattr(Pool if where == "publish" else Fresh, where, lambda *arguments, **rest: os._exit(9))
pool = statepool.StatePool(cache=cache)
object = pool.machine("vm2", ("a", "b")) if name == "vm2" else pool.image(name)
object.set("install", source=source)
"""


def killed(lab: Lab, name: str, where: str) -> dict[Path, tuple[bytes, int]]:
    """
    A set of a new image or machine is killed. :returns: what its files held, and who could do what
    with them
    """
    (lab.root / "vm").mkdir()
    images = {lab.root / f"vm/{image}.qcow2": size for image, size in (("a", "1M"), ("b", "2M"))}
    for path, size in images.items():
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, size], check=True)
    before = {path: (path.read_bytes(), path.stat().st_mode) for path in images}
    source = lab.root / "vm" if name == "vm2" else next(iter(images))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, where, name, lab.root / "cache", source], check=False
    )
    assert done.returncode == 9
    assert source.stat().st_mode != before.get(source)
    return before


@pytest.mark.parametrize("pages", [0, 1, 2])
@pytest.mark.parametrize("name", ["vm2", "vm2/a"])
@pytest.mark.usefixtures("small")
def test_a_set_that_no_more_fits_is_given_back(lab: Lab, name: str, pages: int) -> None:
    """
    It was killed before its record, and now there is no room for what it would need: the next
    command gives all images back, and works.
    """
    before = killed(lab, name, "publish")
    pool = statepool.StatePool(cache=lab.root / "cache")
    fill(lab.root, pages)
    pool.image("vm1/disk").get("install")
    assert not leftovers(lab.root / "cache")
    if not pool.image("vm2/a").check("install"):  # all of it, or nothing
        assert {path: (path.read_bytes(), path.stat().st_mode) for path in before} == before
    else:
        assert pages == 2
        assert {path: path.stat().st_mode for path in before} == {
            path: mode for path, (_, mode) in before.items()
        }
    (lab.root / "ballast").unlink()
    source = lab.root / "vm" if name == "vm2" else lab.root / "vm/a.qcow2"
    assert (
        (pool.machine("vm2", ("a", "b")) if name == "vm2" else pool.image(name))
        .set("install", source=source)
        .complete
    )
    assert {path: path.stat().st_mode for path in before} == {
        path: mode for path, (_, mode) in before.items()
    }
    lab.require_clean()


@pytest.mark.parametrize("name", ["vm2", "vm2/a"])
@pytest.mark.usefixtures("small")
def test_a_state_without_room_for_its_overlay_is_no_hindrance(lab: Lab, name: str) -> None:
    """
    The set was killed after its record: the image waits for room, and other commands, such as those
    that make room, do not.
    """
    killed(lab, name, "settle")
    pool = statepool.StatePool(cache=lab.root / "cache")
    fill(lab.root, 0)
    pool.image("vm1/disk").unset("leaf", scope="own")
    assert not [
        path
        for path in (lab.root / "cache" / layout.DATA).glob("*[0-9a-f]")
        if path.stat().st_mode & 0o222
    ]
    assert pool.image("vm2/a").check("install")
    (lab.root / "ballast").unlink()
    pool.image("vm1/disk").get("install")
    assert all(
        os.access(path, os.W_OK) and path.stat().st_mode & 0o200
        for path in (lab.root / "vm").iterdir()
    )
    assert not leftovers(lab.root / "cache")
    lab.require_clean()
