"""
Files beneath a directory, reached through a descriptor of that directory and never through a
symbolic link.

This is the only module that opens local paths in a pool or a cache. If another account may write to
any directory on the way, a checked path can lead elsewhere by the time it is used. ``O_NOFOLLOW``
protects only its last part. Here the directory itself is opened once, and the kernel resolves
everything else beneath that descriptor (``openat2(2)`` with ``RESOLVE_BENEATH`` and
``RESOLVE_NO_SYMLINKS``); an operation on a name, such as a rename, is done relative to a descriptor
of its own directory. Kernels and sandboxes without that call get one ``openat(2)`` with
``O_NOFOLLOW`` for each part of a path.

Errors are those of the operating system (:class:`OSError`); ``ELOOP`` means that there is a
symbolic link.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import select
import stat
import struct
import sys
from collections.abc import Callable
from contextlib import suppress

_ENCODING, _ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()

_OPENAT2 = 437
"""The number of the system call, the same on every architecture (``arch/*/kernel/syscalls``)."""

_RESOLVE = 0x08 | 0x04
"""
``RESOLVE_BENEATH`` and ``RESOLVE_NO_SYMLINKS`` in ``linux/openat2.h``; the latter excludes the
links of ``/proc`` as well.
"""

_HOW = struct.Struct("=QQQ")
"""``struct open_how``: flags, mode, resolve."""

DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
"""Flags that open a directory as the start of further calls, without reading it."""

NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})
"""
The errors of the kernel where a file cannot get a second name: the file system does not support it
(exFAT, FAT, SMB, some of FUSE), the file has too many, or it belongs to another account
(``fs.protected_hardlinks``).
"""

_LOOK = os.O_PATH | os.O_NOFOLLOW
"""
Flags that open any kind of file, also a symbolic link, without waiting for it or triggering it.
"""


_own = select.epoll.fromfd
_is_open = (0).__le__


class Descriptor:
    """
    An open file that is closed at the latest with the last reference to it, whatever interrupts its
    user.

    Python may run a signal handler between a call and the use of its result. If the handler raises,
    the result is lost: a descriptor that ``os.open`` has just returned would stay open. So the call
    is made here, by C code that passes the descriptor to a C object before any handler can run.
    This object is an ``epoll``, the only one that takes any descriptor, never reads it, and closes
    it when it is destroyed. ``__del__`` would be Python code again.

    :param opening: a function in C that returns a descriptor, which belongs to this object from
        then on
    :param arguments: its arguments
    """

    __slots__ = ("_held", "number", "written")

    def __init__(self, opening: Callable[..., int], *arguments: object) -> None:
        self._held: list[select.epoll] = []
        self._held.extend(map(_own, filter(_is_open, itertools.starmap(opening, (arguments,)))))
        self.number = self._held[0].fileno() if self._held else -1
        """
        The descriptor; negative if it is closed, or if the call reports a failure to open by a
        negative number.
        """
        self.written = True
        """Whether closing it may still report a loss of written data."""

    def lent(self) -> Descriptor:
        """:returns: the same descriptor, for a borrower that closes what it gets: it stays open"""
        return _Lent(self)

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """
        Close the descriptor, once.

        :raises OSError: written data is lost, which a file server may report only now
        """
        if self._held:
            held, self.number = self._held.pop(), -1
            if not self.written:
                held.close()
                return
            try:
                # The kernel reports it for each number that is closed, and an epoll would not pass
                # it on. Again, no Python code runs between the calls.
                any(map(os.close, map(os.dup, (held.fileno(),))))
            except OSError as error:
                if error.errno != errno.EMFILE:  # no free number for a duplicate
                    raise


class _Lent(Descriptor):
    __slots__ = ("_owner",)

    def __init__(self, owner: Descriptor) -> None:
        self._owner, self._held, self.number, self.written = owner, [], owner.number, False


class Tree:
    """
    A directory of this host with everything beneath it.

    :param root: its path, which may lead through symbolic links: an account that may rename in the
        directories above a pool is trusted with all of it
    :param held: a descriptor of it, if it is open already; otherwise it is opened at first use
    """

    def __init__(self, root: str | os.PathLike[str], *, held: Descriptor | None = None) -> None:
        self.root = os.fspath(root) or "/"
        self._root = held

    def __str__(self) -> str:
        return self.root

    def __getstate__(self) -> str:
        return self.root

    def __setstate__(self, root: str) -> None:
        self.root, self._root = root, None

    def top(self) -> Descriptor:
        """
        :returns: the directory itself, opened at first use. The caller must keep it in a variable
            while it uses the number: another thread may open the directory anew, and a descriptor
            to which nothing refers is closed.
        :raises FileNotFoundError: the directory does not exist
        """
        if (held := self._root) is None:
            held = self._root = Descriptor(os.open, self.root, DIRECTORY)
        return held

    def open(self, path: str, flags: int, mode: int = 0o600) -> Descriptor:
        """
        :param path: relative; ``""`` is the directory itself
        :param flags: as for :func:`os.open`; ``O_CLOEXEC`` is added, and a symbolic link is never
            followed
        :returns: the open file
        """
        top = self._root or self.top()
        try:
            return open_at(top.number, path, flags, mode)
        except FileNotFoundError:
            if os.fstat(top.number).st_nlink:
                raise
        self._root = None  # the directory was deleted, and may have been made again
        top = self.top()
        return open_at(top.number, path, flags, mode)

    def place(self, path: str) -> tuple[Descriptor, str]:
        """
        :returns: the directory of ``path``, and the name there, for those calls of :mod:`os` that
            take both
        """
        above, _, name = path.rpartition("/")
        return self.open(above, DIRECTORY) if above else self.top().lent(), name

    def stat(self, path: str) -> os.stat_result:
        """:returns: the status of the file with this name, which may be a symbolic link"""
        if path and "/" not in path and path != "..":
            # unless the directory was deleted and made again
            with suppress(FileNotFoundError):
                top = self.top()
                return os.stat(path, dir_fd=top.number, follow_symlinks=False)
        found = self.open(path, _LOOK)
        try:
            return os.fstat(found.number)
        finally:
            found.close()

    def make_directory(self, path: str, mode: int) -> None:
        """Make a directory with exactly this mode, if there is none."""
        place, name = self.place(path)
        with place as directory:
            try:
                os.mkdir(name, 0o700, dir_fd=directory)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                    raise
                return
            with open_at(directory, name, os.O_RDONLY | os.O_DIRECTORY) as made:
                os.fchmod(made, mode)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name."""
        (before, one), (after, other) = self.place(source), self.place(target)
        with before as old, after as new:
            os.link(one, other, src_dir_fd=old, dst_dir_fd=new, follow_symlinks=False)

    def rename(self, source: str, target: str) -> None:
        """
        Rename a file. An existing target is replaced, even if both are names of one file, where
        ``rename(2)`` would keep both.
        """
        (before, one), (after, other) = self.place(source), self.place(target)
        with before as old, after as new:
            if source != target and _same(old, one, new, other):
                os.unlink(one, dir_fd=old)
            else:
                os.rename(one, other, src_dir_fd=old, dst_dir_fd=new)

    def remove(self, path: str) -> bool:
        """:returns: whether there was such a file or link"""
        try:
            place, name = self.place(path)
            with place as directory:
                os.unlink(name, dir_fd=directory)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def remove_all(self, path: str) -> None:
        """
        Remove a directory with its content, as far as this account may. What links lead to stays.
        """
        import shutil  # slow to import, and needed only here

        place, name = self.place(path)
        with place as directory:
            shutil.rmtree(name, dir_fd=directory, ignore_errors=True)

    def symlink(self, text: str, path: str) -> None:
        """Make a symbolic link that holds ``text``."""
        place, name = self.place(path)
        with place as directory:
            os.symlink(text, name, dir_fd=directory)

    def readlink(self, path: str) -> str:
        """:returns: the text of a symbolic link"""
        place, name = self.place(path)
        with place as directory:
            return os.readlink(name, dir_fd=directory)

    def name(self, descriptor: int, path: str) -> None:
        """Give a name to a file that was opened without one (``O_TMPFILE``)."""
        place, name = self.place(path)
        with place as directory:
            # This is linkat with AT_SYMLINK_FOLLOW, which gives such a file a name (man 2 open).
            os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=directory, follow_symlinks=True)

    def close(self) -> None:
        """Close the directory; the next use opens it again."""
        self._root = None


class Beneath(os.PathLike[str]):
    """
    A file beneath a :class:`Tree`. Its path is for messages, and for programs such as QEMU that
    only take paths; our own code uses :meth:`open`.

    :param tree: the directory
    :param path: relative to it
    """

    __slots__ = ("path", "tree")

    def __init__(self, tree: Tree, path: str) -> None:
        self.tree = tree
        self.path = path

    def __fspath__(self) -> str:
        return f"{self.tree.root.rstrip('/')}/{self.path}"

    __str__ = __fspath__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Beneath) and os.fspath(self) == os.fspath(other)

    def __hash__(self) -> int:
        return hash(os.fspath(self))

    def __repr__(self) -> str:
        return f"Beneath({str(self)!r})"

    def open(self, flags: int, mode: int = 0o600) -> Descriptor:
        """:returns: the open file"""
        return self.tree.open(self.path, flags, mode)

    def stat(self) -> os.stat_result | None:
        """
        :returns: the status of the file with this name, which may be a symbolic link; None if there
            is none
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            return self.tree.stat(self.path)
        return None

    def remove(self) -> bool:
        """:returns: whether there was such a file or link"""
        return self.tree.remove(self.path)


def link(source: Beneath, target: Beneath) -> None:
    """Give a file a second name, in another directory."""
    (before, one), (after, other) = source.tree.place(source.path), target.tree.place(target.path)
    with before as old, after as new:
        os.link(one, other, src_dir_fd=old, dst_dir_fd=new, follow_symlinks=False)


def rename_new(source: Beneath, target: Beneath) -> None:
    """
    Rename a file atomically to a name that must be free (``renameat2(2)`` with
    ``RENAME_NOREPLACE``).

    :raises FileExistsError: the name is not free
    :raises OSError: ``EOPNOTSUPP``: the kernel, the C library or the file system does not support
        it
    """
    import ctypes  # only for file systems without hard links

    (before, one), (after, other) = source.tree.place(source.path), target.tree.place(target.path)
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    with before as old, after as new:
        if call is not None and call(old, os.fsencode(one), new, os.fsencode(other), 1) == 0:
            return
        code = ctypes.get_errno() if call is not None else errno.ENOSYS
    code = errno.EOPNOTSUPP if code in (errno.EINVAL, errno.ENOSYS) else code
    raise OSError(code, os.strerror(code), os.fspath(target))


def link_or_rename(source: Beneath, target: Beneath) -> None:
    """
    Give a finished file a name that must be free. The file appears under it whole. Where the file
    system has no hard links, the file loses its old name.

    :raises FileExistsError: the name is not free
    :raises OSError: ``EOPNOTSUPP``: the file system supports neither links nor such a rename
    """
    try:
        link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        rename_new(source, target)


def settle(source: Beneath, target: Beneath) -> None:
    """
    Give a finished file a name that must be free, on any file system. At worst, an empty file holds
    the name for a moment. The file may lose its old name.

    :raises FileExistsError: the name is not free
    """
    try:
        link_or_rename(source, target)
        return
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    target.open(os.O_WRONLY | os.O_CREAT | os.O_EXCL).close()
    try:
        (before, one), (after, other) = (
            source.tree.place(source.path),
            target.tree.place(target.path),
        )
        with before as old, after as new:
            os.rename(one, other, src_dir_fd=old, dst_dir_fd=new)
    except BaseException:
        target.remove()
        raise


def beside(path: str | os.PathLike[str]) -> Beneath:
    """
    :returns: a file of the user, such as a working image, with its directory held open: operations
        on its name happen in that directory
    """
    above, name = os.path.split(os.path.abspath(path))
    return Beneath(Tree(above), name)


def same_file(one: Beneath, other: Beneath) -> bool:
    """:returns: whether two names exist and belong to the same file"""
    first, second = one.stat(), other.stat()
    return first is not None and second is not None and os.path.samestat(first, second)


def _same(old: int, one: str, new: int, other: str) -> bool:
    try:
        there = os.stat(other, dir_fd=new, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.stat(one, dir_fd=old, follow_symlinks=False), there)


def open_at(directory: int, path: str, flags: int, mode: int = 0) -> Descriptor:
    """
    Open a path beneath a directory that is open.

    :param directory: its descriptor
    :param path: relative to it; ``""`` is the directory itself
    :param flags: as for :func:`os.open`; ``O_CLOEXEC`` is added, and a symbolic link is never
        followed
    :returns: the open file
    """
    while _calls:
        opened = Descriptor(
            _syscall(),
            _OPENAT2,
            directory,
            path.encode(_ENCODING, _ERRORS) or b".",
            _how(flags, mode),
            _HOW.size,
        )
        if opened.number >= 0:
            opened.written = bool(flags & (os.O_WRONLY | os.O_RDWR))
            return opened
        code = _errno()
        if code == errno.ENOSYS:
            _calls.clear()
        # EPERM can also mean that the file may not be opened, for example an immutable one for
        # writing: then the fallback gives the same error.
        elif code == errno.EPERM:
            break
        elif code != errno.EINTR:
            raise OSError(code, os.strerror(code), path)
    return _open_by_parts(directory, path or ".", flags, mode)


_calls = {"openat2"}
"""
The new system calls that can be used. It is empty once the kernel has refused the call: kernels
before 5.6 do, and sandboxes, some of them with EPERM.
"""


def _errno() -> int:
    import ctypes  # slower to import than anything else here

    return ctypes.get_errno()


@functools.cache
def _syscall() -> Callable[..., int]:
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).syscall
    call.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    call.restype = ctypes.c_long
    return call


@functools.cache
def _how(flags: int, mode: int) -> bytes:
    # The kernel refuses a mode if nothing is created. O_TMPFILE contains O_DIRECTORY. Without
    # O_NOFOLLOW, a link at the end gives ELOOP, too.
    creates = flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE
    return _HOW.pack(flags | os.O_CLOEXEC, mode if creates else 0, _RESOLVE)


def _open_by_parts(directory: int, path: str, flags: int, mode: int) -> Descriptor:
    *above, last = path.split("/")
    held = Descriptor(os.dup, directory)
    for part in above:
        # the previous one is closed with its last reference
        held = _open_part(held.number, part, DIRECTORY, 0)
    with held as place:
        return _open_part(place, last, flags, mode)


def _open_part(directory: int, name: str, flags: int, mode: int) -> Descriptor:
    if name == "..":
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), name)
    try:
        opened = Descriptor(
            functools.partial(os.open, dir_fd=directory),
            name,
            flags | os.O_CLOEXEC | os.O_NOFOLLOW,
            mode,
        )
    except NotADirectoryError as error:
        # With O_DIRECTORY, a symbolic link only gives ENOTDIR; openat2 distinguishes the two.
        if _is_link(directory, name):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name) from error
        raise
    if flags & (os.O_PATH | os.O_NOFOLLOW) == os.O_PATH and stat.S_ISLNK(
        os.fstat(opened.number).st_mode
    ):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
    opened.written = bool(flags & (os.O_WRONLY | os.O_RDWR))
    return opened


def _is_link(directory: int, name: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
