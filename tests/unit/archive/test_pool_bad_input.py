"""Pools and archives that cannot be used: what is said, and that nothing is left."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from statepool.archive.pool_archiver import PoolArchiver
from statepool.archive.pool_reader import read_index, restore_pool, verify_archive
from statepool.archive.pool_writer import PoolWriter
from statepool.errors import (
    AccessDenied,
    DigestMismatch,
    FileInTheWay,
    IntegrityError,
    NotAPool,
    NotFound,
    ReadOnlyPool,
    RefusedError,
    StatePoolError,
)
from statepool.model.digest import Digest
from statepool.model.progress import NoProgress
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.pools.staging import Staging
from statepool.testing.trees import photograph
from tests.support.pool_archives import DISK, Store, open_local, states_of
from tests.support.privileges import permissions_count


class During(NoProgress):
    """Does something when the data begins to be read, as another process might."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work

    def advance(self, count: int) -> None:
        work, self._work = self._work, lambda: None
        work()


@pytest.fixture
def nothing_left(store: Store) -> Iterator[None]:
    """What a test does leaves no file beside the pool."""
    before = {path for path in store.root.iterdir() if "work" not in path.name}
    yield
    after = {path for path in store.root.iterdir() if "work" not in path.name}
    assert after - before <= {store.root / ".pool.lock"}
    assert not list((store.path / layout.INCOMING).iterdir())


# -- pools that change while they are read ---------------------------------------------------------


def test_states_that_are_removed_meanwhile_are_in_the_archive(store: Store) -> None:
    before = states_of(store.path)

    def interfere() -> None:
        other = open_local(store.path)
        for state in list(other.fold("vm1").states):
            if state in other.fold("vm1").states:
                other.remove(state, cascade=True)
        store.collect()
        store.put("meanwhile", b"meanwhile", object="vm2/data")

    store.archive(progress=During(interfere))
    store.restore(0)
    assert states_of(store.root / "back") == before
    store.collect()
    store.archive(1)
    store.restore(1, "later")
    assert states_of(store.root / "later") == states_of(store.path)


def test_states_that_are_removed_before_they_are_protected(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Pool.stage, 0

    def stage(pool: Pool, digests: set[Digest]) -> Staging:
        nonlocal calls
        calls += 1
        if calls == 1:
            store.remove("customize")
            store.collect()
        return real(pool, digests)

    monkeypatch.setattr(Pool, "stage", stage)
    store.archive()
    monkeypatch.undo()
    assert calls > 1  # the logs were read again
    store.restore()
    assert states_of(store.root / "back") == states_of(store.path)


@pytest.mark.usefixtures("nothing_left")
def test_states_that_vanish_each_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Pool.lacking
    monkeypatch.setattr(Pool, "lacking", lambda pool, wanted: set(list(wanted)[:1]))
    monkeypatch.setattr("statepool.archive.pool_writer.PoolWriter._is_needed", lambda *_: False)
    with pytest.raises(RefusedError, match="each time"):
        store.archive()
    monkeypatch.setattr(Pool, "lacking", real)


@pytest.mark.usefixtures("nothing_left")
def test_removed_from_a_pool_that_cannot_be_protected(store: Store) -> None:
    gone = store.pool.find(
        next(one for one in store.pool.fold("vm1").states if one.state == "customize")
    )
    assert gone is not None

    def interfere() -> None:
        store.remove("customize")
        store.file(gone).unlink()

    (store.path / layout.INCOMING).chmod(0o555)
    try:
        with (
            permissions_count(),
            pytest.raises(RefusedError, match="while it was archived") as caught,
        ):
            store.archive(progress=During(interfere))
        assert "customize" in caught.value.message
    finally:
        (store.path / layout.INCOMING).chmod(0o755)


def test_a_pool_that_cannot_be_written_is_archived_with_a_warning(store: Store) -> None:
    (store.path / layout.INCOMING).chmod(0o555)
    try:
        with permissions_count():
            (warning,) = store.archive().events
    finally:
        (store.path / layout.INCOMING).chmod(0o755)
    assert "cannot be written" in warning.text
    store.restore()
    assert states_of(store.root / "back") == states_of(store.path)


# -- pools that cannot be archived -----------------------------------------------------------------


def test_where_no_pool_is(tmp_path: Path) -> None:
    for place in (tmp_path / "missing", tmp_path):
        with pytest.raises(NotAPool), PoolWriter(open_local(place)).protected():
            pytest.fail("there is nothing to be protected")
    assert not list(tmp_path.iterdir())


def test_a_pool_of_another_tool(tmp_path: Path) -> None:
    image = tmp_path / "pool" / DISK / "install.qcow2"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"x")
    writer = PoolWriter(open_local(tmp_path / "pool"))
    with pytest.raises(ReadOnlyPool, match="no logs") as caught, writer.protected():
        pytest.fail("there is nothing to be protected")
    assert "adopt" in (caught.value.hint or "")


@pytest.mark.usefixtures("nothing_left")
def test_bytes_that_are_damaged(store: Store) -> None:
    manifest = store.put("new", b"new" * 1000)
    store.file(manifest).chmod(0o644)
    store.file(manifest).write_bytes(b"N" + b"new" * 1000)
    with pytest.raises(IntegrityError, match="vm1/disk new"):  # another length
        store.archive()
    store.file(manifest).write_bytes(b"New" + b"new" * 999)
    with pytest.raises(DigestMismatch, match="vm1/disk new") as caught:
        store.archive()
    assert "--exclude 'vm1/disk:new'" in (caught.value.hint or "")


def test_all_but_what_is_damaged_can_be_archived(store: Store) -> None:
    manifest = store.put("new", b"new" * 1000)
    store.file(manifest).unlink()
    store.archive(exclude=[f"{DISK}:new"])
    store.restore()
    assert len(states_of(store.root / "back")) == len(store.pool.fold("vm1").states)


@pytest.mark.usefixtures("nothing_left")
def test_bytes_that_are_gone(store: Store) -> None:
    manifest = store.put("new", b"new" * 1000)
    store.file(manifest).unlink()
    with pytest.raises(IntegrityError, match=r"vm1/disk new in .* are gone"):
        store.archive()


@pytest.mark.usefixtures("nothing_left")
def test_large_bytes_that_are_damaged(store: Store) -> None:
    manifest = store.put("large", b"large" * (1 << 20))
    path = store.file(manifest)
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestMismatch, match="vm1/disk large"):
        store.archive()


@pytest.mark.usefixtures("nothing_left")
def test_data_outside_of_the_extents_of_a_manifest(store: Store) -> None:
    """The pool's log is not believed: what it calls a hole is not taken for zeros."""
    store.put("lying", b"data" * 1000, extents=[(0, 512)])
    with pytest.raises(DigestMismatch, match="vm1/disk lying"):
        store.archive()


@pytest.mark.usefixtures("nothing_left")
def test_bytes_that_this_account_may_not_read(store: Store) -> None:
    manifest = store.put("closed", b"closed")
    store.file(manifest).chmod(0)
    with permissions_count(), pytest.raises(AccessDenied):
        store.archive()
    store.file(manifest).chmod(0o444)


@pytest.mark.usefixtures("nothing_left")
def test_bytes_that_are_a_link(store: Store) -> None:
    manifest = store.put("linked", b"linked")
    store.file(manifest).unlink()
    store.file(manifest).symlink_to("/etc/passwd")
    with pytest.raises(StatePoolError):
        store.archive()


# -- levels that do not belong together ------------------------------------------------------------


def test_a_level_above_an_archive_of_another_pool(store: Store) -> None:
    store.archive()
    before = photograph(store.root)
    shutil.rmtree(store.path)
    other = Store(store.root, "pool")  # another one, in its place
    other.put("install", b"install" * 5000)
    with pytest.raises(RefusedError, match="another pool"):
        other.archive(1)
    assert not other.archive_path(1).exists()
    assert photograph(store.archive_path(0)).items() <= before.items()


def test_a_pool_whose_log_went_back(store: Store) -> None:
    shutil.copytree(store.path, store.root / "before", symlinks=True)
    store.put("new", b"new")
    store.archive()
    shutil.rmtree(store.path)
    (store.root / "before").rename(store.path)
    with pytest.raises(RefusedError, match="other records") as caught:
        store.archive(1)
    assert "level 0" in (caught.value.hint or "")
    store.pool = open_local(store.path)
    store.put("other", b"other")  # as many records as there were, but others
    with pytest.raises(RefusedError, match="other records"):
        store.archive(1)


def test_levels_that_are_missing_or_of_another_series(store: Store) -> None:
    for level in range(3):
        store.put(f"new-{level}", str(level).encode())
        store.archive(level)
    first, second, third = map(store.archive_path, range(3))
    other = _another_series(store)
    newer = other.archive_path(1)
    before = photograph(store.root)
    for paths, told in (
        ([second], "level 0 should be there"),
        ([first, third], "level 1 should be there"),
        ([first, first], "level 1 should be there"),
        ([other.archive_path(0), second], "another level below"),
        ([first, newer], "another level below"),
    ):
        with pytest.raises(IntegrityError, match=told) as caught:
            restore_pool(paths, store.root / "back")
        assert str(paths[-1]) in caught.value.message
    with pytest.raises(StatePoolError):
        restore_pool([first, store.root / "missing"], store.root / "back")
    assert photograph(store.root) == before


def test_an_archive_of_a_file_that_is_missing(tmp_path: Path) -> None:
    found = verify_archive(tmp_path / "missing.tar")
    assert found.problem is not None
    assert "missing.tar" in found.problem


# -- places ----------------------------------------------------------------------------------------


def test_a_pool_is_restored_to_an_empty_or_new_directory_only(store: Store) -> None:
    store.archive()
    (store.root / "full").mkdir()
    (store.root / "full" / "file").touch()
    (store.root / "file").touch()
    before = photograph(store.root)
    for name in ("full", "file", "pool"):
        with pytest.raises(FileInTheWay):
            store.restore(0, name)
    with pytest.raises(StatePoolError, match="missing"):
        store.restore(0, "missing/back")
    assert photograph(store.root) == before
    (store.root / "empty").mkdir()
    store.restore(0, "empty")
    assert states_of(store.root / "empty") == states_of(store.path)


def test_a_pool_is_not_restored_through_a_link(store: Store) -> None:
    store.archive()
    (store.root / "elsewhere").mkdir()
    (store.root / "link").symlink_to("elsewhere")
    with pytest.raises(FileInTheWay):
        store.restore(0, "link")
    assert not list((store.root / "elsewhere").iterdir())


def test_a_selection_that_fits_nothing(store: Store) -> None:
    with pytest.raises(NotFound, match="vm9"):
        store.archive(objects=["vm9"])


def _another_series(store: Store) -> Store:
    """:returns: archives of the same pool that were made apart from the others"""
    other = Store(store.root / "other")
    other.path = store.path
    other.archive()
    store.put("newest", b"newest")
    other.archive(1)
    return other


# -- other processes -------------------------------------------------------------------------------

BUSY = """
import random, sys
from pathlib import Path
from statepool.errors import StatePoolError
from tests.support.pool_archives import Store, open_local

store = Store.__new__(Store)
store.root, store.path = Path(sys.argv[1]).parent, Path(sys.argv[1])
store.pool = open_local(store.path)
chance = random.Random(int(sys.argv[2]))
print("busy", flush=True)
while True:
    name, parent = chance.sample("abcdefgh", 2)
    try:
        match chance.randrange(4):
            case 0:
                store.remove(name, cascade=True)
            case 1:
                store.collect()
            case _:
                data = chance.randbytes(chance.randrange(20_000))
                store.put(name, data, on=chance.choice([None, parent]), supersede=True)
    except StatePoolError:
        pass
"""


def test_others_publish_remove_and_collect_meanwhile(store: Store) -> None:
    """Whatever they do, each level is of one moment of each log, and all its bytes are there."""
    root = Path(__file__).resolve().parents[3]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY, str(store.path), str(seed)],
            cwd=root,
            stdout=subprocess.PIPE,
        )
        for seed in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"busy\n"
        positions = []
        for level in range(8):
            store.archive(level)
            positions.append(read_index(store.archive_path(level)).machines["vm1"].number)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert len(set(positions)) > 2  # they were busy
    assert positions == sorted(positions)
    for level in range(8):
        store.restore(level, f"back-{level}")
        states_of(store.root / f"back-{level}")  # checks all bytes
        fold = open_local(store.root / f"back-{level}").fold("vm1")
        assert fold.number == positions[level]


def test_bytes_that_a_collector_holds_aside(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It began before the archive's marker existed, and has not looked for markers again yet."""
    manifests = store.pool.fold("vm1").manifests
    lacking = Pool.lacking

    def collecting(pool: Pool, digests: Iterable[Digest]) -> set[Digest]:
        found = lacking(pool, digests)
        for digest in {one.digest for one in manifests if one.digest is not None}:
            aside = layout.trash("05b1066973e496ba", digest)
            pool.transport.rename(layout.data(digest), aside)
        return found

    expected = states_of(store.path)
    monkeypatch.setattr(Pool, "lacking", collecting)
    store.archive()
    store.restore()
    assert states_of(store.root / "back") == expected


def test_what_a_pool_is_estimated_at(store: Store) -> None:
    archiver = PoolArchiver(store.root / "work")
    sizes = {one.digest: one.data_size for one in store.pool.fold("vm1").manifests}
    large = store.pool.fold("vm2").manifests
    expected = sum(sizes.values()) + sum(one.data_size for one in large)
    assert archiver.estimate(store.definition()) == expected
    (store.path / ".statepool/log/vm2/00000000000000000001.json").write_text("{")
    assert archiver.estimate(store.definition()) == sum(sizes.values())
