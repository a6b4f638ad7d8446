"""
Files beneath a directory, reached through a descriptor of that directory and never through a
symbolic link.

The one module that opens local paths in a pool or a cache. A path that is used by its name can lead
elsewhere by the time it is used, if another account may write to any directory on the way:
``O_NOFOLLOW`` guards its last part only. Here the directory itself is opened once, and the kernel
resolves everything else beneath that descriptor (``openat2(2)`` with ``RESOLVE_BENEATH`` and
``RESOLVE_NO_SYMLINKS``); what is done to a name, such as renaming it, is done relative to a
descriptor of its own directory. Kernels and sandboxes without that call get one ``openat(2)`` with
``O_NOFOLLOW`` for each part of a path.

Errors are those of the operating system (:class:`OSError`); ``ELOOP`` says that there is a symbolic
link.
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
"""Flags that open a directory as a place from which to go on, without reading it."""

NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})
"""
What the kernel says where a file cannot get a second name: the file system has none (exFAT, FAT,
SMB, some of FUSE), the file has too many, or it is another account's (``fs.protected_hardlinks``).
"""

_LOOK = os.O_PATH | os.O_NOFOLLOW
"""Flags that open whatever has a name, a symbolic link too, without waiting for it or waking it."""


_own = select.epoll.fromfd
_is_open = (0).__le__


class Descriptor:
    """
    An open file that closes itself at the latest with the last reference to it, whatever interrupts
    its user.

    Python runs the handler of a signal between a call and the use of its result, which is lost if
    the handler raises: a number that ``os.open`` has just returned would stay open. So the call is
    made here, by code in C that gives the number to an object in C before any handler can run. That
    is an ``epoll``, the only one which takes any descriptor, never looks at it, and closes it when
    it goes; ``__del__`` would be code of Python again.

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
        The descriptor; negative if it is closed, or could not be opened by a call that says so with
        a negative number.
        """
        self.written = True
        """Whether closing may still tell of something written that is lost."""

    def lent(self) -> Descriptor:
        """:returns: the same descriptor, for a borrower who closes what it gets: it stays open"""
        return _Lent(self)

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """
        Close it, once.

        :raises OSError: something that was written is lost, which a server of files may tell only
            now
        """
        if self._held:
            held, self.number = self._held.pop(), -1
            if not self.written:
                held.close()
                return
            try:
                # The kernel tells it of each number that is closed, and an epoll would not pass it
                # on. Again no code of Python is between the calls.
                any(map(os.close, map(os.dup, (held.fileno(),))))
            except OSError as error:
                if error.errno != errno.EMFILE:  # no number is left to ask with
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
    :param held: a descriptor of it, if it is open already; otherwise it is opened when it is first
        needed
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
        :returns: the directory itself, opened when it is first needed. The caller keeps it in a
            variable while it uses the number: another thread may open the directory anew, and a
            descriptor to which nothing refers is closed.
        :raises FileNotFoundError: there is none
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
        :returns: the directory in which ``path`` is, and its name there, for the calls of :mod:`os`
            that take both
        """
        above, _, name = path.rpartition("/")
        return self.open(above, DIRECTORY) if above else self.top().lent(), name

    def stat(self, path: str) -> os.stat_result:
        """:returns: the status of what has this name, which may be a symbolic link"""
        if path and "/" not in path and path != "..":
            # unless the directory was deleted, and has been made again
            with suppress(FileNotFoundError):
                top = self.top()
                return os.stat(path, dir_fd=top.number, follow_symlinks=False)
        found = self.open(path, _LOOK)
        try:
            return os.fstat(found.number)
        finally:
            found.close()

    def make_directory(self, path: str, mode: int) -> None:
        """Make a directory with exactly this mode; nothing happens if it is there."""
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
        Give something another name; what is there gives way, also where both are names of one file,
        of which ``rename(2)`` would keep two.
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
        Remove a directory with all that is in it, as far as this account may; nothing that a link
        leads to.
        """
        import shutil  # only here: it brings much with it

        place, name = self.place(path)
        with place as directory:
            shutil.rmtree(name, dir_fd=directory, ignore_errors=True)

    def symlink(self, text: str, path: str) -> None:
        """Make a symbolic link that holds ``text``."""
        place, name = self.place(path)
        with place as directory:
            os.symlink(text, name, dir_fd=directory)

    def readlink(self, path: str) -> str:
        """:returns: what a symbolic link holds"""
        place, name = self.place(path)
        with place as directory:
            return os.readlink(name, dir_fd=directory)

    def name(self, descriptor: int, path: str) -> None:
        """Give a file that was opened without one (``O_TMPFILE``) a name."""
        place, name = self.place(path)
        with place as directory:
            # linkat with AT_SYMLINK_FOLLOW, which is how such a file gets a name (man 2 open).
            os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=directory, follow_symlinks=True)

    def close(self) -> None:
        """Let go of the directory; the next use opens it anew."""
        self._root = None


class Beneath(os.PathLike[str]):
    """
    A file beneath a :class:`Tree`. As a path it is for messages, and for programs such as QEMU that
    only know paths; we open it by :meth:`open`.

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
        :returns: the status of what has this name, which may be a symbolic link; None if there is
            nothing
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
    Give a file another name that must be free, in one step (``renameat2(2)`` with
    ``RENAME_NOREPLACE``).

    :raises FileExistsError: it is not
    :raises OSError: ``EOPNOTSUPP``: the kernel, the C library or the file system has no such thing
    """
    import ctypes  # only here: where a file system has no hard links

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
    Give a finished file a name that must be free, whole from the first moment on. Where the file
    system has no hard links it loses its old name.

    :raises FileExistsError: the name is not free
    :raises OSError: ``EOPNOTSUPP``: the file system can do neither
    """
    try:
        link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        rename_new(source, target)


def settle(source: Beneath, target: Beneath) -> None:
    """
    Give a finished file a name that must be free, on any file system: at worst there is an empty
    file of that name for a moment, which holds its place. It may lose its old name.

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
    :returns: a file of the user's, such as a working image, with its directory pinned: what is done
        to its name is done in that directory
    """
    above, name = os.path.split(os.path.abspath(path))
    return Beneath(Tree(above), name)


def same_file(one: Beneath, other: Beneath) -> bool:
    """:returns: whether two names are there, and are those of one file"""
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
    Open what is beneath a directory that is open.

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
        # A file that may not be opened is also EPERM, as an immutable one is for writing: the way
        # without the call says the same of it.
        elif code == errno.EPERM:
            break
        elif code != errno.EINTR:
            raise OSError(code, os.strerror(code), path)
    return _open_by_parts(directory, path or ".", flags, mode)


_calls = {"openat2"}
"""
Empty once the kernel has said that it does not know the call: kernels before 5.6, and sandboxes,
some of which say EPERM.
"""


def _errno() -> int:
    import ctypes  # nothing else here takes as long to import

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
    # The kernel refuses a mode where nothing is created. O_TMPFILE contains O_DIRECTORY. Without
    # O_NOFOLLOW a link at the end is ELOOP, too.
    creates = flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE
    return _HOW.pack(flags | os.O_CLOEXEC, mode if creates else 0, _RESOLVE)


def _open_by_parts(directory: int, path: str, flags: int, mode: int) -> Descriptor:
    *above, last = path.split("/")
    held = Descriptor(os.dup, directory)
    for part in above:
        # the one before closes when its last reference goes
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
        # With O_DIRECTORY a symbolic link is only "no directory"; openat2 tells the two apart.
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
