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
from collections.abc import Sequence

from statepool.archive.scan import names_in
from statepool.beneath import Tree


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
        self._rename([(letter, name) for letter, name in names if letter in "RT"])
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

    def _rename(self, steps: Sequence[tuple[str, bytes]]) -> None:
        aside = ".statepool-renamed"
        source = ""
        for letter, name in steps:
            path = os.path.normpath(os.fsdecode(name)) if name else aside
            if letter == "R":
                source = path
                continue
            try:
                self._tree.stat(source)
            except (FileNotFoundError, NotADirectoryError):
                continue  # it was made and renamed between the levels
            above, last = self._tree.place(path)
            with above as directory:
                if _exists(directory, last):
                    remove(directory, last)
            self._tree.rename(source, path)

    def _permit(self, path: str) -> None:
        above, last = self._tree.place(path)
        with above as directory:
            os.chmod(last, stat.S_IRWXU, dir_fd=directory)


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
