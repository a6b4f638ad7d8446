"""
A pool with archives, and the steps that change them, each in a process that can be killed: what
must be there whenever that happened.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from statepool.archive.directory import ArchiveDirectory, Stored
from statepool.archive.pool_reader import restore_pool
from tests.support.pool_archives import States, Store, states_of

KEEP = 2
"""Generations that are kept."""

STEP = Path(__file__).parents[1] / "faults/archive_step.py"
"""The program of the steps."""


class Shelf:
    """
    A pool with two generations of archives, in a directory that can be set back.

    :param root: the directory
    :ivar expected: the states that each archive gives back, by its digest
    """

    def __init__(self, root: Path) -> None:
        self.root, self._template = root / "shelf", root / "template"
        self.root.mkdir()
        store = Store(self.root)
        store.put("install", b"install" * 5000)
        store.put("large", bytes(5 << 20) + b"large", extents=[(5 << 20, 5)])
        self.expected: dict[str, States] = {}
        self._archive(store, 0)
        store.put("customize", b"customize" * 300, on="install")
        self._archive(store, 1)
        self._archive(store, 0, keep=KEEP)
        store.remove("large")
        store.put("new", b"new" * 300)
        self._archive(store, 1)
        store.put("newest", b"newest" * 300, on="new")
        self.newest = states_of(store.path)
        shutil.move(self.root, self._template)
        self.reset()

    def _archive(self, store: Store, level: int, *, keep: int = 0) -> None:
        made = store.archive(level, keep=keep)
        self.expected[str(made.manifest.digest)] = states_of(store.path)

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self._template, self.root, symlinks=True)

    def step(self, name: str) -> Sequence[str]:
        return [sys.executable, str(STEP), name]

    def stored(self) -> dict[str, Stored]:
        """:returns: the archives as a reader finds them, by their digests"""
        found = ArchiveDirectory(self.root, "pool").stored()
        assert all(one.manifest is not None for one in found.values())
        return {str(one.manifest.digest): one for one in found.values() if one.manifest}

    def require(self, digests: Sequence[str]) -> None:
        """Check that archives are there, and give back what they are of."""
        directory = ArchiveDirectory(self.root, "pool")
        there = self.stored()
        names = {one.name: one for one in there.values()}
        for digest in digests:
            chain = directory.chain(there[digest].name, names)
            back = self.root / "checked"
            restore_pool([self.root / one.file for one in chain], back)
            assert states_of(back) == self.expected[digest]
            shutil.rmtree(back)

    def require_clean(self) -> None:
        """Check that nothing of a process that was killed is left."""
        names = [path.name for path in self.root.iterdir() if path.name.startswith(".")]
        assert names in ([], [".pool.lock"])
        work = self.root / "work/snapshots"
        assert not [path for path in work.iterdir() if path.name.startswith(".")]


def again(shelf: Shelf, step: str) -> None:
    done = subprocess.run(
        shelf.step(step), cwd=shelf.root, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr


def check_made(shelf: Shelf, step: str, before: dict[str, Stored]) -> None:
    """Levels that are made: what was there is there, whatever its name is now."""
    level, kept = (2 if step == "level" else 0), step != "overwrite"
    stays = [
        digest
        for digest, one in before.items()
        if kept or one.name.keeping_id is not None or one.name.level < level
    ]
    whole = set(before) <= set(shelf.stored())
    shelf.require(list(before) if whole else stays)
    if not whole:  # the change has happened: the new one is there
        assert not kept
        assert len(set(shelf.stored()) - set(before)) == 1
    again(shelf, step)
    new = set(shelf.stored()) - set(before)
    assert new
    for digest in new:
        shelf.expected[digest] = shelf.newest
    shelf.require(list(new))
    shelf.require_clean()


def check_pruned(shelf: Shelf, step: str, before: dict[str, Stored]) -> None:
    stays = {digest for digest, one in before.items() if one.name.keeping_id is None}
    there = set(shelf.stored())
    assert there in (set(before), stays)  # all or nothing
    shelf.require(sorted(there))
    again(shelf, step)
    assert set(shelf.stored()) == stays
    shelf.require(sorted(stays))
    shelf.require_clean()


def check_restored(shelf: Shelf, step: str, before: dict[str, Stored]) -> None:
    (digest,) = (one for one, found in before.items() if str(found.name) == "pool.1.tar")
    back = shelf.root / "back"
    if back.exists():
        assert states_of(back) == shelf.expected[digest]
        shutil.rmtree(back)
    again(shelf, step)
    assert states_of(back) == shelf.expected[digest]
    shelf.require(list(before))


CHECKS: dict[str, Callable[[Shelf, str, dict[str, Stored]], None]] = {
    "level": check_made,
    "keep": check_made,
    "overwrite": check_made,
    "prune": check_pruned,
    "restore": check_restored,
}
