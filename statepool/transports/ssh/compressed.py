"""
Compressed transfers: zstd runs at both ends, through a command on a separate channel, while the
files are still opened, sized, flushed and closed by SFTP.

Compression pays if the link is slower than both processors, and the bytes can be compressed; so
``auto`` measures. A transfer begins without compression, which shows the throughput of the link. If
the link is slow, compression is tried, and goes on as long as it is faster.

The bytes that arrive are checked as always: zstd checks what it unpacks, the programs there report
failures, the length of the file is compared, and all bytes are hashed here. If the programs fail
while the connection holds, the transfer does not fail: the rest, and all doubtful bytes, are moved
without compression.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable
from typing import IO, Any, cast

from attrs import define

from statepool.errors import TransportError
from statepool.model.settings import Compress
from statepool.transports.failures import translating
from statepool.transports.reading import within
from statepool.transports.ssh.moving import AHEAD, Download, Extent, Job, Upload, write_here
from statepool.transports.ssh.shell import Command, Shell, quoted

MIB = 1 << 20

LEVEL = 1
"""
The compression level of zstd: the fastest one. Higher levels are slower than the links on which
compression pays (docs/measurements.rst).
"""

LEAST = 1 * MIB
"""The fewest bytes of data for which starting two programs pays."""

WARM_UP = 8 * MIB
"""Bytes that are moved before the first measurement, because of TCP slow start."""

MEASURED = 16 * MIB
"""Bytes that are measured at a time."""

RECONSIDERED = 256 * MIB
"""
Bytes after which compression is reconsidered: an image does not compress equally well everywhere.
"""

FAST = 300 * MIB
"""
Bytes per second. On a link with this throughput, a single compressing thread only slows the
transfer down.
"""

BETTER = 0.95
"""
The lowest rate with compression, relative to the rate without, at which compression goes on. It is
below 1 since rates vary from moment to moment.
"""

MOST_SEGMENTS = 200
"""
The most extents on one command line. The zeros between extents that are close to each other cost
almost nothing.
"""

CHUNK = 256 << 10
"""Bytes that are unpacked, written and hashed at a time. Zeros in all of them stay a hole."""

PACKET = 32 << 10
"""Bytes that are passed to a channel at a time."""

LARGEST_WINDOW = 8 * MIB
"""The most bytes of memory that a compressed stream may require."""

_PACK_IN_PYTHON = (
    "import sys, zstandard; zstandard.ZstdCompressor(level=1,"
    " write_checksum=True).copy_stream(sys.stdin.buffer, sys.stdout.buffer)"
)
_UNPACK_IN_PYTHON = (
    "import sys, zstandard; zstandard.ZstdDecompressor().copy_stream(sys.stdin.buffer,"
    " sys.stdout.buffer)"
)


class ProgramFailed(Exception):
    """An error: the far end of a compressed transfer fails, although the connection holds."""


@define(eq=False)
class Packer:
    """
    The far end of a compressed transfer.

    :param shell: runs the programs
    :param word: the path of the file, quoted
    :param how: whether to compress
    :param clock: returns the time in seconds, from any origin
    """

    shell: Shell
    word: str
    how: Compress
    clock: Callable[[], float] = time.monotonic

    @property
    def is_able(self) -> bool:
        """Whether the far side has a program for it. May have to ask."""
        return "zstd" in self.shell.programs or "zstandard" in self.shell.modules

    def start(self, script: str) -> Command:
        """
        :param script: in which ``$p`` is the path
        :raises ProgramFailed: the server starts no further command now
        """
        command = self.shell.try_start(f"p={self.word}; {script}")
        if command is None:
            raise ProgramFailed("the server runs no further command")
        return command

    @property
    def packs(self) -> str:
        """The command that compresses its input there."""
        return (
            f"zstd -{LEVEL} -q -c"
            if "zstd" in self.shell.programs
            else f"python3 -c {shlex.quote(_PACK_IN_PYTHON)}"
        )

    @property
    def unpacks(self) -> str:
        """The command that unpacks its input there."""
        return (
            "zstd -d -q -c"
            if "zstd" in self.shell.programs
            else f"python3 -c {shlex.quote(_UNPACK_IN_PYTHON)}"
        )


def packer(shell: Shell, path: str, how: Compress, size: int) -> Packer | None:
    """
    :param shell: the shell of the account
    :param path: of the file there, absolute
    :param how: whether to compress
    :param size: of what is to be moved, in bytes
    :returns: the far end that may compress the transfer, or None if there is nothing to gain. The
        shell has not been asked yet.
    """
    least = LEAST if how is Compress.ON else WARM_UP + 2 * MEASURED
    word = quoted(path)
    return (
        Packer(shell, word, how)
        if how is not Compress.OFF and size >= least and word is not None
        else None
    )


class _Choosing:
    """The base of both directions: the choice and the measurements."""

    _hashed: int
    _extents: tuple[Extent, ...]
    _job: Job
    _packer: Packer

    def _move(self, end: int) -> None:
        raise NotImplementedError

    def _pack(self, end: int, goes_on: Callable[[int], bool]) -> None:
        raise NotImplementedError

    def _choose(self) -> None:
        """Move everything."""
        size = self._job.end
        try:
            if self._packer.how is Compress.ON:
                if self._packer.is_able:
                    self._pack(size, lambda count: True)
            else:
                self._measure(size)
        except ProgramFailed:
            pass
        self._move(size)

    def _measure(self, size: int) -> None:
        """Try both ways, and continue with the faster one, until there is nothing more to gain."""
        self._move(self._after(WARM_UP))
        while self._left() > MEASURED:
            plain = self._rate_of(lambda: self._move(self._after(MEASURED)))
            if plain > FAST or not self._packer.is_able:
                return
            self._pack(size, _Watch(plain, self._packer.clock))
            self._move(self._after(RECONSIDERED))

    def _rate_of(self, work: Callable[[], object]) -> float:
        before, begin = self._left(), self._packer.clock()
        work()
        return (before - self._left()) / max(self._packer.clock() - begin, 1e-9)

    def _left(self) -> int:
        return sum(length for _, length in within(self._extents, self._hashed, self._job.end))

    def _after(self, count: int) -> int:
        """
        :returns: the offset up to which there are ``count`` bytes of data from here; the size of
            the file if there are fewer
        """
        for offset, length in within(self._extents, self._hashed, self._job.end):
            if count <= length:
                return offset + count
            count -= length
        return self._job.end

    def _segments(self, end: int) -> list[Extent]:
        return few(within(self._extents, self._hashed, end))


class _Watch:
    """A check whether compression is still the faster way."""

    def __init__(self, plain: float, clock: Callable[[], float]) -> None:
        self._plain = plain
        self._clock = clock
        self._begin: float | None = None
        self._counted = 0

    def __call__(self, count: int) -> bool:
        """
        :param count: how many unpacked bytes have been moved since the last call
        :returns: whether to go on
        """
        now = self._clock()
        if self._begin is None:
            # the time before the first bytes was spent starting the programs; it does not count
            self._begin = now
            return True
        self._counted += count
        if self._counted < MEASURED:
            return True
        good = self._counted >= BETTER * self._plain * (now - self._begin)
        self._begin, self._counted = now, 0
        return good


class PackedDownload(Download, _Choosing):
    """A download that is compressed where that is faster."""

    def __init__(self, packer: Packer, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._packer = packer

    def run(self) -> int:
        """:returns: how many bytes arrived"""
        self._begin()
        self._choose()
        self._finish()
        return self.received

    def _pack(self, end: int, goes_on: Callable[[int], bool]) -> None:
        segments = self._segments(end)
        parts = " && ".join(f"x {offset} {length}" for offset, length in segments)
        take = 'x() { dd if="$p" bs=1M iflag=skip_bytes,count_bytes skip=$1 count=$2 2>/dev/null; }'
        script = f"{take}; say go; {{ {parts}; }} | {self._packer.packs} 2>/dev/null"
        with self._packer.start(script) as command:
            command.end_of_input()
            stream = _Stream(command)
            try:
                done = self._unpack(stream, segments, goes_on)
            finally:
                self.received += stream.count
            if done and (stream.read(1) or command.exit_status() != 0):
                raise ProgramFailed(f"{self._packer.packs} says more than it should, or failed")

    def _unpack(
        self, stream: _Stream, segments: list[Extent], goes_on: Callable[[int], bool]
    ) -> bool:
        """
        :returns: whether all of it arrived; False if it was stopped because compression does not
            pay
        """
        import zstandard

        reader = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).stream_reader(
            cast("IO[bytes]", stream), read_size=4 * MIB
        )
        buffer = memoryview(bytearray(CHUNK))
        for offset, length in segments:
            self._job.hash_zeros(offset - self._hashed)
            self._hashed = offset
            while self._hashed < offset + length:
                try:
                    count = reader.readinto(buffer[: min(CHUNK, offset + length - self._hashed)])
                except zstandard.ZstdError as error:
                    raise ProgramFailed(str(error)) from error
                if not count:
                    raise ProgramFailed(f"{self._packer.packs} ended too soon")
                self._take_here(buffer[:count])
                if not goes_on(count):
                    return False
        try:
            # also read the checksum at the end of the stream
            return not reader.readinto(buffer[:1])
        except zstandard.ZstdError as error:
            raise ProgramFailed(str(error)) from error

    def _take_here(self, data: memoryview) -> None:
        job = self._job
        with translating("write a copy of", job.far, needed=job.size, descriptor=job.local):
            write_here(job.local, [data], self._hashed)
        job.hasher.update(data)
        self._hashed += len(data)
        job.progress.advance(len(data))


class PackedUpload(Upload, _Choosing):
    """An upload that is compressed where that is faster."""

    def __init__(self, packer: Packer, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._packer = packer

    def run(self) -> int:
        """:returns: how many bytes were sent"""
        self._begin()
        self._choose()
        self._finish()
        return self.sent

    def _pack(self, end: int, goes_on: Callable[[int], bool]) -> None:
        begin, segments = self._hashed, self._segments(end)
        parts = " && ".join(f"w {offset} {length}" for offset, length in segments)
        put = (
            'w() { dd of="$p" bs=1M iflag=fullblock,count_bytes oflag=seek_bytes conv=notrunc'
            " seek=$1 count=$2 2>/dev/null; }"
        )
        length = 'length() { wc -c <"$p"; }'
        both = (
            f"{{ {self._packer.unpacks} 2>/dev/null || say bad >&3; }} | {{ {{ {parts}; }} && say"
            " good $(length) >&3 || say bad >&3; }"
        )
        try:
            with self._packer.start(f"{put}; {length}; exec 3>&1; say go; {both}") as command:
                answers = command.lines(self._packer.shell.patience)
                if next(answers, None) != ["go"]:
                    raise ProgramFailed("there is no shell any more")
                self._send_packed(command, segments, goes_on)
                command.end_of_input()
                # dd does not fail on a short input; the length of the file shows that.
                if list(answers) != [["good", str(self._hashed)]] or command.exit_status() != 0:
                    raise ProgramFailed(f"{self._packer.unpacks} or dd failed")
        except TransportError as error:
            if not self._packer.shell.is_connected:
                raise
            self._send_again(begin)
            raise ProgramFailed(str(error)) from error
        except ProgramFailed:
            self._send_again(begin)
            raise

    def _send_packed(
        self, command: Command, segments: list[Extent], goes_on: Callable[[int], bool]
    ) -> None:
        import zstandard

        job = self._job
        packing = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()
        for offset, length in segments:
            job.hash_zeros(offset - self._hashed)
            self._hashed = offset
            while self._hashed < offset + length:
                data = self._read(self._hashed, min(MIB, offset + length - self._hashed))
                job.hasher.update(data)
                self._hashed += len(data)
                job.progress.advance(len(data))
                self._hand_over(command, packing.compress(data))
                job.note_written(len(data))
                if not goes_on(len(data)):
                    self._hand_over(command, packing.flush())
                    return
        self._hand_over(command, packing.flush())

    def _hand_over(self, command: Command, data: bytes) -> None:
        for start in range(0, len(data), PACKET):
            command.send(data[start : start + PACKET])
        self.sent += len(data)

    def _send_again(self, begin: int) -> None:
        """
        Send again what was passed to failed programs: it has been hashed, but need not have
        arrived.
        """
        for offset, length in within(self._extents, begin, self._hashed):
            for start in range(offset, offset + length, self._length):
                self._write(start, self._read(start, min(self._length, offset + length - start)))
                while len(self._asked) >= AHEAD:
                    self._check_one()


@define(eq=False)
class _Stream:
    """The output of a script as a file, after the line that announces it."""

    command: Command
    count: int = 0
    _first: bytes | None = None

    def read(self, size: int) -> bytes:
        """:returns: some bytes, or none at the end"""
        if self._first is None:
            found = self.command.rest_after("go")
            if found is None:
                raise ProgramFailed("there is no shell any more")
            self._first = found
        data, self._first = (self._first, b"") if self._first else (self.command.receive(size), b"")
        self.count += len(data)
        return data


# -- extents ---------------------------------------------------------------------------------------


def few(extents: Iterable[Extent], most: int = MOST_SEGMENTS) -> list[Extent]:
    """:returns: at most ``most`` extents that cover these: small gaps are closed"""
    found, gap = list(extents), 64 << 10
    while len(found) > most:
        closed: list[Extent] = []
        for offset, length in found:
            if closed and offset - sum(closed[-1]) <= gap:
                closed[-1] = (closed[-1][0], offset + length - closed[-1][0])
            else:
                closed.append((offset, length))
        found, gap = closed, gap * 2
    return found
