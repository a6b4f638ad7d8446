"""Pruning a directory of archives: what no rule keeps, and what belongs to nothing."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from statepool.archive.names import ArchiveName
from statepool.archive.prune import Pruned, backups_in, prune
from statepool.archive.retention import Rules
from statepool.errors import InvalidName, LockTimeout, NotFound, UsageError
from statepool.testing.trees import photograph
from tests.support.pool_archives import Store, states_of

KEPT = Rules(kept=0)


@pytest.fixture
def shelf(store: Store) -> Store:
    """Two generations of two levels each, and the first one of a third."""
    for _ in range(2):
        store.archive(0, keep=5)
        store.put("new", b"new")
        store.archive(1, keep=5)
        store.remove("new")
    store.archive(0, keep=5)
    return store


def pruned(store: Store, rules: Rules | None = None, *, dry_run: bool = False) -> Pruned:
    return prune(store.root, "pool", store.root / "work", rules, dry_run=dry_run)


def names(store: Store) -> set[str]:
    return {path.name for path in store.root.iterdir() if ArchiveName.parse(path.name)}


def test_what_no_rule_keeps_goes(shelf: Store) -> None:
    assert names(shelf) == {
        "pool.tar", "pool.aa.tar", "pool.1.aa.tar", "pool.ab.tar", "pool.1.ab.tar"
    }  # fmt: skip
    before = photograph(shelf.root)
    shown = pruned(shelf, Rules(kept=1), dry_run=True)
    assert photograph(shelf.root) == before
    assert set(shown.files) == {"pool.ab.tar", "pool.1.ab.tar"}
    assert shown.files[0] == "pool.1.ab.tar"  # the one that nothing stands on
    assert shown.bytes > 0
    done = pruned(shelf, Rules(kept=1))
    assert (done.files, done.leftovers, done.bytes) == (shown.files, shown.leftovers, shown.bytes)
    assert names(shelf) == {"pool.tar", "pool.aa.tar", "pool.1.aa.tar"}
    assert not list(shelf.root.glob("*.ab.*"))  # nor their manifests
    assert pruned(shelf, Rules(kept=1)).files == ()


def test_without_rules_all_archives_stay(shelf: Store) -> None:
    before = names(shelf)
    found = pruned(shelf)
    assert (found.plan, found.files, found.bytes) == (None, (), 0)
    assert names(shelf) == before


def test_manifests_without_archives_go(shelf: Store) -> None:
    (shelf.root / "pool.1.ab.tar").unlink()
    (shelf.root / "other.tar.manifest").touch()
    found = pruned(shelf)
    assert found.leftovers == ("pool.1.ab.tar.manifest",)
    assert not (shelf.root / "pool.1.ab.tar.manifest").exists()
    assert (shelf.root / "other.tar.manifest").exists()  # of another backup
    assert backups_in(shelf.root) == ["other", "pool"]


def test_snapshot_files_of_levels_that_are_gone_go(shelf: Store) -> None:
    snapshots = shelf.root / "work/snapshots"
    shelf.archive(1)
    (snapshots / "pool.7.snar").touch()
    (snapshots / "other.snar").touch()
    assert pruned(shelf).leftovers == ("pool.7.snar",)
    assert sorted(path.name for path in snapshots.iterdir()) == [
        "other.snar", "pool.1.snar", "pool.snar"
    ]  # fmt: skip
    shelf.put("more", b"more")
    shelf.archive(2)  # levels go on
    shelf.restore(2)
    assert states_of(shelf.root / "back") == states_of(shelf.path)


def test_a_damaged_archive_does_not_take_the_place_of_a_good_one(shelf: Store) -> None:
    with (shelf.root / "pool.tar").open("ab") as file:
        file.write(b"x")
    found = pruned(shelf, Rules(last=1, orphans=False))
    assert set(found.files) == {"pool.tar", "pool.ab.tar", "pool.1.ab.tar"}
    assert found.plan is not None
    (one,) = (one for one in found.plan.decisions if str(one.archive) == "pool")
    assert "another length" in one.reasons[0]


def test_an_archive_without_a_manifest_stays_unless_told(shelf: Store) -> None:
    (shelf.root / "pool.ab.tar.manifest").unlink()
    assert pruned(shelf, KEPT).files == ("pool.1.aa.tar", "pool.aa.tar")
    assert {"pool.ab.tar", "pool.1.ab.tar"} <= names(shelf)
    assert set(pruned(shelf, Rules(kept=0, orphans=False)).files) == {
        "pool.ab.tar", "pool.1.ab.tar"
    }  # fmt: skip


def test_only_one_process_works_on_a_backup(shelf: Store) -> None:
    before = names(shelf)
    with (shelf.root / ".pool.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LockTimeout):
            pruned(shelf, KEPT)
        assert pruned(shelf, KEPT, dry_run=True).files
    assert names(shelf) == before


def test_what_cannot_be_pruned(store: Store, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        prune(tmp_path / "missing", "pool", tmp_path / "work")
    with pytest.raises(NotFound):
        backups_in(tmp_path / "missing")
    with pytest.raises(InvalidName):
        prune(tmp_path, "../pool", tmp_path / "work")
    store.archive()
    before = photograph(store.root)
    with pytest.raises(UsageError):
        pruned(store, Rules())
    assert photograph(store.root) == before
    assert prune(tmp_path, "unknown", tmp_path / "work").files == ()
