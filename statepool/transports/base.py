"""
The interface that every transport has, in two layers.

The lower layer is the primitives, which the author of a transport has to write: ``scan``, ``stat``
and ``read``, and ``create`` and ``remove`` unless the place can only be read. The upper layer is
implemented here on the primitives alone: slow, but correct. A transport that can do better
overrides it. What cannot be built from the primitives without breaking a promise is refused with a
clear message; :class:`Capabilities` tells beforehand what is refused.

Paths are relative to the pool's directory, with ``/`` between their parts. The calling layer builds
them from validated names, so a transport need not validate them again. It never follows a symbolic
link in any of their parts.

All methods raise :class:`~statepool.errors.TransportError` or one of its kinds
(:class:`~statepool.errors.MissingFile`, :class:`~statepool.errors.FileExists`,
:class:`~statepool.errors.AccessDenied`), or :class:`~statepool.errors.NoSpace`; those that read
bytes also :class:`~statepool.errors.UnsafeImage` (check ``regular-file``) for anything but a
regular file, and :class:`~statepool.errors.IntegrityError` for a file of another length. They raise
nothing else. Several threads can call them.
"""

from __future__ import annotations

import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from attrs import evolve

from statepool.beneath import Beneath
from statepool.errors import AccessDenied, FileExists, IntegrityError, MissingFile, TransportError
from statepool.model.digest import Digest, new_hasher
from statepool.model.location import Location
from statepool.model.outcomes import Finding
from statepool.model.settings import Settings
from statepool.transports.failures import (
    Subject,
    not_regular,
    require_few_holes,
    translating,
    wrong_length,
)
from statepool.transports.reading import SLICE, Extent, are_in_order, slices, within
from statepool.transports.values import Capabilities, Entry, FileKind, Moved, Stat, Transfer

__all__ = [
    "MOST_TOGETHER",
    "Capabilities",
    "Entry",
    "FileKind",
    "Moved",
    "Stat",
    "Transfer",
    "Transport",
    "small_file_mode",
    "too_much",
]

MOST_TOGETHER = 256 << 20
"""
The most bytes of small files that are read together. The limit is needed because a file that is
long according to the pool may be a hole, which takes no room there.
"""


class Transport(ABC):
    """
    A way to move named files to and from the directory of one pool.

    :param location: the address of the pool
    """

    def __init__(self, location: Location) -> None:
        self.location = location

    @classmethod
    def open(cls, location: Location, settings: Settings) -> Transport:
        """
        :param settings: the settings, for transports that use some; the others need only the
            location
        :returns: a transport. Nothing has been connected or looked at yet.
        """
        return cls(location)

    @property
    def capabilities(self) -> Capabilities:
        """
        What this transport can do. It may have to ask the far side. This default is what can be
        built from the primitives; a transport that overrides methods overrides this too.
        """
        writes = type(self).create is not Transport.create
        return Capabilities(
            symlinks=False,
            durable=False,
            writes=writes,
            renames=False,
            directories=False,
            copies=True,
        )

    # -- looking -----------------------------------------------------------------------------------

    @abstractmethod
    def scan(self, directory: str) -> list[Entry]:
        """
        :param directory: ``""`` is the pool's own
        :returns: its entries, in no order; none if it does not exist. Names that are not UTF-8 are
            omitted.
        """

    @abstractmethod
    def stat(self, path: str) -> Stat | None:
        """:returns: what is known of the file, or None if there is none"""

    def now(self, path: str) -> float:
        """
        :param path: of a temporary file that is made for this
        :returns: the time by the clock of the far side, in seconds since the epoch
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
        :param size: how much to read at most; None: to the end. Callers that do not trust the file
            give a size.
        :raises MissingFile: there is no such file
        """

    def readlink(self, path: str) -> str:
        """
        :returns: what a symbolic link holds
        :raises MissingFile: there is no such link
        """
        raise self._cannot("read the symbolic link", path)

    # Methods for many paths: where a request has a long round trip, all requests are sent before
    # the first answer is awaited.

    def scan_many(self, directories: Sequence[str]) -> list[list[Entry]]:
        """:returns: as :meth:`scan`, for each of the directories, in their order"""
        return [self.scan(directory) for directory in directories]

    def stat_many(self, paths: Sequence[str]) -> list[Stat | None]:
        """:returns: as :meth:`stat`, for each of the paths, in their order"""
        return [self.stat(path) for path in paths]

    def read_many(self, paths: Sequence[str], size: int) -> list[bytes | None]:
        """
        Read small files, all of which are held in memory together.

        :param size: how much to read at most of each, in bytes
        :returns: their content, in their order; None for what is not there
        :raises IntegrityError: together they have more than :data:`MOST_TOGETHER` bytes
        """
        content: list[bytes | None] = []
        left = MOST_TOGETHER
        for path in paths:
            # Ask for one byte more than is allowed, to detect a file that is too long.
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

    # -- names: each of these happens as a whole or not at all -------------------------------------

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """
        Create a small file atomically and exclusively: it appears whole, with its content on stable
        storage (if ``flush``), and only if the name does not exist.

        The entry in its directory may still need :meth:`flush`.

        :raises FileExists: the name exists, whatever it is
        """
        raise self._cannot("create", path)

    def assemble(self, path: str, pieces: Iterable[bytes]) -> None:
        """
        Create a large file from consecutive pieces, as :meth:`create` makes a small one: it appears
        whole, flushed, and only if the name does not exist. This default holds all of it in memory,
        since ``create`` needs all bytes at once; a transport that can send one piece after the
        other overrides it.

        :param pieces: of two MiB at most; an exception of the iterator is passed on to the caller,
            and leaves no file behind
        :raises FileExists: the name exists, whatever it is
        """
        whole = io.BytesIO()
        for piece in pieces:
            whole.write(piece)
        self.create(path, whole.getvalue())

    def draft(self, directory: str, data: bytes) -> AbstractContextManager[Callable[[str], None]]:
        """
        Prepare a small file that gets its name later.

        :param directory: where its name will be
        :returns: for the duration of a ``with`` block, a function that makes the file appear under
            a path, once, as :meth:`create` does; if the name exists, it can be called again with
            another path
        """
        return nullcontext(partial(self.create, data=data))

    def link(self, source: str, target: str) -> None:
        """
        Give a file a second name. This default makes a copy, one piece at a time.

        :raises MissingFile: there is no source
        :raises FileExists: the target exists
        """
        if not self.capabilities.writes:
            raise self._cannot("create", target)
        if self.stat(target) is not None:
            subject = self._subject(target)
            raise FileExists(
                f"cannot create {subject.text}: it exists", pool=subject.pool, path=target
            )
        self.assemble(target, self._pieces_of(source))

    def _pieces_of(self, path: str) -> Iterator[bytes]:
        offset = 0
        while piece := self.read(path, offset, SLICE):
            yield piece
            offset += len(piece)
            if len(piece) < SLICE:
                break

    def rename(self, source: str, target: str) -> None:
        """
        Rename a file atomically; an existing target is replaced. The primitives cannot do that in
        one step, so the default refuses.

        :raises MissingFile: there is no source
        """
        raise self._cannot("rename", source)

    def remove(self, path: str) -> bool:
        """
        :returns: whether there was such a file or link, which is removed now. A directory is an
            error.
        """
        raise self._cannot("remove", path)

    def symlink(self, target: str, path: str) -> None:
        """
        Make the name ``path`` a symbolic link that holds ``target``; an existing link or file is
        replaced atomically.
        """
        raise self._cannot("make the symbolic link", path)

    def make_directory(self, path: str) -> None:
        """
        Make a directory and its parents, with the permissions of the pool's own directory. Do
        nothing if it exists. This default does nothing: it suits a store in which a directory
        exists as soon as a file is in it.
        """
        if not self.capabilities.writes:
            raise self._cannot("make the directory", path)

    def remove_directory(self, path: str) -> bool:
        """
        :returns: whether the directory existed and was removed: False if it is not empty, and for a
            store without directories
        """
        if not self.capabilities.writes:
            raise self._cannot("remove the directory", path)
        return False

    def flush(self, directory: str) -> None:
        """Flush the entries of a directory to stable storage, where the far side can do that."""
        return None

    # -- bytes -------------------------------------------------------------------------------------

    def fetch(self, path: str, target: int, transfer: Transfer) -> Moved:
        """
        Copy the bytes of a file into an empty local file, holes as holes.

        Where transfers can be resumed, the length of the local file tells after a failure how many
        bytes were transferred.

        :param target: descriptor of a local file open for reading and writing, of our own
        :param transfer: what is moved
        :returns: what was moved; the digest is that of the *copy*
        :raises MissingFile: there is no such file
        :raises IntegrityError: it has another length than ``transfer`` says
        """
        subject = self._subject(path)
        with translating("write a copy of", subject, descriptor=target):
            os.ftruncate(target, 0)
        moved = self._read_through(path, transfer, self._keeper(path, target, transfer.size))
        with translating("write a copy of", subject, needed=transfer.size, descriptor=target):
            os.ftruncate(target, transfer.size)  # there may be a hole at the end
        return moved

    def fetch_part(self, path: str, target: int, transfer: Transfer, part: Extent) -> Moved:
        """
        Copy a part of a file to the same place in a local file. The other parts of the local file
        are not touched, so several calls can fill one file at the same time.

        :param target: descriptor of a local file of our own, as long as the whole file, in which
            the part is a hole or zeros: zeros need not be written
        :param transfer: describes the whole file. Nothing of the part is there, whatever ``done``
            says; ``pieces`` gets the digests of the pieces of the part.
        :param part: its offset, at which a piece begins, and its length, in bytes
        :returns: what was moved; the digest is that of the copy of the part
        :raises MissingFile: there is no such file
        :raises IntegrityError: it has another length than ``transfer`` says
        """
        return self._read_through(path, transfer, self._keeper(path, target, transfer.size), part)

    def store(self, source: int, path: str, transfer: Transfer) -> Moved:
        """
        Store the bytes of a local file as a new file, holes as holes, checked as far as the far
        side can, flushed, and read-only. This default sends them one piece at a time, by
        :meth:`assemble`.

        Where transfers can be resumed, and the connection broke, the length of the new file tells
        how many bytes were transferred. Otherwise a failure leaves nothing behind.

        :param source: descriptor of the local file, open for reading
        :param path: a private name of the caller; an existing file is replaced, unless the transfer
            resumes it
        :param transfer: what is moved
        :returns: what was moved; the digest is that of the *copy*
        :raises IntegrityError: the local file has another length than ``transfer`` says
        :raises NoSpace: the far side is full
        """
        if not self.capabilities.writes:
            raise self._cannot("create", path)
        there = self._subject(path)
        subject, hasher = (
            Subject(f"the local file for {there.text}", there.pool, path),
            new_hasher(transfer.algorithm, pieces=transfer.pieces),
        )
        with translating("read", subject):
            found = os.fstat(source)
        if not stat.S_ISREG(found.st_mode) or found.st_size != transfer.size:
            raise wrong_length(subject, transfer.size, found.st_size)

        def pieces() -> Iterator[bytes]:
            for part in slices((), transfer.size):
                with translating("read", subject):
                    piece = os.pread(source, part.length, part.start)
                if len(piece) != part.length:
                    raise wrong_length(subject, transfer.size, part.start + len(piece))
                hasher.update(piece)
                yield piece
                transfer.progress.advance(part.length)

        self.remove(path)
        self.assemble(path, pieces())
        return Moved(Digest(transfer.algorithm, hasher.hexdigest()), "stream", transfer.size)

    def digest(self, path: str, transfer: Transfer) -> Digest:
        """
        Read a file again to make its digest, on the far side where that is possible.

        :param transfer: gives the length, the algorithm and the progress; extents and ``done`` are
            ignored
        :raises MissingFile: there is no such file
        :raises IntegrityError: it has another length than ``transfer`` says
        """
        return self._read_through(
            path, evolve(transfer, extents=()), lambda data, offset: None
        ).digest

    def _keeper(self, path: str, target: int, size: int) -> Callable[[bytes, int], object]:
        subject = self._subject(path)

        def keep(data: bytes, offset: int) -> None:
            done = 0
            with translating("write a copy of", subject, needed=size, descriptor=target):
                while done < len(data):
                    done += os.pwrite(target, data[done:], offset + done)

        return keep

    @property
    def far_algorithm(self) -> str | None:
        """
        The algorithm by which the far side can make digests of many files without sending them; see
        :meth:`far_digests`. None: it can make none, or the files are on this host.
        """
        return None

    def far_digests(self, files: Mapping[str, int]) -> list[Digest | None]:
        """
        :param files: paths with their lengths in bytes
        :returns: the digests that the far side has made of them, by :attr:`far_algorithm`, in their
            order; None for a file of another length, and where it could not make one
        """
        return [None] * len(files)

    def _read_through(
        self,
        path: str,
        transfer: Transfer,
        keep: Callable[[bytes, int], object],
        part: Extent | None = None,
    ) -> Moved:
        """
        Read a file from beginning to end, only where it has data.

        :param keep: is given the data, and the offset of each piece of it
        :param part: offset and length of the only part to read
        """
        subject, size, extents = self._subject(path), transfer.size, transfer.extents
        found = self.stat(path)
        if found is None:
            raise MissingFile(
                f"cannot read {subject.text}: it is not there", pool=subject.pool, path=path
            )
        if found.kind is not FileKind.FILE:
            raise not_regular(subject)
        if found.size != size:
            raise wrong_length(subject, size, found.size)
        if not are_in_order(extents):
            extents = ()
        if extents:
            require_few_holes(size - sum(length for _, length in extents), subject)
        hasher, sent = new_hasher(transfer.algorithm, pieces=transfer.pieces), 0
        begin, end = (part[0], sum(part)) if part is not None else (0, size)
        for some in slices(within(extents or ((0, size),), begin, end), end, begin):
            content = memoryview(bytearray(some.length))
            for offset, length in some.data:
                data = self.read(path, offset, length)
                if len(data) != length:
                    raise wrong_length(subject, size, offset + len(data))
                content[offset - some.start :][:length] = data
                sent += length
                if data.strip(b"\0"):  # zeros become a hole, even if the extents list data there
                    keep(data, offset)
            hasher.update(content)
            transfer.progress.advance(some.length)
        return Moved(Digest(transfer.algorithm, hasher.hexdigest()), "stream", sent)

    # -- the rest ----------------------------------------------------------------------------------

    def free_space(self) -> int | None:
        """:returns: bytes that this account can still write, or None if that is unknown"""
        return None

    def local_path(self, path: str) -> Path | None:
        """
        :returns: the path of a file on this host, for messages and for programs that only accept
            paths, or None if the file is elsewhere
        """
        return None

    def beneath(self, path: str) -> Beneath | None:
        """
        :returns: the same as a value with which it can be opened without following a symbolic link,
            or None where it cannot be opened on this host
        """
        return None

    def hold(self, path: str, timeout: float) -> AbstractContextManager[None] | None:
        """
        Lock a lock file on the far side with flock(2), so that the lock also excludes processes
        that lock the file there.

        :param path: the lock file; it is made if it is missing
        :param timeout: how long to wait for another holder, in seconds
        :returns: holds the lock for the duration of a ``with`` block, and raises
            :class:`~statepool.errors.LockTimeout` where it is entered; None where there is no such
            lock
        """
        return None

    def is_transient(self, error: BaseException) -> bool:
        """
        :param error: what one of the other methods raised
        :returns: whether the same call can succeed if it is retried a little later: a connection
            broke, a server was busy
        """
        return isinstance(error, TransportError) and error.transient

    def survey(self) -> list[Finding]:
        """
        :returns: what was found out about the far side: what it offers, what is slow or missing,
            and the remedy
        """
        return []

    @property
    def identity(self) -> str:
        """
        A string that is the same for every address of the same directory, as far as this host can
        see.
        """
        return str(self.location)

    def close(self) -> None:
        """Close the connections; the next call opens them again."""
        return None

    # -- what messages say -------------------------------------------------------------------------

    def _subject(self, path: str) -> Subject:
        return Subject(
            f"{path!r} in {self.location}" if path else str(self.location), str(self.location), path
        )

    def _cannot(self, doing: str, path: str) -> TransportError:
        subject = self._subject(path)
        if not self.capabilities.writes:
            hint = "states can only be fetched from there"
            return AccessDenied(
                f"cannot {doing} {subject.text}: it can only be read",
                hint=hint,
                pool=subject.pool,
                path=path,
            )
        hint = "reach the pool in another way for this, if there is one"
        return TransportError(
            f"cannot {doing} {subject.text}: that cannot be done there",
            hint=hint,
            pool=subject.pool,
            path=path,
        )


def too_much(pool: Location, path: str) -> IntegrityError:
    """
    :param path: the file that exceeded the limit
    :returns: the error for small files that are together too long to be held in memory
    """
    return IntegrityError(
        f"{path} in {pool}, and what is read together with it, has more than"
        f" {MOST_TOGETHER >> 20} MiB",
        pool=str(pool),
        path=path,
        hint="no such files are that long: find out who put it there",
    )


def small_file_mode(root: int) -> int:
    """
    :param root: the mode of a pool's directory
    :returns: the mode of files in it that are not bytes of states, such as records: an account that
        may read the directory may read them, and a group that may write to it may write them
    """
    return 0o664 if root & stat.S_IWGRP else 0o600 | root & (stat.S_IRGRP | stat.S_IROTH)
