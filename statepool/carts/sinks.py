"""Sinks for the bytes of one file of a cart, which are counted and hashed meanwhile."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from statepool import DigestMismatch, IntegrityError
from statepool.carts.hashes import OWN, Hash, hex_of, new_hash

_FICLONE = 0x40049409
"""``FICLONE`` in ``linux/fs.h``: share all blocks of another file."""

_CANNOT = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS})
"""Errors of the kernel if a file cannot be cloned, or copied inside the kernel."""

NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOENT})
"""Errors of the kernel if a file cannot get a hard link there."""


class Sink:
    """
    A sink for the bytes of one file.

    :param descriptor: of the target file, open for reading and writing
    :param offset: the offset of the bytes in it
    :param size: the expected number of bytes
    :param what: what messages call the file
    :param hash_type: type of the sum to compare with
    :param hash_sum: the sum to compare with; empty: none
    :param advance: told of each step; if it raises, the transfer ends
    :param step: bytes that are moved at a time
    :param name: the name of the target file, if it holds only these bytes: it may become a hard
        link
    :param fresh: whether nothing was written there before, so that holes can stay holes
    """

    def __init__(
        self,
        descriptor: int,
        offset: int,
        size: int,
        *,
        what: str,
        advance: Callable[[int], None],
        step: int,
        hash_type: str = "",
        hash_sum: str = "",
        name: Path | None = None,
        fresh: bool = True,
    ) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._what = what
        self._advance = advance
        self._sum = hash_sum
        self._type = hash_type
        self._hashes: dict[str, Hash] = {
            kind: new_hash(kind) for kind in ({OWN, hash_type} if hash_sum else {OWN})
        }
        self._name = name
        self._fresh = fresh
        self._digest: str | None = None
        self.step = step
        self.size = size
        self.done = 0
        """Bytes that have arrived."""
        self.linked = False
        """
        Whether the file is a hard link to another file, so that its times must not be changed.
        """

    def write(self, data: bytes) -> None:
        """
        Write the next bytes.

        :raises IntegrityError: these exceed the expected size
        """
        if self.done + len(data) > self.size:
            raise self._wrong_length(f"more than {self.size}")
        for hasher in self._hashes.values():
            hasher.update(data)
        if not self._fresh or data.strip(b"\0"):
            written = 0
            while written < len(data):
                place = self._offset + self.done + written
                written += os.pwrite(self._descriptor, data[written:], place)
        self._passed(len(data))

    def take(self, source: int, *, digest: str | None = None, immutable: bool = False) -> None:
        """
        Write all bytes of an open file of this host; share blocks with it if the file system can.

        :param digest: the known digest of the bytes, as ``blake3:…``: then they need not be read
        :param immutable: whether the file never changes, so that a hard link suffices
        :raises IntegrityError: the file has another length
        """
        if (found := os.fstat(source).st_size) != self.size:
            raise self._wrong_length(str(found))
        if self._name is None or not self._clone(source):
            if immutable and self._name is not None and self._link(source, self._name):
                self.linked = True
            else:
                self._copy(source)
        copy, offset = (source, 0) if self.linked else (self._descriptor, self._offset)
        algorithm, _, value = (digest or "").partition(":")
        if digest is None or (self._sum and algorithm != self._type):
            self._hash(copy, offset)
        else:
            self._digest = digest
            self._compare(value)
        if not self.done:
            self._passed(self.size)

    def finish(self) -> str:
        """
        :returns: the digest of the bytes, as ``blake3:…``
        :raises IntegrityError: there are too few
        :raises DigestMismatch: the bytes do not match the sum
        """
        if self.done != self.size:
            raise self._wrong_length(str(self.done))
        if self._digest is None:
            self._compare(hex_of(self._hashes[self._type], self._sum) if self._sum else "")
            self._digest = f"{OWN}:{hex_of(self._hashes[OWN])}"
        return self._digest

    def _compare(self, actual: str) -> None:
        if self._sum and actual != self._sum:
            raise DigestMismatch(
                f"{self._what}: the {self._type} is {actual}, not {self._sum} as the list says",
                expected=self._sum,
                actual=actual,
                hint="correct the list, or look what happened to the file",
            )

    def _wrong_length(self, found: str) -> IntegrityError:
        hint = "it was changed, or the archive is wrong about it: ask for it once more"
        return IntegrityError(
            f"{self._what} has {found} bytes, not {self.size} as its archive said", hint=hint
        )

    def _passed(self, count: int) -> None:
        self.done += count
        self._advance(count)

    # -- ways of taking a whole file --------------------------------------------------------------

    def _clone(self, source: int) -> bool:
        try:
            fcntl.ioctl(self._descriptor, _FICLONE, source)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            return False
        return True

    def _link(self, source: int, name: Path) -> bool:
        beside = name.with_name(f"{name.name}.link")
        beside.unlink(missing_ok=True)
        directory = os.open(name.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # This is linkat with AT_SYMLINK_FOLLOW, which Python calls only with a directory.
            origin = f"/proc/self/fd/{source}"
            os.link(origin, beside.name, dst_dir_fd=directory, follow_symlinks=True)
        except OSError as error:
            if error.errno not in NO_LINK:
                raise
            return False
        finally:
            os.close(directory)
        beside.replace(name)
        return True

    def _copy(self, source: int) -> None:
        for start, length in self._data(source):
            done = 0
            while done < length:
                count = min(self.step, length - done)
                moved = _copy_some(source, self._descriptor, count, start + done, self._offset)
                if not moved:
                    raise self._wrong_length(f"only {start + done}")
                done += moved
                self._advance(0)

    def _data(self, source: int) -> Iterator[tuple[int, int]]:
        """
        Yield the data extents of a file as (offset, length); the whole file if holes have to be
        written.
        """
        if not self._fresh:
            yield 0, self.size
            return
        end = 0
        while end < self.size:
            try:
                start = os.lseek(source, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return  # the rest is a hole
            end = min(os.lseek(source, start, os.SEEK_HOLE), self.size)
            yield start, end - start

    def _hash(self, descriptor: int, offset: int) -> None:
        while self.done < self.size:
            data = os.pread(descriptor, min(self.step, self.size - self.done), offset + self.done)
            if not data:  # the file does not extend beyond its last data yet
                data = bytes(min(self.step, self.size - self.done))
            for hasher in self._hashes.values():
                hasher.update(data)
            self._passed(len(data))


def _copy_some(source: int, target: int, count: int, start: int, offset: int) -> int:
    """:returns: the number of copied bytes; the kernel copies them if it can"""
    try:
        return os.copy_file_range(source, target, count, start, offset + start)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    return os.pwrite(target, os.pread(source, count, start), offset + start)
