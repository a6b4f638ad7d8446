"""
The directory of the service.

::

    <directory>/carts.sqlite            the database, unless it is elsewhere
    <directory>/<id>/<uid>/...          the files of a cart that is not bundled
    <directory>/<id>/<uid>.tar          one that is bundled; before, <uid>.tar.<shape>.part
    <directory>/cartuids/<uid>          a symbolic link to either, as Cartd has it
    <directory>/locks/<id>              held to fill or remove a cart, shared by downloads
    <directory>/shared/<name>.<digest>  a file of several carts, as another hard link to it

Everything in it belongs to the account of the service, and only that account may read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from statepool import AccessDenied, IntegrityError
from statepool.carts.database import Cart
from statepool.carts.sinks import NO_LINK, Sink

_INSIDE = ("locks", "cartuids", "shared")


@frozen
class Volume:
    """
    The directory of carts.

    :param root: the directory, absolute
    """

    root: Path

    def prepare(self) -> None:
        """
        Create missing directories.

        :raises AccessDenied: that is not permitted, or other accounts may write there
        """
        try:
            for path in (self.root, *(self.root / name for name in _INSIDE)):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.root.stat()
        except OSError as error:
            raise AccessDenied(
                f"the directory {self.root} cannot be made: {error.strerror}",
                path=str(self.root),
                hint="name another one: serve.directory",
            ) from error
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise AccessDenied(
                f"others may write to the directory {self.root}",
                path=str(self.root),
                hint="give it an own directory with mode 0700: serve.directory",
            )

    def tree(self, cart: Cart) -> Path:
        """:returns: the directory of the files of a cart that is not bundled"""
        return self.root / str(cart.id) / cart.cart_uid

    def tar(self, cart: Cart) -> Path:
        """:returns: the tar of a cart that is bundled"""
        return self.root / str(cart.id) / f"{cart.cart_uid}.tar"

    def unfinished(self, cart: Cart, shape: str) -> Path:
        """
        :returns: the tar of a cart while it is being made. Its name contains the shape, since the
            sizes of files can change.
        """
        return self.root / str(cart.id) / f"{cart.cart_uid}.tar.{shape[-16:]}.part"

    def arriving(self, cart: Cart, number: int) -> Path:
        """:returns: a file of a cart, while its bytes arrive"""
        return self.root / str(cart.id) / f"arriving.{number}"

    def publish(self, cart: Cart, path: Path) -> None:
        """Point the symbolic link of a cart to its tar or its directory."""
        link = self.root / "cartuids" / cart.cart_uid
        fresh = link.with_name(f".{cart.id}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(path, link.parent))
        fresh.replace(link)

    def remove(self, cart: Cart) -> None:
        """Remove the files of a cart; the caller holds it."""
        shutil.rmtree(self.root / str(cart.id), ignore_errors=False, onerror=_unless_gone)
        link = self.root / "cartuids" / cart.cart_uid
        with contextlib.suppress(FileNotFoundError, OSError):
            if os.readlink(link).startswith(f"../{cart.id}/"):
                link.unlink()
        (self.root / "locks" / str(cart.id)).unlink(missing_ok=True)
        self._drop_shared()

    @contextlib.contextmanager
    def sharing(self, name: str | None) -> Iterator[Shared | None]:
        """
        Hold the file of several carts for the duration of a ``with`` block: it is made once.

        :param name: of its bytes, in hexadecimal; None: there is none
        """
        if name is None:
            yield None
            return
        with self.hold(f"shared.{name}", wait=True):
            yield Shared(self.root / "shared", name)

    def _drop_shared(self) -> None:
        """Remove shared files that no cart has any more."""
        for entry in os.scandir(self.root / "shared"):
            name = f"shared.{entry.name.partition('.')[0]}"
            with self.hold(name) as held:
                if held and entry.stat(follow_symlinks=False).st_nlink == 1:
                    os.unlink(entry.path)
                    (self.root / "locks" / name).unlink()

    def ids(self) -> list[int]:
        """:returns: the ids of the carts that have files here"""
        return [int(entry.name) for entry in os.scandir(self.root) if entry.name.isdecimal()]

    def free(self) -> int:
        """:returns: bytes that this account can still write"""
        return room_at(self.root)[0]

    @property
    def device(self) -> int:
        """The number of the file system."""
        return self.root.stat().st_dev

    @contextlib.contextmanager
    def hold(self, name: int | str, *, shared: bool = False, wait: bool = False) -> Iterator[bool]:
        """
        Hold a cart by a lock, which the kernel releases if the process dies.

        :param shared: together with other shared holders
        :param wait: wait until it can be held
        :returns: whether it is held
        """
        descriptor = self.take(name, shared=shared, wait=wait)
        try:
            yield descriptor is not None
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def take(self, name: int | str, *, shared: bool, wait: bool) -> int | None:
        """
        :returns: as :meth:`hold`, but a descriptor that holds it until it is closed; None if it
            cannot be held
        """
        path = self.root / "locks" / str(name)
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, how)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            # the lock file was removed with its cart: a later one is another file
            os.close(descriptor)


@frozen
class Shared:
    """
    A file that several carts have, which is held.

    :param directory: of such files
    :param name: of the bytes of this one
    """

    directory: Path
    name: str

    def give(self, sink: Sink) -> bool:
        """
        :returns: whether it is there, and was given to a sink
        :raises IntegrityError: it was damaged, and has been removed
        """
        path = next(self.directory.glob(f"{self.name}.*"), None)
        if path is None:
            return False
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(source).st_size != sink.size:
                path.unlink()
                return False
            sink.take(source, immutable=True)
        finally:
            os.close(source)
        digest = sink.finish()
        if path.name != self._file(digest):
            path.unlink()
            raise IntegrityError(f"{path} was damaged", hint="ask for it once more")
        return True

    def keep(self, path: Path, digest: str) -> None:
        """Keep a file of a cart for others, if the file system can."""
        try:
            os.link(path, self.directory / self._file(digest))
        except FileExistsError:
            pass  # it came from there
        except OSError as error:
            if error.errno not in NO_LINK:
                raise

    def _file(self, digest: str) -> str:
        return f"{self.name}.{digest.rpartition(':')[2]}"


def room_at(path: Path) -> tuple[int, int]:
    """:returns: bytes of a file system that this account can still write, and those in use"""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize, (found.f_blocks - found.f_bfree) * found.f_frsize


def _unless_gone(_function: object, _path: str, error: tuple[type, BaseException, object]) -> None:
    if not isinstance(error[1], FileNotFoundError):
        raise error[1]
