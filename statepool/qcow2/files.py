"""Open files from other accounts and tools: only regular files, and never through a link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from statepool.beneath import Beneath, Descriptor
from statepool.errors import (
    AccessDenied,
    InUse,
    MissingFile,
    NoSpace,
    StatePoolError,
    TransportError,
    UnsafeImage,
    about_file,
)

REASONS = {
    "regular-file": (
        "An image is a regular file: a FIFO would wait forever, a device or a link can lead"
        " anywhere."
    ),
}
"""The checks of this module, each with its reason."""


_OWNS_ALL = 1 << 3
"""
CAP_FOWNER in ``linux/capability.h``: the right to do to all files what only their owners may do.
"""

_GIVES_AWAY = 1 << 0
"""CAP_CHOWN of the same file: the right to give a file to another account."""


def refusal(
    check: str, what: str, problem: str, *, hint: str | None = None, path: str | None = None
) -> UnsafeImage:
    """
    :param check: the name of the check that failed
    :param what: the image, for the message
    :param problem: the problem, as the end of a sentence
    :returns: the error to raise
    """
    return UnsafeImage(
        f"{what} is refused by the safety check {check!r}: {problem}",
        check=check,
        hint=hint,
        path=path,
    )


def translated(error: OSError, path: Path | str | Beneath, doing: str) -> StatePoolError:
    """
    :param error: the error of the system
    :param path: the file concerned
    :param doing: the operation that was tried, such as ``open``
    :returns: the same as an error of ``statepool.errors``; the caller raises it ``from`` the
        original
    """
    return about_file(_translated(error, str(path), doing))


def _translated(error: OSError, name: str, doing: str) -> StatePoolError:
    if isinstance(error, FileNotFoundError):
        return MissingFile(f"cannot {doing} {name}: there is no such file or directory", path=name)
    if isinstance(error, PermissionError):
        hint = "look at the permissions of the file and its directory"
        if error.errno == errno.EPERM:
            hint = (
                "no permission would help: the file or its directory may be immutable (lsattr), or"
                " a sandbox may forbid it (seccomp)"
            )
        return AccessDenied(f"cannot {doing} {name}: {error.strerror}", path=name, hint=hint)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"cannot {doing} {name}: {error.strerror}", path=name, hint="free some space there"
        )
    return TransportError(f"cannot {doing} {name}: {error.strerror or error}", path=name)


def is_ours(descriptor: int) -> bool:
    """
    :returns: whether this account may change the mode of a file, as its owner or as root. This is
        not tried, since that would already be a change.
    """
    return os.fstat(descriptor).st_uid == os.geteuid() or bool(_capabilities() & _OWNS_ALL)


def may_become_ours(descriptor: int) -> bool:
    """:returns: whether a file belongs to this account, or this account may take ownership of it"""
    needed = _OWNS_ALL | _GIVES_AWAY
    return os.fstat(descriptor).st_uid == os.geteuid() or _capabilities() & needed == needed


def _capabilities() -> int:
    """
    :returns: the capabilities of this thread (``CapEff`` in ``man 5 proc``); none if the system
        does not tell
    """
    try:
        with open("/proc/thread-self/status", "rb") as file:
            return next(
                (int(line.split()[1], 16) for line in file if line.startswith(b"CapEff:")), 0
            )
    except FileNotFoundError:
        return 0


def open_regular(
    path: Path | str | Beneath, flags: int = os.O_RDONLY, *, wait: bool = True
) -> Descriptor:
    """
    Open a file without waiting for a FIFO's other end, following a link, or accepting anything but
    a regular file.

    :param flags: as for :func:`os.open`
    :param wait: whether to wait for a process that holds a lease on the file, which the kernel ends
        after some seconds (``/proc/sys/fs/lease-break-time``); else such a file raises
        :class:`BlockingIOError`
    :returns: the open file
    :raises UnsafeImage: check ``regular-file``
    :raises MissingFile: there is no such file
    :raises AccessDenied: permissions do not allow opening it like this
    """
    try:
        descriptor = _open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except BlockingIOError:
        if not wait:
            raise
        descriptor = _open_patiently(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and os.path.islink(path):
            raise refusal(
                "regular-file",
                str(path),
                "it is a symbolic link",
                hint="name the file that it leads to",
                path=str(path),
            ) from error
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV):
            raise _irregular(path) from error
        raise translated(error, path, "open") from error
    _require_regular(descriptor.number, path)
    return descriptor


def open_same(
    path: Path | str | Beneath, made: os.stat_result, flags: int = os.O_RDONLY
) -> Descriptor:
    """
    Open a file that was made a moment ago, as :func:`open_regular` does.

    :param made: its status then
    :raises InUse: another file has its name now
    """
    descriptor = open_regular(path, flags)
    if os.path.samestat(os.fstat(descriptor.number), made):
        return descriptor
    raise InUse(
        f"{path} was replaced by another file as soon as it was made",
        path=str(path),
        hint="look who may write to its directory",
    )


def _open(path: Path | str | Beneath, flags: int) -> Descriptor:
    return (
        path.open(flags)
        if isinstance(path, Beneath)
        else Descriptor(os.open, path, flags | os.O_CLOEXEC)
    )


def _open_patiently(path: Path | str | Beneath, flags: int) -> Descriptor:
    # Without O_NONBLOCK, opening a FIFO would wait as well. So the file is pinned first, checked,
    # and then opened through the pin.
    try:
        with _open(path, os.O_PATH | os.O_NOFOLLOW) as pin:
            _require_regular(pin, path)
            return Descriptor(os.open, f"/proc/self/fd/{pin}", flags | os.O_CLOEXEC)
    except OSError as error:
        if isinstance(error, StatePoolError):
            raise
        raise translated(error, path, "open") from error


def _require_regular(descriptor: int, path: Path | str | Beneath) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise _irregular(path)


def _irregular(path: Path | str | Beneath) -> UnsafeImage:
    return refusal("regular-file", str(path), "it is not a regular file", path=str(path))
