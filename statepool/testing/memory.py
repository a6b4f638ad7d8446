"""
Pools in memory: as fast as possible, and as strict as a file system.

::

    store = MemoryStore()
    here, there = MemoryTransport(store), MemoryTransport(store)      # two hosts that see one pool

Every operation is atomic, and of several that race for a name one wins, as the interface of
transports demands.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from weakref import WeakSet

from attrs import define, field

from statepool.errors import TransportError
from statepool.model.digest import Digest, new_hasher
from statepool.model.location import Location
from statepool.transports import copying
from statepool.transports.base import (
    Capabilities,
    Entry,
    FileKind,
    Moved,
    Stat,
    Transfer,
    Transport,
)
from statepool.transports.failures import not_regular, translated, translating, wrong_length

BLOCK = 64 << 10
"""Bytes that are moved at a time; a block of zeros becomes a hole at the other end."""

FILE, LINK, DIRECTORY = FileKind.FILE, FileKind.LINK, FileKind.DIRECTORY

_numbers = itertools.count(1)


@define(eq=False)
class _Node:
    """A file, a symbolic link or a directory; two names of a file refer to the same node."""

    kind: FileKind
    number: int
    mtime_ns: int
    data: bytearray = field(factory=bytearray)
    """The content of a file, or the target of a link."""
    children: dict[str, _Node] = field(factory=dict)


class MemoryStore:
    """
    A file system in memory. Its methods raise what the operating system would: :class:`OSError`
    with an errno.

    :param clock: gives the time of changes, in nanoseconds
    :param capacity: bytes that all files together may have, or None for any number
    """

    def __init__(
        self, *, clock: Callable[[], int] = time.time_ns, capacity: int | None = None
    ) -> None:
        self.name = f"memory-{next(_numbers)}"
        self.lock = threading.RLock()
        self._clock = clock
        self._capacity = capacity
        # a file that has no name any more, and is not in use, is removed from there
        self._nodes = WeakSet[_Node]()
        self._root = self._made(DIRECTORY)

    def _made(self, kind: FileKind) -> _Node:
        node = _Node(kind, next(_numbers), self._clock())
        self._nodes.add(node)
        return node

    @property
    def free(self) -> int | None:
        """Return how many bytes still fit, or None if there is no limit."""
        with self.lock:
            return (
                None
                if self._capacity is None
                else max(self._capacity - sum(len(node.data) for node in self._nodes), 0)
            )

    def find(self, path: str) -> tuple[_Node, str, _Node | None]:
        """
        :returns: a directory, a name in it, and the node of this name
        :raises OSError: ENOENT, ENOTDIR or ELOOP on the way to it
        """
        above, _, name = path.rpartition("/")
        directory = self.get(above, DIRECTORY) if above else self._root
        return directory, name, directory.children.get(name) if name else directory

    def get(self, path: str, kind: FileKind | None = None) -> _Node:
        """:raises OSError: ENOENT: nothing is there; ELOOP or ENOTDIR: it is of another kind"""
        node = self.find(path)[2]
        if node is None:
            raise _error(errno.ENOENT)
        if kind not in (None, node.kind):
            raise _error(errno.ELOOP if node.kind is LINK else errno.ENOTDIR)
        return node

    def put(self, path: str, kind: FileKind, data: bytes = b"", *, over: bool = False) -> _Node:
        """
        :param over: whether it replaces what is there
        :raises OSError: EEXIST or EISDIR: it cannot; or ENOSPC
        """
        with self.lock:
            node = self._made(kind)
            self.append(node, data)
            self._enter(path, node, over)
            return node

    def append(self, node: _Node, data: bytes) -> None:
        """:raises OSError: ENOSPC"""
        with self.lock:
            if (free := self.free) is not None and len(data) > free:
                raise _error(errno.ENOSPC)
            node.data += data
            node.mtime_ns = self._clock()

    def link(self, source: str, target: str) -> None:
        """:raises OSError: ENOENT, EEXIST, or EPERM for a directory"""
        with self.lock:
            node = self.get(source)
            if node.kind is DIRECTORY:
                raise _error(errno.EPERM)
            self._enter(target, node)

    def rename(self, source: str, target: str) -> None:
        """:raises OSError: ENOENT, or EISDIR and EEXIST for directories"""
        with self.lock:
            node = self.get(source)
            if source != target:
                self._enter(target, node, node.kind is not DIRECTORY)
                self._leave(source)

    def remove(self, path: str, *, directory: bool = False) -> None:
        """:raises OSError: ENOENT; EISDIR, or for a directory ENOTDIR or ENOTEMPTY"""
        with self.lock:
            node = self.get(path, DIRECTORY if directory else None)
            if node.children:
                raise _error(errno.ENOTEMPTY)
            if node.kind is DIRECTORY and not directory:
                raise _error(errno.EISDIR)
            self._leave(path)

    def _enter(self, path: str, node: _Node, over: bool = False) -> None:
        directory, name, there = self.find(path)
        if there is not None and (not over or there.kind is DIRECTORY):
            raise _error(errno.EISDIR if over else errno.EEXIST)
        directory.children[name] = node
        directory.mtime_ns = self._clock()

    def _leave(self, path: str) -> None:
        directory, name, _ = self.find(path)
        del directory.children[name]


class MemoryTransport(Transport):
    """
    A pool in memory.

    :param store: the store of the files; transports with the same store see the same pool
    :param location: the address that messages name
    :param resumes: whether transfers can be resumed, as for a server to which connections break
    """

    def __init__(
        self, store: MemoryStore, location: Location | None = None, *, resumes: bool = False
    ) -> None:
        super().__init__(location or Location("memory", f"/{store.name}"))
        self.memory = store
        self._resumes = resumes

    @property
    def capabilities(self) -> Capabilities:
        """
        The capabilities of a server with symbolic links. It counts as durable although nothing
        outlives the process.
        """
        return Capabilities(symlinks=True, durable=True, resumes=self._resumes)

    @property
    def identity(self) -> str:
        """A string that is the same for all transports with one store."""
        return self.memory.name

    # -- looking -----------------------------------------------------------------------------------

    def scan(self, directory: str) -> list[Entry]:
        """Return what is in a directory, nothing if there is none."""
        with self._at(directory, "list"), self.memory.lock:
            try:
                node = self.memory.get(directory, DIRECTORY)
            except FileNotFoundError:
                return []
            return [Entry(name, child.kind) for name, child in node.children.items()]

    def stat(self, path: str) -> Stat | None:
        """Return the facts of a file, None if it does not exist."""
        with self._at(path, "look at"), self.memory.lock:
            try:
                node = self.memory.get(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return Stat(node.kind, len(node.data), node.mtime_ns, (0, node.number))

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return a part of a file."""
        with self.memory.lock:
            return bytes(self._file(path).data[offset : None if size is None else offset + size])

    def readlink(self, path: str) -> str:
        """Return what a symbolic link holds."""
        with self._at(path, "read"):
            node = self.memory.get(path)
            if node.kind is not LINK:
                raise _error(errno.EINVAL)
            return node.data.decode()

    # -- names -------------------------------------------------------------------------------------

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """Create a file that has no name yet."""
        with self._at(path, "create", needed=len(data)):
            self.memory.put(path, FILE, data)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name."""
        with self._at(target, f"link {source!r} to"):
            self.memory.link(source, target)

    def rename(self, source: str, target: str) -> None:
        """Rename a file, and replace an existing target."""
        with self._at(target, f"rename {source!r} to"):
            self.memory.rename(source, target)

    def remove(self, path: str) -> bool:
        """Remove a file; return whether it existed."""
        with self._at(path, "remove"), suppress(FileNotFoundError, NotADirectoryError):
            self.memory.remove(path)
            return True
        return False

    def symlink(self, target: str, path: str) -> None:
        """Make a symbolic link, and replace an existing target."""
        with self._at(path, "make the symbolic link"):
            self.memory.put(path, LINK, target.encode(), over=True)

    def make_directory(self, path: str) -> None:
        """Make a directory and its parents."""
        parts = path.split("/")
        with self._at(path, "make the directory"), self.memory.lock:
            for above in ("/".join(parts[:count]) for count in range(1, len(parts) + 1)):
                try:
                    self.memory.get(above, DIRECTORY)
                except FileNotFoundError:
                    self.memory.put(above, DIRECTORY)

    def remove_directory(self, path: str) -> bool:
        """Remove an empty directory; return whether it was removed."""
        with self._at(path, "remove the directory"):
            try:
                self.memory.remove(path, directory=True)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise
                return False
            return True

    def flush(self, directory: str) -> None:
        """Check that it is a directory; there is nothing to flush."""
        with self._at(directory, "flush the directory"):
            self.memory.get(directory, DIRECTORY)

    # -- bytes -------------------------------------------------------------------------------------

    def fetch(self, path: str, target: int, transfer: Transfer) -> Moved:
        """Fetch a file, holes as holes."""
        size, progress = transfer.size, transfer.progress
        data = self._whole(path, size)
        sent, begin = 0, transfer.done if self._resumes else 0
        progress.advance(begin)
        for offset in range(begin, size, BLOCK):
            block = data[offset : offset + BLOCK]
            with translating(
                "write a copy of", self._subject(path), needed=size, descriptor=target
            ):
                os.ftruncate(target, offset + len(block))
                if block.strip(b"\0"):
                    os.pwrite(target, block, offset)
                    sent += len(block)
            progress.advance(len(block))
        return Moved(
            copying.hash_file(target, size, algorithm=transfer.algorithm, pieces=transfer.pieces),
            "stream",
            sent,
        )

    def store(self, source: int, path: str, transfer: Transfer) -> Moved:
        """Store a file, which grows under its private name."""
        size, progress = transfer.size, transfer.progress
        found = os.fstat(source).st_size
        if found != size:
            raise wrong_length(self._subject(path), size, found)
        begin = transfer.done if self._resumes else 0
        if begin:
            file = self._file(path)
            del file.data[begin:]
        else:
            self.remove(path)
            with self._at(path, "create", needed=size):
                file = self.memory.put(path, FILE)
        try:
            progress.advance(begin)
            for offset in range(begin, size, BLOCK):
                with self._at(path, "write", needed=size):
                    block = os.pread(source, min(BLOCK, size - offset), offset)
                    self.memory.append(file, block)
                progress.advance(len(block))
            if len(file.data) != size:
                raise wrong_length(self._subject(path), size, len(file.data))
        except BaseException as error:
            if not (self._resumes and isinstance(error, TransportError) and error.transient):
                self.remove(path)
            raise
        hasher = new_hasher(transfer.algorithm, pieces=transfer.pieces)
        hasher.update(bytes(file.data))
        return Moved(Digest(transfer.algorithm, hasher.hexdigest()), "stream", size - begin)

    # -- the rest ----------------------------------------------------------------------------------

    def free_space(self) -> int | None:
        """Return how many bytes still fit."""
        return self.memory.free

    # -- below -------------------------------------------------------------------------------------

    def _at(self, path: str, doing: str, *, needed: int = 0) -> AbstractContextManager[None]:
        return translating(doing, self._subject(path), needed=needed)

    def _file(self, path: str) -> _Node:
        try:
            node = self.memory.get(path)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise not_regular(self._subject(path)) from error
            raise translated(error, "open", self._subject(path)) from error
        if node.kind is not FILE:
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
