"""
The face that every transport has.

Paths are relative to the pool's directory, with ``/`` between their parts, made of validated names by the floor above; a transport need not look at
them again, but never follows a symbolic link in any of their parts.

All methods raise :class:`~statepool.errors.TransportError` or one of its kinds (:class:`~statepool.errors.MissingFile`,
:class:`~statepool.errors.FileExists`, :class:`~statepool.errors.AccessDenied`), or :class:`~statepool.errors.NoSpace`; those that read bytes also
:class:`~statepool.errors.UnsafeImage` (check ``regular-file``) for what is no regular file, and :class:`~statepool.errors.IntegrityError` for one of
another length; and nothing else. They can be called from several threads.
"""

from __future__ import annotations

import enum
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from attrs import frozen

from statepool.beneath import Beneath
from statepool.errors import IntegrityError, MissingFile, TransportError
from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.location import Location
from statepool.model.outcomes import Finding
from statepool.model.progress import SILENT, Progress
from statepool.model.settings import Settings

MOST_TOGETHER = 256 << 20
"""Bytes of small files that are read together at most: what a pool says is long may be a hole that took no room there."""


class FileKind(enum.StrEnum):
    """What a name in a directory stands for."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    OTHER = "other"


@frozen(slots=False)  # made by the thousand, which is quicker so
class Entry:
    """A name in a directory."""

    name: str
    kind: FileKind


@frozen
class Stat:
    """
    What is known of a file without opening it; of a symbolic link, not of what it points to.

    :param kind: what it is
    :param size: in bytes
    :param mtime_ns: last change, in nanoseconds of the far side's clock; servers may round it to seconds
    :param identity: the same for two names of one file on this side of the transport, or None where that is not known
    """

    kind: FileKind
    size: int
    mtime_ns: int
    identity: tuple[int, int] | None = None


@frozen
class Capabilities:
    """
    What a transport can do beyond what all of them can.

    :param symlinks: symbolic links can be made and read
    :param durable: what has been flushed survives a power cut there
    :param local: the files can be opened on this host, see :meth:`Transport.local_path`
    :param refers: a cache refers to the files instead of copying them
    :param resumes: what an interrupted transfer has moved need not be moved again
    """

    symlinks: bool
    durable: bool
    local: bool = False
    refers: bool = False
    resumes: bool = False


@frozen
class Moved:
    """
    A file has been moved.

    :param digest: of the bytes as they are at their new place
    :param how: ``reflink``, ``copy`` or ``stream``
    :param sent: bytes that really had to be moved: neither holes nor shared blocks
    :param again: how many of them had been moved before, in an attempt that failed
    """

    digest: Digest
    how: str
    sent: int
    again: int = 0


class Transport(ABC):
    """
    Moves named files to and from the directory of one pool.

    :param location: the address of the pool
    """

    def __init__(self, location: Location) -> None:
        self.location = location

    @classmethod
    def open(cls, location: Location, settings: Settings) -> Transport:
        """
        :param settings: the knobs, for transports that have some; the others are made of the location alone
        :returns: a transport. Nothing has been connected or looked at yet.
        """
        return cls(location)

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this one can do. May have to ask the far side."""

    # -- looking ---------------------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def scan(self, directory: str) -> list[Entry]:
        """
        :param directory: ``""`` is the pool's own
        :returns: what is in it, in no order; nothing if it does not exist. Names that are not UTF-8 are left out.
        """

    @abstractmethod
    def stat(self, path: str) -> Stat | None:
        """:returns: what is known of the file, or None if there is none"""

    def now(self, path: str) -> float:
        """
        :param path: of a file that is made for a moment
        :returns: the time of the place's own clock, in seconds since the epoch
        """
        self.create(path, b"", flush=False)
        try:
            stat = self.stat(path)
        finally:
            self.remove(path)
        return stat.mtime_ns / 1e9 if stat is not None else 0.0

    @abstractmethod
    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """
        :param offset: where to begin, in bytes
        :param size: how much to read at most; None: to the end. Callers that do not trust the file give a size.
        :raises MissingFile: there is no such file
        """

    @abstractmethod
    def readlink(self, path: str) -> str:
        """
        :returns: what a symbolic link holds
        :raises MissingFile: there is no such link
        """

    # -- looking at many: where every question takes a while, all are asked before the first answer is waited for -----------------------------------

    def scan_many(self, directories: Sequence[str]) -> list[list[Entry]]:
        """:returns: as :meth:`scan`, for each of the directories, in their order"""
        return [self.scan(directory) for directory in directories]

    def stat_many(self, paths: Sequence[str]) -> list[Stat | None]:
        """:returns: as :meth:`stat`, for each of the paths, in their order"""
        return [self.stat(path) for path in paths]

    def read_many(self, paths: Sequence[str], size: int) -> list[bytes | None]:
        """
        Read small files, which all are held in memory.

        :param size: how much to read at most of each, in bytes
        :returns: their content, in their order; None for what is not there
        :raises IntegrityError: they have more than :data:`MOST_TOGETHER` bytes, all together
        """
        content: list[bytes | None] = []
        left = MOST_TOGETHER
        for path in paths:
            # One byte more than there may be tells that there is more.
            content.append(self._read_or_none(path, min(size, left + 1)))
            left -= len(content[-1] or b"")
            if left < 0:
                raise too_much(self.location, path)
        return content

    def _read_or_none(self, path: str, size: int) -> bytes | None:
        try:
            return self.read(path, 0, size)
        except MissingFile:
            return None

    # -- names: each of these happens as a whole or not at all -------------------------------------------------------------------------------------

    @abstractmethod
    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """
        Make a small file that appears whole, with its content on stable storage (if ``flush``), and only if nobody has made it before.

        The entry in its directory may still need :meth:`flush`.

        :raises FileExists: the name exists, whatever it is
        """

    def draft(self, directory: str, data: bytes) -> AbstractContextManager[Callable[[str], None]]:
        """
        Make ready a small file that gets its name later.

        :param directory: where its name will be
        :returns: for as long as a ``with`` block lasts, a function that makes it appear under a path, once, as :meth:`create` does; when another
            file was there first, it can be called again with another path
        """
        return nullcontext(partial(self.create, data=data))

    @abstractmethod
    def link(self, source: str, target: str) -> None:
        """
        Give a file a second name.

        :raises MissingFile: there is no source
        :raises FileExists: the target exists
        """

    @abstractmethod
    def rename(self, source: str, target: str) -> None:
        """
        Give a file another name; a file that is there gives way.

        :raises MissingFile: there is no source
        """

    @abstractmethod
    def remove(self, path: str) -> bool:
        """:returns: whether there was such a file or link. A directory is an error."""

    @abstractmethod
    def symlink(self, target: str, path: str) -> None:
        """Make the name ``path`` a symbolic link that holds ``target``; a link or file that is there gives way in one step."""

    @abstractmethod
    def make_directory(self, path: str) -> None:
        """Make a directory and those above it, with the permissions of the pool's own; nothing happens if it is there."""

    @abstractmethod
    def remove_directory(self, path: str) -> bool:
        """:returns: whether it was there and could be removed: False if it is not empty"""

    @abstractmethod
    def flush(self, directory: str) -> None:
        """Bring the entries of a directory to stable storage, where the far side can."""

    # -- bytes -------------------------------------------------------------------------------------------------------------------------------------

    @abstractmethod
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
        """
        Bring the bytes of a file into an empty local file, holes as holes.

        Where transfers can be resumed, the length of the local file tells after a failure how far this one came.

        :param target: descriptor of a local file open for reading and writing, of our own
        :param size: how long the file must be
        :param algorithm: for the digest, which is that of the *copy*
        :param extents: where the source has data; empty: find out, or take all
        :param progress: told of the bytes; begin and end are the caller's
        :param done: so many bytes at the beginning are in the local file already; they are hashed, and the rest is moved. Without resuming, all is.
        :raises MissingFile: there is no such file
        :raises IntegrityError: it is not ``size`` bytes long
        """

    @abstractmethod
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
        """
        Make a new file of the bytes of a local one, holes as holes, checked as far as the far side can, flushed, and read-only.

        Where transfers can be resumed, and the connection broke, the length of the new file tells how far this one came. Otherwise a failure leaves
        nothing behind.

        :param source: descriptor of the local file, open for reading
        :param path: a private name of the caller; a file that is there gives way
        :param size: how many bytes
        :param done: so many of them, at the beginning, are in the new file already; the rest is moved. Without resuming, all are.
        :raises NoSpace: the far side is full
        """

    @abstractmethod
    def digest(self, path: str, size: int, *, algorithm: str = DEFAULT_ALGORITHM, progress: Progress = SILENT) -> Digest:
        """
        Read a file once more, on the far side where that is possible.

        :raises MissingFile: there is no such file
        :raises IntegrityError: it is not ``size`` bytes long
        """

    # -- the rest ----------------------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def free_space(self) -> int | None:
        """:returns: bytes that can still be written by this account, or None where nobody knows"""

    def local_path(self, path: str) -> Path | None:
        """:returns: where a file is on this host, for messages and for programs that only know paths, or None where it is elsewhere"""
        return None

    def beneath(self, path: str) -> Beneath | None:
        """:returns: the same, for opening it without following a symbolic link, or None where it cannot be opened on this host"""
        return None

    def hold(self, path: str, timeout: float) -> AbstractContextManager[None] | None:
        """
        Take the kernel's lock on a lock file on the far side: flock(2), which meets that of whoever locks the file there.

        :param path: the lock file; it is made if it is missing
        :param timeout: how long to wait for another holder, in seconds
        :returns: holds the lock for as long as a ``with`` block lasts, and raises :class:`~statepool.errors.LockTimeout` where it is entered; None
            where there is no such lock
        """
        return None

    def is_transient(self, error: BaseException) -> bool:
        """
        :param error: what one of the other methods raised
        :returns: whether the same call can succeed if it is made once more, a little later: a connection broke, a server was busy
        """
        return isinstance(error, TransportError) and error.transient

    def survey(self) -> list[Finding]:
        """:returns: what there is to say of the far side: what it offers, what is slow or missing, and the cure"""
        return []

    @property
    def identity(self) -> str:
        """The same for every address of the same directory, as far as this host can see."""
        return str(self.location)

    def close(self) -> None:
        """Let go of connections; the next call makes them anew."""
        return None


def too_much(pool: Location, path: str) -> IntegrityError:
    """
    :param path: the file with which it was too much
    :returns: the error that small files are too long to be held in memory
    """
    return IntegrityError(
        f"{path} in {pool}, and what is read together with it, has more than {MOST_TOGETHER >> 20} MiB",
        pool=str(pool),
        path=path,
        hint="no such files are that long: find out who put it there",
    )


def small_file_mode(root: int) -> int:
    """
    :param root: the mode of a pool's directory
    :returns: that of files in it that are not bytes of states, such as records: who may read the one may read the other, and a group works together
    """
    return 0o664 if root & stat.S_IWGRP else 0o600 | root & (stat.S_IRGRP | stat.S_IROTH)
