"""
Locks that save work. Nothing is torn, forked or lost if all of them are ignored; they let one
worker do what the others then find done.

Those of a file system are flock(2): held by an open file description, so that a holder that is
killed holds nothing. A library is not used for it: those that there are look for the directory of a
lock by its name, follow links on the way, and make what is missing, in a pool that may be hostile.
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
"""Seconds between two looks at a lock that somebody else holds."""

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
"""
What ``flock(2)`` says where a file system has no such locks: Lustre without ``-o flock``, NFS
without a lock daemon, some of FUSE.
"""

LOCK_MODE = 0o664
"""Permissions of lock files: the group of a shared pool opens them too."""


class Locks(Protocol):
    """Gives locks by name."""

    def hold(self, name: str, timeout: float) -> contextlib.AbstractContextManager[None]:
        """
        :param name: what is locked, a valid file name
        :param timeout: how long to wait for another holder, in seconds
        :raises LockTimeout: it did not let go
        :raises TransportError: there can be no such lock: the place is closed to us, or read-only
        :raises NoSpace: there is no room for it
        """


class FileLocks:
    """
    Locks of one host: files in ``locks/`` of a pool in a file system.

    :param tree: of the pool
    :param place: the directory in it where the lock files are
    """

    def __init__(self, tree: Tree, place: str = layout.LOCKS) -> None:
        self._tree = tree
        self._place = place

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        """As :meth:`Locks.hold`."""
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
                os.fchmod(lock.number, LOCK_MODE)  # whatever the umask
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
        Take the lock, where there are any. Each holder has an open file description of its own, so
        threads exclude each other too.
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
        Remove the files of locks that are not held. A process that takes one at this very moment
        shares it with no other, and works in vain at worst.

        :param prefix: how the names of the locks begin
        :returns: the files
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
                    continue  # another process has just done it
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise translated(
                            error, "remove", Subject(f"the lock {path}", path=str(path))
                        ) from error
                    return gone  # whether it is held cannot be told, so they stay
        return gone


def _try(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_told: set[str] = set()
"""The directories of which it was said that there are no locks."""


def _tell(directory: str, error: OSError) -> None:
    """
    Say once that work goes on without locks: nothing is lost by it but time, where several
    processes do the same.
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
    Locks of a place on another host: those of its kernel where there is a shell to take them, which
    local users of the pool meet; else claims.

    :param transport: reaches it
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._claims = Claims(transport)

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        """As :meth:`Locks.hold`."""
        lock = self._transport.hold(f"{layout.LOCKS}/{name}.lock", timeout)
        with self._claims.hold(name, timeout) if lock is None else lock:
            yield


class NoLocks:
    """For what is not worth waiting for: everybody does the work, and publication sorts it out."""

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        """As :meth:`Locks.hold`, without waiting for anybody."""
        yield


def locks_of(transport: Transport) -> Locks:
    """:returns: the locks that the place of a pool offers, for work that takes long"""
    return _file_locks(transport) or RemoteLocks(transport)


def quick_locks_of(transport: Transport) -> Locks:
    """
    :returns: those that cost next to nothing, for work that is soon done once more: none where
        taking one is a conversation with another host
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
