"""What is not permitted, tried by those to whom everything is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION = 0x20080522
"""``_LINUX_CAPABILITY_VERSION_3`` of ``linux/capability.h``: sets of 64 bits, in two halves."""

_GOES_PAST_PERMISSIONS = 1 << 1 | 1 << 2
"""
CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of the same file: what lets root read and write whatever
its mode is.
"""

_OWNS_ALL = 1 << 0 | 1 << 3 | 1 << 28
"""
CAP_CHOWN, CAP_FOWNER and CAP_LEASE: what lets root do to all files what only their owners may, or
make them its own.
"""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Half(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def permissions_count(*, owners_too: bool = False) -> Iterator[None]:
    """
    Have the modes of files mean something to this thread, also if it is root's: it may do what the
    owner of a file may. Nothing changes for who is somebody else, nor for other threads.

    :param owners_too: a file of somebody else is not root's either
    """
    ours = _capabilities()
    before = ours[0].effective
    try:
        ours[0].effective = before & ~(_GOES_PAST_PERMISSIONS | (_OWNS_ALL if owners_too else 0))
        _set(ours)
        yield
    finally:
        ours[0].effective = before
        _set(ours)


def _capabilities() -> ctypes.Array[_Half]:
    halves = (_Half * 2)()
    _check(_LIBC.capget(ctypes.byref(_Header(_VERSION, 0)), halves))
    return halves


def _set(halves: ctypes.Array[_Half]) -> None:
    _check(_LIBC.capset(ctypes.byref(_Header(_VERSION, 0)), halves))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
