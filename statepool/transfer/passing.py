"""
Directories for working images that live no longer than the process which made them. Each says whose it is; whoever makes the next one, or tidies up,
takes away those of processes that are gone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import define

from statepool.errors import BadRecord, StatePoolError
from statepool.model.outcomes import Collected
from statepool.pools import layout
from statepool.pools.writer import Writer
from statepool.qcow2.opened import is_open
from statepool.transfer.cache import Cache
from statepool.transfer.notes import make_directory, write_note
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

    def keep(self) -> None:
        """It stays, with all that is in it: from now on it is nobody's to take away but the user's."""
        (self.path / _WRITER).unlink(missing_ok=True)

    @property
    def is_kept(self) -> bool:
        """Whether it stays."""
        return not (self.path / _WRITER).exists()


@contextmanager
def passing(cache: Cache) -> Iterator[Passing]:
    """:returns: a new directory in the cache, which is taken away at the end of the block, unless it is to be kept"""
    base = cache.working_directory()
    clear_passing(cache)
    place = Passing(base / f"{_PREFIX}{cache.pool.nonce()}")
    make_directory(place.path)
    write_note(place.path / _WRITER, Writer.current().to_json())
    try:
        yield place
    finally:
        if not place.is_kept:
            _remove(cache, place.path)


def clear_passing(cache: Cache, *, dry_run: bool = False) -> list[Collected]:
    """
    Take away what processes left that were killed. What somebody has open stays: a program that they started may still be at work.

    :param dry_run: only say what would go
    :returns: what went
    """
    gone = []
    for path in sorted((cache.root / layout.OURS / "working").glob(f"{_PREFIX}*")):
        if _is_left_behind(path):
            size = sum(image.stat().st_size for image in _images(path))
            gone.append(Collected(str(cache.pool), "working images of a process that is gone", str(path), size))
            if not dry_run:
                recover(cache)  # it may have been killed while one of them became a state
                _remove(cache, path)
    return gone


def _is_left_behind(path: Path) -> bool:
    try:
        writer = Writer.from_json(json.loads((path / _WRITER).read_bytes()))
    except (FileNotFoundError, ValueError, BadRecord):
        return False  # kept, or just being made or removed
    return writer.is_dead and not any(_may_be_open(image) for image in _images(path))


def _may_be_open(image: Path) -> bool:
    try:
        return is_open(image)
    except StatePoolError:
        return False  # no regular file, or gone


def _images(path: Path) -> list[Path]:
    return [image for image in path.iterdir() if image.name != _WRITER and image.is_file() and not image.is_symlink()]


def _remove(cache: Cache, path: Path) -> None:
    """The note goes last: if we are killed on the way, the next one finds the rest."""
    for image in _images(path):
        throw_away(cache, image)
    for other in path.iterdir():
        if other.name != _WRITER:
            shutil.rmtree(other) if other.is_dir() and not other.is_symlink() else other.unlink()
    (path / _WRITER).unlink(missing_ok=True)
    path.rmdir()
