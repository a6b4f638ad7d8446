from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve

from statepool.errors import IntegrityError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.pools import layout
from statepool.pools import log as log_module
from statepool.pools.collect import ABANDONED, PASSING, Collector
from statepool.pools.pool import Pool
from statepool.pools.staging import Marker, Staging
from statepool.pools.writer import Writer
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.registry import open_transport

State = Callable[..., Manifest]
Put = Callable[..., bool]

DEAD = evolve(Writer.current(), boot="another")
THERE = evolve(Writer.current(), boot="another", machine="another")


def names(pool: Pool, directory: str) -> list[str]:
    return sorted(entry.name for entry in pool.transport.scan(directory))


@pytest.fixture
def install(pool: Pool, state: State, put: Put) -> Manifest:
    manifest = state("install")
    put(pool, manifest)
    return manifest


@pytest.fixture
def needless(pool: Pool, install: Manifest) -> Digest:
    """Bytes that a removal left, beside those of ``install``."""
    digest = Digest.of(b"needless")
    pool.transport.create(layout.data(digest), b"needless")
    return digest


def test_bytes_that_no_record_needs_go(pool: Pool, install: Manifest, needless: Digest) -> None:
    (gone,) = Collector(pool).sweep()
    assert (gone.path, gone.bytes, gone.pool) == (layout.data(needless), 8, str(pool))
    assert names(pool, layout.DATA) == [install.digest.file_name]  # type: ignore[union-attr]
    assert names(pool, layout.TRASH) == []


def test_a_second_sweep_finds_nothing(pool: Pool, needless: Digest) -> None:
    Collector(pool).sweep()
    assert Collector(pool).sweep() == []


def test_a_dry_run_says_the_same_and_changes_nothing(pool: Pool, needless: Digest) -> None:
    before = pool.transport.scan(layout.DATA)
    would = Collector(pool).sweep(dry_run=True)
    assert pool.transport.scan(layout.DATA) == before
    assert [(gone.path, gone.bytes) for gone in would] == [
        (gone.path, gone.bytes) for gone in Collector(pool).sweep()
    ]


def test_only_what_was_asked_for_is_collected(
    pool: Pool, install: Manifest, needless: Digest
) -> None:
    other = Digest.of(b"other")
    pool.transport.create(layout.data(other), b"other")
    assert len(Collector(pool).collect([needless, install.digest, Digest.of(b"nowhere")])) == 1  # type: ignore[list-item]
    assert names(pool, layout.DATA) == sorted([install.digest.file_name, other.file_name])  # type: ignore[union-attr]


def test_bytes_that_are_held_stay(pool: Pool, needless: Digest) -> None:
    assert Collector(pool, lambda: frozenset([needless])).sweep() == []
    assert pool.has_bytes(needless)


def test_bytes_that_come_to_be_held_while_they_are_moved_come_back(
    pool: Pool, needless: Digest
) -> None:
    answers = iter([frozenset[Digest](), frozenset([needless])])
    assert Collector(pool, lambda: next(answers)).collect([needless]) == []
    assert needless.file_name in names(pool, layout.DATA)
    assert names(pool, layout.TRASH) == []


def test_bytes_that_a_writer_is_about_to_need_stay(pool: Pool, needless: Digest) -> None:
    staging = pool.stage([needless])
    assert Collector(pool).sweep() == []
    staging.end()
    assert len(Collector(pool).sweep()) == 1


def test_what_a_dead_collector_left_is_brought_back_or_goes(pool: Pool, install: Manifest) -> None:
    needless = Digest.of(b"needless")
    assert install.digest is not None
    pool.transport.rename(layout.data(install.digest), layout.trash("dead", install.digest))
    pool.transport.create(layout.trash("dead", needless), b"needless")
    would = Collector(pool).sweep(dry_run=True)
    gone = Collector(pool).sweep()
    assert (
        [found.path for found in gone]
        == [found.path for found in would]
        == [layout.trash("dead", needless)]
    )
    assert names(pool, layout.DATA) == [install.digest.file_name]
    assert names(pool, layout.TRASH) == []


def test_names_in_the_trash_that_are_not_ours_go(pool: Pool) -> None:
    pool.transport.create(f"{layout.TRASH}/what", b"")
    assert len(Collector(pool).sweep()) == 1
    assert names(pool, layout.TRASH) == []


def test_damage_stops_a_sweep_before_it_deletes(
    pool: Pool, install: Manifest, needless: Digest
) -> None:
    pool.transport.create(layout.record("vm1", 2), b"{")
    with pytest.raises(IntegrityError):
        Collector(pool).sweep()
    assert pool.transport.read(layout.data(needless)) == b"needless"


def test_logs_are_compacted(
    pool: Pool, install: Manifest, monkeypatch: pytest.MonkeyPatch, state: State, put: Put
) -> None:
    monkeypatch.setattr(log_module, "KEEP_RECORDS", 1)
    put(pool, state("customize", parent=install))
    monkeypatch.setattr(log_module, "CHECKPOINT_EVERY", 1)
    (gone,) = Collector(pool).sweep()
    assert gone.path == layout.record("vm1", 1)
    assert len(Pool(pool.transport).fold("vm1").states) == 2


def test_the_view_is_made_right(pool: Pool, install: Manifest) -> None:
    path = layout.view(install.id)
    pool.transport.remove(path)
    pool.transport.symlink(layout.view_target(install.id, Digest.of(b"old")), "vm1/disk/old.qcow2")
    (gone,) = Collector(pool).sweep()
    assert gone.path == "vm1/disk/old.qcow2"
    assert names(pool, "vm1/disk") == ["install.qcow2"]


# -- what crashed writers left ---------------------------------------------------------------------


def leave(pool: Pool, writer: Writer, digest: Digest) -> None:
    """What a writer leaves that is killed in a transfer."""
    staging = Staging.begin(pool.transport, Marker("left", frozenset([digest]), writer))
    pool.transport.create(staging.path(digest), b"half")
    pool.transport.create(layout.gathered("left"), b"half")


@pytest.mark.parametrize("thorough", [False, True])
def test_a_dead_writer_leaves_nothing_behind(pool: Pool, thorough: bool) -> None:
    leave(pool, DEAD, Digest.of(b"x"))
    gone = Collector(pool).clear_incoming(thorough=thorough)
    assert gone[-1].path == layout.marker("left")
    assert sum(found.bytes for found in gone[:-1]) == 8
    assert names(pool, layout.INCOMING) == []


@pytest.mark.parametrize("writer", [Writer.current(), THERE])
def test_a_writer_that_may_be_alive_is_left_alone(pool: Pool, writer: Writer) -> None:
    leave(pool, writer, Digest.of(b"x"))
    assert Collector(pool).clear_incoming(thorough=True) == []
    assert len(names(pool, layout.INCOMING)) == 3


@pytest.fixture
def aging() -> tuple[Pool, Callable[[float], None]]:
    """A pool with a clock of its own, and what lets time pass in it."""
    now = [1e18]
    pool = Pool(MemoryTransport(MemoryStore(clock=lambda: int(now[0]))), clock=lambda: 5.0)
    pool.create()

    def wait(seconds: float) -> None:
        now[0] += seconds * 1e9

    return pool, wait


def test_a_marker_of_another_host_is_abandoned_in_the_end(
    aging: tuple[Pool, Callable[[float], None]],
) -> None:
    pool, wait = aging
    leave(pool, THERE, Digest.of(b"x"))
    wait(ABANDONED - 10)
    assert Collector(pool).sweep() == []
    wait(20)
    assert Collector(pool).clear_incoming() == []
    assert len(Collector(pool).sweep()) == 3
    assert names(pool, layout.INCOMING) == []


def test_a_clock_of_this_process_that_is_ahead_abandons_nobody(tmp_path: Path) -> None:
    pool = Pool(
        open_transport(Location("file", str(tmp_path / "pool"))),
        clock=lambda: time.time() + 8 * 24 * 3600,
    )
    pool.create()
    leave(pool, THERE, Digest.of(b"x"))
    pool.transport.create(f"{layout.INCOMING}/.temporary", b"")
    assert Collector(pool).sweep() == []
    os.utime(tmp_path / "pool" / layout.marker("left"), (time.time() - ABANDONED - 10,) * 2)
    assert len(Collector(pool).sweep()) == 3


def test_a_living_writer_of_this_host_is_never_abandoned(
    aging: tuple[Pool, Callable[[float], None]],
) -> None:
    pool, wait = aging
    leave(pool, Writer.current(), Digest.of(b"x"))
    wait(10 * ABANDONED)
    assert Collector(pool).sweep() == []


def test_files_without_a_marker_go_when_they_are_old(
    aging: tuple[Pool, Callable[[float], None]],
) -> None:
    pool, wait = aging
    pool.transport.create(f"{layout.INCOMING}/.temporary", b"")
    wait(PASSING - 10)
    assert Collector(pool).sweep() == []
    wait(20)
    assert len(Collector(pool).sweep()) == 1
    assert names(pool, layout.INCOMING) == []
