"""Snapshots of directories, to show that an operation changed nothing."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

PASSING = ("/.statepool/locks/", "/.statepool/known/")
"""
Parts of paths that are ignored: a process that only checks whether a change is allowed may create a
lock file, and how a source behaved is noted also if nothing was changed.
"""


def photograph(*directories: Path, besides: tuple[str, ...] = PASSING) -> dict[str, str]:
    """
    :param directories: the directories; a missing one counts as empty
    :param besides: parts of paths that are left out
    :returns: what each name stands for: the kind and permissions of the file, and a digest of its
        content or what a link holds. Times are left out.
    """
    return {
        path: _described(path)
        for directory in directories
        for path in _names(directory)
        if not any(part in path for part in besides)
    }


def _names(directory: Path) -> Iterator[str]:
    if not directory.is_dir():
        yield from [str(directory)] if os.path.lexists(directory) else []
        return
    for path, directories, files in os.walk(directory):
        for name in sorted([*directories, *files]):
            yield os.path.join(path, name)


def _described(path: str) -> str:
    found = os.lstat(path)
    mode = stat.filemode(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        return f"{mode} -> {os.readlink(path)}"
    if stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            return f"{mode} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    return mode
