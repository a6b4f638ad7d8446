"""
The tar of a cart, as a table: its bytes follow from the names, sizes and times of its files.

So ranges can be sent, and sent again, without storing the tar. Its length is known before it is
made, and every file can be written to its final offset when it arrives. The data of a larger file
begins at a multiple of 4096 bytes, so that file systems can share its blocks with another file: its
header has a comment as padding (the keyword ``comment`` of POSIX.1-2001, "pax").
"""

from __future__ import annotations

import bisect
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property

import blake3
from attrs import field, frozen

from statepool.carts.spans import Span, spans

_BLOCK = tarfile.BLOCKSIZE
_ALIGNED = 4096
"""The block size of file systems that can share blocks."""

_ALIGNED_FROM = 1 << 16
"""The smallest file, in bytes, for which the longer header pays."""

Open = Callable[[int], AbstractContextManager[int]]
"""A function that opens the file of a member, by its number, for reading."""


@frozen(order=True)
class Member:
    """
    A file in a tar.

    :param name: with ``/`` between its parts
    :param size: in bytes
    :param mtime: seconds since the epoch
    """

    name: str
    size: int
    mtime: int


def header(member: Member, offset: int) -> bytes:
    """
    :param offset: its offset in the tar
    :returns: all bytes before the data of a member
    """
    info = tarfile.TarInfo(member.name)
    info.size, info.mtime, info.mode = member.size, member.mtime, 0o644
    made = info.tobuf(tarfile.PAX_FORMAT)
    if member.size < _ALIGNED_FROM:
        return made
    for comment in range(_BLOCK - 32, _ALIGNED + 2 * _BLOCK, _BLOCK):
        if (offset + len(made)) % _ALIGNED == 0:
            break
        info.pax_headers = {"comment": " " * comment}
        made = info.tobuf(tarfile.PAX_FORMAT)
    return made


def _in_order(members: Iterable[Member]) -> tuple[Member, ...]:
    return tuple(sorted(members))


@frozen(slots=False)  # derived values are cached
class Table:
    """
    The contents of a tar. The same members give the same bytes.

    :param members: in their order in the tar
    """

    members: tuple[Member, ...] = field(converter=_in_order)

    @cached_property
    def _starts(self) -> list[tuple[int, int]]:
        """For each member the offsets of its header and of its data."""
        found, end = [], 0
        for member in self.members:
            data = end + len(header(member, end))
            found.append((end, data))
            end = data + -(-member.size // _BLOCK) * _BLOCK
        found.append((end, end))
        return found

    @cached_property
    def length(self) -> int:
        """
        The length of the whole tar in bytes: it ends with two empty blocks, and is padded to a
        record of twenty blocks.
        """
        return -(-(self._starts[-1][0] + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def place(self, number: int) -> int:
        """:returns: the offset of the data of a member"""
        return self._starts[number][1]

    def headers(self) -> Iterator[tuple[int, bytes]]:
        """Yield all headers, each with its offset. All other bytes that are no data are zeros."""
        for member, (start, _) in zip(self.members, self._starts, strict=False):
            yield start, header(member, start)

    @property
    def shape(self) -> str:
        """A string that is equal for tars with all members at the same offsets."""
        return self.digest("" for _ in self.members)

    def digest(self, digests: Iterable[str]) -> str:
        """
        :param digests: of the members' bytes, in their order
        :returns: a digest that determines the bytes of the tar
        """
        hasher = blake3.blake3()
        for member, digest in zip(self.members, digests, strict=True):
            hasher.update(f"{member.name}\0{member.size}\0{member.mtime}\0{digest}\n".encode())
        return f"blake3:{hasher.hexdigest()}"

    def read(self, start: int, stop: int, open_member: Open, step: int) -> Iterator[bytes | Span]:
        """
        Yield the bytes of the tar from ``start`` to ``stop``.

        :param step: the most bytes at a time
        :raises IntegrityError: the length of a file has changed
        """
        number = max(bisect.bisect_right(self._starts, start, key=lambda pair: pair[0]) - 1, 0)
        for index in range(number, len(self.members)):
            begin, data = self._starts[index]
            if begin >= stop:
                return
            member, after = self.members[index], self._starts[index + 1][0]
            if start < data:
                yield header(member, begin)[max(start - begin, 0) : stop - begin]
            first, last = max(start, data) - data, min(stop, data + member.size) - data
            if first < last:
                with open_member(index) as descriptor:
                    yield from spans(descriptor, first, last, step, member.name)
            yield bytes(max(min(stop, after) - max(start, data + member.size), 0))
        yield bytes(max(stop - max(start, self._starts[-1][0]), 0))
