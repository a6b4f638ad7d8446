"""
What the lists of directories in an incremental archive say is done to a tree that is restored.

GNU tar writes these lists (its manual, "Dumpdir"): the names that a directory had, and which
directories had been renamed. They are applied here, and not by GNU tar, since that fails if a
directory gets the name of a file, or of another directory, that was there on the level below.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping

from statepool.archive.scan import names_in, renames_in
from statepool.beneath import Tree
from statepool.pools.log import random_nonce


class Lists:
    """
    The lists of the archives that are restored.

    :param tree: the directory that is restored; nothing outside of it is changed
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def apply(self, path: str, dumpdir: bytes) -> None:
        """
        Rename and remove what the list of a directory says.

        :param path: of the directory, relative to the tree; its names were checked
        :param dumpdir: the list
        """
        names = names_in(dumpdir)
        renames = renames_in(dumpdir).items()
        self._rename({_normal(old): _normal(new) for old, new in renames})
        try:
            opened = self._tree.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return  # it is new on this level
        except PermissionError:
            self._permit(path)
            opened = self._tree.open(path, os.O_RDONLY | os.O_DIRECTORY)
        with opened as directory:
            mode = os.fstat(directory).st_mode
            if mode & stat.S_IRWXU != stat.S_IRWXU:
                # GNU tar gives it its mode at the end
                os.fchmod(directory, stat.S_IMODE(mode) | stat.S_IRWXU)
            self._prune(directory, {name: letter for letter, name in names if letter in "YND"})

    def _prune(self, directory: int, listed: dict[bytes, str]) -> None:
        for name in os.listdir(directory):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            letter = listed.get(os.fsencode(name))
            if letter is None or (letter == "D") != stat.S_ISDIR(status.st_mode):
                remove(directory, name)

    def _rename(self, new_names: Mapping[str, str]) -> None:
        """Give directories their new names, as if all at once."""
        aside = {old: f".{random_nonce()}.renamed" for old in new_names}
        moved = []
        for old in sorted(new_names, key=_depth, reverse=True):
            if self._is_there(old):
                self._tree.rename(old, aside[old])
                moved.append(old)
        for old in sorted(moved, key=lambda one: _depth(new_names[one])):
            new = new_names[old]
            above, _, name = new.rpartition("/")
            self._make(above)
            with self._tree.open(above, os.O_PATH | os.O_DIRECTORY) as directory:
                if _exists(directory, name):
                    remove(directory, name)
            self._tree.rename(aside[old], new)

    def _make(self, path: str) -> None:
        """Make a directory that is new on this level; GNU tar gives it its mode."""
        parts = path.split("/") if path else []
        for number in range(len(parts)):
            above = "/".join(parts[:number])
            with self._tree.open(above, os.O_PATH | os.O_DIRECTORY) as directory:
                name = parts[number]
                if _exists(directory, name):
                    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        continue
                    remove(directory, name)
                os.mkdir(name, stat.S_IRWXU, dir_fd=directory)

    def _is_there(self, path: str) -> bool:
        try:
            self._tree.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False  # it was made and renamed between the levels
        return True

    def _permit(self, path: str) -> None:
        above, last = self._tree.place(path)
        with above as directory:
            os.chmod(last, stat.S_IRWXU, dir_fd=directory)


def _normal(name: bytes) -> str:
    return os.path.normpath(os.fsdecode(name))


def _depth(path: str) -> int:
    return path.count("/")


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def remove(directory: int, name: str) -> None:
    """Remove a file, or a directory with all below it, also where its modes forbid that."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=directory)
        return
    if os.geteuid() != 0:
        os.chmod(name, stat.S_IRWXU, dir_fd=directory)
        for _, directories, _, above in os.fwalk(name, dir_fd=directory):
            for one in directories:
                if stat.S_ISDIR(os.stat(one, dir_fd=above, follow_symlinks=False).st_mode):
                    os.chmod(one, stat.S_IRWXU, dir_fd=above)
    shutil.rmtree(name, dir_fd=directory)
