"""
Compression of archives by several threads, and its reverse.

The bytes are cut into blocks, which are compressed one by one: the formats of gzip, bzip2 and xz
permit a file of several complete streams, and their programs read it as one. The libraries release
the interpreter's lock while they compress, so threads suffice. The result does not depend on the
number of threads.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, cast

from attrs import frozen

from statepool.archive.definition import BackupType
from statepool.errors import IntegrityError

Put = Callable[[bytes | memoryview], object]
"""A function that takes bytes in their order."""

READ = 1 << 20
"""Bytes that are decompressed at a time."""

_XZ_DICTIONARY = (18, 20, 21, 22, 22, 23, 23, 24, 25, 26)
"""The size of the dictionary of each preset of xz, as a power of two (``man xz``)."""


@frozen
class Packing:
    """
    A way to compress blocks.

    :param block: bytes of a block
    :param pack: compresses a block into a complete stream
    """

    block: int
    pack: Callable[[bytes], bytes]


def _gzip(strength: int) -> Packing:
    return Packing(1 << 20, lambda data: zlib.compress(data, strength, wbits=31))


def _bzip2(strength: int) -> Packing:
    level = max(1, strength)
    # bzip2 sorts blocks of 100,000 bytes for each level: several of them in each of our blocks
    return Packing(4 * level * 100_000, lambda data: bz2.compress(data, level))


def _xz(strength: int) -> Packing:
    block = 3 << _XZ_DICTIONARY[strength]  # as xz chooses it for several threads
    return Packing(block, lambda data: lzma.compress(data, preset=strength))


_PACKINGS = {BackupType.TAR_GZ: _gzip, BackupType.TAR_BZ2: _bzip2, BackupType.TAR_XZ: _xz}

DEFAULT_STRENGTH = {
    BackupType.TAR_GZ: 6,
    BackupType.TAR_BZ2: 9,
    BackupType.TAR_XZ: 6,
    BackupType.TAR_ZST: 1,
}
"""The strengths that the programs use if none is given."""


def zstd_level(strength: int) -> int:
    """:returns: the level of zstd for a strength: 1 to 19; strength 1 is its default, 3"""
    return 1 + 2 * strength


@contextlib.contextmanager
def compressing(
    backup_type: BackupType, put: Put, *, strength: int | None = None, threads: int = 0
) -> Iterator[Put]:
    """
    Yield a function that takes the bytes of a tar. At the end of a ``with`` block, all of them
    were compressed and put.

    :param put: takes the compressed bytes
    :param strength: 0 to 9; what the program of the format uses if not given
    :param threads: how many compress at the same time; one for each processor if 0
    """
    threads = threads or len(os.sched_getaffinity(0))
    if strength is None:
        strength = DEFAULT_STRENGTH.get(backup_type, 0)
    if backup_type is BackupType.TAR:
        yield put
    elif backup_type is BackupType.TAR_ZST:
        import zstandard  # imported only for this compression

        packer = zstandard.ZstdCompressor(
            level=zstd_level(strength),
            write_checksum=True,
            threads=threads if threads > 1 else 0,
        ).compressobj()
        yield lambda data: put(packer.compress(data))
        put(packer.flush())
    else:
        blocks = _Blocks(_PACKINGS[backup_type](strength), put, threads)
        try:
            yield blocks.write
            blocks.finish()
        finally:
            blocks.close()


class _Blocks:
    def __init__(self, packing: Packing, put: Put, threads: int) -> None:
        self._packing, self._put = packing, put
        self._block = bytearray()
        self._pool = ThreadPoolExecutor(threads, "compress")
        self._most = 2 * threads
        self._packed: deque[Future[bytes]] = deque()

    def write(self, data: bytes | memoryview) -> None:
        self._block += data
        size = self._packing.block
        if len(self._block) < size:
            return
        with memoryview(self._block) as view:
            whole = len(view) // size * size
            blocks = [bytes(view[at : at + size]) for at in range(0, whole, size)]
            rest = bytes(view[whole:])
        self._block = bytearray(rest)
        for block in blocks:
            self._submit(block)

    def finish(self) -> None:
        if self._block:
            self._submit(bytes(self._block))
        while self._packed:
            self._put(self._packed.popleft().result())

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, block: bytes) -> None:
        while len(self._packed) >= self._most or (self._packed and self._packed[0].done()):
            self._put(self._packed.popleft().result())
        self._packed.append(self._pool.submit(self._packing.pack, block))


@contextlib.contextmanager
def decompressed(descriptor: int, extension: str, what: str) -> Iterator[Iterator[bytes]]:
    """
    Yield an iterator over the bytes of the tar in an archive.

    :param descriptor: of the archive, open at its beginning
    :param extension: of its file
    :param what: its name, for messages
    :raises IntegrityError: the archive is damaged, or cut short
    """
    with open(descriptor, "rb", closefd=False) as raw, _opened(raw, extension) as stream:
        yield _chunks(stream, what)


def _opened(raw: IO[bytes], extension: str) -> IO[bytes]:
    match BackupType(extension):
        case BackupType.TAR:
            return open(raw.fileno(), "rb", closefd=False)
        case BackupType.TAR_GZ:
            return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
        case BackupType.TAR_BZ2:
            return cast("IO[bytes]", bz2.BZ2File(raw))
        case BackupType.TAR_XZ:
            return cast("IO[bytes]", lzma.LZMAFile(raw))
        case BackupType.TAR_ZST:
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            return cast("IO[bytes]", reader)


def _chunks(stream: IO[bytes], what: str) -> Iterator[bytes]:
    while True:
        try:
            chunk = stream.read(READ)
        except _damage() as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk
            raise IntegrityError(
                f"{what} is damaged: {' '.join(str(error).split()) or type(error).__name__}",
                path=what,
                hint="use an older archive that is kept, and make a new one",
            ) from error
        if not chunk:
            return
        yield chunk


def _damage() -> tuple[type[Exception], ...]:
    import zstandard

    return (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
