"""Restoring: levels, points in time, one file, and everything that is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from statepool.archive.archiver import Archiver
from statepool.archive.definition import BackupType
from statepool.archive.restore import Restore, UnsafeMember, choose
from statepool.archive.verify import DamagedMember, verify
from statepool.archive.writing import Job
from statepool.errors import FileInTheWay, IntegrityError, NotFound, ToolError
from tests.support.archives import Place, facts_of, flip, write_all


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Three levels; ``copies`` has the tree of each."""
    made = Place(tmp_path)
    root = made.root
    write_all(root, ["a", "b/c", "b/d/e", "gone", "f"])
    _make(made, 0)
    (root / "gone").unlink()
    (root / "b/d").rename(root / "moved")
    (root / "a").write_text("changed")
    _make(made, 1)
    (root / "f").unlink()
    write_all(root, ["f/inside"])
    (root / "moved/e").unlink()
    _make(made, 2)
    return made


def _make(place: Place, level: int) -> None:
    place.make()
    copy = place.path / f"copy{level}"
    subprocess.run(["cp", "-a", str(place.root), str(copy)], check=True)


@pytest.mark.parametrize("level", range(3))
def test_each_level(place: Place, level: int) -> None:
    target = place.path / "target"
    done = Restore(place.directory, place.name(level)).to(target)
    assert facts_of(target) == facts_of(place.path / f"copy{level}")
    assert done.archives == tuple(place.name(one) for one in range(level + 1))
    assert [name for name in os.listdir(place.path) if name.startswith(".")] == []


def test_over_a_directory_with_files(place: Place) -> None:
    target = place.path / "target"
    write_all(target, ["extra", "b/extra", "a/was/a/directory"])
    with pytest.raises(FileInTheWay, match="has files"):
        Restore(place.directory, place.name(2)).to(target)
    assert sorted(os.listdir(target)) == ["a", "b", "extra"]
    Restore(place.directory, place.name(2)).to(target, overwrite=True)
    assert facts_of(target) == facts_of(place.path / "copy2")


def test_one_file_and_one_directory(place: Place) -> None:
    one, two, three = (place.path / name for name in ("one", "two", "three"))
    Restore(place.directory, place.name(1)).one("moved/e", one)
    assert one.read_text() == "b/d/e"
    Restore(place.directory, place.name(0)).one("./b//d/e", two)
    assert two.read_text() == "b/d/e"
    Restore(place.directory, place.name(2)).one("f", three)
    assert os.listdir(three) == ["inside"]
    with pytest.raises(NotFound, match="gone is not in"):
        Restore(place.directory, place.name(2)).one("gone", place.path / "four")
    with pytest.raises(FileInTheWay):
        Restore(place.directory, place.name(0)).one("a", one)
    Restore(place.directory, place.name(0)).one("a", one, overwrite=True)
    assert one.read_text() == "a"


def test_a_point_in_time(place: Place) -> None:
    place.make(0, keep=2)
    stored = place.directory.stored()
    newest = choose(stored)
    assert newest == place.name(0)
    moment = stored[place.name(1, "aa")].manifest
    assert moment is not None
    assert choose(stored, until=moment.created) == place.name(1, "aa")
    assert choose(stored, keeping_id="aa") == place.name(2, "aa")
    assert choose(stored, keeping_id="aa", level=0) == place.name(0, "aa")
    with pytest.raises(NotFound, match="as old as that"):
        choose(stored, until=1.0)
    with pytest.raises(NotFound, match="no such archive"):
        choose(stored, level=9)
    target = place.path / "target"
    Restore(place.directory, place.name(1, "aa")).to(target)
    assert facts_of(target) == facts_of(place.path / "copy1")


@pytest.mark.parametrize("file", ["one.1.tar", "one.1.tar.manifest"])
def test_a_level_that_is_missing_or_altered(place: Place, file: str) -> None:
    target = place.path / "target"
    content = (place.to / file).read_bytes()
    for harm in (b"", content[:-1], content[: len(content) // 2]):
        (place.to / file).write_bytes(harm)
        with pytest.raises((IntegrityError, NotFound)):
            Restore(place.directory, place.name(2)).to(target)
        assert verify(place.directory, place.directory.stored(), place.name(1)).error is not None
    (place.to / file).unlink()
    with pytest.raises((IntegrityError, NotFound)):
        Restore(place.directory, place.name(2)).to(target)
    assert not target.exists()
    Restore(place.directory, place.name(0)).to(target)


def test_a_flipped_byte_is_found_and_its_member_is_named(place: Place) -> None:
    with place.directory.manifest(place.directory.stored()[place.name(0)]) as file:
        lines = file.read().splitlines()[1:-1]
    target = place.path / "target"
    write_all(target, ["old"])
    for line in lines:
        name, _, offset, length = json.loads(line)[:4]
        for position in (offset, offset + length - 1):
            flip(place.to / "one.tar", position)
            found = verify(place.directory, place.directory.stored(), place.name(0))
            assert isinstance(found.error, DamagedMember)
            assert found.member == name
            with pytest.raises(IntegrityError):
                Restore(place.directory, place.name(1)).to(target, overwrite=True)
            assert os.listdir(target) == ["old"]
            flip(place.to / "one.tar", position)
    assert verify(place.directory, place.directory.stored(), place.name(0)).error is None


@pytest.mark.parametrize("backup_type", [kind for kind in BackupType if kind != "tar"])
def test_damage_of_a_compressed_archive_is_found(tmp_path: Path, backup_type: BackupType) -> None:
    place = Place(tmp_path, backup_type=backup_type)
    (place.root / "a").write_bytes(os.urandom(3000))
    path = place.make()
    size = path.stat().st_size
    for position in (*range(0, size, 97), size - 1):
        flip(path, position)
        found = verify(place.directory, place.directory.stored(), place.name())
        assert isinstance(found.error, IntegrityError), position
        flip(path, position)
    with path.open("ab") as file:
        file.write(b"\0")
    assert verify(place.directory, place.directory.stored(), place.name()).error is not None


# -- archives of an attacker -----------------------------------------------------------------------


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax
    return info.tobuf(tarfile.PAX_FORMAT)


def _forge(place: Place, monkeypatch: pytest.MonkeyPatch, *members: bytes) -> None:
    """Make an archive with these members, and a manifest that agrees."""

    def produce(self: Archiver, job: Job) -> dict[str, object]:
        for member in members:
            job.write(member)
        job.write(bytes(1024))
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(type(place.archiver), "produce", produce)
        place.archiver.backup_files(place.definition)


HOSTILE = {
    "parent": [_member("../out")],
    "parent inside": [_member("a/../../out")],
    "absolute": [_member("/tmp/statepool-out")],
    "through a link": [_member("a", tarfile.SYMTYPE, "b"), _member("a/out")],
    "link to a parent": [_member("a", tarfile.SYMTYPE, "../out")],
    "link that is absolute": [_member("a", tarfile.SYMTYPE, "/etc")],
    "link by a detour": [_member("a/b", tarfile.SYMTYPE, "c/../../../out")],
    "hard link out": [_member("a", tarfile.LNKTYPE, "../out")],
    "hard link absolute": [_member("a", tarfile.LNKTYPE, "/etc/passwd")],
    "hard link through a link": [
        _member("a", tarfile.SYMTYPE, "b"), _member("c", tarfile.LNKTYPE, "a/out"),
    ],
    "hard link to a link": [
        _member("a", tarfile.SYMTYPE, "b"), _member("c", tarfile.LNKTYPE, "a"), _member("c/out"),
    ],
    "device": [_member("a", tarfile.CHRTYPE)],
    "block device": [_member("a", tarfile.BLKTYPE)],
    "list that deletes": [_member("./", tarfile.DIRTYPE, **{"GNU.dumpdir": "Y../out\0\0"})],
    "list that renames": [_member("./", tarfile.DIRTYPE, **{"GNU.dumpdir": "R/etc\0Tout\0\0"})],
    "list that renames out": [
        _member("./", tarfile.DIRTYPE, **{"GNU.dumpdir": "Ra\0T../out\0\0"}),
    ],
    "list that renames through": [
        _member("a", tarfile.SYMTYPE, "b"),
        _member("./", tarfile.DIRTYPE, **{"GNU.dumpdir": "Rc\0Ta/out\0\0"}),
    ],
    "renamed link": [
        _member("d/a", tarfile.SYMTYPE, "b"),
        _member("./", tarfile.DIRTYPE, **{"GNU.dumpdir": "Rd\0Te\0\0"}),
        _member("e/a/out"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("overwrite", [False, True])
def test_members_that_lead_out_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, overwrite: bool
) -> None:
    place = Place(tmp_path)
    _forge(place, monkeypatch, _member("good"), *HOSTILE[what])
    target = place.path / "below/target"
    write_all(target, ["old"] if overwrite else [])
    target.mkdir(parents=True, exist_ok=True)
    with pytest.raises(UnsafeMember):
        Restore(place.directory, place.name()).to(target, overwrite=overwrite)
    assert os.listdir(target) == ["old"] * overwrite
    assert os.listdir(target.parent) == ["target"]
    assert sorted(os.listdir(place.path)) == ["below", "root", "to", "work"]


def test_links_that_lead_out_are_restored_if_trusted(tmp_path: Path) -> None:
    place = Place(tmp_path)
    os.symlink("/etc/passwd", place.root / "out")
    os.symlink("x/../y", place.root / "in")
    place.make()
    target = place.path / "target"
    with pytest.raises(UnsafeMember, match="--trusted"):
        Restore(place.directory, place.name()).to(target)
    Restore(place.directory, place.name(), trusted=True).to(target)
    assert facts_of(target) == facts_of(place.root)


def test_a_tree_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    _forge(place, monkeypatch, _member("a"), _member("a/b"))
    target = place.path / "target"
    with pytest.raises(ToolError, match=r"tar ended with 2: .*a/b"):
        Restore(place.directory, place.name()).to(target)
    assert not target.exists()


def test_what_is_no_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    for member in (b"x" * 512, _member("a")[:-1] + b"x", _member("a", b"V")):
        with pytest.raises(IntegrityError, match="damaged at byte"):
            _forge(place, monkeypatch, member)
    assert place.files() == []
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("x" * 150)
        tar.addfile(info)
    _forge(place, monkeypatch, buffer.getvalue()[:-20])
