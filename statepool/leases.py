"""
Leases on files: the kernel's answer to the question which other processes have a file open.

The kernel grants a write lease (``fcntl(2)``, ``F_SETLEASE``) only while no other process has the
file open. It grants a read lease only while no process has it open for writing, including a
writable mapping. While a lease is held, a process that opens the file (for a read lease: for
writing) waits until the lease is released, or until the kernel ends it
(``/proc/sys/fs/lease-break-time``, 45 s).

Only the owner of a file can have leases on it, and not on every file system.
"""

from __future__ import annotations

import errno
import fcntl
import signal

_NO_LEASES = frozenset(
    {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
)
"""
The errors of the kernel where a lease is not possible: the file is not ours, or its file system
does not support leases.
"""


def try_lease(descriptor: int, kind: int) -> bool | None:
    """
    Ask for a lease, without waiting.

    :param descriptor: of a regular file; for a read lease, open only for reading
    :param kind: :data:`fcntl.F_RDLCK` or :data:`fcntl.F_WRLCK`
    :returns: whether it was granted, or None where leases are not possible
    """
    try:
        # By default the kernel announces the end of a lease by SIGIO, which ends a process that
        # does not expect it. SIGURG is ignored by default.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, kind)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return False
        if error.errno in _NO_LEASES:
            return None
        raise
    return True


def held_lease(descriptor: int) -> int:
    """
    :returns: the lease that this open file has now: :data:`fcntl.F_RDLCK` or :data:`fcntl.F_WRLCK`;
        :data:`fcntl.F_UNLCK` if it has none, or if another process waits for the lease to end
    """
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETLEASE)
    except OSError as error:
        if error.errno in _NO_LEASES:
            return fcntl.F_UNLCK
        raise


def let_go(descriptor: int) -> None:
    """
    Release a lease. Closing the descriptor would not release it while a child that this process is
    just starting has the descriptor, too.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        # The kernel has already ended the lease, since another process waited too long for the
        # file. Or the file was given to another account meanwhile: then only closing is left.
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
