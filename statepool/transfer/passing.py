"""
Directories for working images that live no longer than the process which made them. Each says whose it is; the next command of the same account takes
away those of processes that are gone. Those of other accounts are left to them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import define

from statepool.beneath import Beneath
from statepool.errors import BadRecord, StatePoolError
from statepool.model.outcomes import Collected
from statepool.pools.writer import Writer
from statepool.qcow2.opened import is_open
from statepool.transfer.cache import WORKING, Cache
from statepool.transfer.notes import names_in, read_note, write_note
from statepool.transfer.takeover import recover
from statepool.transfer.working import throw_away

_PREFIX = "passing-"
_WRITER = "writer.json"


@define
class Passing:
    """
    A directory for working images.

    :param path: where
    """

    path: Path
    _note: Beneath

    def keep(self) -> None:
        """It stays, with all that is in it: from now on it is nobody's to take away but the user's."""
        self._note.remove()

    @property
    def is_kept(self) -> bool:
        """Whether it stays."""
        return self._note.stat() is None


@contextmanager
def passing(cache: Cache) -> Iterator[Passing]:
    """:returns: a new directory in the cache, which is taken away at the end of the block, unless it is to be kept"""
    base = cache.working_place()
    clear_passing(cache)
    path = f"{base.path}/{_PREFIX}{cache.pool.nonce()}"
    base.tree.make_directory(path, stat.S_IMODE(base.tree.stat(base.path).st_mode))
    note = Beneath(base.tree, f"{path}/{_WRITER}")
    write_note(base.tree, note.path, Writer.current().to_json())
    place = Beneath(base.tree, path)
    made = Passing(Path(place), note)
    try:
        yield made
    finally:
        if not made.is_kept:
            _remove(cache, place)


def clear_passing(cache: Cache, *, dry_run: bool = False) -> list[Collected]:
    """
    Take away what processes of this account left that were killed. What is open in a process stays: a program that they started may still be at work.

    :param dry_run: only say what would go
    :returns: what went
    """
    gone = []
    base = cache.notes.found(WORKING)
    for name in names_in(base.tree, base.path) if base is not None else []:
        assert base is not None
        place = Beneath(base.tree, f"{base.path}/{name}")
        if name.startswith(_PREFIX) and _is_left_behind(place):
            size = sum(status.st_size for _, status in _images(place))
            gone.append(Collected(str(cache.pool), "working images of a process that is gone", str(place), size))
            if not dry_run:
                recover(cache)  # it may have been killed while one of them became a state
                _remove(cache, place)
    return gone


def _is_left_behind(place: Beneath) -> bool:
    try:
        writer = Writer.from_json(read_note(place.tree, f"{place.path}/{_WRITER}")[0])
    except (FileNotFoundError, NotADirectoryError, ValueError, BadRecord):
        return False  # kept, or just being made or removed
    return writer.has_ended_here and not any(_may_be_open(image) for image, _ in _images(place))


def _may_be_open(image: Beneath) -> bool:
    try:
        return is_open(image)
    except StatePoolError:
        return False  # no regular file, or gone


def _images(place: Beneath) -> list[tuple[Beneath, os.stat_result]]:
    files = [Beneath(place.tree, f"{place.path}/{name}") for name in names_in(place.tree, place.path) if name != _WRITER]
    found = [(file, status) for file in files if (status := file.stat()) is not None]
    return [(file, status) for file, status in found if stat.S_ISREG(status.st_mode)]


def _remove(cache: Cache, place: Beneath) -> None:
    """The note goes last: if this process is killed on the way, the next one finds the rest."""
    for image, _ in _images(place):
        throw_away(cache, image)
    for name in names_in(place.tree, place.path):
        if name != _WRITER:
            other = f"{place.path}/{name}"
            place.tree.remove_all(other) if stat.S_ISDIR(place.tree.stat(other).st_mode) else place.tree.remove(other)
    place.tree.remove(f"{place.path}/{_WRITER}")
    place.tree.remove_all(place.path)
