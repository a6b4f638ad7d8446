"""
Transfers of large files over SFTP: many requests are pipelined, what arrives is written and hashed
at once, and every answer to a write is checked.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Iterator

from attrs import define, field, frozen

from statepool.model.digest import Hasher
from statepool.model.progress import Progress
from statepool.transports.copying import data_extents
from statepool.transports.failures import Subject, translating, wrong_length
from statepool.transports.ssh.packets import (
    Code,
    Garbled,
    Kind,
    Limits,
    Refused,
    attributes,
    check,
    data_in,
    string,
)
from statepool.transports.ssh.sftp import Sftp

AHEAD = 64
"""The most requests without an answer, the same as in OpenSSH's own client."""

REFILL = 16
"""
Requests for reading that are sent together: each packet costs the same, however many requests are
in it.
"""

LONGEST = 255 << 10
"""
The most bytes of one request: OpenSSH's server accepts this, since its packets are 256 KiB long.
"""

MOST_TURNS = 64
"""
The most requests for one piece. A server may answer with fewer bytes than requested, but at an
average of 4 KiB of 255 the transfer would not get anywhere.
"""

MOST_EXTENTS = 100_000
"""
The most extents of a local file that is sent; the smallest holes beyond that are sent as zeros.
"""

SLICE = 2 << 20
"""Bytes that are hashed at a time from a local file."""

MOST_PARTS = 1024
"""The most pieces that one call writes: ``IOV_MAX`` of Linux."""

Extent = tuple[int, int]


@frozen
class Job:
    """
    A file to transfer.

    :param local: descriptor of the file here
    :param size: how long it is, in bytes
    :param hasher: gets all of its bytes in their order
    :param progress: told of the bytes
    :param far: the remote file in messages
    :param done: the offset from which bytes are moved; those before are there
    :param wrote: called with the number of bytes after each send
    :param part: offset and length of the only part that is moved and hashed; None: the whole file
    """

    local: int
    size: int
    hasher: Hasher
    progress: Progress
    far: Subject
    done: int = 0
    wrote: Callable[[int], object] | None = None
    part: Extent | None = None

    @property
    def begin(self) -> int:
        """The offset of the first byte that is hashed."""
        return self.part[0] if self.part is not None else 0

    @property
    def end(self) -> int:
        """The offset behind the last byte that is moved and hashed."""
        return sum(self.part) if self.part is not None else self.size

    @property
    def near(self) -> Subject:
        """The local file in messages."""
        return Subject(f"the local copy of {self.far.text}", self.far.pool, self.far.path)

    def note_written(self, count: int) -> None:
        """Note that bytes of data have been sent."""
        if self.wrote is not None:
            self.wrote(count)

    def hash_zeros(self, count: int) -> None:
        """Hash the zeros of a hole."""
        while count:
            some = min(count, SLICE)
            self.hasher.zeros(some)
            self.progress.advance(some)
            count -= some

    def hash_done(self) -> None:
        """Hash the bytes that need not be moved, but for those that an earlier attempt hashed."""
        offset, end = self.begin + self.hasher.hashed, self.done
        self.progress.advance(offset - self.begin)
        while offset < end:
            with translating("read", self.near):
                data = os.pread(self.local, min(SLICE, end - offset), offset)
            if not data:
                raise wrong_length(self.near, end, offset)
            self.hasher.update(data)
            self.progress.advance(len(data))
            offset += len(data)


def cut(extents: tuple[Extent, ...], begin: int, end: int, length: int) -> Iterator[Extent]:
    """
    :param extents: offsets and lengths, in order
    :param length: the most bytes of one piece
    :returns: the parts of them between ``begin`` and ``end``, in pieces
    """
    for offset, count in extents:
        first, last = max(offset, begin), min(offset + count, end)
        while first < last:
            piece = min(length, last - first)
            yield first, piece
            first += piece


# -- from there ------------------------------------------------------------------------------------


@define(eq=False)
class _Piece:
    """A part of a file that has been requested."""

    offset: int
    length: int
    missing: int
    turns: int = 0
    parts: list[memoryview] = field(factory=list)


class Download:
    """
    A download: reads a remote file, and writes it to a local one unless it is only to be hashed.

    :param sftp: by which
    :param handle: of the file there
    :param job: what is moved
    :param limits: of the server
    :param extents: where it has data; all else is a hole
    :param keep: whether to write it here
    """

    def __init__(
        self,
        sftp: Sftp,
        handle: bytes,
        job: Job,
        limits: Limits,
        extents: tuple[Extent, ...],
        *,
        keep: bool = True,
    ) -> None:
        self._sftp = sftp
        self._handle = string(handle)
        self._job = job
        self._keep = keep
        self._extents = extents
        self._length = min(limits.read, LONGEST)
        self._coming: Iterator[Extent] = iter(())
        self._asked: dict[int, tuple[_Piece, int, int]] = {}
        self._order: deque[_Piece] = deque()
        self._hashed = 0
        self.received = 0

    def run(self) -> int:
        """:returns: how many bytes arrived"""
        self._begin()
        # The check of the rate is called also while a piece is incomplete: it may never be
        # completed.
        with self._sftp.heard(lambda: self._job.progress.advance(0)):
            self._move(self._job.end)
        self._finish()
        return self.received

    def _begin(self) -> None:
        self._job.hash_done()
        self._hashed = self._job.done

    def _move(self, end: int) -> None:
        """Continue up to an offset."""
        self._coming = cut(self._extents, self._hashed, end, self._length)
        self._ask_more()
        while self._asked:
            number, answer = self._sftp.next_answer(self._asked)
            piece, offset, length = self._asked.pop(number)
            try:
                parts = data_in(check(answer))
            except Refused as refused:
                if refused.code == Code.EOF:
                    raise wrong_length(self._job.far, self._job.size, offset) from refused
                raise
            self._arrived(piece, offset, length, parts)
            if len(self._asked) <= AHEAD - REFILL:
                self._ask_more()
        self._job.hash_zeros(end - self._hashed)
        self._hashed = end

    def _finish(self) -> None:
        job = self._job
        if self._keep:
            with translating("write a copy of", job.far, needed=job.size, descriptor=job.local):
                os.ftruncate(job.local, job.size)

    def _ask_more(self) -> None:
        pieces: list[_Piece] = []
        while (
            len(self._asked) + len(pieces) < AHEAD
            and (extent := next(self._coming, None)) is not None
        ):
            pieces.append(_Piece(*extent, missing=extent[1]))
        self._order.extend(pieces)
        self._ask([(piece, piece.offset, piece.length) for piece in pieces])

    def _ask(self, wanted: list[tuple[_Piece, int, int]]) -> None:
        numbers = self._sftp.send(
            *(
                (Kind.READ, self._handle + struct.pack(">QI", offset, length))
                for _, offset, length in wanted
            )
        )
        self._asked.update(zip(numbers, wanted, strict=True))

    def _arrived(self, piece: _Piece, offset: int, length: int, parts: list[memoryview]) -> None:
        count = sum(map(len, parts))
        if count > length:
            raise wrong_length(self._job.far, self._job.size, offset + count)
        self.received += count
        piece.missing -= count
        piece.parts += parts
        if count < length:
            piece.turns += 1
            require_progress(piece.turns)
            self._ask([(piece, offset + count, length - count)])
        # Pieces are written in their order, in whatever order the server answers: so the length of
        # our copy tells how many bytes arrived.
        while self._order and not self._order[0].missing:
            self._take(self._order.popleft())

    def _take(self, piece: _Piece) -> None:
        job = self._job
        job.hash_zeros(piece.offset - self._hashed)
        if self._keep:
            with translating("write a copy of", job.far, needed=job.size, descriptor=job.local):
                write_here(job.local, piece.parts, piece.offset)
        for part in piece.parts:
            job.hasher.update(part)
        self._hashed = piece.offset + piece.length
        job.progress.advance(piece.length)


def require_progress(turns: int) -> None:
    """
    :param turns: how often the server has answered with fewer bytes of a piece than requested
    :raises Garbled: at this rate the transfer would not end
    """
    if turns > MOST_TURNS:
        raise Garbled("the server answers with a few bytes at a time, whatever it is asked for")


def write_here(descriptor: int, parts: list[memoryview], offset: int) -> None:
    """
    Write consecutive pieces, unless all of them are zeros: the file is new, and has holes where
    nothing is written.
    """
    if not parts[0][0] and all(_is_empty(part) for part in parts):
        return  # a hole that the extents did not list
    if len(parts) > MOST_PARTS:
        parts = [memoryview(b"".join(parts))]
    count = os.pwritev(descriptor, parts, offset)
    for part in parts:
        done = min(count, len(part))
        count -= done
        while done < len(part):
            done += os.pwrite(descriptor, part[done:], offset + done)
        offset += len(part)


def _is_empty(part: memoryview) -> bool:
    return not part[-1] and not bytes(part).strip(b"\0")


# -- to there --------------------------------------------------------------------------------------


class Upload:
    """
    An upload: writes a remote file.

    :param sftp: by which
    :param handle: of the file there
    :param job: what is moved
    :param limits: of the server
    """

    def __init__(self, sftp: Sftp, handle: bytes, job: Job, limits: Limits) -> None:
        self._sftp = sftp
        self._handle = string(handle)
        self._job = job
        self._length = min(limits.write, LONGEST)
        self._extents: tuple[Extent, ...] = ()
        self._asked: dict[int, None] = {}
        self._hashed = 0
        self.sent = 0

    def run(self) -> int:
        """:returns: how many bytes were sent"""
        self._begin()
        self._move(self._job.size)
        self._finish()
        return self.sent

    def _begin(self) -> None:
        self._extents = data_extents(self._job.local, self._job.size, limit=MOST_EXTENTS)
        self._job.hash_done()
        self._hashed = self._job.done

    def _move(self, end: int) -> None:
        """Continue up to an offset, and until the server has confirmed all writes."""
        for offset, length in cut(self._extents, self._hashed, end, self._length):
            self._job.hash_zeros(offset - self._hashed)
            self._send(offset, length)
            self._hashed = offset + length
        self._job.hash_zeros(end - self._hashed)
        self._hashed = end
        while self._asked:
            self._check_one()

    def _finish(self) -> None:
        # Holes are not sent, so a hole at the end needs the length to be set.
        self._asked[
            self._sftp.send((Kind.FSETSTAT, self._handle + attributes(size=self._job.size)))[0]
        ] = None
        while self._asked:
            self._check_one()

    def _send(self, offset: int, length: int) -> None:
        data = self._read(offset, length)
        self._write(offset, data)
        self._job.hasher.update(data)
        while self._asked and (len(self._asked) >= AHEAD or self._sftp.is_ready):
            self._check_one()
        self._job.progress.advance(length)

    def _read(self, offset: int, length: int) -> bytes:
        job = self._job
        with translating("read", job.near):
            data = os.pread(job.local, length, offset)
        if len(data) != length:
            raise wrong_length(job.near, job.size, offset + len(data))
        return data

    def _write(self, offset: int, data: bytes) -> None:
        self._asked[
            self._sftp.send_data(
                Kind.WRITE, self._handle + struct.pack(">Q", offset), memoryview(data)
            )
        ] = None
        self.sent += len(data)
        self._job.note_written(len(data))

    def _check_one(self) -> None:
        # Answers are short, and each can take as long as all data sent before it is on its way.
        self._sftp.begin()
        number, answer = self._sftp.next_answer(self._asked)
        del self._asked[number]
        try:
            check(answer)
        except Refused:
            # The cause of the refusal is unknown here: it can be asked for when all outstanding
            # answers have arrived.
            while self._asked:
                del self._asked[self._sftp.next_answer(self._asked)[0]]
            raise
