"""
The collect action, for a peer without CedarBackup: files and directories become tars in the collect
directory, and then the indicator is made.

A tar appears whole, under the name that CedarBackup gives it. What is collected incrementally is
compared with the digests of the last collect; they are written after the tar, so that what a crash
leaves is collected once more. The old indicators are removed first: so a stage never takes a
directory that is being collected.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from statepool.bundles.place import made
from statepool.errors import NotFound
from statepool.model.digest import DEFAULT_ALGORITHM
from statepool.staging.day import MODE, Owner, owner_of
from statepool.staging.settings import ArchiveMode, CollectMode, CollectSettings, Item, tar_name
from statepool.transports.copying import hash_file
from statepool.transports.failures import Subject, translate_os_errors, translated

_MODES: dict[ArchiveMode, Any] = {
    ArchiveMode.TAR: "w:",
    ArchiveMode.GZIP: "w:gz",
    ArchiveMode.BZIP2: "w:bz2",
}
"""How :mod:`tarfile` writes a tar of each kind."""

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@frozen
class CollectedItem:
    """
    What happened to an item.

    :param path: its path
    :param tar: the path of its tar; None: there was nothing to do today
    :param files: how many files are in it
    :param changed: files that changed while they were read, which cannot be right in it, or were
        gone
    """

    path: str
    tar: str | None = None
    files: int = 0
    changed: tuple[str, ...] = ()

    def form(self) -> dict[str, object]:
        """:returns: it for JSON"""
        return {
            "path": self.path,
            "tar": self.tar,
            "files": self.files,
            "changed": list(self.changed),
        }


_Known = dict[str, list[object]]
"""The length, the time in nanoseconds and the digest of each file, by its path."""


@define(eq=False)
class Collect:
    """
    The action.

    :param settings: its settings
    :param full: whether everything is collected, as at the start of the week
    :param tell: is given the result of each item, when it is done
    :param now: returns the local time
    """

    settings: CollectSettings
    full: bool = False
    tell: Callable[[CollectedItem], object] = lambda _: None
    now: Callable[[], dt.datetime] = dt.datetime.now
    _owner: Owner | None = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._owner = owner_of(self.settings.user, self.settings.group)

    def run(self) -> tuple[CollectedItem, ...]:
        """
        :returns: what happened to each item
        :raises NotFound: an item is not there; nothing is indicated then
        :raises AccessDenied: something cannot be read, or the collect directory cannot be written
        """
        start = self.full or self.now().weekday() == self.settings.starting_day
        directory, names = self.settings.directory, self.settings.indicators
        with _told("write to", str(directory)):
            for path in (directory, self.settings.notes):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._owner is not None:
                    os.chown(path, self._owner.uid, self._owner.gid)
            for name in (names.collect, names.stage):
                (directory / name).unlink(missing_ok=True)
        done = []
        for item in self.settings.items:
            due = start or item.mode is not CollectMode.WEEKLY
            done.append(self._item(item, start) if due else CollectedItem(item.path))
            self.tell(done[-1])
        with made(directory / names.collect, overwrite=True) as (descriptor, _):
            self._give(descriptor)
        return tuple(done)

    def _item(self, item: Item, start: bool) -> CollectedItem:
        if not os.path.lexists(item.path):
            raise NotFound(
                f"{item.path} is to be collected, and is not there",
                hint="mount it, or leave it out of the settings",
                path=item.path,
            )
        paths = list(_files(item))
        if item.mode is not CollectMode.INCREMENTAL:
            return self._tar(item, paths)
        notes = self.settings.notes / f"{tar_name(item)}.json"
        known = {} if start else self._known(notes)
        current = {path: found for path in paths if (found := _looked(path, known)) is not None}
        changed = [
            path
            for path in paths
            if path not in current or known.get(path, [None])[-1] != current[path][-1]
        ]
        result = self._tar(item, changed) if changed else CollectedItem(item.path)
        for path in result.changed:
            current.pop(path, None)  # it is collected the next time
        with made(notes, overwrite=True) as (descriptor, _):
            self._give(descriptor)
            with os.fdopen(os.dup(descriptor), "w") as file:
                json.dump(current, file)
        return result

    def _known(self, notes: Path) -> _Known:
        try:
            found = json.loads(notes.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError:
            return {}  # all is collected
        except OSError as error:
            raise translated(error, "read", Subject(str(notes), path=str(notes))) from error
        if not isinstance(found, dict):
            return {}
        return {str(path): one for path, one in found.items() if isinstance(one, list) and one}

    def _tar(self, item: Item, paths: list[str]) -> CollectedItem:
        target = self.settings.directory / tar_name(item)
        changed: list[str] = []
        mode = _MODES[item.archive]
        with made(target, overwrite=True) as (descriptor, _):
            self._give(descriptor)
            with (
                _told("write", str(target)),
                os.fdopen(os.dup(descriptor), "wb") as file,
                tarfile.open(fileobj=file, mode=mode, format=tarfile.GNU_FORMAT) as tar,
            ):
                changed += [path for path in paths if not _add(tar, path)]
        count = len(paths) - len(changed)
        return CollectedItem(item.path, str(target), count, tuple(changed))

    def _give(self, descriptor: int) -> None:
        with _told("write to", str(self.settings.directory)):
            os.fchmod(descriptor, MODE)
            if self._owner is not None:
                self._owner.give(descriptor)


def _told(doing: str, path: str) -> AbstractContextManager[None]:
    """Translate errors of the operating system about a file into errors of this package."""
    return translate_os_errors(doing, Subject(path, path=path))


def _add(tar: tarfile.TarFile, path: str) -> bool:
    """
    :returns: whether a file, a link or a directory was added as it is; a file that has become
        shorter is filled with zeros, since its length was written before
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            tar.add(path, recursive=False)
            return True
        descriptor = os.open(path, _READ)
    except FileNotFoundError:
        return False
    with os.fdopen(descriptor, "rb") as file:
        info = tar.gettarinfo(fileobj=file, arcname=path)
        if not info.isreg():
            if info.islnk():
                tar.addfile(info)
            return info.islnk()
        reader = _Whole(file, info.size)
        tar.addfile(info, reader)  # type: ignore[arg-type]
        after = os.fstat(descriptor)
        return not reader.short and after.st_size == info.size


class _Whole:
    """A reader of so many bytes of a file, with zeros for those that it does not have any more."""

    def __init__(self, file: object, size: int) -> None:
        self._file, self._left, self.short = file, size, False

    def read(self, size: int) -> bytes:
        """:returns: the next bytes"""
        wanted = min(size, self._left)
        data: bytes = self._file.read(wanted)  # type: ignore[attr-defined]
        self.short = self.short or len(data) < wanted
        self._left -= wanted
        return data.ljust(wanted, b"\0")


def _files(item: Item) -> Iterator[str]:
    """
    :returns: the item itself and all below it that is not excluded: a directory before what is in
        it, links as links, and nothing that is no file, directory or link
    """
    patterns = [re.compile(pattern) for pattern in item.patterns]
    left = [item.path]
    while left:
        path = left.pop()
        if path in item.exclude or any(one.fullmatch(path) for one in patterns):
            continue
        with _told("read", path):
            kind = os.lstat(path).st_mode
            if stat.S_ISREG(kind) or stat.S_ISLNK(kind):
                yield path
            if not stat.S_ISDIR(kind):
                continue
            names = sorted(os.listdir(path), reverse=True)
        if item.ignore_file and item.ignore_file in names:
            continue
        yield path
        left += [os.path.join(path, name) for name in names]


def _looked(path: str, known: _Known) -> list[object] | None:
    """
    :returns: length, time and digest of a regular file, which is read only if the first two have
        changed; None for anything else
    """
    try:
        with _told("read", path):
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return None
            descriptor = os.open(path, _READ)
    except FileNotFoundError:
        return None
    try:
        found = os.fstat(descriptor)
        facts: list[object] = [found.st_size, found.st_mtime_ns]
        before = known.get(path, [])
        if before[:2] == facts and len(before) == 3:
            return before
        subject = Subject(path, path=path)
        digest = hash_file(descriptor, found.st_size, algorithm=DEFAULT_ALGORITHM, subject=subject)
        return [*facts, str(digest)]
    finally:
        os.close(descriptor)
