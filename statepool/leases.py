"""
Leases on files: the kernel's word on who else has a file open.

It grants a write lease (``fcntl(2)``, ``F_SETLEASE``) only while nobody else has the file open, and
a read lease only while nobody has it open for writing, a mapping that can be written to included.
While a lease is held, whoever opens the file (for writing, if it is a read lease) waits until it is
given up, or until the kernel ends it (``/proc/sys/fs/lease-break-time``, 45 s).

Leases are for the owner of a file, and not for every file system.
"""

from __future__ import annotations

import errno
import fcntl
import signal

_NO_LEASES = frozenset(
    {errno.EACCES, errno.EPERM, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
)
"""
What the kernel says where we can have no lease: the file is not ours, or its file system has none.
"""


def try_lease(descriptor: int, kind: int) -> bool | None:
    """
    Ask for a lease, without waiting.

    :param descriptor: of a regular file; for a read lease, open only for reading
    :param kind: :data:`fcntl.F_RDLCK` or :data:`fcntl.F_WRLCK`
    :returns: whether it was granted, or None where none can be had
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
        :data:`fcntl.F_UNLCK` if it has none, or somebody waits for it to end
    """
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GETLEASE)
    except OSError as error:
        if error.errno in _NO_LEASES:
            return fcntl.F_UNLCK
        raise


def let_go(descriptor: int) -> None:
    """
    Give a lease up. Closing would do, but not while a child that this process is just starting has
    the descriptor too.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        # The kernel has ended the lease already, since somebody has waited too long for the file;
        # or that was given to another account meanwhile, and then only closing is left.
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
