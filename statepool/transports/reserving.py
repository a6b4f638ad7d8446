"""
Reservation of blocks for what is about to be written, in one request.

A file system with delayed allocation has to reserve one block for each block that is written: on
ext4 this is a third of the time that writing takes. Blocks that the file already has need no such
reservation, and lie together (docs/measurements.rst).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

WORTH = 512 << 10
"""Bytes that are worth a system call of their own."""

_RESERVE = 0x40305828
"""
The ioctl that allocates blocks without writing to them, as ``fallocate`` does: ``FS_IOC_RESVSP``,
``_IOW('X', 40, struct space_resv)`` in ``linux/falloc.h``. The C library's ``posix_fallocate``
would write to every block where the file system does not support it.
"""

_REQUEST = struct.Struct("hhqqiI4i")
"""
``struct space_resv``: type and whence of a lock, offset, length, and fields that are not read.
"""

_REAL_FAILURES = frozenset(
    {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EINTR}
)
"""Errors that are real failures, not just the answer that it is not supported."""


class Reserver:
    """
    A requester of the blocks of a file before they are written to, where that helps: on file
    systems that have their own block device. A file system in memory or on a server would do the
    work twice, and btrfs would not compress what is written there.

    :param fd: descriptor of the file, open for writing
    :raises OSError: there is no such file
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._helps = os.major(os.fstat(fd).st_dev) != 0

    def reserve(self, offset: int, length: int) -> None:
        """
        :param offset: where something is about to be written, in bytes
        :param length: how much
        :raises OSError: there is no room for it, or the disk failed; what was in the file is still
            there
        """
        if not self._helps or length < WORTH:
            return
        try:
            fcntl.ioctl(
                self._fd, _RESERVE, _REQUEST.pack(0, os.SEEK_SET, offset, length, 0, 0, 0, 0, 0, 0)
            )
        except OSError as error:
            if error.errno in _REAL_FAILURES:
                raise
            self._helps = False
