"""Archivers: names, levels, keeping, events; with GNU tar and without."""

from __future__ import annotations

import errno
import os
import platform
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool.archive import external
from statepool.archive.archiver import Archiver
from statepool.archive.definition import BackupDefinition, BackupType, Feature
from statepool.archive.names import KEEPING_IDS
from statepool.archive.registry import BUILT_IN, archiver_class
from statepool.archive.verify import verify
from statepool.archive.writing import Job, _Output
from statepool.errors import (
    Conflict,
    InvalidName,
    LockTimeout,
    MissingFile,
    NoSpace,
    NotFound,
    RefusedError,
    UsageError,
)
from tests.support.archives import Place, write_all
from tests.support.privileges import permissions_count

BOTH = pytest.mark.parametrize("archiver", sorted(set(BUILT_IN) - {"pool"}))  # of directories


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    write_all(made.root, ["a", "b/c", "b/d"])
    return made


@BOTH
@pytest.mark.parametrize("backup_type", BackupType)
def test_tar_reads_what_is_written(tmp_path: Path, archiver: str, backup_type: BackupType) -> None:
    place = Place(tmp_path, archiver, backup_type)
    write_all(place.root, ["a", "b/c"])
    path = place.archiver.backup_files(place.definition)
    assert path == place.to / f"one.{backup_type}"
    command = ["tar", "-tf", str(path)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert sorted(os.path.normpath(name) for name in listed) == [".", "a", "b", "b/c"]
    assert sorted(os.path.normpath(name) for name in place.heard.files) == [".", "a", "b", "b/c"]
    stored = place.directory.stored()
    assert verify(place.directory, stored, place.name()).error is None
    compared = ["tar", "--compare", "-f", str(path), "-C", str(place.root)]
    assert subprocess.run(compared, check=True, capture_output=True).stdout == b""


@BOTH
def test_the_number_of_threads_changes_nothing(tmp_path: Path, archiver: str) -> None:
    contents = []
    for threads in (1, 3):
        place = Place(tmp_path, archiver, "tar.gz")
        (place.root / "big").write_bytes(bytes(range(256)) * 20_000)
        os.utime(place.root / "big", (1e9, 1e9))
        os.utime(place.root, (1e9, 1e9))
        place.archiver.threads = threads
        contents.append(place.archiver.backup_files(place.definition).read_bytes())
    assert contents[0] == contents[1]


def test_features() -> None:
    levels, internal = (archiver_class(name) for name in ("external", "internal"))
    assert levels.get_supported_features() == set(Feature)
    assert levels.get_supported_features(BackupType.TAR) == {Feature.INCREMENTAL}
    assert internal.get_supported_features() == {Feature.COMPRESSION_STRENGTH}
    with pytest.raises(UsageError, match="known are external, internal"):
        archiver_class("nope")


def test_levels_follow_each_other(place: Place) -> None:
    assert place.archiver.get_max_backup_level(place.definition) == 0
    for level in range(3):
        assert place.make().name == str(place.name(level))
        assert place.archiver.get_max_backup_level(place.definition) == level + 1
    assert sorted(os.listdir(place.path / "work/snapshots")) == [
        "one.1.snar", "one.2.snar", "one.snar",
    ]  # fmt: skip
    assert place.archiver.get_stored_backup_ids() == ["one"]
    assert place.archiver.does_backup_exist(place.definition, 2)
    assert not place.archiver.does_backup_exist(place.definition, 2, "aa")
    assert place.archiver.does_any_backup_level_exist(place.definition, 2)
    assert not place.archiver.does_any_backup_level_exist(place.definition, 3)


def test_a_level_that_is_too_high_is_clamped(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.make()
    assert place.make(7).name == "one.1.tar"
    assert "level 7 of one cannot be made before level 1" in caplog.text


def test_a_lower_level_erases_higher_ones(place: Place) -> None:
    for _ in range(4):
        place.make()
    place.make(1)
    assert place.names() == ["one.1.tar", "one.tar"]
    assert sorted(os.listdir(place.path / "work/snapshots")) == ["one.1.snar", "one.snar"]
    assert place.archiver.get_max_backup_level(place.definition) == 2


def test_levels_of_a_kept_archive_move_together(place: Place) -> None:
    """The names are those that AutoArchive 2.1.1 gave, with --number-of-old-backups=3."""
    for _ in range(3):
        place.make(keep=3)
    place.make(1, keep=3)
    assert place.names() == ["one.1.aa.tar", "one.1.tar", "one.2.aa.tar", "one.tar"]
    place.make(keep=3)
    place.make(0, keep=3)
    assert place.names() == [
        "one.1.aa.tar", "one.1.ab.tar", "one.2.aa.tar", "one.2.ab.tar", "one.aa.tar", "one.tar",
    ]  # fmt: skip
    for _ in range(2):
        place.make(keep=3)
    place.make(1, keep=3)
    place.make(0, keep=3)
    assert place.names() == [
        "one.1.aa.tar", "one.1.ab.tar", "one.1.ac.tar", "one.2.ab.tar", "one.2.ac.tar",
        "one.aa.tar", "one.ac.tar", "one.tar",
    ]  # fmt: skip
    for name in place.directory.stored():
        if name.keeping_id == "ac":
            assert verify(place.directory, place.directory.stored(), name).error is None


def test_all_letters_can_be_kept(place: Place) -> None:
    place.make()
    for number, keeping_id in enumerate(KEEPING_IDS):
        for name in (place.name(0, keeping_id), place.name(0, keeping_id).manifest):
            os.link(place.to / str(place.name()), place.to / str(name))
        assert number < 676
    oldest = place.to / "one.zz.tar"
    newest = place.to / "one.zy.tar"
    oldest.unlink()
    oldest.write_bytes(b"the oldest")
    newest.unlink()
    newest.write_bytes(b"the next")
    place.make(0, keep=676)
    assert oldest.read_bytes() == b"the next"
    assert len(place.names()) == 677
    with pytest.raises(UsageError, match="677 archives cannot be kept"):
        place.make(0, keep=677)


def test_a_keeping_id_that_is_taken(place: Place) -> None:
    place.make()
    place.archiver.keep_backup(place.definition, None, "ab")
    place.make()
    with pytest.raises(Conflict, match="ab is taken"):
        place.archiver.keep_backup(place.definition, None, "ab")
    assert place.names() == ["one.ab.tar", "one.tar"]
    place.archiver.keep_backup(place.definition, "ab", "zz")
    assert place.names() == ["one.tar", "one.zz.tar"]
    with pytest.raises(NotFound, match=r"no archive one\.aa\.tar"):
        place.archiver.keep_backup(place.definition, "aa", "ac")
    with pytest.raises(InvalidName, match="'A' is not a keeping id"):
        place.archiver.keep_backup(place.definition, None, "A")


def test_keeping_and_removing(place: Place) -> None:
    place.make()
    place.make()
    place.archiver.keep_new(place.definition, 5)
    assert place.names() == ["one.1.aa.tar", "one.aa.tar"]
    place.make()
    place.make()
    place.archiver.remove_backup_increments(place.definition, 1)
    assert place.names() == ["one.1.aa.tar", "one.aa.tar", "one.tar"]
    assert place.archiver.get_max_backup_level(place.definition) == 1
    place.archiver.remove_backup(place.definition, "aa")
    assert place.files() == ["one.tar", "one.tar.manifest"]
    with pytest.raises(NotFound):
        place.archiver.remove_backup(place.definition, "aa")
    place.archiver.purge_stored_backup_data("one")
    assert place.archiver.get_max_backup_level(place.definition) == 0
    with pytest.raises(NotFound):
        place.archiver.purge_stored_backup_data("one")


def test_an_archive_is_overwritten_at_the_start_if_asked_for(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    produce = type(place.archiver).produce

    def watched(self: Archiver, job: Job) -> dict[str, Any]:
        seen.append(place.names())
        return produce(self, job)

    place.make()
    monkeypatch.setattr(type(place.archiver), "produce", watched)
    place.make(0)
    place.make(0, overwrite_at_start=True)
    place.make(0, keep=1, overwrite_at_start=True)
    assert seen == [["one.tar"], [], ["one.aa.tar"]]


# -- what a level stands on ------------------------------------------------------------------------


def test_a_snapshot_file_of_another_archive_is_not_used(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.make()
    place.make()
    snapshots = place.path / "work/snapshots"
    (snapshots / "one.1.snar").write_bytes((snapshots / "one.snar").read_bytes())
    assert place.archiver.get_max_backup_level(place.definition) == 1
    assert place.make().name == "one.1.tar"
    assert "level 1 of one is made again" in caplog.text
    (snapshots / "one.snar").unlink()
    assert place.make().name == "one.tar"


def test_another_host_and_another_root_are_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.make()
    before = place.files()
    with monkeypatch.context() as patch:
        patch.setattr(platform, "node", lambda: "elsewhere")
        with pytest.raises(RefusedError, match=r"of another host: .*, not elsewhere"):
            place.make()
    other = BackupDefinition("one", "tar", place.to, place.path)
    with pytest.raises(RefusedError, match="of another root"):
        place.archiver.backup_files_incrementally(other)
    assert place.files() == before


def test_two_writers_exclude_each_other(place: Place) -> None:
    with place.directory.locked(), pytest.raises(LockTimeout, match="another process works"):
        place.make()
    place.make()


# -- files -----------------------------------------------------------------------------------------


def _limit_tar(place: Place, patch: pytest.MonkeyPatch) -> None:
    """Have GNU tar run without the capabilities by which root reads all files."""
    wrapper = place.path / "tar"
    lacking = "-dac_override,-dac_read_search"
    drop = f"setpriv --bounding-set={lacking} --inh-caps={lacking}" if os.geteuid() == 0 else ""
    wrapper.write_text(f'#!/bin/sh\nexec {drop} tar "$@"\n')
    wrapper.chmod(0o755)
    patch.setattr(external, "PROGRAM", str(wrapper))


@BOTH
def test_what_is_not_archived_is_told(
    tmp_path: Path, archiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, archiver)
    write_all(place.root, ["a", "no/x", "secret", "b\n\\\u00e4/é"])
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place.root / "so"))
    (place.root / "secret").chmod(0)
    definition = BackupDefinition("one", "tar", place.to, place.root, exclude_files=["no", "gone"])
    _limit_tar(place, monkeypatch)
    with permissions_count():
        place.archiver.backup_files(definition)
    assert place.heard.kinds() == ["excluded", "permission-denied", "socket-ignored"]
    paths = {event.kind.value: event.path for event in place.heard.events}
    assert paths == {"excluded": "no", "permission-denied": "secret", "socket-ignored": "so"}
    manifest = place.directory.stored()[place.name()].manifest
    assert manifest is not None
    assert manifest.events == {"excluded": 1, "permission-denied": 1, "socket-ignored": 1}
    assert not [name for name in place.heard.files if "no" in name.split("/")]


@BOTH
def test_only_what_is_included(tmp_path: Path, archiver: str) -> None:
    place = Place(tmp_path, archiver)
    write_all(place.root, ["a", "b/c", "b/d/e", "x", "-v"])
    definition = BackupDefinition("one", "tar", place.to, place.root, ["b", "-v"], ["b/d"])
    place.archiver.backup_files(definition)
    found = sorted(os.path.normpath(name) for name in place.heard.files)
    assert found == ["-v", "b", "b/c"]
    with pytest.raises(MissingFile, match="there is no nope in"):
        place.archiver.backup_files(BackupDefinition("one", "tar", place.to, place.root, ["nope"]))
    with pytest.raises(UsageError, match="not a path below the root"):
        BackupDefinition("one", "tar", place.to, place.root, ["../x"])


def _while_reading(place: Place, change: Callable[[], None]) -> None:
    """Make an archive, and change the tree when its first bytes were written."""
    done = threading.Event()
    write = _Output.write

    def watched(self: _Output, data: bytes | memoryview) -> None:
        if not done.is_set():
            done.set()
            change()
        write(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Output, "write", watched)
        place.archiver.backup_files(place.definition)


@BOTH
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, archiver: str) -> None:
    place = Place(tmp_path, archiver)
    (place.root / "a").write_bytes(os.urandom(64 << 20))

    def shrink() -> None:
        os.truncate(place.root / "a", 1000)

    _while_reading(place, shrink)
    assert "file-changed" in place.heard.kinds()
    assert verify(place.directory, place.directory.stored(), place.name()).error is None
    command = ["tar", "-tvf", str(place.to / "one.tar")]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert str(64 << 20) in listed


@BOTH
def test_a_file_that_vanishes_before_it_is_read(tmp_path: Path, archiver: str) -> None:
    place = Place(tmp_path, archiver)
    (place.root / "a").write_bytes(os.urandom(16 << 20))
    (place.root / "b").write_bytes(os.urandom(16 << 20))

    def vanish() -> None:
        for name in ("a", "b"):
            (place.root / name).unlink()

    _while_reading(place, vanish)
    assert place.heard.events
    assert set(place.heard.kinds()) <= {"file-changed", "file-vanished"}
    assert verify(place.directory, place.directory.stored(), place.name()).error is None


@BOTH
def test_a_full_disk(tmp_path: Path, archiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, archiver)
    write_all(place.root, ["a"])
    place.archiver.backup_files(place.definition)
    before = {name: (place.to / name).read_bytes() for name in place.files()}
    (place.root / "big").write_bytes(os.urandom(4 << 20))

    def full(self: _Output, data: bytes | memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_Output, "write", full)
    with pytest.raises(NoSpace, match="No space left"):
        place.archiver.backup_files(place.definition, keep=3)
    assert {name: (place.to / name).read_bytes() for name in place.files()} == before


def test_a_tree_and_a_directory_that_are_not_there(place: Place) -> None:
    definition = BackupDefinition("one", "tar", place.to, place.path / "nope")
    with pytest.raises(MissingFile, match=r"cannot archive .*nope"):
        place.archiver.backup_files(definition)
    definition = BackupDefinition("one", "tar", place.path / "nope", place.root)
    with pytest.raises(MissingFile):
        place.archiver.backup_files(definition)
    with pytest.raises(UsageError, match="there is no strength 10"):
        place.archiver.backup_files(
            BackupDefinition("one", "tar.gz", place.to, place.root), compression_strength=10
        )
    with pytest.raises(UsageError, match="a tar has no strength"):
        place.archiver.backup_files(place.definition, compression_strength=1)
    assert place.files() == []
