"""The collect action: what is in the tars, when, and what a failure leaves."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from statepool.errors import NoSpace, NotFound
from statepool.staging import collect as collect_module
from statepool.staging.collect import Collect, CollectedItem
from statepool.staging.settings import ArchiveMode, CollectMode, CollectSettings, Item

MONDAY = dt.datetime(2026, 11, 30, 12)  # noqa: DTZ001
TUESDAY = MONDAY + dt.timedelta(days=1)


class World:
    """A directory to collect, and the collect directory."""

    def __init__(self, root: Path) -> None:
        self.source = root / "src"
        self.source.mkdir()
        (self.source / "a").write_text("a")
        (self.source / "b").write_text("b")
        self.target = root / "collect"
        self.notes = root / "notes"

    def run(self, *, now: dt.datetime = TUESDAY, full: bool = False, **item: Any) -> CollectedItem:
        items = (Item(str(self.source), **item),)
        settings = CollectSettings(self.target, items, self.notes)
        (result,) = Collect(settings, full, now=lambda: now).run()
        return result

    def names(self, result: CollectedItem) -> set[str]:
        assert result.tar is not None
        with tarfile.open(result.tar) as tar:
            prefix = str(self.source)[1:]
            return {one.name.removeprefix(prefix).lstrip("/") for one in tar}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("archive", list(ArchiveMode))
def test_gnu_tar_reads_what_is_collected(
    world: World, archive: ArchiveMode, tmp_path: Path
) -> None:
    (world.source / "sub").mkdir(mode=0o750)
    (world.source / "sub/deep").write_bytes(os.urandom(100_000))
    (world.source / "link").symlink_to("sub/deep")
    os.link(world.source / "a", world.source / "again")
    result = world.run(archive=archive)
    assert result.tar is not None
    assert result.tar.endswith(f"src.{archive}")
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["tar", "-xpf", result.tar, "-C", str(out)], check=True)
    done = subprocess.run(
        ["diff", "-r", "--no-dereference", str(world.source), f"{out}{world.source}"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
    assert (out / str(world.source)[1:] / "sub").stat().st_mode & 0o777 == 0o750
    assert (world.target / "cback.collect").exists()
    assert Path(result.tar).stat().st_mode & 0o777 == 0o600


def test_when_what_is_collected(world: World) -> None:
    assert world.run(mode=CollectMode.WEEKLY).tar is None
    assert (world.target / "cback.collect").exists()
    assert world.run(mode=CollectMode.WEEKLY, full=True).tar is not None
    assert world.run(mode=CollectMode.WEEKLY, now=MONDAY).tar is not None
    assert world.run(mode=CollectMode.DAILY).tar is not None


def test_only_what_has_changed(world: World) -> None:
    result = world.run(mode=CollectMode.INCREMENTAL)
    assert world.names(result) == {"", "a", "b"}
    (world.source / "b").write_text("B")
    (world.source / "c").write_text("c")
    os.utime(world.source / "a", (1, 1))  # its content is the same
    result = world.run(mode=CollectMode.INCREMENTAL)
    assert world.names(result) == {"", "b", "c"}
    assert world.run(mode=CollectMode.INCREMENTAL, full=True).files == 4
    assert world.run(mode=CollectMode.INCREMENTAL, now=MONDAY).files == 4


@pytest.mark.parametrize("notes", ["{", "[1]", '{"x": 7}'])
def test_notes_that_are_damaged_mean_that_all_is_collected(world: World, notes: str) -> None:
    world.run(mode=CollectMode.INCREMENTAL)
    (path,) = world.notes.iterdir()
    path.write_text(notes)
    assert world.names(world.run(mode=CollectMode.INCREMENTAL)) == {"", "a", "b"}


def test_what_is_excluded(world: World) -> None:
    for name in ("keep/x.tmp", "drop/y", "ignored/z", "ignored/.cbignore"):
        (world.source / name).parent.mkdir(exist_ok=True)
        (world.source / name).touch()
    os.mkfifo(world.source / "pipe")
    result = world.run(
        exclude=(f"{world.source}/drop",), patterns=(r".*\.tmp",), ignore_file=".cbignore"
    )
    assert world.names(result) == {"", "a", "b", "keep"}


def test_the_indicator_comes_last_and_an_old_one_goes_first(world: World) -> None:
    world.run()
    (world.target / "cback.stage").touch()
    world.source = world.source / "none"
    with pytest.raises(NotFound, match="is not there") as caught:
        world.run()
    assert caught.value.hint
    assert not (world.target / "cback.collect").exists()
    assert not (world.target / "cback.stage").exists()


def test_a_file_that_shrinks_while_it_is_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tar is whole, the file is named, and it is collected once more."""
    big = world.source / "big"
    big.write_bytes(b"x" * 100_000)
    reader = collect_module._Whole

    class Shrinking(reader):  # type: ignore[valid-type,misc]
        def read(self, size: int) -> bytes:
            if self._left == 100_000:  # not while another file is read
                os.truncate(big, 10)
            found: bytes = super().read(size)
            return found

    monkeypatch.setattr(collect_module, "_Whole", Shrinking)
    result = world.run(mode=CollectMode.INCREMENTAL)
    assert str(big) in result.changed
    assert result.tar is not None
    subprocess.run(["tar", "-tf", result.tar], check=True, capture_output=True)
    monkeypatch.undo()
    assert "big" in world.names(world.run(mode=CollectMode.INCREMENTAL))


def test_a_tar_appears_whole_or_not_at_all(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(collect_module, "_add", fail)
    with pytest.raises(NoSpace):
        world.run()
    assert list(world.target.iterdir()) == []


def test_one_file_can_be_collected(world: World) -> None:
    world.source = world.source / "a"
    result = world.run(archive=ArchiveMode.TAR)
    assert result.files == 1
    assert world.names(result) == {""}
