"""
Temporary directories for working images, which last no longer than the process that made them. Each
names its process. The next command of the same account removes the directories of processes that
have ended, but none of other accounts.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attrs import define

from statepool.beneath import Beneath
from statepool.cache.cache import WORKING, Cache
from statepool.cache.working import throw_away
from statepool.capture.capture_journal import recover
from statepool.errors import BadRecord, StatePoolError, UsageError
from statepool.model.outcomes import Collected
from statepool.pools.json_files import names_in, read_json, write_json
from statepool.pools.writer import Writer
from statepool.qcow2.opened import is_open

_PREFIX = "passing-"
_WRITER = "writer.json"


@define
class Scratch:
    """
    A temporary directory for working images.

    :param path: its path
    """

    path: Path
    _note: Beneath

    def file(self, name: str) -> Beneath:
        """:returns: the file of this name in it"""
        return Beneath(self._note.tree, f"{os.path.dirname(self._note.path)}/{name}")

    def keep(self) -> None:
        """Keep the directory with all its content: from now on only the user removes it."""
        self._note.remove()

    @property
    def is_kept(self) -> bool:
        """Whether the directory is kept."""
        return self._note.stat() is None


@contextmanager
def scratch(cache: Cache) -> Iterator[Scratch]:
    """
    :returns: a new directory in the cache, which is removed at the end of the block, unless it is
        kept
    """
    base = cache.working_place()
    clear_scratch(cache)
    path = f"{base.path}/{_PREFIX}{cache.pool.nonce()}"
    base.tree.make_directory(path, stat.S_IMODE(base.tree.stat(base.path).st_mode))
    note = Beneath(base.tree, f"{path}/{_WRITER}")
    write_json(base.tree, note.path, Writer.current().to_json())
    place = Beneath(base.tree, path)
    made = Scratch(Path(place), note)
    try:
        yield made
    finally:
        if not made.is_kept:
            _remove(cache, place)


@contextmanager
def lasting(
    cache: Cache, names: Mapping[str, str], *, keep: str, directory: str | os.PathLike[str] | None
) -> Iterator[dict[str, Path]]:
    """
    Yield a place for each of some working images, which are removed at the end of the block.

    :param names: the file names, by the names of the images; a unique suffix is added
    :param keep: ``never``, ``failed`` (if the block raises) or ``always``
    :param directory: the directory of the files; None: a new one in the cache
    :raises UsageError: ``keep`` has another value
    """
    if keep not in ("never", "failed", "always"):
        raise UsageError(f"keep cannot be {keep!r}", hint="never, failed or always")
    with ExitStack() as stack:
        place = stack.enter_context(scratch(cache)) if directory is None else None
        # Absolute: the block may change the working directory.
        above = place.path if place is not None else Path(os.path.abspath(directory or ""))
        # Names can be long, and a file name that joins all of them too long.
        paths = {
            name: above / f"{file[:180]}-{cache.pool.nonce()}.qcow2" for name, file in names.items()
        }
        kept = keep == "always"
        try:
            yield paths
        except BaseException:
            kept = kept or keep == "failed"
            raise
        finally:
            if not kept or not any(map(os.path.lexists, paths.values())):
                for path in paths.values():
                    throw_away(cache, path)
            elif place is not None:
                place.keep()


def clear_scratch(cache: Cache, *, dry_run: bool = False) -> list[Collected]:
    """
    Remove what killed processes of this account left. Files that a process has open stay: a program
    that the killed process started may still be at work.

    :param dry_run: only report what would be removed
    :returns: what was removed
    """
    gone = []
    base = cache.notes.found(WORKING)
    for name in names_in(base.tree, base.path) if base is not None else []:
        assert base is not None
        place = Beneath(base.tree, f"{base.path}/{name}")
        if name.startswith(_PREFIX) and _is_left_behind(place):
            size = sum(status.st_size for _, status in _images(place))
            gone.append(
                Collected(
                    str(cache.pool), "working images of a process that is gone", str(place), size
                )
            )
            if not dry_run:
                recover(cache)  # the process may have been killed during a capture of one
                _remove(cache, place)
    return gone


def _is_left_behind(place: Beneath) -> bool:
    try:
        writer = Writer.from_json(read_json(place.tree, f"{place.path}/{_WRITER}")[0])
    except (FileNotFoundError, NotADirectoryError, ValueError, BadRecord):
        return False  # kept, or just being made or removed by another process
    return writer.has_ended_here and not any(_may_be_open(image) for image, _ in _images(place))


def _may_be_open(image: Beneath) -> bool:
    try:
        return is_open(image)
    except StatePoolError:
        return False  # not a regular file, or removed meanwhile


def _images(place: Beneath) -> list[tuple[Beneath, os.stat_result]]:
    files = [
        Beneath(place.tree, f"{place.path}/{name}")
        for name in names_in(place.tree, place.path)
        if name != _WRITER
    ]
    found = [(file, status) for file in files if (status := file.stat()) is not None]
    return [(file, status) for file, status in found if stat.S_ISREG(status.st_mode)]


def _remove(cache: Cache, place: Beneath) -> None:
    """
    Remove a directory, its note last: if this process is killed meanwhile, the next one finds the
    rest.
    """
    for image, _ in _images(place):
        throw_away(cache, image)
    for name in names_in(place.tree, place.path):
        if name != _WRITER:
            other = f"{place.path}/{name}"
            place.tree.remove_all(other) if stat.S_ISDIR(
                place.tree.stat(other).st_mode
            ) else place.tree.remove(other)
    place.tree.remove(f"{place.path}/{_WRITER}")
    place.tree.remove_all(place.path)
