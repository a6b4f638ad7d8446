"""Keep RAM in a file compressed with zstd, while QEMU writes and reads it uncompressed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from statepool.errors import IntegrityError
from statepool.model.progress import SILENT, Progress

ZSTD = "zstd"
"""The name of the compression in a fingerprint."""

_LEVEL = 1
"""The zstd level: for data that is read once or twice, higher levels take longer than they save."""

_BLOCK = 1 << 20


def compress(source: Path, target: Path, *, progress: Progress = SILENT) -> None:
    """
    :param source: a file
    :param target: the compressed file to make
    """
    import zstandard  # only here: seldom needed

    progress.begin(f"compress {source.name}", source.stat().st_size)
    try:
        with (
            open(source, "rb") as file,
            open(target, "xb") as compressed,
            zstandard.ZstdCompressor(level=_LEVEL).stream_writer(compressed) as writer,
        ):
            while block := file.read(_BLOCK):
                writer.write(block)
                progress.advance(len(block))
    finally:
        progress.end()


@contextlib.contextmanager
def readable(path: Path, compression: str) -> Iterator[int]:
    """
    Open a file so that QEMU can read it uncompressed.

    :param path: the file
    :param compression: its compression: ``zstd``, or empty for none
    :returns: a descriptor of the file, or of a pipe with the decompressed content
    :raises IntegrityError: the compression is unknown, or the file is damaged
    """
    if compression not in ("", ZSTD):
        raise IntegrityError(
            f"the RAM in {path} is compressed in an unknown way: {compression!r}",
            path=str(path),
            hint="update statepool",
        )
    with open(path, "rb") as file:
        if not compression:
            yield file.fileno()
            return
        with _Decompression(file.fileno()) as stream:
            try:
                yield stream.descriptor
            except IntegrityError as error:
                stream.close()
                if stream.failed is not None:
                    raise IntegrityError(
                        f"the RAM in {path} is not what zstd wrote: {stream.failed}", path=str(path)
                    ) from error
                raise


class _Decompression:
    """A thread that decompresses into a pipe, until its reader closes the pipe."""

    def __init__(self, source: int) -> None:
        self.descriptor, self._writer = os.pipe()
        self.failed: Exception | None = None
        self._source = source
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="statepool-zstd", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop: the reader needs no more."""
        if self._is_open:
            self._is_open = False
            os.close(self.descriptor)
            self._thread.join()

    def _run(self) -> None:
        import zstandard

        try:
            with (
                open(self._writer, "wb", buffering=0) as pipe,
                open(self._source, "rb", closefd=False) as file,
            ):
                zstandard.ZstdDecompressor().copy_stream(file, pipe, write_size=_BLOCK)
        except BrokenPipeError:
            pass  # the reader has closed the pipe
        except zstandard.ZstdError as error:
            self.failed = error
