"""
Locks that save work. Nothing is torn, forked or lost if all of them are ignored: they let one
process do work that the other processes then find done.

The locks of a file system are flock(2) locks. An open file description holds such a lock, so a
killed process holds nothing. No library is used for them: the existing libraries look up the
directory of a lock by its name, follow links on the way, and create what is missing, in a pool that
may be hostile.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from typing import Protocol

from statepool.beneath import Beneath, Descriptor, Tree
from statepool.errors import AccessDenied, LockTimeout
from statepool.pools import layout
from statepool.pools.claims import Claims
from statepool.transports.base import Transport
from statepool.transports.failures import Subject, translated

_LOG = logging.getLogger(__name__)

POLL_INTERVAL = 0.01
"""Seconds between two attempts to take a lock that another process holds."""

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
"""
The errors of ``flock(2)`` on a file system without such locks: Lustre without ``-o flock``, NFS
without a lock daemon, some FUSE file systems.
"""

LOCK_MODE = 0o664
"""Permissions of lock files: in a shared pool, the members of the group open them, too."""


class Locks(Protocol):
    """The interface of locks, which are taken by name."""

    def hold(self, name: str, timeout: float) -> contextlib.AbstractContextManager[None]:
        """
        Hold a lock for the duration of the block.

        :param name: what is locked, a valid file name
        :param timeout: how long to wait for another holder, in seconds
        :raises LockTimeout: the other holder did not release it
        :raises TransportError: the lock cannot be made: the place is closed to this account, or
            read-only
        :raises NoSpace: there is no space for the lock file
        """


class FileLocks:
    """
    File locks: files in ``locks/`` of a pool in a file system.

    :param tree: the tree of the pool
    :param place: the directory of the lock files in it
    """

    def __init__(self, tree: Tree, place: str = layout.LOCKS) -> None:
        self._tree = tree
        self._place = place

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        path = Beneath(self._tree, f"{self._place}/{name}.lock".lstrip("/"))
        lock = self._opened(path)
        try:
            self._wait(lock.number, path, timeout)
            yield
        finally:
            lock.close()

    def _opened(self, path: Beneath) -> Descriptor:
        try:
            lock = path.open(os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, LOCK_MODE)
            found = os.fstat(lock.number)
            if (
                found.st_uid == os.geteuid()
                and stat.S_IMODE(found.st_mode) & LOCK_MODE != LOCK_MODE
            ):
                os.fchmod(lock.number, LOCK_MODE)  # regardless of the umask
        except PermissionError as error:
            raise AccessDenied(
                f"the lock {path} cannot be opened",
                path=str(path),
                hint="make it writable for the group of the pool",
            ) from error
        except OSError as error:
            raise translated(error, "open", Subject(f"the lock {path}", path=str(path))) from error
        return lock

    def _wait(self, lock: int, path: Beneath, timeout: float) -> None:
        """
        Take the lock, if the file system has locks. Each holder has its own open file description,
        so threads exclude each other, too.
        """
        deadline = time.monotonic() + timeout
        try:
            while not _try(lock):
                if time.monotonic() >= deadline:
                    raise LockTimeout(
                        f"another process held {path} for more than {timeout:g} s",
                        seconds=timeout,
                        path=str(path),
                        hint="wait for it, or raise lock-timeout",
                    )
                time.sleep(POLL_INTERVAL)
        except OSError as error:
            if isinstance(error, LockTimeout):
                raise
            if error.errno not in _NO_LOCKS:
                raise translated(error, "lock", Subject(str(path), path=str(path))) from error
            _tell(str(Beneath(self._tree, self._place)), error)

    def tidy(self, prefix: str) -> list[str]:
        """
        Remove the files of locks that are not held. A process that takes such a lock at the same
        moment then holds a lock that no other process sees; at worst, work is done twice.

        :param prefix: the beginning of the names of the locks
        :returns: the names of the removed files
        """
        gone = []
        with self._tree.open(self._place, os.O_RDONLY | os.O_DIRECTORY) as directory:
            for name in sorted(os.listdir(directory)):
                path = Beneath(self._tree, f"{self._place}/{name}".lstrip("/"))
                if not (name.startswith(prefix) and name.endswith(".lock")):
                    continue
                try:
                    with path.open(os.O_RDWR | os.O_NONBLOCK) as lock:
                        if _try(lock) and path.remove():
                            gone.append(name)
                except FileNotFoundError:
                    continue  # another process has just removed it
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise translated(
                            error, "remove", Subject(f"the lock {path}", path=str(path))
                        ) from error
                    return gone  # without locks it is unknown which files are in use, so they stay
        return gone


def _try(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_told: set[str] = set()
"""The directories for which the missing locks were reported."""


def _tell(directory: str, error: OSError) -> None:
    """
    Warn once that work goes on without locks: only time is lost, if several processes do the same
    work.
    """
    if directory not in _told:
        _told.add(directory)
        _LOG.warning(
            "%s has no file locks (flock: %s): processes may do the same work twice there",
            directory,
            error.strerror,
        )


class RemoteLocks:
    """
    Locks of a place on another host: those of its kernel if there is a shell to take them, which
    exclude local users of the pool, too; else claims.

    :param transport: reaches the place
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._claims = Claims(transport)

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        lock = self._transport.hold(f"{layout.LOCKS}/{name}.lock", timeout)
        with self._claims.hold(name, timeout) if lock is None else lock:
            yield


class NoLocks:
    """
    No locks, for work that is not worth waiting for: every process does it, and publication settles
    the races.
    """

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        """Run the block at once, without waiting."""
        yield


def locks_of(transport: Transport) -> Locks:
    """:returns: the locks that the place of a pool offers, for work that takes a long time"""
    return _file_locks(transport) or RemoteLocks(transport)


def quick_locks_of(transport: Transport) -> Locks:
    """
    :returns: locks that cost almost nothing, for work that is quickly repeated: no locks where
        taking one would need round trips to another host
    """
    return _file_locks(transport) or NoLocks()


def _file_locks(transport: Transport) -> FileLocks | None:
    here = transport.beneath(layout.LOCKS)
    found = here.stat() if here is not None else None
    return (
        FileLocks(here.tree)
        if here is not None and found is not None and stat.S_ISDIR(found.st_mode)
        else None
    )
