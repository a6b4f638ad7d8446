"""
The translation of the operating system's errors: one table for everything that works on local
files.

The original error stays as ``__cause__``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from attrs import frozen

from statepool.errors import (
    AccessDenied,
    FileExists,
    IntegrityError,
    MissingFile,
    NoSpace,
    StatePoolError,
    TransportError,
    UnsafeImage,
)


@frozen
class Subject:
    """
    The file that a message is about.

    :param text: the file, as messages name it
    :param pool: the location of its pool, where it is in one
    :param path: its name there
    """

    text: str
    pool: str | None = None
    path: str | None = None


A_FILE = Subject("the file")
"""The subject if only a descriptor is known."""

NOT_PERMITTED = (
    "it is not the mode: the file may belong to another account, it or its directory may be"
    " immutable or append-only (lsattr), the file system may not have what was asked for, or a"
    " sandbox may forbid it (seccomp)"
)
"""
What the user can do about ``EPERM``. Permissions are only one cause of it; missing permissions on a
file give ``EACCES``.
"""

LINKS = "hard links and no exclusive renames"
"""What a pool needs, one of the two, to create a name exclusively."""

SYMLINKS = "symbolic links that may be read (sshfs needs -o no_contain_symlinks)"
"""What a cache needs, and the view of a pool too."""

_LACKING = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS})
"""Errors of the kernel for a feature that the file system lacks."""

_KINDS: dict[int, tuple[type[TransportError], str | None]] = {
    errno.ENOENT: (MissingFile, None),
    errno.EEXIST: (FileExists, None),
    errno.EACCES: (
        AccessDenied,
        "look at the owner and the mode of the file and of the directories above it",
    ),
    errno.EPERM: (AccessDenied, NOT_PERMITTED),
    errno.EROFS: (AccessDenied, "the file system is mounted read-only"),
    errno.ENOTDIR: (TransportError, "a file is where a directory should be"),
    errno.ELOOP: (
        TransportError,
        (
            "there is a symbolic link on the way; no link in a pool is followed: find out who put"
            " it there"
        ),
    ),
    errno.EIO: (
        TransportError,
        "the disk or the network behind it fails; the kernel's log may say why",
    ),
    errno.EXDEV: (
        TransportError,
        (
            "the two are on different file systems, or in different mounts of one, and a pool must"
            " be in one"
        ),
    ),
    errno.EMFILE: (TransportError, "too many files are open: raise the limit (ulimit -n)"),
    errno.ESTALE: (
        TransportError,
        "the server of this network file system has forgotten the file: mount it again",
    ),
}

_NO_LINKS = (
    "no link in a pool is followed: find out who put it there, and put the directory itself in its"
    " place"
)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No space, quota exceeded, or a file longer than the file system permits."""


def translated(
    error: OSError,
    doing: str,
    subject: Subject,
    *,
    needed: int = 0,
    descriptor: int | None = None,
    lacks: str = "",
) -> TransportError | NoSpace:
    """
    :param error: the operating system's error
    :param doing: what was attempted on the subject: ``read``, ``create``
    :param needed: bytes that were to be written
    :param descriptor: a file on the file system to which they were to be written: its free space is
        asked for
    :param lacks: what the file system probably lacks, if anything
    :returns: the error of this package to raise from it
    """
    reason = os.strerror(error.errno) if error.errno is not None else str(error)
    message = f"cannot {doing} {subject.text}: {reason}"
    if error.errno in _FULL:
        hint = {
            errno.ENOSPC: "free some space there, for example with statepool gc --everywhere",
            errno.EDQUOT: "the quota of this account or group is used up there",
            errno.EFBIG: (
                "a file of that length is beyond a limit of the file system or of this process"
                " (ulimit -f)"
            ),
        }[error.errno or errno.ENOSPC]
        return NoSpace(
            message,
            needed=needed,
            available=_available(descriptor),
            hint=hint,
            pool=subject.pool,
            path=subject.path,
        )
    kind, advice = _KINDS.get(error.errno or 0, (TransportError, None))
    if lacks and error.errno in _LACKING:
        what = (
            f"no {lacks}, as on exFAT and on many shared directories: put it on ext4, xfs or btrfs"
        )
        advice = (
            f"the file system may have {what}; if not, {NOT_PERMITTED}"
            if error.errno == errno.EPERM
            else f"the file system has {what}"
        )
    return kind(message, hint=advice, pool=subject.pool, path=subject.path)


@contextmanager
def translating(
    doing: str, subject: Subject, *, needed: int = 0, descriptor: int | None = None
) -> Iterator[None]:
    """
    Translate the operating system's errors inside the block into errors of this package. The block
    must not call back into the caller's code, whose errors must pass unchanged.
    """
    try:
        yield
    except OSError as error:
        raise translated(error, doing, subject, needed=needed, descriptor=descriptor) from error


@contextmanager
def translate_os_errors(doing: str, subject: Subject) -> Iterator[None]:
    """
    Translate remaining errors of a whole operation on local files: an error of the operating system
    becomes an error of this package, and errors of this package pass unchanged.
    """
    try:
        yield
    except StatePoolError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        if error.filename is None:
            raise translated(error, doing, subject) from error
        raise translated(
            error, f"{doing}:", Subject(str(error.filename), subject.pool, str(error.filename))
        ) from error


def not_regular(subject: Subject) -> UnsafeImage:
    """:returns: the error for a link, a FIFO, a device or a directory where bytes should be"""
    return UnsafeImage(
        f"{subject.text} is not a regular file",
        check="regular-file",
        hint="nothing else is opened in a pool: find out who put it there",
        pool=subject.pool,
        path=subject.path,
    )


def linked(subject: Subject) -> TransportError:
    """:returns: the error for a symbolic link where a directory of a pool should be"""
    return TransportError(
        f"{subject.text} is a symbolic link", hint=_NO_LINKS, pool=subject.pool, path=subject.path
    )


MOST_HOLES = 1 << 40
"""
The most bytes of a file that may be holes. They take no room on the host that makes them, but cost
time on every host that hashes them: some minutes for a terabyte.
"""


def require_few_holes(length: int, subject: Subject) -> None:
    """
    :param length: bytes of a file that are holes
    :raises IntegrityError: they are too many: hashing them would take hours
    """
    if length > MOST_HOLES:
        raise IntegrityError(
            f"{subject.text} has {length} bytes of holes, more than the {MOST_HOLES} that are read",
            pool=subject.pool,
            path=subject.path,
            hint=(
                "find out who put it there; of an image, a copy by qemu-img convert is as long as"
                " its disk needs"
            ),
        )


def wrong_length(subject: Subject, expected: int, actual: int) -> IntegrityError:
    """:returns: the error for a file that is longer or shorter than it must be"""
    return IntegrityError(
        f"{subject.text} should have {expected} bytes, and has {actual}",
        pool=subject.pool,
        path=subject.path,
    )


def _available(descriptor: int | None) -> int:
    """
    :returns: bytes that this account may still write on the file system of the open file; 0 if that
        is unknown, since this is only used on an error path
    """
    if descriptor is None:
        return 0
    left = os.fstatvfs(descriptor)
    return left.f_bavail * left.f_frsize
