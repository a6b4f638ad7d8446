"""
The transport ``file://``: a pool in a file system of this host.

No symbolic link beneath the pool's directory is ever followed, and no open blocks: anything but a
regular file is refused before a byte of it is read.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from statepool.beneath import DIRECTORY, Beneath, Descriptor, Tree, link, link_or_rename
from statepool.errors import TransportError
from statepool.model.digest import Digest
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
    small_file_mode,
)
from statepool.transports.failures import (
    LINKS,
    SYMLINKS,
    Subject,
    not_regular,
    translated,
    translating,
)

INCOMING = ".statepool/incoming"
"""The directory of a pool for unfinished files, where a collector looks for abandoned ones."""

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""
Non-blocking, since opening a FIFO would wait for its other end. Reading a regular file is not
affected.
"""

_WRITE_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_NO_ANONYMOUS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""Errors of an open with O_TMPFILE where that is not supported (``man 2 open``)."""


class LocalTransport(Transport):
    """
    The transport for files of this host.

    :param location: a location without a host
    """

    def __init__(self, location: Location) -> None:
        super().__init__(location)
        self.tree = Tree(location.path.rstrip("/"))
        # Files without a name get one through /proc. Assumed until the file system says that it
        # does not support such files.
        self._anonymous = os.path.isdir("/proc/self/fd")
        self._symlinks = self._durable = True  # likewise

    @property
    def capabilities(self) -> Capabilities:
        """Everything but references from a cache."""
        return Capabilities(symlinks=self._symlinks, durable=self._durable, local=True)

    # -- looking -----------------------------------------------------------------------------------

    def scan(self, directory: str) -> list[Entry]:
        """List a directory. The pool's own directory may be behind a symbolic link."""
        try:
            with self.tree.open(directory, _LIST) as fd, os.scandir(fd) as entries:
                # Names that are not UTF-8 contain lone surrogates, which cannot be encoded as
                # UTF-8.
                return [
                    Entry(entry.name, _kind(entry))
                    for entry in entries
                    if entry.name.isascii() or _is_utf8(entry.name)
                ]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise translated(error, "list", self._subject(directory)) from error

    def stat(self, path: str) -> Stat | None:
        try:
            found = self.tree.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise translated(error, "look at", self._subject(path)) from error
        return _stat(found)

    def stat_many(self, paths: Sequence[str]) -> list[Stat | None]:
        """Look at several files. A directory is opened once for all consecutive paths in it."""
        answers: list[Stat | None] = []
        for directory, group in itertools.groupby(paths, _above):
            names = [path.rpartition("/")[2] for path in group]
            try:
                opened = self.tree.open(directory, DIRECTORY)
            except (FileNotFoundError, NotADirectoryError):
                answers += [None] * len(names)
                continue
            except OSError as error:
                raise translated(error, "look at", self._subject(directory)) from error
            with opened as held:
                answers += [self._stat_in(held, directory, name) for name in names]
        return answers

    def _stat_in(self, held: int, directory: str, name: str) -> Stat | None:
        try:
            return _stat(os.stat(name, dir_fd=held, follow_symlinks=False))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise translated(
                error, "look at", self._subject(f"{directory}/{name}" if directory else name)
            ) from error

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """:raises UnsafeImage: it is not a regular file"""
        opened, length = self._open(path)
        left = max(length - offset, 0)
        wanted = left if size is None else min(size, left)
        try:
            with opened as fd:
                data = os.pread(fd, wanted, offset)
                while len(data) < wanted and (
                    more := os.pread(fd, wanted - len(data), offset + len(data))
                ):
                    data += more
                return data
        except OSError as error:
            raise translated(error, "read", self._subject(path)) from error

    def readlink(self, path: str) -> str:
        try:
            return self.tree.readlink(path)
        except OSError as error:
            if error.errno == errno.EINVAL:
                subject = self._subject(path)
                raise TransportError(
                    f"{subject.text} is not a symbolic link", pool=subject.pool, path=path
                ) from error
            self._symlinks = self._symlinks and error.errno != errno.EPERM
            raise translated(error, "read", self._subject(path)) from error

    # -- names -------------------------------------------------------------------------------------

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """
        Create a file that has no name until it is complete, so that a crash leaves nothing behind.
        Where the file system does not support such files, it is a temporary file in
        ``.statepool/incoming`` meanwhile.
        """
        try:
            opened = self._open_anonymous(_above(path))
            if opened is None:
                self._create_named(path, data, flush)
                return
            with opened as fd:
                self._write(fd, data, flush)
                self.tree.name(fd, path)
        except OSError as error:
            raise translated(
                error, "create", self._subject(path), needed=len(data), lacks=LINKS
            ) from error

    @contextmanager
    def draft(self, directory: str, data: bytes) -> Iterator[Callable[[str], None]]:
        """Prepare a file, and flush it at once if the file system supports files without a name."""
        subject = self._subject(directory)
        with translating("write to", subject, needed=len(data)):
            opened = self._open_anonymous(directory)
        if opened is None:
            yield partial(self.create, data=data)
            return
        with opened as fd:
            with translating("write to", subject, needed=len(data)):
                self._write(fd, data, flush=True)
            yield partial(self._name, fd)

    def _name(self, fd: int, path: str) -> None:
        try:
            self.tree.name(fd, path)
        except OSError as error:
            raise translated(error, "create", self._subject(path)) from error

    def link(self, source: str, target: str) -> None:
        """
        Give a file a second name. If the file system has no hard links, a file of this pool is
        renamed instead. That suffices for files gathered in ``incoming``: no process looks for them
        there again.
        """
        give = link_or_rename if source.startswith(f"{INCOMING}/") else link
        try:
            give(Beneath(self.tree, source), Beneath(self.tree, target))
        except OSError as error:
            raise translated(error, "link", self._subjects(source, target), lacks=LINKS) from error

    def rename(self, source: str, target: str) -> None:
        try:
            self.tree.rename(source, target)
        except OSError as error:
            raise translated(error, "rename", self._subjects(source, target)) from error

    def remove(self, path: str) -> bool:
        try:
            return self.tree.remove(path)
        except OSError as error:
            raise translated(error, "remove", self._subject(path)) from error

    def symlink(self, target: str, path: str) -> None:
        try:
            private = self._private_link(target, path)
            try:
                # sshfs refuses only the reading, of a link with ".." in it
                self.tree.readlink(private)
                self.tree.rename(private, path)
            except BaseException:
                self.tree.remove(private)
                raise
        except OSError as error:
            self._symlinks = error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
            raise translated(
                error, "make the symbolic link", self._subject(path), lacks=SYMLINKS
            ) from error

    def make_directory(self, path: str) -> None:
        """Make a directory and its parents; the umask applies only to the pool's own directory."""
        try:
            os.makedirs(self.tree.root, exist_ok=True)
            mode = stat.S_IMODE(self._status().st_mode) | stat.S_IRWXU
            parts = path.split("/") if path else []
            for count in range(1, len(parts) + 1):
                self.tree.make_directory("/".join(parts[:count]), mode)
        except OSError as error:
            raise translated(error, "make the directory", self._subject(path)) from error

    def remove_directory(self, path: str) -> bool:
        try:
            place, name = self.tree.place(path)
            with place as directory:
                os.rmdir(name, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise translated(error, "remove the directory", self._subject(path)) from error
        return True

    def flush(self, directory: str) -> None:
        """
        Flush a directory. If directories cannot be flushed, the pool counts as not durable from
        then on.
        """
        try:
            with self.tree.open(directory, _LIST) as fd:
                os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise translated(error, "flush the directory", self._subject(directory)) from error
            # Some FUSE file systems, and directories that a virtual machine shares with its host,
            # can flush only files.
            self._durable = False

    # -- bytes -------------------------------------------------------------------------------------

    def fetch(self, path: str, target: int, transfer: Transfer) -> Moved:
        """
        Copy a file from its beginning. Its data is where the file system says, whatever ``extents``
        says.
        """
        opened, _ = self._open(path)
        with opened as source:
            return copying.copy(source, target, transfer, subject=self._subject(path))

    def store(self, source: int, path: str, transfer: Transfer) -> Moved:
        """
        Copy a file from its beginning. Its data is where the file system says, whatever ``extents``
        says.
        """
        subject = self._subject(path)
        with translating("create", subject):
            self.tree.remove(path)
        try:
            with translating("create", subject):
                opened = self.tree.open(path, _WRITE_NEW)
            with opened as target:
                moved = copying.copy(source, target, transfer, flush=True, subject=subject)
                with translating("flush", subject, needed=transfer.size, descriptor=target):
                    os.fchmod(target, 0o444)
                    os.fsync(target)
        except BaseException:
            self.tree.remove(path)
            raise
        return moved

    def digest(self, path: str, transfer: Transfer) -> Digest:
        opened, _ = self._open(path)
        with opened as fd:
            subject = self._subject(path)
            algorithm, progress, pieces = transfer.algorithm, transfer.progress, transfer.pieces
            return copying.hash_file(
                fd,
                transfer.size,
                algorithm=algorithm,
                progress=progress,
                subject=subject,
                pieces=pieces,
            )

    # -- the rest ----------------------------------------------------------------------------------

    def free_space(self) -> int | None:
        with translating("ask for the free space at", self._subject("")):
            top = self.tree.top()
            left = os.fstatvfs(top.number)
        # Some FUSE file systems do not report blocks.
        return left.f_bavail * left.f_frsize if left.f_blocks else None

    def local_path(self, path: str) -> Path | None:
        """Return the path itself, whether or not a file is there."""
        return Path(self.tree.root, path)

    def beneath(self, path: str) -> Beneath:
        return Beneath(self.tree, path)

    @property
    def identity(self) -> str:
        """
        The device and the inode of the directory: the same for all mounts and links that lead to
        it.
        """
        try:
            found = os.stat(self.tree.root)
        # there is no directory yet, or this account may not see it: use its address
        except OSError:
            return super().identity
        return f"{found.st_dev}:{found.st_ino}"

    # -- below -------------------------------------------------------------------------------------

    def _status(self) -> os.stat_result:
        top = self.tree.top()
        return os.fstat(top.number)

    def _subjects(self, source: str, target: str) -> Subject:
        return Subject(f"{source!r} to {target!r} in {self.location}", str(self.location), target)

    def _open(self, path: str) -> tuple[Descriptor, int]:
        """:returns: a regular file, and its length"""
        try:
            try:
                opened = self.tree.open(path, _READ)
            except BlockingIOError:
                opened = self._open_leased(path)
            found = os.fstat(opened.number)
        except OSError as error:
            # A symbolic link, or a socket.
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise not_regular(self._subject(path)) from error
            raise translated(error, "open", self._subject(path)) from error
        if not stat.S_ISREG(found.st_mode):
            raise not_regular(self._subject(path))
        return opened, found.st_size

    def _open_anonymous(self, directory: str) -> Descriptor | None:
        """:returns: a new file without a name, or None where the file system has no such files"""
        if not self._anonymous:
            return None
        try:
            return self.tree.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o644)
        except OSError as error:
            if error.errno not in _NO_ANONYMOUS_FILES:
                raise
        self._anonymous = False
        return None

    def _create_named(self, path: str, data: bytes, flush: bool) -> None:
        private = f"{INCOMING}/{_private_name()}"
        try:
            try:
                opened = self.tree.open(private, _WRITE_NEW, 0o644)
            except FileNotFoundError:  # not a pool yet
                private = _beside(path)
                opened = self.tree.open(private, _WRITE_NEW, 0o644)
            with opened as fd:
                self._write(fd, data, flush)
            link_or_rename(Beneath(self.tree, private), Beneath(self.tree, path))
        finally:
            self.tree.remove(private)

    def _write(self, fd: int, data: bytes, flush: bool) -> None:
        done = 0
        while done < len(data):
            done += os.write(fd, data[done:] if done else data)
        # The umask of this account must not matter: other accounts that may read the pool, or write
        # to it, need what is written here.
        mode, wanted = stat.S_IMODE(os.fstat(fd).st_mode), small_file_mode(self._status().st_mode)
        if wanted & ~mode:
            os.fchmod(fd, mode | wanted)
        if flush:
            os.fsync(fd)

    def _private_link(self, target: str, path: str) -> str:
        """:returns: a new symbolic link under a temporary name"""
        private = f"{INCOMING}/{_private_name()}"
        try:
            self.tree.symlink(target, private)
        except FileNotFoundError:  # not a pool, or not yet
            private = _beside(path)
            self.tree.symlink(target, private)
        return private

    def _open_leased(self, path: str) -> Descriptor:
        """
        Open a file on which another process holds a lease, for a moment to find out whether the
        file is in use: wait until that process releases it.

        The kernel breaks the lease after ``/proc/sys/fs/lease-break-time`` seconds at the latest.
        Only regular files have leases, so there is no wait for anything else.
        """
        with self.tree.open(path, os.O_PATH) as pinned:
            if not stat.S_ISREG(os.fstat(pinned).st_mode):
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), path)
            return Descriptor(os.open, f"/proc/self/fd/{pinned}", _READ & ~os.O_NONBLOCK)


def _private_name() -> str:
    # The prefix is one with which no name of a machine, an image or a state begins.
    return f".tmp-{os.urandom(10).hex()}"


def _above(path: str) -> str:
    return path.rpartition("/")[0]


def _beside(path: str) -> str:
    above = _above(path)
    return f"{above}/{_private_name()}" if above else _private_name()


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stat(found: os.stat_result) -> Stat:
    return Stat(
        _kind_of_mode(found.st_mode), found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino)
    )


def _kind(entry: os.DirEntry[str]) -> FileKind:
    if entry.is_file(follow_symlinks=False):
        return FileKind.FILE
    if entry.is_symlink():
        return FileKind.LINK
    return FileKind.DIRECTORY if entry.is_dir(follow_symlinks=False) else FileKind.OTHER


def _kind_of_mode(mode: int) -> FileKind:
    if stat.S_ISREG(mode):
        return FileKind.FILE
    if stat.S_ISLNK(mode):
        return FileKind.LINK
    return FileKind.DIRECTORY if stat.S_ISDIR(mode) else FileKind.OTHER
