"""
Pools in memory: as fast as it goes, and as strict as a file system.

::

    store = MemoryStore()
    here, there = MemoryTransport(store), MemoryTransport(store)      # two hosts that see one pool

Every operation happens as a whole or not at all, and of several that race for a name one wins, as the face of transports demands.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from attrs import define, field

from statepool.errors import TransportError
from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.location import Location
from statepool.model.progress import SILENT, Progress
from statepool.transports import copying
from statepool.transports.base import Capabilities, Entry, FileKind, Moved, Stat, Transport
from statepool.transports.failures import Subject, not_regular, translated, translating, wrong_length

BLOCK = 64 << 10
"""Bytes that are moved at a time; those that are all zeros are holes at the other end."""

_stores = itertools.count(1)


@define(eq=False)
class _File:
    number: int
    mtime_ns: int
    data: bytearray = field(factory=bytearray)


@define(eq=False)
class _Link:
    number: int
    mtime_ns: int
    target: str


@define(eq=False)
class _Directory:
    number: int
    mtime_ns: int
    children: dict[str, _Node] = field(factory=dict)


_Node = _File | _Link | _Directory

_KINDS = {_File: FileKind.FILE, _Link: FileKind.LINK, _Directory: FileKind.DIRECTORY}


@define(eq=False)
class _Place:
    """Where a path leads: a name in a directory, and what has it, if anything."""

    directory: _Directory
    name: str
    node: _Node | None


class MemoryStore:
    """
    A file system in memory. Its methods raise what the operating system would: :class:`OSError` with a number.

    :param clock: gives the time of changes, in nanoseconds
    :param capacity: bytes that all files together may have, or None for any number
    """

    def __init__(self, *, clock: Callable[[], int] = time.time_ns, capacity: int | None = None) -> None:
        self.name = f"memory-{next(_stores)}"
        self.lock = threading.RLock()
        self._clock = clock
        self._capacity = capacity
        self._numbers = itertools.count(1)
        self._root = _Directory(next(self._numbers), clock())

    @property
    def free(self) -> int | None:
        """Bytes that still fit, or None if there is no limit."""
        with self.lock:
            return None if self._capacity is None else max(self._capacity - sum(len(file.data) for file in self._files()), 0)

    def find(self, path: str) -> _Place:
        """:raises OSError: ENOENT, ENOTDIR or ELOOP on the way to it; nothing under the last name is not an error"""
        *above, last = [name for name in path.split("/") if name] or [""]
        here = self._root
        for name in above:
            node = here.children.get(name)
            if node is None:
                raise _error(errno.ENOENT)
            if not isinstance(node, _Directory):
                raise _error(errno.ELOOP if isinstance(node, _Link) else errno.ENOTDIR)
            here = node
        return _Place(here, last, here.children.get(last) if last else here)

    def get(self, path: str) -> _Node:
        """:raises OSError: ENOENT: nothing is there"""
        node = self.find(path).node
        if node is None:
            raise _error(errno.ENOENT)
        return node

    def add_file(self, path: str, data: bytes) -> _File:
        """:raises OSError: EEXIST, or ENOSPC"""
        with self.lock:
            place = self._vacant(path)
            file = _File(next(self._numbers), self._clock())
            self.append(file, data)
            self._enter(place, file)
            return file

    def append(self, file: _File, data: bytes) -> None:
        """:raises OSError: ENOSPC"""
        with self.lock:
            free = self.free
            if free is not None and len(data) > free:
                raise _error(errno.ENOSPC)
            file.data += data
            file.mtime_ns = self._clock()

    def add_directory(self, path: str) -> None:
        """:raises OSError: EEXIST, unless it is a directory"""
        with self.lock:
            if not isinstance(self.find(path).node, _Directory):
                self._enter(self._vacant(path), _Directory(next(self._numbers), self._clock()))

    def put_link(self, path: str, target: str) -> None:
        """:raises OSError: EISDIR: there is a directory"""
        with self.lock:
            place = self.find(path)
            if isinstance(place.node, _Directory):
                raise _error(errno.EISDIR)
            self._enter(place, _Link(next(self._numbers), self._clock(), target))

    def link(self, source: str, target: str) -> None:
        """:raises OSError: ENOENT, EEXIST, or EPERM for a directory"""
        with self.lock:
            node = self.get(source)
            if isinstance(node, _Directory):
                raise _error(errno.EPERM)
            self._enter(self._vacant(target), node)

    def rename(self, source: str, target: str) -> None:
        """:raises OSError: ENOENT, or EISDIR and EEXIST for directories"""
        with self.lock:
            old, node = self.find(source), self.get(source)
            new = self.find(target)
            if isinstance(new.node, _Directory):
                raise _error(errno.EISDIR)
            if isinstance(node, _Directory) and new.node is not None:
                raise _error(errno.EEXIST)
            if (old.directory, old.name) != (new.directory, new.name):
                self._enter(new, node)
                del old.directory.children[old.name]

    def remove(self, path: str) -> None:
        """:raises OSError: ENOENT, or EISDIR"""
        with self.lock:
            place = self.find(path)
            if isinstance(self.get(path), _Directory):
                raise _error(errno.EISDIR)
            del place.directory.children[place.name]

    def remove_directory(self, path: str) -> None:
        """:raises OSError: ENOENT, ENOTDIR, or ENOTEMPTY"""
        with self.lock:
            place, node = self.find(path), self.get(path)
            if not isinstance(node, _Directory):
                raise _error(errno.ENOTDIR)
            if node.children:
                raise _error(errno.ENOTEMPTY)
            del place.directory.children[place.name]

    def _vacant(self, path: str) -> _Place:
        place = self.find(path)
        if place.node is not None:
            raise _error(errno.EEXIST)
        return place

    def _enter(self, place: _Place, node: _Node) -> None:
        place.directory.children[place.name] = node
        place.directory.mtime_ns = self._clock()

    def _files(self) -> set[_File]:
        """:returns: all files, each once however many names it has"""
        found: set[_File] = set()
        directories = [self._root]
        while directories:
            for node in directories.pop().children.values():
                if isinstance(node, _Directory):
                    directories.append(node)
                elif isinstance(node, _File):
                    found.add(node)
        return found


class MemoryTransport(Transport):
    """
    A pool in memory.

    :param store: where the files are; transports with the same one see the same pool
    :param location: the address that messages name
    :param resumes: as for a server to which connections break
    """

    def __init__(self, store: MemoryStore, location: Location | None = None, *, resumes: bool = False) -> None:
        super().__init__(location or Location("memory", f"/{store.name}"))
        self.memory = store
        self._resumes = resumes

    @property
    def capabilities(self) -> Capabilities:
        """As a server with symbolic links has them. That nothing outlives the process is not held against it."""
        return Capabilities(symlinks=True, durable=True, resumes=self._resumes)

    @property
    def identity(self) -> str:
        """The same for all transports with one store."""
        return self.memory.name

    # -- looking ---------------------------------------------------------------------------------------------------------------------------------

    def scan(self, directory: str) -> list[Entry]:
        """As the transport's face says."""
        with self._at(directory, "list"), self.memory.lock:
            try:
                node = self.memory.get(directory)
            except FileNotFoundError:
                return []
            if not isinstance(node, _Directory):
                raise _error(errno.ENOTDIR)
            return [Entry(name, _KINDS[type(child)]) for name, child in node.children.items()]

    def stat(self, path: str) -> Stat | None:
        """As the transport's face says."""
        with self._at(path, "look at"), self.memory.lock:
            try:
                node = self.memory.get(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            size = len(node.data) if isinstance(node, _File) else len(node.target) if isinstance(node, _Link) else 0
            return Stat(_KINDS[type(node)], size, node.mtime_ns, (0, node.number))

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """As the transport's face says."""
        with self.memory.lock:
            data = self._file(path).data
            return bytes(data[offset : None if size is None else offset + size])

    def readlink(self, path: str) -> str:
        """As the transport's face says."""
        with self._at(path, "read"):
            node = self.memory.get(path)
            if not isinstance(node, _Link):
                raise _error(errno.EINVAL)
            return node.target

    # -- names -----------------------------------------------------------------------------------------------------------------------------------

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """As the transport's face says."""
        with self._at(path, "create", needed=len(data)):
            self.memory.add_file(path, data)

    def link(self, source: str, target: str) -> None:
        """As the transport's face says."""
        with self._at(target, f"link {source!r} to"):
            self.memory.link(source, target)

    def rename(self, source: str, target: str) -> None:
        """As the transport's face says."""
        with self._at(target, f"rename {source!r} to"):
            self.memory.rename(source, target)

    def remove(self, path: str) -> bool:
        """As the transport's face says."""
        with self._at(path, "remove"):
            try:
                self.memory.remove(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def symlink(self, target: str, path: str) -> None:
        """As the transport's face says."""
        with self._at(path, "make the symbolic link"):
            self.memory.put_link(path, target)

    def make_directory(self, path: str) -> None:
        """As the transport's face says."""
        parts = path.split("/")
        with self._at(path, "make the directory"):
            for count in range(1, len(parts) + 1):
                self.memory.add_directory("/".join(parts[:count]))

    def remove_directory(self, path: str) -> bool:
        """As the transport's face says."""
        try:
            self.memory.remove_directory(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY):
                return False
            raise translated(error, "remove the directory", self._subject(path)) from error
        return True

    def flush(self, directory: str) -> None:
        """As the transport's face says, as far as there is anything to do."""
        with self._at(directory, "flush the directory"):
            if not isinstance(self.memory.get(directory), _Directory):
                raise _error(errno.ENOTDIR)

    # -- bytes -----------------------------------------------------------------------------------------------------------------------------------

    def fetch(
        self,
        path: str,
        target: int,
        size: int,
        *,
        algorithm: str = DEFAULT_ALGORITHM,
        extents: tuple[tuple[int, int], ...] = (),
        progress: Progress = SILENT,
        done: int = 0,
    ) -> Moved:
        """As the transport's face says."""
        data = self._whole(path, size)
        sent, begin = 0, done if self._resumes else 0
        progress.advance(begin)
        for offset in range(begin, size, BLOCK):
            block = data[offset : offset + BLOCK]
            with translating("write a copy of", self._subject(path), needed=size, descriptor=target):
                os.ftruncate(target, offset + len(block))
                if block.count(0) != len(block):
                    os.pwrite(target, block, offset)
                    sent += len(block)
            progress.advance(len(block))
        return Moved(copying.hash_file(target, size, algorithm=algorithm), "stream", sent)

    def store(
        self,
        source: int,
        path: str,
        size: int,
        *,
        algorithm: str = DEFAULT_ALGORITHM,
        extents: tuple[tuple[int, int], ...] = (),
        progress: Progress = SILENT,
        done: int = 0,
    ) -> Moved:
        """As the transport's face says. As anywhere else, the file is there under its private name while it grows."""
        found = os.fstat(source).st_size
        if found != size:
            raise wrong_length(self._subject(path), size, found)
        begin = done if self._resumes else 0
        file = self._begun(path, begin, size)
        try:
            progress.advance(begin)
            for offset in range(begin, size, BLOCK):
                with self._at(path, "write", needed=size):
                    block = os.pread(source, min(BLOCK, size - offset), offset)
                    self.memory.append(file, block)
                progress.advance(len(block))
        except BaseException as error:
            if not (self._resumes and isinstance(error, TransportError) and error.transient):
                self.remove(path)
            raise
        if len(file.data) != size:
            self.remove(path)
            raise wrong_length(self._subject(path), size, len(file.data))
        return Moved(Digest.of(bytes(file.data), algorithm), "stream", size - begin)

    def _begun(self, path: str, done: int, size: int) -> _File:
        """:returns: a file that has its first bytes, or an empty one"""
        if done:
            file = self._file(path)
            del file.data[done:]
            return file
        self.remove(path)
        with self._at(path, "create", needed=size):
            return self.memory.add_file(path, b"")

    def digest(self, path: str, size: int, *, algorithm: str = DEFAULT_ALGORITHM, progress: Progress = SILENT) -> Digest:
        """As the transport's face says."""
        data = self._whole(path, size)
        progress.advance(size)
        return Digest.of(data, algorithm)

    # -- the rest --------------------------------------------------------------------------------------------------------------------------------

    def free_space(self) -> int | None:
        """As the transport's face says."""
        return self.memory.free

    # -- below -----------------------------------------------------------------------------------------------------------------------------------

    def _subject(self, path: str) -> Subject:
        return Subject(f"{path!r} in {self.location}" if path else str(self.location), str(self.location), path)

    def _at(self, path: str, doing: str, *, needed: int = 0) -> AbstractContextManager[None]:
        return translating(doing, self._subject(path), needed=needed)

    def _file(self, path: str) -> _File:
        try:
            node = self.memory.get(path)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise not_regular(self._subject(path)) from error
            raise translated(error, "open", self._subject(path)) from error
        if not isinstance(node, _File):
            raise not_regular(self._subject(path))
        return node

    def _whole(self, path: str, size: int) -> bytes:
        with self.memory.lock:
            data = bytes(self._file(path).data)
        if len(data) != size:
            raise wrong_length(self._subject(path), size, len(data))
        return data


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
