"""Unpack a compressed file that a user wants to import."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, cast

from statepool.errors import IntegrityError
from statepool.model.progress import Progress
from statepool.transports.failures import Subject, translating

_CHUNK = 1 << 20
"""Bytes that are unpacked at a time."""

_HOLE = bytes(64 << 10)
"""So many zeros of unpacked data become a hole: a cluster of qcow2."""

_ZSTD_WINDOW = 1 << 27
"""The memory for a window that zstd itself grants without being asked: 128 MiB."""

_ZSTD_CHUNK = 4 << 10
"""
Compressed bytes given to zstd at a time. It has no bound on what it returns: four bytes can stand
for a block of 128 KiB.
"""


def unpack(packing: str, source: int, target: int, path: str, progress: Progress) -> None:
    """
    Unpack a file, zeros as holes.

    :param packing: ``gzip``, ``bzip2``, ``xz`` or ``zstd``
    :param source: the descriptor of the file
    :param target: the descriptor of an empty file
    :param path: of the file, for messages
    :raises IntegrityError: it is damaged, or cut short
    :raises NoSpace: what is in it does not fit
    """
    import lzma  # these three are only needed here, and not by most commands
    from gzip import BadGzipFile

    import zstandard

    told = size = 0
    progress.begin(f"unpack {path}", os.fstat(source).st_size)
    with ExitStack() as ending:
        ending.callback(progress.end)
        packed = ending.enter_context(io.FileIO(source, closefd=False))
        packed.seek(0)
        try:
            for data in _plain(packing, packed):
                with translating("unpack", Subject(path, path=path), descriptor=target):
                    _write(target, data, size)
                size += len(data)
                progress.advance(max(0, packed.tell() - told))
                told = max(told, packed.tell())
        except (BadGzipFile, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
            raise _damaged(path, packing, error) from error
        except OSError as error:
            if error.errno is not None or type(error) is not OSError:
                raise
            raise _damaged(path, packing, error) from error  # bz2 has no error of its own
    with translating("unpack", Subject(path, path=path), descriptor=target):
        os.ftruncate(target, size)


def _damaged(path: str, packing: str, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"{path} is damaged or cut short: {packing} says: {error}",
        path=path,
        hint="nothing was imported; download it once more",
    )


def _write(target: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    for start in range(0, len(data), len(_HOLE)):
        part = view[start : start + len(_HOLE)]
        if part != _HOLE[: len(part)]:
            written = 0
            while written < len(part):
                written += os.pwrite(target, part[written:], offset + start + written)


def _plain(packing: str, packed: IO[bytes] | io.FileIO) -> Iterator[bytes]:
    """:returns: what is in a compressed file"""
    import bz2
    import gzip
    import lzma

    if packing == "zstd":
        yield from _plain_zstd(packed)
        return
    reading = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[packing]
    with cast("IO[bytes]", reading(packed, "rb")) as file:  # type: ignore[operator]
        while data := file.read(_CHUNK):
            yield data


def _plain_zstd(packed: IO[bytes] | io.FileIO) -> Iterator[bytes]:
    # Its readers take a file that is cut short for one that has ended.
    import zstandard

    decompressor, frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW), None
    while data := packed.read(_ZSTD_CHUNK):
        while data:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(data)
            data = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it is cut short")
