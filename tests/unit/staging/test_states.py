"""Peers with states: they come into a pool of the day, and from there into a pool that keeps them;
old days go."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import statepool
from statepool.errors import Conflict, NotAPool, NotFound, RefusedError
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.sources.pool_source import open_pool
from statepool.staging.purge import purge
from statepool.staging.ready import NotReady
from statepool.staging.settings import Peer, PeerKind, StageSettings
from statepool.staging.stage import PeerResult, Stage, Staged
from statepool.staging.store import Stored, store

TODAY = dt.date(2026, 11, 30)
MIB = 1 << 20
Make = Callable[..., Path]


class Lab:
    """Two peers with pools, whose base is the same, and one with files."""

    def __init__(self, root: Path, make_image: Make) -> None:
        self.root = root
        self.make_image = make_image
        self.peers: list[Peer] = []
        statepool.init(root / "first")
        work = make_image(root / "work.qcow2", 4 * MIB, writes=[(0, MIB, 1)])
        self.set("first", "install", work)
        shutil.copytree(root / "first", root / "second", symlinks=True)

    def set(self, pool: str, state: str, work: Path, object: str = "vm1/disk") -> None:
        cache = self.root / f"cache-{pool}"
        handle = statepool.StatePool(cache, [self.root / pool]).image(object)
        handle.set(state, source=work)

    def on_top(self, pool: str, state: str, byte: int) -> None:
        """Set a state on top of the base."""
        cache = self.root / f"cache-{pool}"
        work = self.root / f"{pool}-{state}.qcow2"
        handle = statepool.StatePool(cache, [self.root / pool]).image("vm1/disk")
        handle.get("install", to=work)
        handle.set(state, source=work)

    def peer(self, name: str, *objects: str) -> None:
        location = Location("file", str(self.root / name))
        self.peers.append(Peer(name, location, PeerKind.STATES, objects or ("*",)))

    @property
    def settings(self) -> StageSettings:
        return StageSettings(self.root / "staging", tuple(self.peers))

    def stage(self, day: dt.date = TODAY) -> Staged:
        noon = dt.datetime.combine(day, dt.time(12))
        return Stage(self.settings, Settings(), now=lambda: noon).run()

    def one(self) -> PeerResult:
        (result,) = self.stage().peers
        return result

    def day(self, day: dt.date = TODAY) -> Path:
        return self.root / "staging" / day.strftime("%Y/%m/%d")

    def store(self, day: dt.date = TODAY, *, full: bool = False) -> Stored:
        statepool.init(self.root / "kept")
        kept = Location("file", str(self.root / "kept"))
        return store(self.settings, kept, Settings(), today=day, full=full)


@pytest.fixture
def lab(tmp_path: Path, make_image: Make) -> Lab:
    return Lab(tmp_path, make_image)


def states_in(pool: Path) -> set[str]:
    found = open_pool(pool, Settings())
    return {
        f"{one.object} {one.state}"
        for machine in found.machines_of(None)
        for one in found.fold(machine).states.values()
    }


def data_in(pool: Path) -> dict[str, os.stat_result]:
    return {
        path.name: path.stat()
        for path in (pool / ".statepool/data").iterdir()
        if not path.name.endswith(".pieces")
    }


def test_states_arrive_as_a_pool_and_each_base_once(lab: Lab) -> None:
    lab.on_top("first", "one", 1)
    lab.on_top("second", "two", 2)
    lab.peer("first")
    lab.peer("second")
    staged = lab.stage()
    assert staged.complete
    assert states_in(lab.day() / "first") == {"vm1/disk install", "vm1/disk one"}
    assert states_in(lab.day() / "second") == {"vm1/disk install", "vm1/disk two"}
    first, second = data_in(lab.day() / "first"), data_in(lab.day() / "second")
    assert {name for name in first if first[name].st_nlink > 1} == first.keys() & second.keys()
    assert first.keys() & second.keys()
    assert (lab.day() / "cback.stage").exists()
    assert not list(lab.root.glob("*/cback.stage"))  # a pool gets no indicator
    # The second peer's base did not move.
    assert staged.peers[0].brought.sent > MIB > staged.peers[1].brought.sent


def test_the_next_run_and_the_next_day_move_what_is_new(lab: Lab) -> None:
    lab.peer("first")
    assert lab.one().brought.new == 1
    assert lab.one().brought.new == 0
    lab.on_top("first", "one", 1)
    tomorrow = TODAY + dt.timedelta(days=1)
    (result,) = lab.stage(tomorrow).peers
    assert result.brought.sent < MIB
    assert states_in(lab.day(tomorrow) / "first") == {"vm1/disk install", "vm1/disk one"}
    assert states_in(lab.day() / "first") == {"vm1/disk install"}


def test_objects_by_pattern(lab: Lab) -> None:
    other = lab.make_image(lab.root / "other.qcow2", 4 * MIB, writes=[(0, MIB, 2)])
    lab.set("first", "install", other, "vm2/disk")
    lab.peer("first", "vm2/*")
    assert [one.name for one in lab.one().brought.staged] == ["vm2/disk install"]
    assert states_in(lab.day() / "first") == {"vm2/disk install"}
    lab.peers.clear()
    lab.peer("first", "vm3/*", "x*")
    error = lab.one().error
    assert isinstance(error, NotFound)
    assert "vm3/* or x*" in str(error)


def test_a_pool_that_is_none(lab: Lab) -> None:
    (lab.root / "none").mkdir()
    lab.peer("none")
    error = lab.one().error
    assert isinstance(error, NotReady)
    assert isinstance(error.__cause__, NotAPool)
    assert error.exit_code == NotAPool.exit_code
    assert not (lab.day() / "cback.stage").exists()


def test_a_state_that_is_damaged_fails_and_the_others_come(lab: Lab) -> None:
    lab.on_top("first", "one", 1)
    (tip,) = (
        path
        for path in (lab.root / "first/.statepool/data").iterdir()
        if path.stat().st_size < MIB and not path.name.endswith(".pieces")
    )
    tip.chmod(0o600)
    with tip.open("r+b") as file:
        file.seek(tip.stat().st_size - 1)
        file.write(b"\xff")
    lab.peer("first")
    result = lab.one()
    assert "could not be copied: vm1/disk one" in str(result.error)
    assert states_in(lab.day() / "first") == {"vm1/disk install"}


# -- store -----------------------------------------------------------------------------------------


def test_a_day_is_stored_once(lab: Lab) -> None:
    lab.on_top("second", "two", 2)
    lab.peer("first")
    lab.peer("second")
    lab.stage()
    stored = lab.store()
    assert stored.states == (("first", 1, 1), ("second", 2, 1))
    assert states_in(lab.root / "kept") == {"vm1/disk install", "vm1/disk two"}
    assert (lab.day() / "cback.store").exists()
    with pytest.raises(RefusedError, match="looked at today, yesterday and tomorrow"):
        lab.store()
    assert lab.store(full=True).states == (("first", 1, 0), ("second", 2, 0))


@pytest.mark.parametrize("days", [1, -1])
def test_the_day_before_or_after_is_stored_if_today_is_not_staged(lab: Lab, days: int) -> None:
    lab.peer("first")
    lab.stage()
    today = TODAY + dt.timedelta(days=days)
    with pytest.raises(RefusedError, match="looked at today"):
        lab.store(today, full=True)
    with pytest.raises(RefusedError):
        lab.store(today + dt.timedelta(days=days))
    assert lab.store(today).day == str(lab.day())


def test_a_day_that_is_not_complete_is_not_stored(lab: Lab) -> None:
    lab.peer("first")
    lab.peer("none")
    lab.stage()
    with pytest.raises(RefusedError):
        lab.store()


def test_files_cannot_be_stored_and_states_of_the_same_day_are(lab: Lab) -> None:
    files = lab.root / "files"
    files.mkdir()
    (files / "cback.collect").touch()
    lab.peers.append(Peer("plain", Location("file", str(files))))
    lab.peer("first")
    lab.stage()
    stored = lab.store()
    (error,) = stored.errors
    assert isinstance(error, RefusedError)
    assert error.hint == "keep files with statepool archive"
    assert stored.states == (("first", 1, 1),)
    assert not (lab.day() / "cback.store").exists()


def test_peers_that_mean_different_things_by_one_name(lab: Lab) -> None:
    shutil.rmtree(lab.root / "second")
    statepool.init(lab.root / "second")
    other = lab.make_image(lab.root / "other.qcow2", 4 * MIB, writes=[(0, MIB, 9)])
    lab.set("second", "install", other)
    lab.peer("first")
    lab.peer("second")
    assert lab.stage().complete
    stored = lab.store()
    (error,) = stored.errors
    assert isinstance(error, Conflict)
    assert "install of second" in str(error)
    assert not (lab.day() / "cback.store").exists()


# -- purge -----------------------------------------------------------------------------------------


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(path, (then, then), follow_symlinks=False)


def test_files_go_that_are_so_many_whole_days_old(lab: Lab) -> None:
    day = lab.day()
    (day / "one").mkdir(parents=True)
    for name, days in (("old", 3.1), ("new", 2.9), ("ahead", -5)):
        (day / "one" / name).touch()
        age(day / "one" / name, days)
    (day / "one/link").symlink_to("/etc/passwd")
    lab.peers.append(Peer("one", Location("file", "/x")))
    assert set(purge(lab.settings, 3, dry_run=True)) == {f"{day}/one/link", f"{day}/one/old"}
    assert (day / "one/old").exists()
    assert set(purge(lab.settings, 3)) == {f"{day}/one/link", f"{day}/one/old"}
    assert sorted(path.name for path in (day / "one").iterdir()) == ["ahead", "new"]
    purge(lab.settings, 0)
    assert list((lab.root / "staging").iterdir()) == []
    assert Path("/etc/passwd").exists()


def test_only_directories_of_days_are_purged(lab: Lab) -> None:
    staging = lab.root / "staging"
    for name in ("mine/01/01", "2026/mine/01", "2026/11/mine", "20261/11/30"):
        (staging / name).mkdir(parents=True)
        (staging / name / "x").touch()
        age(staging / name / "x", 100)
    elsewhere = lab.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x").touch()
    age(elsewhere / "x", 100)
    (staging / "2026/11/30").symlink_to(elsewhere)
    lab.peers.append(Peer("one", Location("file", "/x")))
    assert purge(lab.settings, 1) == ()
    assert (elsewhere / "x").exists()


def test_a_pool_goes_as_a_whole_or_stays(lab: Lab) -> None:
    lab.peer("first")
    lab.stage()
    pool = lab.day() / "first"
    for path in (pool / ".statepool/data").iterdir():
        age(path, 100)
    purge(lab.settings, 3)
    assert states_in(pool) == {"vm1/disk install"}
    for path in lab.day().rglob("*"):
        age(path, 3.5)
    purge(lab.settings, 3)
    assert not lab.day().exists()
