"""
What ``verify`` and ``gc`` say: nothing untrue of what was removed meanwhile, and all of what stays.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.cache.chains import GRACE

Make = Callable[..., Path]


@pytest.fixture
def pool(tmp_path: Path, make_image: Make) -> statepool.StatePool:
    """A cache with three states that stand alone."""
    return filled(tmp_path / "cache", make_image)


def filled(root: Path, make_image: Make) -> statepool.StatePool:
    pool = statepool.StatePool(root)
    for number in range(3):
        work = make_image(root.parent / "work.qcow2", 4 << 20, writes=[(0, 65536, number + 1)])
        pool.image("vm1/disk").set(f"s{number}", source=work)
        pool.throw_away(work)
    return pool


class Meanwhile(statepool.Progress):
    """Something that happens while the first file is read."""

    def __init__(self, what: Callable[[], object]) -> None:
        self._left = [what]

    def begin(self, what: str, total: int) -> None:
        if self._left:
            self._left.pop()()

    def advance(self, count: int) -> None:
        pass

    def end(self) -> None:
        pass


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_is_removed_while_states_are_read_is_not_damaged(
    tmp_path: Path, pool: statepool.StatePool, everywhere: bool
) -> None:
    cache = tmp_path / ("other" if everywhere else "cache")
    sources = [tmp_path / "cache"] if everywhere else []
    progress = Meanwhile(lambda: pool.image("vm1/disk").unset("s2"))
    found = statepool.StatePool(cache, sources, progress=progress).verify()
    assert [(one.state, one.problem) for one in found] == [("s0", None), ("s1", None)]


def test_what_is_replaced_while_states_are_read_is_not_damaged(
    tmp_path: Path, pool: statepool.StatePool, make_image: Make
) -> None:
    work = make_image(tmp_path / "work.qcow2", 4 << 20, writes=[(0, 65536, 99)])
    progress = Meanwhile(lambda: pool.image("vm1/disk").set("s2", source=work, replace=True))
    found = statepool.StatePool(tmp_path / "cache", progress=progress).verify()
    assert [one.problem for one in found] == [None] * len(found)


def test_what_was_really_lost_is_still_said(tmp_path: Path, pool: statepool.StatePool) -> None:
    def lose() -> None:
        os.unlink(os.path.realpath(tmp_path / "cache/vm1/disk/s2.qcow2"))

    found = statepool.StatePool(tmp_path / "cache", progress=Meanwhile(lose)).verify()
    assert [one.state for one in found if "are gone" in str(one.problem)] == ["s2"]


def test_gc_says_what_stays_for_whom_and_until_when(
    tmp_path: Path, pool: statepool.StatePool, run_statepool: Callable[..., Any]
) -> None:
    disk = pool.image("vm1/disk")
    disk.get("s1", to=tmp_path / "one.qcow2")
    disk.get("s2", to=tmp_path / "two.qcow2")
    for state in ("s1", "s2"):
        disk.unset(state)
    (tmp_path / "two.qcow2").unlink()
    said = run_statepool("--cache", "cache", "gc").out
    assert f"of s1 stay, since the working image {tmp_path}/one.qcow2 stands on them" in said
    assert (
        f", since the working image {tmp_path}/two.qcow2 stood on them, and may have been moved"
        in said
    )
    answer = run_statepool("--cache", "cache", "gc", "--json").json["kept"]
    assert [(one["states"], one["by"], one["bytes"] > 0) for one in answer] == [
        ([name], f"{tmp_path}/{file}.qcow2", True)
        for name, file in sorted(
            (one["states"][0], one["by"].rpartition("/")[2][:3]) for one in answer
        )
    ]
    until = {one["states"][0]: one["until"] for one in answer}
    assert until["s1"] is None
    assert abs(until["s2"] - GRACE - (tmp_path / "cache").stat().st_mtime) < GRACE / 7
    assert "stay" not in run_statepool("--cache", "cache", "-q", "gc").out
    pool.throw_away(tmp_path / "one.qcow2")
    (tmp_path / "two.qcow2").touch()
    assert pool.gc().kept == () or all(one.by != f"{tmp_path}/one.qcow2" for one in pool.gc().kept)


def test_gc_now_does_not_wait_for_images_that_are_gone(
    tmp_path: Path, pool: statepool.StatePool, run_statepool: Callable[..., Any]
) -> None:
    disk = pool.image("vm1/disk")
    (tmp_path / "elsewhere").mkdir()
    places = [tmp_path / name for name in ("there", "gone", "elsewhere/unmounted")]
    for place, state in zip(places, ("s1", "s2", "s2"), strict=True):
        disk.get(state, to=place)
    (tmp_path / "gone").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "away")  # as a disk that was unmounted
    for state in ("s1", "s2"):
        disk.unset(state)
    gc = ("--cache", "cache", "gc", "--json")
    would = run_statepool(*gc, "--now", "--dry-run").json
    assert [one["path"] for one in would["collected"]] == [str(tmp_path / "gone")]
    assert {one["by"] for one in run_statepool(*gc).json["kept"]} == {*map(str, places)}
    removed = run_statepool(*gc, "--now").json
    assert str(tmp_path / "gone") in [one["path"] for one in removed["collected"]]
    assert {one["by"] for one in removed["kept"]} == {str(places[0]), str(places[2])}
    (tmp_path / "away").rename(tmp_path / "elsewhere")
    places[2].unlink()
    removed = run_statepool(*gc, "--now").json
    assert {one["by"] for one in removed["kept"]} == {str(places[0])}
    assert sum(one["bytes"] for one in removed["collected"]) > 65536


def test_gc_says_nothing_of_what_states_need(tmp_path: Path, pool: statepool.StatePool) -> None:
    pool.image("vm1/disk").get("s1", to=tmp_path / "one.qcow2")
    assert pool.gc().kept == ()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system of limited size")
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    with open(place / "ballast", "wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return


@pytest.mark.parametrize("lost", ["trust", "locks", "nothing"])
def test_a_full_disk(
    tmp_path: Path, small: Path, make_image: Make, run_statepool: Callable[..., Any], lost: str
) -> None:
    """What makes room, and what only looks, needs none."""
    pool = filled(small / "cache", make_image)
    pool.image("vm1/disk").get("s2", to=tmp_path / "two.qcow2")
    pool.image("vm1/disk").unset("s2")
    (tmp_path / "two.qcow2").unlink()
    for path in small.glob(f"cache/.statepool/{lost}/*"):
        path.unlink()
    fill(small)
    assert {
        one["problem"]
        for one in run_statepool("--cache", small / "cache", "verify", "--json").json["checked"]
    } == {None}
    assert run_statepool("--cache", small / "cache", "gc", "--json").json["kept"]
    assert (
        "nothing more fits there" in run_statepool("--cache", small / "cache", "doctor", code=1).out
    )
    (small / "ballast").unlink()
    note = next(small.glob("cache/.statepool/chains/*/.uses/*.json"))
    note.write_text(note.read_text().replace('"missing_since": null', '"missing_since": 1.0'))
    fill(small)
    gone = run_statepool("--cache", small / "cache", "gc", "--json").json["collected"]
    assert "bytes that no state needs" in {one["what"] for one in gone}
    assert os.statvfs(small).f_bavail > 0
