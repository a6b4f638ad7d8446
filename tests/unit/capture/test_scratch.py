"""Working images that live no longer than the process which made them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import statepool
from statepool.cache.cache import Cache
from statepool.capture.scratch import clear_scratch, scratch
from statepool.care.gc import gc_cache
from statepool.pools.json_files import write_json
from statepool.pools.writer import Writer


@pytest.fixture
def cache(lab: Any) -> Cache:
    made: Cache = lab.cache()
    return made


def left(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.working_directory().iterdir())


@pytest.fixture
def abandoned(cache: Cache) -> Path:
    """A directory of a process that was killed, with two files in it."""
    path = cache.working_directory() / "passing-0123"
    (path / "more").mkdir(parents=True)
    (path / "disk.qcow2").write_bytes(b"image")
    write_json(
        cache.tree,
        ".statepool/working/passing-0123/writer.json",
        evolve(Writer.current(), start=1).to_json(),
    )
    return path


def test_it_goes_at_the_end(cache: Cache) -> None:
    with scratch(cache) as place:
        (place.path / "disk.qcow2").touch()
    with pytest.raises(KeyError), scratch(cache) as place:
        (place.path / "disk.qcow2").touch()
        raise KeyError
    assert left(cache) == []


def test_it_stays_if_it_is_to_be_kept(cache: Cache) -> None:
    with scratch(cache) as place:
        (place.path / "disk.qcow2").touch()
        place.keep()
    assert (place.path / "disk.qcow2").exists()
    assert clear_scratch(cache) == []
    assert (place.path / "disk.qcow2").exists()


def test_while_its_process_lives_nobody_takes_it(cache: Cache) -> None:
    with scratch(cache) as place, scratch(cache) as other:
        assert clear_scratch(cache) == []
        assert left(cache) == sorted([place.path.name, other.path.name])


@pytest.mark.parametrize("clear", [clear_scratch, gc_cache], ids=["clear", "gc"])
def test_what_a_killed_process_left_goes(
    cache: Cache, abandoned: Path, clear: Callable[..., list[Any]]
) -> None:
    told = clear(cache, dry_run=True)
    assert [(one.what, one.bytes) for one in told] == [
        ("working images of a process that is gone", 5)
    ]
    assert abandoned.exists()
    assert clear(cache) == told
    assert left(cache) == []


def test_whoever_makes_the_next_one_takes_it(cache: Cache, abandoned: Path) -> None:
    with scratch(cache):
        assert not abandoned.exists()


def test_what_a_program_still_has_open_stays(cache: Cache, abandoned: Path) -> None:
    """A builder goes on when the one that started it was killed."""
    command = [
        sys.executable,
        "-c",
        "import sys; file = open(sys.argv[1], 'r+b'); print(flush=True); sys.stdin.read()",
        str(abandoned / "disk.qcow2"),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        assert builder.stdout is not None
        builder.stdout.readline()
        assert clear_scratch(cache) == []
        assert abandoned.exists()
        builder.communicate()
    assert len(clear_scratch(cache)) == 1


WORKER = """
import sys, statepool
with statepool.StatePool(sys.argv[1], [sys.argv[2]]).image("vm1/disk").working("install") as path:
    print(path, flush=True)
    sys.stdin.read()
"""


def test_a_worker_is_killed(tmp_path: Path, make_image: Callable[..., Path]) -> None:
    statepool.init(tmp_path / "pool")
    pool = statepool.StatePool(tmp_path / "cache", [tmp_path / "pool"])
    pool.image("vm1/disk").set("install", source=make_image(tmp_path / "work.qcow2"))
    command = [sys.executable, "-c", WORKER, str(tmp_path / "cache"), str(tmp_path / "pool")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        path = Path(worker.stdout.readline().strip())
        assert path.exists()
        worker.kill()
    with pool.image("vm1/disk").working("install") as another:
        assert another.exists()
        assert not path.exists()
    assert [one.what for one in pool.gc()] == []


def test_names_of_any_length(tmp_path: Path, make_image: Callable[..., Path]) -> None:
    disk = statepool.StatePool(tmp_path / "cache").image(f"{'m' * 128}/{'i' * 128}")
    disk.set("s" * 128, source=make_image(tmp_path / "work.qcow2"))
    with disk.working("s" * 128) as path, disk.working("s" * 128, directory=tmp_path) as other:
        assert path.exists()
        assert other.parent == tmp_path
    assert disk.ensure("e" * 100, lambda image: None, parent="s" * 128)
