"""
``file://``: a pool in a file system of this host.

Lookups never follow a symbolic link in the last part of a path, and never wait: what is not a regular file is refused before a byte of it is read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from statepool.errors import TransportError
from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.location import Location
from statepool.model.progress import SILENT, Progress
from statepool.transports import copying
from statepool.transports.base import Capabilities, Entry, FileKind, Moved, Stat, Transport, small_file_mode
from statepool.transports.failures import Subject, not_regular, translated, translating

INCOMING = ".statepool/incoming"
"""The directory of a pool where files may be that are not finished, and where a collector looks for those that never will be."""

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Non-blocking, since opening a FIFO would wait for its other end; reading a regular file is not changed by it."""

_WRITE_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW

_NO_ANONYMOUS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What opening with O_TMPFILE says where there is no such thing (``man 2 open``)."""


class LocalTransport(Transport):
    """
    Files of this host.

    :param location: a location without a host
    """

    def __init__(self, location: Location) -> None:
        super().__init__(location)
        self._root = location.path.rstrip("/")
        # Files without a name get one through /proc. Believed until the file system says that it has none.
        self._anonymous = os.path.isdir("/proc/self/fd")

    @property
    def capabilities(self) -> Capabilities:
        """Everything but referring."""
        return Capabilities(symlinks=True, durable=True, local=True)

    # -- looking ---------------------------------------------------------------------------------------------------------------------------------

    def scan(self, directory: str) -> list[Entry]:
        """As the transport's face says. The pool's own directory may be behind a symbolic link."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if directory else 0)
        try:
            fd = os.open(self._full(directory), flags)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise translated(error, "list", self._subject(directory)) from error
        try:
            # Names that are not UTF-8 come with lone surrogates, which cannot be encoded again.
            with os.scandir(fd) as entries:
                return [Entry(entry.name, _kind(entry)) for entry in entries if entry.name.isascii() or _is_utf8(entry.name)]
        except OSError as error:
            raise translated(error, "list", self._subject(directory)) from error
        finally:
            os.close(fd)

    def stat(self, path: str) -> Stat | None:
        """As the transport's face says."""
        try:
            found = os.lstat(self._full(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise translated(error, "look at", self._subject(path)) from error
        return Stat(_kind_of_mode(found.st_mode), found.st_size, found.st_mtime_ns, (found.st_dev, found.st_ino))

    def read(self, path: str, offset: int = 0, size: int | None = None, *, follow: bool = False) -> bytes:
        """
        As the transport's face says.

        :raises UnsafeImage: it is not a regular file
        """
        fd, length = self._open(path, follow=follow)
        try:
            left = max(length - offset, 0)
            wanted = left if size is None else min(size, left)
            data = os.pread(fd, wanted, offset)
            while len(data) < wanted and (more := os.pread(fd, wanted - len(data), offset + len(data))):
                data += more
            return data
        except OSError as error:
            raise translated(error, "read", self._subject(path)) from error
        finally:
            os.close(fd)

    def readlink(self, path: str) -> str:
        """As the transport's face says."""
        try:
            return os.readlink(self._full(path))
        except OSError as error:
            if error.errno == errno.EINVAL:
                subject = self._subject(path)
                raise TransportError(f"{subject.text} is not a symbolic link", pool=subject.pool, path=path) from error
            raise translated(error, "read", self._subject(path)) from error

    # -- names -----------------------------------------------------------------------------------------------------------------------------------

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """
        As the transport's face says.

        The file has no name until it is complete, so that a crash leaves nothing behind. Where the file system does not know such files, it has one
        in ``.statepool/incoming`` meanwhile.
        """
        full = self._full(path)
        try:
            fd = self._open_anonymous(os.path.dirname(full))
            if fd is None:
                self._create_named(full, data, flush)
                return
            try:
                self._write(fd, data, flush)
                _link_anonymous(fd, full)
            finally:
                os.close(fd)
        except OSError as error:
            raise translated(error, "create", self._subject(path), needed=len(data)) from error

    @contextmanager
    def draft(self, directory: str, data: bytes) -> Iterator[Callable[[str], None]]:
        """As the transport's face says: flushed now, where the file system knows files without a name."""
        subject = self._subject(directory)
        with translating("write to", subject, needed=len(data)):
            fd = self._open_anonymous(self._full(directory))
        if fd is None:
            yield partial(self.create, data=data)
            return
        try:
            with translating("write to", subject, needed=len(data)):
                self._write(fd, data, flush=True)
            yield partial(self._name, fd)
        finally:
            os.close(fd)

    def _name(self, fd: int, path: str) -> None:
        try:
            _link_anonymous(fd, self._full(path))
        except OSError as error:
            raise translated(error, "create", self._subject(path)) from error

    def link(self, source: str, target: str) -> None:
        """As the transport's face says."""
        try:
            os.link(self._full(source), self._full(target), follow_symlinks=False)
        except OSError as error:
            raise translated(error, "link", self._subjects(source, target)) from error

    def rename(self, source: str, target: str) -> None:
        """As the transport's face says."""
        old, new = self._full(source), self._full(target)
        try:
            if _is_same_file(old, new):
                # rename(2) does nothing if both are names of one file already. Here the old one goes, as in every other case.
                os.unlink(old)
            else:
                os.rename(old, new)
        except OSError as error:
            raise translated(error, "rename", self._subjects(source, target)) from error

    def remove(self, path: str) -> bool:
        """As the transport's face says."""
        try:
            os.unlink(self._full(path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise translated(error, "remove", self._subject(path)) from error
        return True

    def symlink(self, target: str, path: str) -> None:
        """As the transport's face says."""
        full = self._full(path)
        try:
            private = self._private_link(target, full)
            try:
                os.replace(private, full)
            except BaseException:
                os.unlink(private)
                raise
        except OSError as error:
            raise translated(error, "make the symbolic link", self._subject(path)) from error

    def make_directory(self, path: str) -> None:
        """As the transport's face says. The pool's own directory is made as the account's umask has it."""
        try:
            os.makedirs(self._root or "/", exist_ok=True)
            mode = stat.S_IMODE(os.stat(self._root or "/").st_mode) | stat.S_IRWXU
            parts = path.split("/") if path else []
            for count in range(1, len(parts) + 1):
                self._make_one("/".join(parts[:count]), mode)
        except OSError as error:
            raise translated(error, "make the directory", self._subject(path)) from error

    def remove_directory(self, path: str) -> bool:
        """As the transport's face says."""
        try:
            os.rmdir(self._full(path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise translated(error, "remove the directory", self._subject(path)) from error
        return True

    def flush(self, directory: str) -> None:
        """As the transport's face says."""
        try:
            fd = os.open(self._full(directory), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise translated(error, "flush the directory", self._subject(directory)) from error

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
        """As the transport's face says. Where the data is, the file system knows better than ``extents``; it is copied anew always."""
        source, _ = self._open(path)
        try:
            return copying.copy(source, target, size, algorithm=algorithm, progress=progress, subject=self._subject(path))
        finally:
            os.close(source)

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
        """As the transport's face says. Where the data is, the file system knows better than ``extents``; it is copied anew always."""
        full, subject = self._full(path), self._subject(path)
        with translating("create", subject):
            with suppress(FileNotFoundError):
                os.unlink(full)
            target = os.open(full, _WRITE_NEW, 0o600)
        try:
            moved = copying.copy(source, target, size, algorithm=algorithm, progress=progress, flush=True, subject=subject)
            with translating("flush", subject, needed=size, descriptor=target):
                os.fchmod(target, 0o444)
                os.fsync(target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(full)
            raise
        finally:
            os.close(target)
        return moved

    def digest(self, path: str, size: int, *, algorithm: str = DEFAULT_ALGORITHM, progress: Progress = SILENT) -> Digest:
        """As the transport's face says."""
        fd, _ = self._open(path)
        try:
            return copying.hash_file(fd, size, algorithm=algorithm, progress=progress, subject=self._subject(path))
        finally:
            os.close(fd)

    # -- the rest --------------------------------------------------------------------------------------------------------------------------------

    def free_space(self) -> int | None:
        """As the transport's face says."""
        with translating("ask for the free space at", self._subject("")):
            left = os.statvfs(self._root or "/")
        return left.f_bavail * left.f_frsize

    def local_path(self, path: str) -> Path | None:
        """As the transport's face says: the name itself, whatever is there."""
        return Path(self._full(path))

    @property
    def identity(self) -> str:
        """The device and the inode of the directory: mounts and links that lead to it are the same."""
        try:
            found = os.stat(self._root or "/")
        except OSError:  # there is no directory yet, or none that we may see; its address must do
            return super().identity
        return f"{found.st_dev}:{found.st_ino}"

    # -- below -----------------------------------------------------------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root or "/"

    def _subject(self, path: str) -> Subject:
        return Subject(f"{path!r} in {self.location}" if path else str(self.location), str(self.location), path)

    def _subjects(self, source: str, target: str) -> Subject:
        return Subject(f"{source!r} to {target!r} in {self.location}", str(self.location), target)

    def _open(self, path: str, *, follow: bool = False) -> tuple[int, int]:
        """:returns: a descriptor of a regular file, and its length"""
        full = self._full(path)
        flags = _READ if follow else _READ | os.O_NOFOLLOW
        try:
            try:
                fd = os.open(full, flags)
            except BlockingIOError:
                fd = _open_leased(full, flags)
            try:
                found = os.fstat(fd)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            # A symbolic link, or a socket.
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise not_regular(self._subject(path)) from error
            raise translated(error, "open", self._subject(path)) from error
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise not_regular(self._subject(path))
        return fd, found.st_size

    def _open_anonymous(self, directory: str) -> int | None:
        """:returns: a descriptor of a new file without a name, or None where there are none"""
        if not self._anonymous:
            return None
        try:
            return os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno not in _NO_ANONYMOUS_FILES:
                raise
        self._anonymous = False
        return None

    def _create_named(self, full: str, data: bytes, flush: bool) -> None:
        private = f"{self._root}/{INCOMING}/{_private_name()}"
        try:
            fd = os.open(private, _WRITE_NEW, 0o644)
        except FileNotFoundError:  # not a pool yet
            private = f"{os.path.dirname(full)}/{_private_name()}"
            fd = os.open(private, _WRITE_NEW, 0o644)
        try:
            try:
                self._write(fd, data, flush)
            finally:
                os.close(fd)
            os.link(private, full, follow_symlinks=False)
        finally:
            os.unlink(private)

    def _write(self, fd: int, data: bytes, flush: bool) -> None:
        done = 0
        while done < len(data):
            done += os.write(fd, data[done:] if done else data)
        # Whatever the umask of this account: others who may look into the pool, or work in it, need what is written here.
        mode, wanted = stat.S_IMODE(os.fstat(fd).st_mode), small_file_mode(os.stat(self._root or "/").st_mode)
        if wanted & ~mode:
            os.fchmod(fd, mode | wanted)
        if flush:
            os.fsync(fd)

    def _private_link(self, target: str, full: str) -> str:
        """:returns: a new symbolic link under a name that nobody looks at"""
        private = f"{self._root}/{INCOMING}/{_private_name()}"
        try:
            os.symlink(target, private)
        except FileNotFoundError:  # not a pool, or not yet
            private = f"{os.path.dirname(full)}/{_private_name()}"
            os.symlink(target, private)
        return private

    def _make_one(self, path: str, mode: int) -> None:
        full = self._full(path)
        try:
            os.mkdir(full)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(full).st_mode):
                raise
        else:
            os.chmod(full, mode)


def _open_leased(full: str, flags: int) -> int:
    """
    Open a file on which somebody holds a lease, as those do for a moment who ask whether a file is in use: wait until they let go.

    The kernel makes them, after ``/proc/sys/fs/lease-break-time`` seconds at the latest. Only regular files have leases: nothing else is waited for.
    """
    if not stat.S_ISREG(os.stat(full, follow_symlinks=not flags & os.O_NOFOLLOW).st_mode):
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), full)
    return os.open(full, flags & ~os.O_NONBLOCK)


def _link_anonymous(fd: int, full: str) -> None:
    # Giving any descriptor makes this linkat with AT_SYMLINK_FOLLOW, which is how a file without a name gets one (man 2 open).
    os.link(f"/proc/self/fd/{fd}", full, src_dir_fd=fd, follow_symlinks=True)


def _private_name() -> str:
    # Begins with what no name of a machine, an image or a state begins with.
    return f".tmp-{os.urandom(10).hex()}"


def _is_same_file(first: str, second: str) -> bool:
    try:
        there = os.lstat(second)
    except FileNotFoundError:
        return False
    return first != second and os.path.samestat(os.lstat(first), there)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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
