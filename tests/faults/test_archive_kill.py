"""
kill -9 in the middle of making, keeping and removing archives: a whole generation is always there,
for readers at once, and for the next writer.

With KILLS set, each piece of work is killed at every moment; else at one in six.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statepool.archive import directory as directory_module
from statepool.archive.names import ArchiveName
from statepool.archive.restore import Restore
from statepool.archive.verify import verify
from statepool.beneath import Tree
from tests.support.archives import Place, facts_of, write_all

KILLS = int(os.environ.get("KILLS", "0"))

WORKS: dict[str, Callable[[Place], object]] = {
    "create": lambda place: place.make(),
    "create and overwrite": lambda place: place.make(1),
    "create and keep": lambda place: place.make(0, keep=2),
    "create and keep a level": lambda place: place.make(1, keep=3),
    "overwrite at the start": lambda place: place.make(0, keep=3, overwrite_at_start=True),
    "keep": lambda place: place.archiver.keep_new(place.definition, 2),
    "keep under another id": lambda place: place.archiver.keep_backup(place.definition, None, "zz"),
    "remove": lambda place: place.archiver.remove_backup(place.definition, "aa"),
    "remove levels": lambda place: place.archiver.remove_backup_increments(place.definition, 1),
    "purge": lambda place: place.archiver.purge_stored_backup_data("one"),
}


class _Counted:
    """Calls that change files, the last of which kills this process before it is made."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int) -> None:
        self.count, self.last = 0, last
        for owner, name in ((Tree, "rename"), (Tree, "remove"), (Tree, "open"), (os, "fsync")):
            patch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **named: object) -> object:
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return counted


@contextlib.contextmanager
def _killed_at(work: Callable[[], object], last: int) -> Iterator[bool]:
    """Yield whether the work was killed; if not, it has fewer such calls."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with pytest.MonkeyPatch.context() as patch:
                _Counted(patch, last)
                work()
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    assert ended in (0, signal.SIGKILL)
    yield ended != 0


def _generations(place: Place) -> dict[str, dict[str, tuple[object, ...]]]:
    """:returns: the tree of each archive, by its digest; each must be whole"""
    found = {}
    stored = place.directory.stored()
    for name, one in stored.items():
        result = verify(place.directory, stored, name)
        assert result.error is None, result
        assert one.manifest is not None
        target = place.path / "target"
        Restore(place.directory, name).to(target)
        found[str(one.manifest.key)] = facts_of(target)
        shutil.rmtree(target)
    return found


def _fill(place: Place) -> None:
    """Two generations of two and of three levels."""
    for number, level in enumerate((0, None, 0, None, None)):
        write_all(place.root, [f"f{number}", "same"])
        place.make(level, keep=2)


@pytest.mark.parametrize("what", WORKS)
def test_a_whole_generation_is_there(tmp_path: Path, what: str) -> None:
    filled = Place(tmp_path / "filled")
    _fill(filled)
    before = _generations(filled)
    write_all(filled.root, ["new"])
    work = WORKS[what]
    step = 1 if KILLS else 6
    for last in range(1, 10_000, step):
        trial = tmp_path / f"trial{last}"
        shutil.copytree(tmp_path / "filled", trial, symlinks=True)
        place = Place(trial)
        _move_root(place, filled)
        with _killed_at(lambda place=place: work(place), last) as killed:  # type: ignore[misc]
            after = _generations(place)
            assert after, "no generation is left"
            assert all(before[key] == tree for key, tree in after.items() if key in before)
            if what.startswith(("create", "keep")):
                lost = before.keys() - after.keys()
                assert not lost or after.keys() - before.keys() or what.startswith("keep")
            # the next writer finishes what was interrupted, and leaves nothing behind
            place.make()
            assert [name for name in place.files() if name.startswith(".")] == []
            newest = max(
                (one for one in place.directory.stored().values() if one.manifest is not None),
                key=lambda one: one.manifest.created if one.manifest is not None else 0,
            )
            Restore(place.directory, newest.name).to(trial / "target")
            assert facts_of(trial / "target") == facts_of(place.root)
        shutil.rmtree(trial)
        if not killed:
            return
    raise AssertionError("the work never ended")


def _move_root(place: Place, filled: Place) -> None:
    """Have the copied archives be of the tree that they were made of: paths are in manifests."""
    place.root = filled.root
    from attrs import evolve

    place.definition = evolve(place.definition, root=str(filled.root))


def test_a_journal_of_an_attacker_is_not_followed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.make()
    for moves in (
        '[["../root", "one.tar", false]]',
        '[["one.tar", "two.tar", false]]',
        '[["one.tar", "/etc/x", true]]',
        '[["one.tar", ".one.lock", false]]',
        '[["one.tar"]]',
        "{",
    ):
        (place.to / ".one.journal").write_text(moves)
        with pytest.raises(directory_module.BadRecord, match="is not a journal"):
            place.make()
        with pytest.raises(directory_module.BadRecord, match="is not a journal"):
            place.directory.stored()
    assert ArchiveName.parse("one.tar") is not None
    assert (place.to / "one.tar").exists()
