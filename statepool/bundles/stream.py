"""
The bytes of a bundle in their order, compressed or not, to and from any descriptor.

A compressed bundle is one frame of zstd, followed by a frame that decompressors skip, with the
CRC-32 of all bytes before it. The zstd frame's own checksum is not enough: it covers the
uncompressed content, and different frames can have the same content. A file that was damaged into
such a frame still counts as damaged.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Protocol, cast

from statepool.errors import IntegrityError, TransportError, about_file
from statepool.transports.failures import Subject, translating

if TYPE_CHECKING:
    import zstandard

ZSTD = b"\x28\xb5\x2f\xfd"
"""The first bytes of a frame of zstd (RFC 8878)."""

LEVEL = 3
"""
The compression level: the default of zstd. It compresses faster than most links transfer, and files
are kept for a long time.
"""

LARGEST_WINDOW = 8 << 20
"""The most bytes of memory for decompression; bundles that we write need 2 MiB."""

_TRAILER = struct.Struct("<III")
_SKIPPED = 0x184D2A5B
"""One of the sixteen magic numbers of a skippable frame."""

_CHUNK = 256 << 10
"""Bytes of a compressed bundle that are read at a time."""

PIPE = 1 << 20
"""
The capacity of a pipe in bytes, if the kernel permits it: each system call then moves more than by
default.
"""


HINT = "nothing was imported; copy the file once more, or export the state again"
"""The hint for a bundle that cannot be used."""


class Stream(Protocol):
    """A source of bytes."""

    def readinto(self, buffer: memoryview, /) -> int: ...


def stream_of(file: IO[bytes]) -> int | Stream:
    """:returns: the descriptor of an open file; where it has none, the file itself"""
    try:
        return file.fileno()
    except io.UnsupportedOperation:
        return cast("Stream", file)


def name_of(file: IO[bytes]) -> str:
    """:returns: the name of an open file, as a path"""
    number = stream_of(file)
    if not isinstance(number, int):
        return os.path.join("/", str(getattr(file, "name", "memory")))
    return {0: "/dev/stdin", 1: "/dev/stdout"}.get(number, f"/dev/fd/{number}")


def widen(descriptor: int) -> None:
    """Enlarge the buffer of a descriptor if it is a pipe."""
    with contextlib.suppress(OSError):  # no pipe, or larger than this account may set
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE)


@contextlib.contextmanager
def about(
    doing: str,
    subject: Subject,
    *,
    needed: int = 0,
    descriptor: int | None = None,
) -> Iterator[None]:
    """
    Translate the operating system's errors for a file that the user has named; see
    :func:`~statepool.transports.failures.translating`.
    """
    try:
        with translating(doing, subject, needed=needed, descriptor=descriptor):
            yield
    except TransportError as error:
        about_file(error)
        raise


class Output:
    """
    An output stream for a bundle.

    :param to: a descriptor, which stays the caller's; or a function that writes all it is given
    :param name: of the target, for messages
    :param compress: whether to compress it
    """

    def __init__(
        self, to: int | Callable[[memoryview], object], name: str, *, compress: bool
    ) -> None:
        self.written = 0
        self._to = to
        self._subject = Subject(name, path=name)
        self._crc = 0
        self._packing: zstandard.ZstdCompressionObj | None = None
        if isinstance(to, int):
            widen(to)
        if compress:
            import zstandard  # imported only for compression, which most work does not need

            packer = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
            self._packing = packer.compressobj()

    def write(self, data: bytes | memoryview) -> None:
        """
        :raises NoSpace: it does not fit
        :raises TransportError: it cannot be written
        """
        if self._packing is None:
            self._put(data)
        else:
            self._put_packed(self._packing.compress(data))

    def finish(self) -> None:
        """Complete the frame and write the trailer, if the bundle is compressed."""
        if self._packing is not None:
            self._put_packed(self._packing.flush())
            self._put(_TRAILER.pack(_SKIPPED, 4, self._crc))

    def _put_packed(self, data: bytes) -> None:
        self._crc = zlib.crc32(data, self._crc)
        self._put(data)

    def _put(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            count = self._put_some(rest)
            self.written += count
            rest = rest[count:]

    def _put_some(self, data: memoryview) -> int:
        if not isinstance(self._to, int):
            self._to(data)
            return len(data)
        with about("write", self._subject, needed=len(data), descriptor=self._to):
            return os.write(self._to, data)


class Input:
    """
    An input stream from a bundle.

    :param source: a descriptor, which stays the caller's, or another source of bytes
    :param name: of the bundle, for messages
    :param what: what messages call it
    :param hint: of errors: what to do about a damaged one
    """

    def __init__(
        self, source: int | Stream, name: str, *, what: str = "the bundle", hint: str = HINT
    ) -> None:
        self.name = name
        self.hint = hint
        self._what = what
        self.position = 0
        self._ahead = memoryview(b"")
        self._packed: _Packed | None = None
        file = _File(source, Subject(name, path=name)) if isinstance(source, int) else source
        beginning = bytearray(len(ZSTD))
        count = _fill(file, memoryview(beginning))
        if beginning == ZSTD:
            self._packed = _Packed(file, bytes(beginning))
            self._stream: Stream = self._packed.unpacked()
        else:
            self._ahead, self._stream = memoryview(beginning)[:count], file

    def fill(self, into: memoryview) -> None:
        """
        Fill a buffer completely.

        :raises IntegrityError: there are no more
        """
        ahead = len(part := self._ahead[: len(into)])
        into[:ahead], self._ahead = part, self._ahead[ahead:]
        count = ahead + self._read(into[ahead:])
        self.position += count
        if count < len(into):
            raise self.damaged("is cut short")

    def read(self, size: int) -> bytes:
        """
        :returns: ``size`` bytes
        :raises IntegrityError: there are no more
        """
        content = bytearray(size)
        self.fill(memoryview(content))
        return bytes(content)

    def peek(self, size: int) -> memoryview:
        """:returns: ``size`` bytes, which the next read returns again; fewer at the end"""
        if len(self._ahead) < size:
            content = bytearray(size)
            content[: len(self._ahead)] = self._ahead
            count = len(self._ahead) + self._read(memoryview(content)[len(self._ahead) :])
            self._ahead = memoryview(content)[:count]
        return self._ahead[:size]

    def finish(self) -> None:
        """
        Check that the bundle ends here.

        :raises IntegrityError: more bytes follow, or the bundle was damaged
        """
        if len(self.peek(1)):
            raise self.damaged("does not end where it should")
        if self._packed is not None and not self._packed.is_right():
            raise self._error("was damaged on its way: its checksum is another one")

    def damaged(self, how: str) -> IntegrityError:
        """
        :param how: the end of the sentence that describes the damage
        :returns: the error with that sentence
        """
        return self._error(f"{how}, {self.position} bytes after its beginning")

    def _error(self, how: str) -> IntegrityError:
        return IntegrityError(f"{self._what} {self.name} {how}", path=self.name, hint=self.hint)

    def _read(self, into: memoryview) -> int:
        if self._packed is None:
            return _fill(self._stream, into)
        import zstandard

        try:
            return _fill(self._stream, into)
        except zstandard.ZstdError as error:
            raise self._error(f"is not what zstd wrote: {error}") from error


def _fill(stream: Stream, into: memoryview) -> int:
    """:returns: how many bytes were read: fewer than the buffer holds only at the end"""
    done = 0
    while done < len(into) and (count := stream.readinto(into[done:])):
        done += count
    return done


class _File:
    """The file behind a descriptor, as a stream."""

    def __init__(self, descriptor: int, subject: Subject) -> None:
        widen(descriptor)
        self._descriptor = descriptor
        self._subject = subject

    def readinto(self, buffer: memoryview) -> int:
        with about("read", self._subject):
            return os.readv(self._descriptor, [buffer])


class _Packed:
    """
    A reader of the compressed bytes. It holds back the trailer until the end of the file.

    :param beginning: the bytes of the file that were read already
    """

    def __init__(self, file: Stream, beginning: bytes) -> None:
        self._file = file
        self._held = beginning
        self._crc = 0

    def unpacked(self) -> Stream:
        """:returns: the stream of uncompressed bytes"""
        import zstandard

        unpacker = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        # A read never returns more than was requested.
        source = cast("IO[bytes]", self)  # of which only read() is used
        return unpacker.stream_reader(source, read_size=_CHUNK, read_across_frames=True)

    def read(self, size: int = _CHUNK) -> bytes:
        """:returns: at most ``size`` bytes; none at the end"""
        buffer = bytearray(size)
        held = self._held
        while len(held) <= _TRAILER.size and (count := self._file.readinto(memoryview(buffer))):
            held += buffer[:count]
        data, self._held = held[: -_TRAILER.size], held[-_TRAILER.size :]
        self._crc = zlib.crc32(data, self._crc)
        return data

    def is_right(self) -> bool:
        """:returns: whether the trailer matches the bytes before it"""
        return self._held == _TRAILER.pack(_SKIPPED, 4, self._crc)
