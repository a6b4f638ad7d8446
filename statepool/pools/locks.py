"""
Locks that save work. Nothing is torn, forked or lost if all of them are ignored; they let one worker do what the others then find done.

The only user of filelock. Its lock on Unix is flock(2): held by an open file description, so that a holder that is killed holds nothing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from typing import Protocol

from statepool.beneath import DIRECTORY, Beneath, Descriptor, Tree
from statepool.errors import AccessDenied, LockTimeout
from statepool.pools import layout
from statepool.pools.claims import Claims
from statepool.transports.base import Transport
from statepool.transports.failures import Subject, translated

_LOG = logging.getLogger(__name__)

POLL_INTERVAL = 0.01
"""Seconds between two looks at a lock that somebody else holds."""

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
"""What ``flock(2)`` says where a file system has no such locks: Lustre without ``-o flock``, NFS without a lock daemon, some of FUSE."""

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
        import filelock  # when the first lock is held: whoever only looks does not wait for it

        path = Beneath(self._tree, f"{self._place}/{name}.lock".lstrip("/"))
        lock = None
        try:
            with self._directory() as directory:
                # Not a singleton, and not thread-local: each holder has its own open file description, so threads exclude each other too. Not soft
                # where the file system has no locks: a holder that is killed would hold it for good.
                lock = filelock.FileLock(
                    f"{directory}/{name}.lock",
                    timeout=timeout,
                    mode=LOCK_MODE,
                    poll_interval=POLL_INTERVAL,
                    thread_local=False,
                    fallback_to_soft=False,
                )
                lock.acquire()
        except filelock.Timeout as error:
            raise LockTimeout(
                f"another process held {path} for more than {timeout:g} s",
                seconds=timeout,
                path=str(path),
                hint="wait for it, or raise lock-timeout",
            ) from error
        except PermissionError as error:
            raise AccessDenied(f"the lock {path} cannot be opened", path=str(path), hint="make it writable for the group of the pool") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise translated(error, "open", Subject(f"the lock {path}", path=str(path))) from error
            lock = None
            _tell(str(Beneath(self._tree, self._place)), error)
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    @contextlib.contextmanager
    def _directory(self) -> Iterator[str]:
        """:returns: a path to the directory of the lock files that leads nowhere else, for as long as a ``with`` block lasts; for filelock"""
        with Descriptor(self._tree.open(self._place, DIRECTORY)) as directory:
            yield f"/proc/self/fd/{directory}"

    def tidy(self, prefix: str) -> list[str]:
        """
        Remove the files of locks that nobody holds. Whoever takes one at this very moment shares it with nobody, and works in vain at worst.

        :param prefix: how the names of the locks begin
        :returns: the files
        """
        import filelock  # as above

        gone = []
        with self._directory() as directory:
            for name in sorted(os.listdir(directory)):
                if not (name.startswith(prefix) and name.endswith(".lock")):
                    continue
                try:
                    with filelock.FileLock(f"{directory}/{name}", timeout=0, mode=LOCK_MODE, thread_local=False, fallback_to_soft=False):
                        os.unlink(f"{directory}/{name}")
                        gone.append(name)
                except filelock.Timeout:
                    continue  # somebody is at work
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        raise
                    return gone  # nobody can tell, so they stay
        return gone


_told: set[str] = set()
"""The directories of which it was said that there are no locks."""


def _tell(directory: str, error: OSError) -> None:
    """Say once that work goes on without locks: nothing is lost by it but time, where several processes do the same."""
    if directory not in _told:
        _told.add(directory)
        _LOG.warning("%s has no file locks (flock: %s): processes may do the same work twice there", directory, error.strerror)


class RemoteLocks:
    """
    Locks of a place on another host: those of its kernel where there is a shell to take them, which local users of the pool meet; else claims.

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
    """:returns: those that cost next to nothing, for work that is soon done once more: none where taking one is a conversation with another host"""
    return _file_locks(transport) or NoLocks()


def _file_locks(transport: Transport) -> FileLocks | None:
    here = transport.beneath(layout.LOCKS)
    found = here.stat() if here is not None else None
    return FileLocks(here.tree) if here is not None and found is not None and stat.S_ISDIR(found.st_mode) else None
