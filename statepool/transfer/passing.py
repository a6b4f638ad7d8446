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
from statepool.pools import layout
from statepool.pools.writer import Writer
from statepool.qcow2.opened import is_open
from statepool.transfer.cache import Cache
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
    cache.working_directory()
    clear_passing(cache)
    path = f"{layout.WORKING}/{_PREFIX}{cache.pool.nonce()}"
    # Others may look into it as they may into the cache, and write to nothing in it.
    mode = stat.S_IMODE(cache.tree.stat(layout.WORKING).st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH)
    cache.tree.make_directory(path, mode | stat.S_IRWXU)
    note = cache.file(f"{path}/{_WRITER}")
    write_note(cache.tree, note.path, Writer.current().to_json())
    place = Passing(Path(cache.file(path)), note)
    try:
        yield place
    finally:
        if not place.is_kept:
            _remove(cache, path)


def clear_passing(cache: Cache, *, dry_run: bool = False) -> list[Collected]:
    """
    Take away what processes left that were killed. What somebody has open stays: a program that they started may still be at work.

    :param dry_run: only say what would go
    :returns: what went
    """
    gone = []
    for name in names_in(cache.tree, layout.WORKING):
        path = f"{layout.WORKING}/{name}"
        if name.startswith(_PREFIX) and _is_left_behind(cache, path):
            size = sum(status.st_size for _, status in _images(cache, path))
            gone.append(Collected(str(cache.pool), "working images of a process that is gone", str(cache.file(path)), size))
            if not dry_run:
                recover(cache)  # it may have been killed while one of them became a state
                _remove(cache, path)
    return gone


def _is_left_behind(cache: Cache, path: str) -> bool:
    """Whether a directory is this account's, as its note is, and the process that made it is gone."""
    try:
        data, note = read_note(cache.tree, f"{path}/{_WRITER}")
        writer = Writer.from_json(data)
    except (FileNotFoundError, NotADirectoryError, ValueError, BadRecord):
        return False  # kept, or just being made or removed
    if {cache.tree.stat(path).st_uid, note.st_uid} != {os.geteuid()}:
        return False
    return writer.is_dead and not any(_may_be_open(image) for image, _ in _images(cache, path))


def _may_be_open(image: Beneath) -> bool:
    try:
        return is_open(image)
    except StatePoolError:
        return False  # no regular file, or gone


def _images(cache: Cache, path: str) -> list[tuple[Beneath, os.stat_result]]:
    files = [cache.file(f"{path}/{name}") for name in names_in(cache.tree, path) if name != _WRITER]
    found = [(file, status) for file in files if (status := file.stat()) is not None]
    return [(file, status) for file, status in found if stat.S_ISREG(status.st_mode)]


def _remove(cache: Cache, path: str) -> None:
    """The note goes last: if we are killed on the way, the next one finds the rest."""
    for image, _ in _images(cache, path):
        throw_away(cache, Path(image))
    for name in names_in(cache.tree, path):
        if name != _WRITER:
            other = f"{path}/{name}"
            cache.tree.remove_all(other) if stat.S_ISDIR(cache.tree.stat(other).st_mode) else cache.tree.remove(other)
    cache.tree.remove(f"{path}/{_WRITER}")
    cache.pool.transport.remove_directory(path)
