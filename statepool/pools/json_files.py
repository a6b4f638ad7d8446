"""
Notes: small JSON files of a cache, each written under a temporary name and then renamed; and the
directories in which an account keeps its notes.

An account obeys only its own notes, and recovers only from its own leftovers. A cache may be shared
by a group, and any member could leave a note that a file has been hashed, or a directory of "a
process that has ended". So all notes are in a directory that belongs to the account, and to which
no other account can write.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress

from statepool.beneath import DIRECTORY, Beneath, Tree, open_at
from statepool.errors import AccessDenied
from statepool.pools import layout
from statepool.pools.log import random_nonce

ACCOUNTS = f"{layout.OURS}/accounts"
"""
The directory for notes in a cache to which other accounts can write. It has a directory for each
account, named by the account's number.
"""

SOURCE_STATS = "known"
"""
The directory for what is known of the sources. The cache makes it, and the code that measures the
sources writes into it.
"""

LARGEST = 1 << 20
"""Largest note that is read, in bytes."""

_NOT_FOR_OTHERS = ~(stat.S_IWGRP | stat.S_IWOTH | stat.S_ISGID)
"""
Mask of the mode bits that stay when only the owner may write. Other accounts keep the read
permissions of the directory above.
"""

_UNFINISHED = ".tmp"

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_READ = os.O_RDONLY | os.O_NONBLOCK


def write_json(tree: Tree, path: str, data: Mapping[str, object], *, flush: bool = False) -> None:
    """
    Write a JSON file by an atomic rename.

    :param path: the file in the tree, in a directory that exists; an existing file is replaced
    :param data: what to write, as JSON
    :param flush: whether the content must be on stable storage before it gets its name
    """
    place, name = tree.place(path)
    temporary = f"{random_nonce()}{_UNFINISHED}"
    with place as directory:
        try:
            with open_at(directory, temporary, _NEW, 0o644) as file:
                _write(file, json.dumps(data).encode())
                # If a group shares the directory, its members can write the file, whatever the
                # umask of this process.
                if os.fstat(directory).st_mode & stat.S_IWGRP:
                    os.fchmod(file, 0o664)
                if flush:
                    os.fsync(file)
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
            raise


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def read_json(tree: Tree, path: str) -> tuple[object, os.stat_result]:
    """
    :returns: the content of a note, and the status of its file
    :raises FileNotFoundError: there is no such note
    :raises ValueError: the file is torn, or no note
    """
    with tree.open(path, _READ) as file:
        return _read(file, path)


def _read(file: int, path: str) -> tuple[object, os.stat_result]:
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
        raise ValueError(f"{path} is no note")
    # Not a buffer of the largest size: its allocation would take longer than all else here.
    return json.loads(os.read(file, found.st_size).decode()), found


def _read_or_none(directory: int, name: str) -> object:
    try:
        with open_at(directory, name, _READ) as file:
            return _read(file, name)[0]
    except (OSError, ValueError):
        return None


def make_directory(tree: Tree, path: str) -> None:
    """
    Make a directory and its missing parents, each with the mode of its parent, as everywhere in a
    pool.
    """
    above = path.rpartition("/")[0]
    try:
        mode = stat.S_IMODE(tree.stat(above).st_mode)
    except FileNotFoundError:
        make_directory(tree, above)
        mode = stat.S_IMODE(tree.stat(above).st_mode)
    tree.make_directory(path, mode | stat.S_IRWXU)


def is_private(status: os.stat_result) -> bool:
    """
    :returns: whether a directory or file belongs to this account, and no other account can write to
        it
    """
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


class Notes:
    """
    The notes of this account in a cache, and its other private directories: in ``.statepool/``
    itself if no other account can write there, else in a directory below ``accounts/``.

    :param tree: the cache
    :param kinds: the names of the directories
    """

    def __init__(self, tree: Tree, kinds: tuple[str, ...]) -> None:
        self._tree = tree
        self._kinds = kinds
        self._found: tuple[int, Tree] | None = None

    def _own(self, *, make: bool = False) -> Tree | None:
        """
        :returns: the private directory of this account that contains the directories of notes; None
            if there is none
        """
        account = os.geteuid()
        if self._found is None or self._found[0] != account:
            found = self._find(make)
            self._found = (account, found) if found is not None else None
        return self._found[1] if self._found is not None else None

    def _find(self, make: bool) -> Tree | None:
        try:
            ours = self._held(layout.OURS)
        except FileNotFoundError:
            return None  # no cache yet
        if ours is not None and all(
            self._is_private_or_missing(ours, kind) for kind in self._kinds
        ):
            return ours
        return self._of_account(make)

    def _held(self, path: str) -> Tree | None:
        """:returns: a directory, held by a descriptor, if it is private; else None"""
        descriptor = self._tree.open(path, DIRECTORY)
        return (
            Tree(f"{self._tree.root}/{path}", held=descriptor)
            if is_private(os.fstat(descriptor.number))
            else None
        )

    @staticmethod
    def _is_private_or_missing(tree: Tree, kind: str) -> bool:
        try:
            return is_private(tree.stat(kind))
        except FileNotFoundError:
            return True

    def _of_account(self, make: bool) -> Tree | None:
        path = f"{ACCOUNTS}/{os.geteuid()}"
        try:
            if make:
                make_directory(self._tree, ACCOUNTS)
                self._tree.make_directory(
                    path, stat.S_IMODE(self._tree.stat("").st_mode) & _NOT_FOR_OTHERS | stat.S_IRWXU
                )
            return self._held(path) or self._held_without_modes(path)
        except OSError:
            # a read-only cache, or a directory that another account has put there: nothing is noted
            return None

    def _held_without_modes(self, path: str) -> Tree | None:
        """
        :returns: a directory of this account on a file system that keeps no modes, such as NTFS by
            FUSE: there the mount options determine the write permission for all files alike. None
            where modes are kept
        """
        if self._tree.stat(path).st_uid != os.geteuid():
            return None
        trial = f"{ACCOUNTS}/.{random_nonce()}{_UNFINISHED}"
        self._tree.make_directory(trial, stat.S_IRWXU)
        keeps_modes = is_private(self._tree.stat(trial))
        self._tree.remove_all(trial)
        return (
            None
            if keeps_modes
            else Tree(f"{self._tree.root}/{path}", held=self._tree.open(path, DIRECTORY))
        )

    def read(self, path: str) -> dict[str, object]:
        """:returns: the content of a note; empty if there is no note, or a power cut tore it"""
        tree = self._own()
        try:
            data = read_json(tree, path)[0] if tree is not None else None
        except (FileNotFoundError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def read_all(self, kind: str, names: Iterable[str]) -> Iterator[object]:
        """
        :param names: of notes in one of the directories
        :returns: the content of each, in their order; None for a note that is missing or torn, or
            that this account may not read
        """
        with ExitStack() as stack:
            directory = None
            with suppress(OSError):
                if (tree := self._own()) is not None:
                    directory = stack.enter_context(tree.open(kind, DIRECTORY))
            for name in names:
                yield _read_or_none(directory, name) if directory is not None else None

    def prepare(self) -> None:
        """Make the directories, if this account can have any."""
        if (tree := self._own(make=True)) is not None:
            for kind in self._kinds:
                make_directory(tree, kind)

    def keeps_apart(self, path: str) -> bool:
        """
        :returns: whether other accounts can put files into a directory of the cache, so that this
            account must note elsewhere what it is to obey
        """
        return not (is_private(self._tree.stat(layout.OURS)) and is_private(self._tree.stat(path)))

    def write(self, path: str, data: Mapping[str, object], *, make: bool = True) -> bool:
        """
        Write a note.

        :param make: whether to make missing directories above it
        :returns: whether this account can have notes in this cache
        :raises FileNotFoundError: there is no such directory
        """
        if (tree := self._own(make=make)) is None:
            return False
        try:
            write_json(tree, path, data)
        except FileNotFoundError:
            if not make:
                raise
            make_directory(tree, path.rpartition("/")[0])
            write_json(tree, path, data)
        return True

    def found(self, kind: str) -> Beneath | None:
        """:returns: one of the directories, if this account has it in this cache"""
        return Beneath(tree, kind) if (tree := self._own()) is not None else None

    def directory(self, kind: str) -> Beneath:
        """
        :returns: one of the directories, which is made if it is missing
        :raises AccessDenied: this account can have no directory in this cache
        """
        if (tree := self._own(make=True)) is None:
            place = Beneath(self._tree, f"{ACCOUNTS}/{os.geteuid()}")
            raise AccessDenied(
                f"{place} cannot be made, or belongs to another account",
                path=str(place),
                hint="look who may write to the cache, or choose another with --cache",
            )
        make_directory(tree, kind)
        return Beneath(tree, kind)

    def remove(self, path: str) -> bool:
        """:returns: whether the note existed"""
        return (tree := self._own()) is not None and tree.remove(path)

    def touch(self, kind: str, names: Iterable[str]) -> None:
        """Set the times of those notes in one of the directories that exist to now."""
        if (tree := self._own()) is None:
            return
        with suppress(FileNotFoundError), tree.open(kind, DIRECTORY) as directory:
            for name in names:
                with suppress(FileNotFoundError):
                    os.utime(name, dir_fd=directory, follow_symlinks=False)

    def status(self, path: str) -> os.stat_result | None:
        """:returns: the status of a note, or None if there is none"""
        try:
            return tree.stat(path) if (tree := self._own()) is not None else None
        except FileNotFoundError:
            return None

    def names(self, kind: str) -> list[str]:
        """:returns: the names in a directory of notes, sorted"""
        return names_in(tree, kind) if (tree := self._own()) is not None else []

    def where(self, path: str) -> str:
        """:returns: the path of a note, for messages"""
        return str(Beneath(self._own() or self._tree, path))

    def unfinished(self) -> list[Beneath]:
        """
        :returns: the temporary files of notes that are being written, or were when a process was
            killed
        """
        tree = self._own()
        return (
            [file for kind in self._kinds for file in unfinished_in(tree, kind)]
            if tree is not None
            else []
        )


def names_in(tree: Tree, path: str) -> list[str]:
    """:returns: the names in a directory, sorted; empty if there is no such directory"""
    try:
        with tree.open(path, os.O_RDONLY | os.O_DIRECTORY) as directory:
            return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def unfinished_in(tree: Tree, path: str) -> list[Beneath]:
    """:returns: the temporary files of notes in a directory, and in those below it"""
    found: list[Beneath] = []
    for name in names_in(tree, path):
        file = Beneath(tree, f"{path}/{name}")
        status = file.stat()
        if status is not None and stat.S_ISDIR(status.st_mode):
            found += unfinished_in(tree, file.path)
        elif name.endswith(_UNFINISHED):
            found.append(file)
    return found
