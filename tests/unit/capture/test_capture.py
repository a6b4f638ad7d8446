"""Taking a working image into the cache as a state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from statepool.cache.cache import Cache
from statepool.cache.trust import FileStatus
from statepool.cache.working import make_working
from statepool.capture.capture import Capture
from statepool.errors import Conflict, InUse, UnsafeImage
from statepool.model.digest import Digest
from statepool.model.manifest import StateId
from statepool.qcow2.header import read_header_file
from statepool.testing.trees import photograph
from tests.support.images import CHILD

INSTALL = StateId("vm1/disk", "install")
CUSTOMIZE = StateId("vm1/disk", "customize")


@pytest.fixture
def work(lab: Any) -> Path:
    path: Path = lab.root / "work.qcow2"
    path.write_bytes(lab.image("work"))
    return path


def on_top(cache: Cache, state: StateId, path: Path, tag: str) -> Path:
    """:returns: a working image on a state, to which something was written"""
    backing = os.fsencode(cache.chains.prepare(cache.pool.chain(state)))
    path.write_bytes(
        evolve(CHILD, backing=backing, extensions=((0x12345678, tag.encode()),)).build()
    )
    return path


def test_the_file_itself_becomes_the_state(cache: Cache, work: Path) -> None:
    inode, content = work.stat().st_ino, work.read_bytes()
    taken = Capture(cache, INSTALL, {INSTALL: work}, labels={"a": "b"}, clock=lambda: 1234.0).run()
    assert (taken.how, taken.written) == ("hardlink", True)
    assert (taken.manifest.digest, taken.manifest.created, dict(taken.manifest.labels)) == (
        Digest.of(content),
        1234.0,
        {"a": "b"},
    )
    data = cache.data(Digest.of(content))
    assert (data.stat().st_ino, data.stat().st_mode & 0o777, data.stat().st_nlink) == (
        inode,
        0o444,
        1,
    )
    assert cache.trust.file_status(Digest.of(content), data.stat()) is FileStatus.TRUSTED
    assert read_header_file(work).backing_name == os.fsencode(
        cache.chains.path(cache.pool.chain(INSTALL))
    )


def test_a_state_on_a_state(lab: Any, cache: Cache, work: Path) -> None:
    Capture(cache, INSTALL, {INSTALL: work}).run()
    on_top(cache, INSTALL, work, "more")
    taken = Capture(cache, CUSTOMIZE, {CUSTOMIZE: work}).run()
    assert (
        read_header_file(cache.data(taken.manifest.digest or Digest.of(b""))).backing_name
        == b"install.qcow2"
    )
    assert lab.names(cache.pool.chain(CUSTOMIZE)) == ["customize", "install"]
    assert lab.leftovers(cache.pool) == []


@pytest.mark.parametrize("written", [False, True])
def test_on_top_of_the_very_state(lab: Any, cache: Cache, work: Path, written: bool) -> None:
    Capture(cache, INSTALL, {INSTALL: work}).run()
    if written:
        work.unlink()
        chain = cache.pool.chain(INSTALL)
        make_working(cache, chain, work)
        with open(work, "r+b") as file:
            l1_offset = int.from_bytes(work.read_bytes()[40:48])
            file.seek(0, os.SEEK_END)
            end = (file.tell() + 65535) & ~65535
            file.truncate(end + 65536)
            file.seek(l1_offset)
            file.write((end | 1 << 63).to_bytes(8))
    before = photograph(lab.root)
    if written:
        with pytest.raises(Conflict, match="was written to since"):
            Capture(cache, INSTALL, {INSTALL: work}).run()
    else:
        assert not Capture(cache, INSTALL, {INSTALL: work}).run().written
    assert photograph(lab.root) == before


def test_a_file_with_other_names_is_copied(cache: Cache, work: Path, tmp_path: Path) -> None:
    os.link(work, tmp_path / "second")
    content = work.read_bytes()
    taken = Capture(cache, INSTALL, {INSTALL: work}).run()
    assert taken.how in ("copy", "reflink")
    assert (tmp_path / "second").read_bytes() == content
    assert Digest.of(cache.data(Digest.of(content)).read_bytes()) == taken.manifest.digest
    assert read_header_file(work).backing_name is not None


def test_a_dry_run(lab: Any, cache: Cache, work: Path) -> None:
    before = photograph(lab.root)
    would = Capture(cache, INSTALL, {INSTALL: work}).run(dry_run=True)
    assert (would.written, would.manifest.digest) == (True, Digest.of(work.read_bytes()))
    assert photograph(lab.root) == before
    assert Capture(cache, INSTALL, {INSTALL: work}).run().manifest.digest == would.manifest.digest


def test_a_conflict_gives_the_image_back(lab: Any, cache: Cache, work: Path) -> None:
    lab.put(cache.pool, "install", tag="theirs")
    work.chmod(0o640)
    before = photograph(lab.root)
    with pytest.raises(Conflict):
        Capture(cache, INSTALL, {INSTALL: work}).run()
    assert photograph(lab.root) == before


def test_a_conflict_at_the_last_moment_gives_the_image_back(
    lab: Any, cache: Cache, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else sets the state between our look and our record."""
    lab.put(cache.pool, "base")
    on_top(cache, StateId("vm1/disk", "base"), work, "mine")
    content, mode = work.read_bytes(), work.stat().st_mode
    publish = cache.pool.publish

    def late(*names: Any, **options: Any) -> bool:
        monkeypatch.undo()
        lab.put(lab.cache().pool, "customize", tag="theirs")
        return publish(*names, **options)

    monkeypatch.setattr(cache.pool, "publish", late)
    with pytest.raises(Conflict):
        Capture(cache, CUSTOMIZE, {CUSTOMIZE: work}).run()
    assert (work.read_bytes(), work.stat().st_mode, work.stat().st_nlink) == (content, mode, 1)
    assert lab.leftovers(cache.pool) == []


def test_what_stands_outside(lab: Any, cache: Cache, work: Path) -> None:
    work.write_bytes(evolve(CHILD, backing=b"/etc/install.qcow2").build())
    before = photograph(lab.root)
    with pytest.raises(UnsafeImage) as caught:
        Capture(cache, INSTALL, {INSTALL: work}).run()
    assert caught.value.check == "backing-outside-cache"
    assert photograph(lab.root) == before


def test_what_this_process_has_open(cache: Cache, work: Path) -> None:
    with open(work, "rb"), pytest.raises(InUse):
        Capture(cache, INSTALL, {INSTALL: work}).run()
    Capture(cache, INSTALL, {INSTALL: work}).run()


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
@pytest.mark.parametrize("how", ["hardlink", "copy"])
def test_the_same_bytes_as_a_state_of_an_older_version_are_that_state(
    lab: Any, cache: Cache, tmp_path: Path, algorithm: str, how: str
) -> None:
    old = lab.put(cache.pool, "install", algorithm=algorithm)
    work = tmp_path / "again.qcow2"
    work.write_bytes(lab.image("install"))
    if how == "copy":
        os.link(work, tmp_path / "second")
    taken = Capture(cache, old.id, {old.id: work}).run()
    assert (taken.manifest.digest, taken.written) == (old.digest, False)
    other = tmp_path / "other.qcow2"
    other.write_bytes(lab.image("other"))
    with pytest.raises(Conflict):
        Capture(cache, old.id, {old.id: other}).run()
    replaced = Capture(cache, old.id, {old.id: other}, replace=True).run()
    assert replaced.manifest.digest == Digest.of(lab.image("other"))
