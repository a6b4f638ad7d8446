"""
Transports for :mod:`tests.support.interleave`: on files that are a value, and on answers that were
recorded.
"""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from statepool.errors import FileExists, MissingFile, TransportError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.transports.base import (
    Capabilities,
    Entry,
    FileKind,
    Moved,
    Stat,
    Transfer,
    Transport,
)

Node = tuple[FileKind, str, bytes]
"""
What has a name: its kind, for a file the name under which it was made, and its bytes; of a symbolic
link, what it holds.
"""

Files = Mapping[str, Node]
"""All files of a pool, by path."""

Operation = tuple[Any, ...]
"""The name of a primitive of the transport, and its arguments."""

Answer = tuple[str, Any]
"""``value`` and what was returned, or ``error`` and the class and message of what was raised."""

_DIRECTORY: Node = (FileKind.DIRECTORY, "", b"")


class NextOperation(BaseException):
    """
    Stops an actor where nothing more is known of what it will see. Not an error of anybody's, so
    that nobody handles it.

    :param operation: what the actor wants to do next
    """

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation)
        self.operation = operation


# -- a file system as a value ----------------------------------------------------------------------


class FileSystem:
    """
    The primitives of a transport on files that are a value.

    :param files: what is there now; replaced, never changed
    """

    def __init__(self, files: Files) -> None:
        self.files = files

    def perform(self, operation: Operation) -> Any:
        """
        :returns: what the primitive returns
        :raises StatePoolError: what the primitive raises
        """
        return getattr(self, f"_{operation[0]}")(*operation[1:])

    def _scan(self, directory: str) -> tuple[Entry, ...]:
        start = directory + "/" if directory else ""
        names = (
            path for path in self.files if path.startswith(start) and "/" not in path[len(start) :]
        )
        return tuple(
            sorted(
                (Entry(path[len(start) :], self.files[path][0]) for path in names),
                key=lambda entry: entry.name,
            )
        )

    def _stat(self, path: str) -> Stat | None:
        if path not in self.files:
            return None
        kind, made_as, data = self.files[path]
        return Stat(kind, len(data), 0, (0, hash(made_as or path)))

    def _read(self, path: str) -> bytes:
        return self._need(path, FileKind.FILE)

    def _readlink(self, path: str) -> str:
        return self._need(path, FileKind.LINK).decode()

    def _need(self, path: str, kind: FileKind) -> bytes:
        if path not in self.files:
            raise MissingFile(f"{path} is not there")
        if self.files[path][0] is not kind:
            raise TransportError(f"{path} is not a {kind}")
        return self.files[path][2]

    def _create(self, path: str, data: bytes) -> None:
        self._enter(path, (FileKind.FILE, path, data))

    def _put(self, path: str, data: bytes) -> None:
        self._remove(path)
        self._create(path, data)

    def _link(self, source: str, target: str) -> None:
        self._need(source, FileKind.FILE)
        self._enter(target, self.files[source])

    def _enter(self, path: str, node: Node, *, over: bool = False) -> None:
        above = path.rpartition("/")[0]
        if above and self.files.get(above) != _DIRECTORY:
            raise MissingFile(f"the directory of {path} is not there")
        if path in self.files and (not over or self.files[path] == _DIRECTORY):
            raise FileExists(f"{path} is there")
        self.files = {**self.files, path: node}

    def _rename(self, source: str, target: str) -> None:
        if source not in self.files:
            raise MissingFile(f"{source} is not there")
        self._enter(target, self.files[source], over=True)
        if source != target:
            self.files = {path: node for path, node in self.files.items() if path != source}

    def _remove(self, path: str) -> bool:
        if path not in self.files:
            return False
        if self.files[path] == _DIRECTORY:
            raise TransportError(f"{path} is a directory")
        self.files = {other: node for other, node in self.files.items() if other != path}
        return True

    def _symlink(self, target: str, path: str) -> None:
        self._enter(path, (FileKind.LINK, "", target.encode()), over=True)

    def _make_directory(self, path: str) -> None:
        if self.files.get(path) != _DIRECTORY:
            self._enter(path, _DIRECTORY)

    def _remove_directory(self, path: str) -> bool:
        if self.files.get(path) != _DIRECTORY or self._scan(path):
            return False
        self.files = {other: node for other, node in self.files.items() if other != path}
        return True


class _Primitives(Transport):
    """The face of transports, one operation for each primitive."""

    def __init__(self, *, symlinks: bool, renames: bool) -> None:
        super().__init__(Location("memory", "/pool"))
        self._symlinks = symlinks
        self._renames = renames

    @abstractmethod
    def do(self, *operation: Any) -> Any:
        """:returns: what comes of the operation"""

    @property
    def capabilities(self) -> Capabilities:
        """
        As a file system of this host; or as a store of blobs, in which there are neither links nor
        renames.
        """
        return Capabilities(
            symlinks=self._symlinks,
            durable=True,
            local=self._renames,
            renames=self._renames,
            copies=not self._renames,
        )

    def scan(self, directory: str) -> list[Entry]:
        """As the transport's face says."""
        return list(self.do("scan", directory))

    def stat(self, path: str) -> Stat | None:
        """As the transport's face says."""
        return cast("Stat | None", self.do("stat", path))

    def now(self, path: str) -> float:
        """As the transport's face says; time does not pass here."""
        return 0.0

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """As the transport's face says; links are never followed."""
        data: bytes = self.do("read", path)
        return data[offset : None if size is None else offset + size]

    def readlink(self, path: str) -> str:
        """As the transport's face says."""
        return str(self.do("readlink", path))

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """As the transport's face says."""
        self.do("create", path, data)

    def link(self, source: str, target: str) -> None:
        """Copy a file in several steps."""
        if not self._renames:
            super().link(source, target)
            return
        self.do("link", source, target)

    def rename(self, source: str, target: str) -> None:
        """As the transport's face says."""
        if not self._renames:
            super().rename(source, target)
        self.do("rename", source, target)

    def remove(self, path: str) -> bool:
        """As the transport's face says."""
        return bool(self.do("remove", path))

    def symlink(self, target: str, path: str) -> None:
        """As the transport's face says."""
        self.do("symlink", target, path)

    def make_directory(self, path: str) -> None:
        """
        As the transport's face says: not in one step, so that others may come between and remove
        what is empty.
        """
        parts = path.split("/")
        for count in range(1, len(parts) + 1):
            self.do("make_directory", "/".join(parts[:count]))

    def remove_directory(self, path: str) -> bool:
        """As the transport's face says."""
        return bool(self.do("remove_directory", path))

    def flush(self, directory: str) -> None:
        """Nothing happens here: power cuts are not what is explored."""

    def fetch(self, path: str, target: int, transfer: Transfer) -> Moved:
        """As the transport's face says, in one step."""
        data = self.read(path)
        os.pwrite(target, data, 0)
        return Moved(Digest.of(data, transfer.algorithm), "copy", len(data))

    def store(self, source: int, path: str, transfer: Transfer) -> Moved:
        """As the transport's face says, in one step."""
        data = os.pread(source, transfer.size, 0)
        self.do("put", path, data)
        return Moved(Digest.of(data, transfer.algorithm), "copy", len(data))

    def digest(self, path: str, transfer: Transfer) -> Digest:
        """As the transport's face says."""
        return Digest.of(self.read(path), transfer.algorithm)

    def free_space(self) -> int | None:
        """Nobody knows."""
        return None


class Direct(_Primitives):
    """
    A transport on files that are a value: for making the first ones, and for looking at some.

    :param files: what is there at first
    """

    def __init__(self, files: Files, *, symlinks: bool = False, renames: bool = True) -> None:
        super().__init__(symlinks=symlinks, renames=renames)
        self._system = FileSystem(files)

    @property
    def files(self) -> Files:
        """What is there now."""
        return self._system.files

    def do(self, *operation: Any) -> Any:
        """Do it now."""
        return self._system.perform(operation)


class Replay(_Primitives):
    """
    A transport that answers what was recorded, and then stops the actor.

    :param name: the actor
    :param answers: what it has seen
    """

    def __init__(
        self, name: str, answers: Sequence[Answer], *, symlinks: bool, renames: bool, locks: bool
    ) -> None:
        super().__init__(symlinks=symlinks, renames=renames)
        self.name = name
        self._answers = iter(answers)
        self._next: Operation | None = None
        self._nonces = 0
        self._locked = locks

    def do(self, *operation: Any) -> Any:
        """Answer from the records."""
        # While the actor is unwound, its `finally` blocks come here too: none of that will have
        # happened.
        if self._next is None:
            answer = next(self._answers, None)
            if answer is not None:
                kind, value = answer
                if kind == "error":
                    raise value[0](value[1])
                return value
            self._next = operation
        raise NextOperation(self._next)

    def nonce(self) -> str:
        """:returns: a name that no other actor chooses, the same in every replay"""
        self._nonces += 1
        return f"{self.name}{self._nonces}"

    def at_once(self, name: str) -> Any:
        """
        Do what is too long to be done in steps, or ask what an actor cannot know.

        :param name: of a function in :attr:`tests.support.interleave.World.at_once`
        """
        return self.do("at_once", name)

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        """
        A lock that a death frees, if the explorer was told to have locks. As
        :meth:`statepool.pools.locks.Locks.hold`.
        """
        if not self._locked:
            yield
            return
        self.do("lock", name)
        try:
            yield
        finally:
            self.do("unlock", name)
