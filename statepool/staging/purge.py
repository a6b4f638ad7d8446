"""
The purge action: old files of the staging directory go, and then the directories that are empty.

The age of a file is counted as in CedarBackup: in whole days since it was last read or written. A
pool is removed as a whole, when all its own records are old: its bytes may be older, since they can
be those of another day.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial

from attrs import frozen

from statepool.errors import AccessDenied
from statepool.pools import layout
from statepool.staging.day import Staging
from statepool.staging.settings import StageSettings
from statepool.staging.states import is_pool
from statepool.transports.base import FileKind
from statepool.transports.failures import translating

DAY = 86_400
"""Seconds of a day."""


def purge(settings: StageSettings, days: int, *, dry_run: bool = False) -> tuple[str, ...]:
    """
    Remove what is so many whole days old, in the directories of days only.

    :param dry_run: remove nothing
    :returns: the paths that are removed
    :raises StatePoolError: something could not be removed
    """
    staging = Staging(settings)
    run = _Purge(staging, days, dry_run, time.time())
    found: list[str] = []
    for day in list(staging.days()):
        found += run.directory(day.path, partial(is_pool, day))
        above = day.path.rpartition("/")[0]
        while above:
            found += run.empty(above)
            above = above.rpartition("/")[0]
    return tuple(f"{staging.tree.root}/{path}" for path in found)


@frozen
class _Purge:
    staging: Staging
    days: int
    dry_run: bool
    now: float

    def file(self, path: str) -> Iterator[str]:
        """Remove a file, if it is old, and yield its path. A symbolic link always goes."""
        found = self._status(path)
        if found is None or not (stat.S_ISLNK(found.st_mode) or self._is_old(found)):
            return
        if self.dry_run or self.staging.files.remove(path):
            yield path

    def directory(
        self, path: str, is_pool: Callable[[str], bool] = lambda name: False
    ) -> list[str]:
        """
        Remove what is old in a directory. If it is empty then, it is removed too, but not if it is
        new: a stage may be about to fill it.

        :param is_pool: tells whether a directory in it is a pool
        """
        before = self._status(path)
        found: list[str] = []
        for entry in sorted(self.staging.files.scan(path), key=lambda entry: entry.name):
            inner = f"{path}/{entry.name}"
            if entry.kind is not FileKind.DIRECTORY:
                found += self.file(inner)
            elif is_pool(entry.name):
                found += self.pool(inner)
            else:
                found += self.directory(inner)
        if found or (before is not None and self._age(before.st_mtime) >= self.days):
            found += self.empty(path)
        return found

    def empty(self, path: str) -> Iterator[str]:
        """Remove a directory, if it is empty."""
        if not self.dry_run and self.staging.files.remove_directory(path):
            yield path

    def pool(self, path: str) -> Iterator[str]:
        """Remove a pool, if all its own records are old."""
        if not all(self._is_old(found) for found in self._records(f"{path}/{layout.OURS}")):
            return
        if not self.dry_run:
            with translating("remove", self.staging.subject(path)):
                self.staging.tree.remove_all(path)
            self._require_gone(path)
        yield path

    def _require_gone(self, path: str) -> None:
        if self._status(path) is not None:
            subject = self.staging.subject(path)
            raise AccessDenied(
                f"{subject.text} could not be removed as a whole",
                hint="look at the owner and the mode of what is left",
                path=subject.path,
            )

    def _records(self, path: str) -> Iterator[os.stat_result]:
        for entry in self.staging.files.scan(path):
            inner = f"{path}/{entry.name}"
            if entry.kind is FileKind.DIRECTORY and not inner.endswith(f"/{layout.DATA}"):
                yield from self._records(inner)
            elif entry.kind is FileKind.FILE and (found := self._status(inner)) is not None:
                yield found

    def _status(self, path: str) -> os.stat_result | None:
        try:
            with translating("look at", self.staging.subject(path)):
                return self.staging.tree.stat(path)
        except FileNotFoundError:
            return None

    def _is_old(self, found: os.stat_result) -> bool:
        return self._age(max(found.st_atime, found.st_mtime)) >= self.days

    def _age(self, then: float) -> float:
        """:returns: whole days"""
        return max(self.now - then, 0.0) // DAY
