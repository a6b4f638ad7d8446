"""
Who may do what with a working image: its owner, group, mode, ACL, extended attributes and security
label.

A set and a get that overwrites put a new file in the place of the user's. The new file gets all of
this from the old one, under its temporary name: it is created for us alone and widened last, so
that it is never open to more accounts than the old one was. The file that becomes a state goes the
other way: it is closed first, and opened to the readers of the pool when it has lost its old name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from attrs import evolve, field, frozen

from statepool.beneath import Descriptor, beside
from statepool.errors import AccessDenied, InUse, about_file
from statepool.leases import held_lease, try_lease
from statepool.pools.layout import READ_ONLY
from statepool.pools.log import random_nonce
from statepool.qcow2.files import is_ours
from statepool.transports.failures import Subject, translated

OURS_ALONE = 0o600
"""The mode of a file that is not finished."""

_ACL = "system.posix_acl_access"
_OF_USERS = ("user.", "security.", "trusted.", "btrfs.", _ACL, "system.nfs4_acl")
"""
The attributes that stay with a name (``man 7 xattr``). Others, such as ``lustre.``, are a file
system's own notes on one file.
"""

_OF_ONE_FILE = (
    "user.overlay.",
    "security.ima",
    "security.evm",
    "security.capability",
    "trusted.overlay.",
    "trusted.glusterfs",
    "trusted.gfid",
)
"""
Among these, what says something of the content, or is the note of a file system that lies above
this one.
"""

_NO_ATTRIBUTES = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODATA})
"""What the kernel says where a file system has no extended attributes, or has one no more."""

_NO_ANONYMOUS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""What opening with O_TMPFILE says where there is no such thing (``man 2 open``)."""

_MAY_NOT = frozenset({errno.EPERM, errno.EACCES, errno.EINVAL})
"""
What the kernel says to an account that gives a file away; EINVAL for an owner that does not exist
in this user namespace.
"""


@frozen
class Access:
    """
    Who may do what with a file.

    :param uid: its owner
    :param gid: its group
    :param mode: its permissions, without the bits that only mean something for programs
    :param attributes: its extended attributes, the ACL and the security label among them
    """

    uid: int
    gid: int
    mode: int
    attributes: Mapping[str, bytes] = field(factory=dict)

    @classmethod
    def of(cls, file: int | Path) -> Access:
        """
        :param file: a descriptor, or a path; a link there is followed
        :returns: who may do what with it
        """
        found = os.stat(file)
        return cls(
            found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode) & 0o777, _attributes(file)
        )

    @classmethod
    def at(cls, path: Path) -> Access | None:
        """
        :returns: who may do what with the file at a path, or that a link there leads to; None if
            there is none
        """
        return cls.of(path) if path.is_file() else None

    def give(self, descriptor: int, path: Path) -> None:
        """
        Give a file all this. It must be one that only this account may open so far.

        :param descriptor: of the file
        :param path: whose place it takes, for messages
        :raises AccessDenied: this account may not; the file is not open to anybody else yet
        """
        with self._giving(path):
            now = Access.of(descriptor)
            if now.mode & ~self.mode:
                os.fchmod(descriptor, now.mode & self.mode)
            if now.gid != self.gid:
                os.fchown(descriptor, -1, self.gid)
            if _ACL in now.attributes and _ACL not in self.attributes:
                os.removexattr(descriptor, _ACL)  # from the default ACL of the directory
            for name, value in self.attributes.items():
                if now.attributes.get(name) != value:
                    os.setxattr(descriptor, name, value)
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != self.mode:
                os.fchmod(descriptor, self.mode)
            if now.uid != self.uid:
                os.fchown(descriptor, self.uid, -1)

    def require_givable(self, path: Path) -> None:
        """
        Try it on a file without a name, before anything is changed.

        :param path: whose place a new file is to take
        :raises AccessDenied: this account may not do it
        """
        if (self.uid, self.gid) == (os.geteuid(), os.getegid()) and not self.attributes:
            return
        with self._giving(path):
            opened = _open_without_name(path.parent)
        with opened as descriptor:
            self.give(descriptor, path)

    @contextmanager
    def _giving(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _MAY_NOT:
                raise translated(
                    error, "make the file that replaces", Subject(str(path), path=str(path))
                ) from error
            other = (
                f"as {_name_of(self.uid)}"
                if self.uid != os.geteuid()
                else "as a member of that group"
            )
            raise AccessDenied(
                f"{path} is {_name_of(self.uid)}'s, with the group {self.gid} and the mode"
                f" {self.mode:03o}, and this account may not make another file in its place that"
                f" is: {os.strerror(error.errno or 0)}",
                path=str(path),
                hint=(
                    f"do it as root, or {other}; or go on with a file of your own: a copy of this"
                    " one, or another name"
                ),
            ) from error


def only_ours(path: str, flags: int) -> int:
    """
    Open a file for :func:`open`, which nobody else may open if it is new. :returns: its descriptor
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, OURS_ALONE)


def close_to_others(descriptor: int) -> bool:
    """
    Let nobody write to a file any more that becomes a state, nor anybody read it who could not
    before: it still has its old name.

    :returns: whether it is so now: it may have been given to another account meanwhile
    """
    found = os.fstat(descriptor)
    try:
        if found.st_uid != os.geteuid():
            os.fchown(descriptor, os.geteuid(), -1)
        os.fchmod(
            descriptor, READ_ONLY if found.st_mode & READ_ONLY == READ_ONLY else READ_ONLY & 0o700
        )
    except PermissionError:
        return False
    return True


def open_to_readers(descriptor: int) -> None:
    """
    Let all read a file that is a state, and has lost its old name; and nothing of what its owner
    had noted on it stays.
    """
    noted = [name for name in _attributes(descriptor) if name == _ACL or name.startswith("user.")]
    if noted:  # of a file that it may not write to, not even its owner may remove them
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | stat.S_IWUSR)
    for name in noted:
        os.removexattr(descriptor, name)
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != READ_ONLY:
        os.fchmod(descriptor, READ_ONLY)


def require_same(working: Path, descriptor: int) -> None:
    """
    Look whether a file still has its name, before another one takes that.

    :param descriptor: of the file
    :raises InUse: another file has the name by now
    """
    there = beside(working).stat()
    if there is None or not os.path.samestat(there, os.fstat(descriptor)):
        raise InUse(
            f"{working} was moved, or replaced by another file, while it was read",
            path=str(working),
            hint="set it once more, by the name it has now",
        )


def require_replaceable(working: Path, descriptor: int) -> None:
    """
    Refuse a file whose name no overlay could get, before there is a state that it would have to
    stand on.

    :param descriptor: of the file, open for writing
    :raises AccessDenied: it is in a directory such as ``/tmp``, in which only the owner of a file
        may replace it, and belongs to another account; or this account cannot give another file to
        its owner and group
    """
    above = os.stat(working.parent)
    if above.st_mode & stat.S_ISVTX and above.st_uid != os.geteuid() and not is_ours(descriptor):
        raise about_file(
            AccessDenied(
                f"{working} belongs to another account, and only that may replace it in this"
                " directory",
                path=str(working),
                hint="copy it to a directory of your own, and set the copy",
            )
        )
    Access.of(descriptor).require_givable(working)


def require_closed(working: Path, descriptor: int, *, running: bool) -> None:
    """
    Let nobody write to a file any more that becomes a state.

    :param running: a machine has it open, below the image that it writes to, so that there is no
        lease to ask
    :raises AccessDenied: it has been given to another account
    :raises InUse: an account that could write to it has asked to: what was opened before the file
        was closed stays open
    """
    could_write = os.fstat(descriptor).st_uid != os.geteuid() or bool(
        os.fstat(descriptor).st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )
    if not close_to_others(descriptor):
        raise AccessDenied(
            f"{working} has been given to another account",
            path=str(working),
            hint="set it as that account, or as root",
        )
    if (
        could_write
        and not running
        and held_lease(descriptor) == fcntl.F_UNLCK
        and try_lease(descriptor, fcntl.F_WRLCK) is not None
    ):
        raise InUse(
            f"another process wants to write to {working}",
            path=str(working),
            hint="set it when nobody writes to it",
        )


def restored(access: Access, uid: int, mode: int) -> Access:
    """
    :param access: of a file that was closed to others
    :param uid: whose it was; -1 if that did not change
    :param mode: the permissions it had
    :returns: what it was before
    """
    return evolve(access, uid=access.uid if uid == -1 else uid, mode=mode & 0o777)


def give_back_to(descriptor: int, uid: int, mode: int) -> None:
    """
    Undo :func:`close_to_others`, unless the file has been given to another account meanwhile.

    :param uid: whose it was; -1 if that did not change
    """
    with suppress(PermissionError):
        os.fchmod(descriptor, mode)
        if uid not in (-1, os.fstat(descriptor).st_uid):
            os.fchown(descriptor, uid, -1)


def _attributes(file: int | Path) -> dict[str, bytes]:
    found = {}
    try:
        for name in os.listxattr(file):
            if name.startswith(_OF_USERS) and not name.startswith(_OF_ONE_FILE):
                found[name] = os.getxattr(file, name)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
    return found


def _open_without_name(directory: Path) -> Descriptor:
    try:
        return Descriptor(os.open, directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, OURS_ALONE)
    except OSError as error:
        if error.errno not in _NO_ANONYMOUS_FILES:
            raise
    path = directory / f".statepool-{random_nonce()}.tmp"
    try:
        return Descriptor(
            os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, OURS_ALONE
        )
    finally:
        path.unlink(missing_ok=True)


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the account {uid}"
