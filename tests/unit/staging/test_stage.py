"""The stage action with peers of this host: what arrives, what is brought again, and bad input."""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from statepool.errors import (
    AccessDenied,
    IntegrityError,
    InUse,
    MissingFile,
    NotFound,
    RefusedError,
    TransportError,
)
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.staging import files as files_module
from statepool.staging.day import Staging
from statepool.staging.ready import NotReady
from statepool.staging.settings import Indicators, Peer, StageSettings
from statepool.staging.stage import PeerOutcome, PeerResult, Stage, Staged
from statepool.transports.base import FileKind
from statepool.transports.local import LocalTransport
from tests.support.privileges import permissions_count
from tests.support.staging import tree

MONDAY = dt.datetime(2026, 11, 30, 23, 59, 59)  # noqa: DTZ001


@define
class World:
    """A staging directory and the collect directories of some peers."""

    root: Path
    now: dt.datetime = MONDAY
    peers: tuple[Peer, ...] = ()
    changes: dict[str, Any] = field(factory=dict)

    def peer(self, name: str, files: dict[str, bytes], *, ready: bool = True) -> Path:
        place = self.root / "peers" / name
        place.mkdir(parents=True)
        for file, content in files.items():
            (place / file).write_bytes(content)
            self.age(place / file)
        if ready:
            (place / "cback.collect").touch()
            self.age(place / "cback.collect")
        self.peers = (*self.peers, Peer(name, Location("file", str(place))))
        return place

    @staticmethod
    def age(path: Path) -> None:
        """Make a file so old that its time tells whether it is changed."""
        then = time.time() - 3600
        os.utime(path, (then, then))

    def stage(self, **given: Any) -> Staged:
        settings = StageSettings(self.root / "staging", self.peers, **self.changes)
        return Stage(settings, Settings(), now=lambda: self.now, **given).run()

    def one(self, **given: Any) -> PeerResult:
        (result,) = self.stage(**given).peers
        return result

    @property
    def day(self) -> Path:
        return self.root / "staging" / self.now.strftime("%Y/%m/%d")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_files_arrive_and_everything_is_indicated(world: World) -> None:
    place = world.peer("one", {"a.tar": b"a" * 5000, "b": b""})
    staged = world.stage()
    assert staged.complete
    assert staged.day == str(world.day)
    assert tree(world.day) == {
        "cback.stage": b"",
        "one": None,
        "one/a.tar": b"a" * 5000,
        "one/b": b"",
        "one/cback.collect": b"",
    }
    assert (place / "cback.stage").read_bytes() == b""
    assert (world.day / "one/a.tar").stat().st_mode & 0o777 == 0o600
    summary = json.loads((world.day / "staged.json").read_text())
    assert summary == json.loads(json.dumps(staged.form()))
    (peer,) = summary["peers"]
    assert (peer["files"], peer["bytes"], peer["new"], peer["sent"]) == (3, 5000, 3, 5000)
    assert [one["name"] for one in peer["staged"]] == ["a.tar", "b", "cback.collect"]
    assert not any((world.day / ".staging").glob("*/*"))


def test_holes_stay_holes(world: World) -> None:
    place = world.peer("one", {})
    with open(place / "disk", "wb") as file:
        file.write(b"x" * 4096)
        file.truncate(64 << 20)
    world.stage()
    copy = world.day / "one/disk"
    assert copy.stat().st_size == 64 << 20
    assert copy.stat().st_blocks * 512 <= 1 << 20
    assert copy.read_bytes() == (place / "disk").read_bytes()


def test_a_second_run_brings_what_is_new_or_changed(world: World) -> None:
    place = world.peer("one", {"same": b"s" * 100, "longer": b"1", "touched": b"1", "gone": b"g"})
    assert world.one().brought.new == 5
    kept = (world.day / "one/same").stat().st_ino
    assert world.one().brought.new == 1  # our indicator, which is a file there now
    assert world.one().brought.new == 0
    (place / "longer").write_bytes(b"12")
    (place / "touched").write_bytes(b"2")
    (place / "new").write_bytes(b"n")
    (place / "gone").unlink()
    assert world.one().brought.new == 3
    assert (world.day / "one/same").stat().st_ino == kept
    assert (world.day / "one/longer").read_bytes() == b"12"
    assert (world.day / "one/touched").read_bytes() == b"2"
    # What the peer has removed since stays, as in CedarBackup.
    assert (world.day / "one/gone").read_bytes() == b"g"


def test_what_was_changed_within_the_resolution_of_its_time_is_brought(world: World) -> None:
    place = world.peer("one", {})
    file = place / "racy"
    file.write_bytes(b"1")
    stamp = time.time_ns()
    os.utime(file, ns=(stamp, stamp))
    world.stage()
    file.write_bytes(b"2")
    os.utime(file, ns=(stamp, stamp))
    world.stage()
    assert (world.day / "one/racy").read_bytes() == b"2"


@pytest.mark.parametrize("damage", ["shorter", "other", "gone", "link"])
def test_a_copy_that_was_changed_here_is_brought_again(world: World, damage: str) -> None:
    world.peer("one", {"a": b"aaaa"})
    world.stage()
    copy = world.day / "one/a"
    if damage == "shorter":
        os.truncate(copy, 1)
    elif damage == "other":
        copy.write_bytes(b"bbbb")
    else:
        copy.unlink()
    if damage == "link":
        copy.symlink_to("/etc/passwd")
    world.stage()
    assert copy.read_bytes() == b"aaaa"
    assert not copy.is_symlink()


def test_notes_that_a_crash_has_torn_do_not_count(world: World) -> None:
    world.peer("one", {"a": b"aaaa", "b": b"b"})
    world.stage()
    notes = world.day / ".staging/one.jsonl"
    lines = notes.read_bytes().splitlines(keepends=True)
    notes.write_bytes(b"null\n[]\n{}\n" + b'["x",1,1,"d",false,7]\n' + lines[0] + lines[1][:20])
    assert world.one().brought.new == 3  # the third of the first run, ours, and the torn one
    assert world.one().brought.new == 0


def test_the_day_is_that_of_the_start(world: World) -> None:
    """Midnight passes while the first peer is staged."""
    world.peer("one", {"a": b"a"})
    world.peer("two", {"b": b"b"})
    first = world.now

    def pass_midnight(_: PeerResult) -> None:
        world.now = first + dt.timedelta(seconds=2)

    staged = world.stage(tell=pass_midnight)
    world.now = first
    assert staged.complete
    assert tree(world.day)["two/b"] == b"b"
    assert [path.name for path in (world.root / "staging/2026").iterdir()] == ["11"]


def test_a_clock_that_is_set_back(world: World) -> None:
    """The day is another one, and nothing of the later one is touched."""
    place = world.peer("one", {"a": b"1"})
    world.stage()
    later = tree(world.day)
    old = world.day
    world.now -= dt.timedelta(days=40)
    (place / "a").write_bytes(b"2")
    ahead = time.time() + 86_400
    os.utime(place / "a", (ahead, ahead))
    assert world.stage().complete
    assert tree(world.day)["one/a"] == b"2"
    assert tree(old) == later
    assert world.one().brought.new == 0


def test_a_failing_peer_stops_no_other_and_the_day_is_not_indicated(world: World) -> None:
    world.peer("bad", {"a": b"a"}, ready=False)
    world.peer("good", {"b": b"b"})
    staged = world.stage()
    assert [one.outcome for one in staged.peers] == [PeerOutcome.NOT_READY, PeerOutcome.STAGED]
    assert not staged.complete
    assert not (world.day / "cback.stage").exists()
    assert tree(world.day)["good/b"] == b"b"
    (world.root / "peers/bad/cback.collect").touch()
    assert world.stage().complete
    assert (world.day / "cback.stage").exists()


def test_names_of_indicators(world: World) -> None:
    world.changes = {"indicators": Indicators("ready", "taken", "kept")}
    place = world.peer("one", {"a": b"a", "ready": b""}, ready=False)
    assert world.stage().complete
    assert (place / "taken").exists()
    assert (world.day / "taken").exists()


def test_what_is_no_file_is_left_out(world: World) -> None:
    place = world.peer("one", {"a": b"a"})
    (place / "sub").mkdir()
    (place / "sub/x").touch()
    (place / "link").symlink_to("/etc/passwd")
    os.mkfifo(place / "pipe")
    result = world.one()
    assert result.outcome is PeerOutcome.STAGED
    assert result.brought.left_out == ("link", "pipe", "sub")
    assert sorted(path.name for path in (world.day / "one").iterdir()) == ["a", "cback.collect"]


def test_an_indicator_that_is_no_file_does_not_count(world: World) -> None:
    place = world.peer("one", {"a": b"a"}, ready=False)
    (place / "cback.collect").mkdir()
    assert isinstance(world.one().error, NotReady)


def test_a_collect_directory_that_is_missing_is_not_ready(world: World) -> None:
    world.peers = (Peer("one", Location("file", str(world.root / "none"))),)
    error = world.one().error
    assert isinstance(error, NotFound)
    assert error.hint


def test_a_collect_directory_that_is_a_file_is_not_ready(world: World) -> None:
    (world.root / "file").touch()
    world.peers = (Peer("one", Location("file", str(world.root / "file"))),)
    assert isinstance(world.one().error, NotReady)


def test_a_collect_directory_that_is_a_link_is_followed(world: World) -> None:
    place = world.peer("one", {"a": b"a"})
    (world.root / "link").symlink_to(place)
    world.peers = (Peer("one", Location("file", str(world.root / "link"))),)
    assert world.one().outcome is PeerOutcome.STAGED


def test_a_closed_collect_directory(world: World) -> None:
    place = world.peer("one", {"a": b"a"})
    settings = StageSettings(world.root / "staging", world.peers)
    place.chmod(0)
    try:
        with permissions_count():  # for this thread only
            result = Stage(settings, Settings())._one(
                Staging(settings).day(world.now.date()), world.peers[0], start=False
            )
    finally:
        place.chmod(0o700)
    assert isinstance(result.error, NotReady)
    assert isinstance(result.error.__cause__, AccessDenied)
    assert result.error.hint


def test_a_link_in_the_staging_directory_is_not_followed(world: World) -> None:
    world.peer("one", {"a": b"a"})
    outside = world.root / "outside"
    outside.mkdir()
    world.day.mkdir(parents=True)
    (world.day / "one").symlink_to(outside)
    error = world.one().error
    assert isinstance(error, TransportError)
    assert "symbolic link" in str(error)
    assert list(outside.iterdir()) == []


def test_a_directory_in_the_way_of_a_file(world: World) -> None:
    world.peer("one", {"a": b"a"})
    (world.day / "one/a").mkdir(parents=True)
    error = world.one().error
    assert isinstance(error, RefusedError)
    assert (world.day / "one/a").is_dir()


def test_something_in_the_way_of_the_indicators(world: World) -> None:
    place = world.peer("one", {"a": b"a"})
    (place / "cback.stage").mkdir()
    assert isinstance(world.one().error, RefusedError)
    (place / "cback.stage").rmdir()
    (world.day / "cback.stage").mkdir()
    with pytest.raises(RefusedError, match="something else has this name"):
        world.stage()


# -- files that change while they are read ---------------------------------------------------------


def while_reading(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, int], None]) -> None:
    """Have something done after each file was looked at, and before it is read."""
    fetch, calls = LocalTransport.fetch, dict[str, int]()

    def slow(self: LocalTransport, path: str, target: int, transfer: Any) -> Any:
        calls[path] = calls.get(path, 0) + 1
        change(path, calls[path])
        return fetch(self, path, target, transfer)

    monkeypatch.setattr(LocalTransport, "fetch", slow)


def test_a_file_that_shrinks_once_is_brought_as_it_is_then(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = world.peer("one", {"a": b"a" * 5000, "b": b"b"})

    def shrink(path: str, count: int) -> None:
        if path == "a" and count == 1:
            os.truncate(place / "a", 10)

    while_reading(monkeypatch, shrink)
    assert world.stage().complete
    assert tree(world.day)["one/a"] == b"a" * 10


def test_a_file_that_goes_on_shrinking_is_an_error_and_not_half_a_file(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = world.peer("one", {"a": b"a" * 5000, "b": b"b"})
    while_reading(monkeypatch, lambda path, count: os.truncate(place / "a", 5000 - 10 * count))
    result = world.one()
    assert isinstance(result.error, IntegrityError)
    assert "changes while it is copied" in str(result.error)
    assert not (world.day / "one/a").exists()
    assert not (place / "cback.stage").exists()


def test_a_file_that_is_overwritten_in_place_is_brought_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = world.peer("one", {"a": b"old!"})
    settle = files_module.FileStager._settle
    seen = []

    def late(self: Any, batch: Any) -> None:
        if batch and not seen:
            seen.append(batch)
            (place / "a").write_bytes(b"new!")
        settle(self, batch)

    monkeypatch.setattr(files_module.FileStager, "_settle", late)
    assert world.stage().complete
    assert tree(world.day)["one/a"] == b"new!"


def test_a_file_that_goes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    place = world.peer("one", {"a": b"a", "b": b"b"})
    while_reading(monkeypatch, lambda path, count: (place / "b").unlink(missing_ok=True))
    assert isinstance(world.one().error, MissingFile)


def test_names_that_lead_elsewhere_are_refused() -> None:
    for name in ("../x", "a/b", "..", "", "a\0b"):
        with pytest.raises(IntegrityError):
            files_module.regular(iter([(name, FileKind.FILE)]))


def test_a_staging_directory_that_cannot_be_made(world: World) -> None:
    world.peer("one", {"a": b"a"})
    (world.root / "staging").touch()
    with pytest.raises((TransportError, AccessDenied)):
        world.stage()


def test_two_runs_at_the_same_time(world: World) -> None:
    world.peer("one", {"a": b"a"})
    refused = []

    def again(_: PeerResult) -> None:
        with pytest.raises(InUse, match="another process is staging") as caught:
            world.stage()
        refused.append(caught.value.hint)

    assert world.stage(tell=again).complete
    assert refused == ["wait until it has ended"]
    assert world.stage().complete
