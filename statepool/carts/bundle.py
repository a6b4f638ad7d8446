"""
The storage of the files of a cart: as one tar, or as separate files from which a tar is made during
each download. Either is complete, and on stable storage, before the cart is ready.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from statepool.carts.database import Cart, File
from statepool.carts.service import Service
from statepool.carts.sinks import Sink
from statepool.carts.tar import Member, Table

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW


def files_of(cart: Cart) -> dict[str, File]:
    """:returns: the files of a cart by their names in its tar; the caller has opened a session"""
    files = File.select().where(File.cart == cart.id)
    return {f"{cart.cart_uid}/{file.bundle_path}": file for file in files}


def table_of(files: dict[str, File]) -> Table:
    """:returns: the table of the tar of these files"""
    return Table([Member(name, file.size, int(file.mtime)) for name, file in files.items()])


class Target:
    """
    The place where the files of a cart are stored.

    :param cart: the cart; all its files are known
    """

    def __init__(self, service: Service, cart: Cart) -> None:
        self._service, self._cart = service, cart
        with service.database.session():
            self._files = files_of(cart)
        self.table = table_of(self._files)
        self._numbers = {member.name: index for index, member in enumerate(self.table.members)}
        self._begun: set[int] = set()
        self._tar: int | None = None
        self._fresh = True

    @contextlib.contextmanager
    def opened(self) -> Iterator[Target]:
        """Resume filling the cart, for the duration of a ``with`` block."""
        self._tree.parent.mkdir(mode=0o700, exist_ok=True)
        if not self._cart.bundle:
            self._tree.mkdir(mode=0o700, exist_ok=True)
            yield self
            return
        path = self._unfinished
        for other in path.parent.glob(f"{self._cart.cart_uid}.tar.*.part"):
            if other != path:  # the sizes and offsets of the files were different then
                other.unlink()
        self._fresh = not path.exists()
        with _opened(path, os.O_RDWR | os.O_CREAT) as self._tar:
            yield self

    @property
    def _unfinished(self) -> Path:
        return self._service.volume.unfinished(self._cart, self.table.shape)

    def missing(self) -> list[File]:
        """:returns: the files with bytes that have not arrived yet"""
        return [file for file in self._files.values() if not self._is_here(file)]

    def _is_here(self, file: File) -> bool:
        if self._tar is not None or file.status != "staged":
            return file.status == "staged" and not self._fresh
        try:
            return (self._tree / file.bundle_path).stat().st_size == file.size
        except OSError:
            return False

    @property
    def _tree(self) -> Path:
        return self._service.volume.tree(self._cart)

    @contextlib.contextmanager
    def sink(self, file: File, advance: Callable[[int], None]) -> Iterator[Sink]:
        """Store the bytes of a file during a ``with`` block; afterwards the file is complete."""

        def sink(descriptor: int, offset: int, name: Path | None, *, fresh: bool) -> Sink:
            return Sink(
                descriptor,
                offset,
                file.size,
                what=f"{file.bundle_path} ({file.file_name})",
                advance=advance,
                step=self._service.settings.transfer_size,
                hash_type=file.hash_type or "",
                hash_sum=file.hash_value or "",
                name=name,
                fresh=fresh,
            )

        if self._tar is not None:
            offset = self.table.place(self._numbers[f"{self._cart.cart_uid}/{file.bundle_path}"])
            fresh = self._fresh and file.id not in self._begun
            self._begun.add(file.id)
            yield sink(self._tar, offset, None, fresh=fresh)
            return
        name = self._service.volume.arriving(self._cart, file.id)
        # After a crash it may be a hard link to bytes of the cache: they are not written to.
        name.unlink(missing_ok=True)
        with _opened(name, os.O_RDWR | os.O_CREAT | os.O_EXCL) as descriptor:
            taken = sink(descriptor, 0, name, fresh=True)
            yield taken
            if not taken.linked:
                os.ftruncate(descriptor, file.size)  # there may be a hole at the end
                os.utime(descriptor, (file.mtime, file.mtime))
                os.fsync(descriptor)
        place = self.place(file)
        assert place is not None
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        name.replace(place)

    def place(self, file: File) -> Path | None:
        """:returns: the place of a file, if it is one of its own"""
        return self._tree / file.bundle_path if self._tar is None else None

    def finish(self) -> tuple[Path, str]:
        """
        Complete the cart after all bytes have arrived.

        :returns: the path of the bytes, and the digest of the tar's table
        """
        with self._service.database.session():
            files = files_of(self._cart)
        digest = self.table.digest(files[member.name].digest for member in self.table.members)
        if self._tar is None:
            _flush(self._tree.parent)
            return self._tree, digest
        for offset, header in self.table.headers():
            os.pwrite(self._tar, header, offset)
        os.ftruncate(self._tar, self.table.length)
        os.fsync(self._tar)
        place = self._service.volume.tar(self._cart)
        self._unfinished.replace(place)
        _flush(place.parent)
        return place, digest


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[int]:
    """Open a file of a cart for reading, for the duration of a ``with`` block."""
    with _opened(path, _READ) as descriptor:
        yield descriptor


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _flush(directory: Path) -> None:
    with _opened(directory, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)
