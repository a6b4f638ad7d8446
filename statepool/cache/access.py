"""
The access rights of a working image: its owner, group, mode, ACL, extended attributes and security
label.

A set, and a get that overwrites, replace the user's file by a new one. The new file gets all access
rights of the old one while it has its temporary name. It is created for this account alone, and
opened to other accounts last, so that it is never open to more accounts than the old file was. The
file that becomes a state is treated in the opposite order: it is closed first, and opened to the
readers of the pool when it has lost its old name.
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
The attributes that are carried over to the new file of a name (``man 7 xattr``). Other attributes,
such as ``lustre.``, are a file system's own notes on one file.
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
The exceptions: attributes that depend on the content, or are notes of a file system on top of this
one.
"""

_NO_ATTRIBUTES = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODATA})
"""
The errors of the kernel where a file system has no extended attributes, or an attribute was
removed.
"""

_NO_ANONYMOUS_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
"""The errors of opening with O_TMPFILE where it is not supported (``man 2 open``)."""

_MAY_NOT = frozenset({errno.EPERM, errno.EACCES, errno.EINVAL})
"""
The errors of the kernel for an account that may not change the owner of a file; EINVAL for an owner
that does not exist in this user namespace.
"""


@frozen
class Access:
    """
    The access rights of a file.

    :param uid: its owner
    :param gid: its group
    :param mode: its permissions, without the bits that only matter for programs
    :param attributes: its extended attributes, among them the ACL and the security label
    """

    uid: int
    gid: int
    mode: int
    attributes: Mapping[str, bytes] = field(factory=dict)

    @classmethod
    def of(cls, file: int | Path) -> Access:
        """
        :param file: a descriptor, or a path; a symbolic link is followed
        :returns: its access rights
        """
        found = os.stat(file)
        return cls(
            found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode) & 0o777, _attributes(file)
        )

    @classmethod
    def at(cls, path: Path) -> Access | None:
        """
        :returns: the access rights of the file at a path, or to which a link there leads; None if
            there is no file
        """
        return cls.of(path) if path.is_file() else None

    def give(self, descriptor: int, path: Path) -> None:
        """
        Give a file these access rights. So far, only this account may be able to open it.

        :param descriptor: of the file
        :param path: the file that it replaces, for messages
        :raises AccessDenied: this account may not do it; the file is not open to other accounts yet
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
        Check that :meth:`give` can succeed: try it on a file without a name, before anything is
        changed.

        :param path: the file that a new file is to replace
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
    Open a file, as the opener of :func:`open`; if the file is new, no other account may open it.

    :returns: its descriptor
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, OURS_ALONE)


def close_to_others(descriptor: int) -> bool:
    """
    Withdraw the write permission of all accounts for a file that becomes a state. No account that
    could not read the file before gets read permission: the file still has its old name.

    :returns: whether this succeeded: the file may have been given to another account meanwhile
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
    Let all accounts read a file that is a state and has lost its old name, and remove its owner's
    notes on it.
    """
    noted = [name for name in _attributes(descriptor) if name == _ACL or name.startswith("user.")]
    if noted:  # without write permission, not even the owner of a file may remove them
        os.fchmod(descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) | stat.S_IWUSR)
    for name in noted:
        os.removexattr(descriptor, name)
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != READ_ONLY:
        os.fchmod(descriptor, READ_ONLY)


def require_same(working: Path, descriptor: int) -> None:
    """
    Check that a file still has its name, before another file takes the name.

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
    Refuse a file that an overlay could not replace, before the state exists that would back the
    overlay.

    :param descriptor: of the file, open for writing
    :raises AccessDenied: the file belongs to another account, and is in a directory such as
        ``/tmp``, in which only the owner of a file may replace it; or this account cannot give
        another file to its owner and group
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
    Close a file that becomes a state to all writers, and check that no other process writes to it.

    :param running: a machine has the file open, below the image to which it writes, so there is no
        lease to check
    :raises AccessDenied: the file has been given to another account
    :raises InUse: another process that could write to the file wants to: a descriptor that was
        opened before stays open
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
    :param access: of a file that was closed to other accounts
    :param uid: its owner before; -1 if that did not change
    :param mode: its permissions before
    :returns: the access rights before
    """
    return evolve(access, uid=access.uid if uid == -1 else uid, mode=mode & 0o777)


def give_back_to(descriptor: int, uid: int, mode: int) -> None:
    """
    Undo :func:`close_to_others`, unless the file has been given to another account meanwhile.

    :param uid: its owner before; -1 if that did not change
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
