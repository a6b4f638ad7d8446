"""
Something is gone that a log speaks of, or a whole source: what else there is goes on, and what can
be put back is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import statepool
from statepool.errors import MissingFile, NotAPool
from statepool.model.outcomes import Presence, SyncAction
from statepool.transports.registry import open_transport

KIB = 1 << 10

Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


@pytest.fixture
def pool(tmp_path: Path, make_image: Make, write_to_image: Write) -> statepool.StatePool:
    """A cache and two sources, all of which have a chain of two."""
    for name in ("a", "b"):
        statepool.init(tmp_path / name)
    made = statepool.StatePool(tmp_path / "cache", [tmp_path / "a", tmp_path / "b"])
    work = make_image(tmp_path / "work.qcow2", 1024 * KIB, writes=[(0, 64 * KIB, 1)])
    made.image("vm1/disk").set("install", source=work)
    write_to_image(work, [(64 * KIB, 64 * KIB, 2)])
    made.image("vm1/disk").set("customize", source=work)
    return made


def lose(root: Path, state: str) -> None:
    """The bytes of a state are deleted, by somebody who does not know what they are."""
    view = root / f"vm1/disk/{state}.qcow2"
    view.resolve().unlink()


def states(root: Path) -> set[str]:
    return {path.stem for path in (root / "vm1/disk").iterdir() if path.exists()}


def test_bytes_that_are_gone_from_a_source_are_put_back_by_a_set(
    pool: statepool.StatePool, tmp_path: Path
) -> None:
    lose(tmp_path / "a", "install")
    stored = pool.image("vm1/disk").set("customize", source=tmp_path / "work.qcow2")
    assert [at.result for at in stored.pools] == [
        Presence.PRESENT,
        Presence.STORED,
        Presence.PRESENT,
    ]
    assert states(tmp_path / "a") == {"install", "customize"}
    other = statepool.StatePool(tmp_path / "other", [tmp_path / "a"])
    assert len(other.image("vm1/disk").get("customize").chain) == 2


@pytest.mark.parametrize("dry_run", [True, False])
def test_bytes_that_are_gone_are_put_back_by_a_sync(
    pool: statepool.StatePool, tmp_path: Path, dry_run: bool
) -> None:
    lose(tmp_path / "a", "install")
    synced = statepool.sync(tmp_path / "b", tmp_path / "a", dry_run=dry_run)
    assert {one.state: one.action for one in synced.states} == {
        "install": SyncAction.COPIED,
        "customize": SyncAction.PRESENT,
    }
    assert states(tmp_path / "a") == ({"customize"} if dry_run else {"install", "customize"})


def test_the_only_source_has_lost_the_bytes(pool: statepool.StatePool, tmp_path: Path) -> None:
    lose(tmp_path / "a", "install")
    other = statepool.StatePool(tmp_path / "other", [tmp_path / "a"]).image("vm1/disk")
    with pytest.raises(MissingFile, match="does not have the bytes of vm1/disk install") as caught:
        other.get("customize")
    assert "doctor" in (caught.value.hint or "")
    with pytest.raises(statepool.TransportError, match="does not have the bytes"):
        other.check("customize")


def test_a_source_that_is_missing_keeps_nobody_from_looking_at_the_others(
    pool: statepool.StatePool, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    found = pool.verify()
    assert {(Path(statepool.Location.parse(one.pool).path).name, one.state) for one in found} == {
        *((name, state) for name in ("cache", "b") for state in ("install", "customize")),
        ("a", ""),
    }
    assert [one.pool for one in found if one.problem] == [
        str(open_transport(statepool.Location.parse(str(tmp_path / "a"))).location)
    ]


def test_no_source_is_there(pool: statepool.StatePool, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / name)
    for ask in (pool.verify, pool.log, lambda: pool.gc(everywhere=True)):
        with pytest.raises(NotAPool):
            ask()


def test_the_log_of_a_source_that_is_missing_is_not_an_empty_one(
    pool: statepool.StatePool, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(NotAPool):
        pool.log()
