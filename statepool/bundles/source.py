"""
A bundle as a pool from which states are fetched: read once, from beginning to end.

The transport knows from the record which bytes come next. Files must be requested in the order in
which they are in the bundle; a file that is not requested is skipped, but still hashed.
"""

from __future__ import annotations

import os
import tarfile
from collections import deque
from collections.abc import Iterator

from statepool.bundles.contents import (
    BLOCK,
    MOST_RECORD,
    POOL,
    PRELUDE,
    Contents,
    data_header,
    padding,
    record_size,
)
from statepool.bundles.stream import HINT, Input
from statepool.errors import IntegrityError, MissingFile
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.pools import layout
from statepool.pools.refusals import mismatched
from statepool.transports.base import Entry, FileKind, Moved, Stat, Transfer, Transport
from statepool.transports.copying import copy_read, hash_read
from statepool.transports.failures import Subject, translating
from statepool.transports.reading import SLICE, Reader, Slice, slices

SCHEME = "bundle"
"""The scheme of the location in messages; no transport is registered for it."""

_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.DIRTYPE: "a directory",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.REGTYPE: "a file",
    tarfile.XHDTYPE: "an extended header",
}
"""The names of kinds of archive members in messages."""


class BundleTransport(Transport):
    """
    A transport that reads a bundle. The small files of its pool are in memory.

    :param stream: the bundle, of which nothing has been read
    :param path: its name, an absolute path
    :raises BadRecord: its record is invalid
    :raises IntegrityError: it is no bundle, or damaged
    :raises UnsupportedFormat: it is of a newer format
    """

    def __init__(self, stream: Input, path: str) -> None:
        super().__init__(Location(SCHEME, path))
        self._stream = stream
        self.contents = self._read_contents()
        self._small = {layout.POOL_FILE: POOL, self.contents.record_path: self.contents.record}
        self._coming = deque(self.contents.files)
        self._is_begun = False

    # -- the beginning ------------------------------------------------------------------------

    def _read_contents(self) -> Contents:
        stream = self._stream
        if bytes(stream.peek(BLOCK)) != PRELUDE[:BLOCK]:
            raise IntegrityError(
                f"{stream.name} is not a bundle",
                path=stream.name,
                hint="make one with: statepool export OBJECT STATE -o FILE;"
                " a disk image becomes a state with: statepool import OBJECT STATE FILE;"
                " what tar has packed is none: unpack it, and name the directory as a source",
            )
        self._expect(PRELUDE)
        header = bytes(stream.peek(BLOCK))
        size = record_size(header)
        if size is None or size > MOST_RECORD:
            raise stream.damaged(f"has no record, but {told(header)}")
        stream.read(BLOCK)
        content = stream.read(size)
        rest = stream.read(len(padding(size)))
        contents = Contents.read(content, stream.name)
        if header + content + rest != contents.record_file:
            raise stream.damaged(f"has {told(header)} in the place of {contents.record_path!r}")
        return contents

    def _expect(self, wanted: bytes) -> None:
        """
        Read the bytes that must come next.

        :raises IntegrityError: other bytes came
        """
        for start in range(0, len(wanted), BLOCK):
            expected = wanted[start : start + BLOCK]
            found = self._stream.peek(len(expected))
            if found != expected and len(found) == len(expected):
                raise self._stream.damaged(f"has {told(bytes(found))}, which has no place there")
            self._stream.read(len(expected))

    # -- as a transport -----------------------------------------------------------------------

    def scan(self, directory: str) -> list[Entry]:
        kinds: dict[str, FileKind] = {}
        for path in self._small:
            if path.startswith(f"{directory}/"):
                name, slash, _ = path.removeprefix(f"{directory}/").partition("/")
                kinds[name] = FileKind.DIRECTORY if slash else FileKind.FILE
        return [Entry(name, kind) for name, kind in kinds.items()]

    def stat(self, path: str) -> Stat | None:
        if path in self._small:
            return Stat(FileKind.FILE, len(self._small[path]), 0)
        for manifest in self.contents.files:
            if _path(manifest) == path:
                return Stat(FileKind.FILE, manifest.size, 0)
        return None

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Read small files; of data, only the beginning, and only of the next file."""
        if (small := self._small.get(path)) is not None:
            return small[offset:] if size is None else small[offset : offset + size]
        manifest = self._reach(path)
        end = _first(manifest) if size is None else min(offset + size, _first(manifest))
        if end > SLICE:
            raise self._stream.damaged(f"is asked for more of {manifest.id} than its beginning")
        return bytes(self._stream.peek(max(0, end))[offset:])

    def fetch(self, path: str, target: int, transfer: Transfer) -> Moved:
        manifest = self._reach(path)
        subject = self._subject(path)
        with translating("write a copy of", subject, needed=manifest.size, descriptor=target):
            os.ftruncate(target, manifest.size)
        reader = Streamed(self._stream, manifest, subject)
        moved = copy_read(reader, target, transfer, flush=True, subject=subject)
        self._end(manifest, moved.digest)
        return moved

    # -- from one file to the next ------------------------------------------------------------

    def finish(self) -> None:
        """
        Read to the end, and check that the bundle is complete.

        :raises IntegrityError: it is damaged
        """
        while self._coming:
            self._pass()
        self._expect(self.contents.closing)
        self._stream.finish()

    def _reach(self, path: str) -> Manifest:
        """
        Read up to the bytes of a file.

        :returns: the manifest of the file
        """
        if all(_path(manifest) != path for manifest in self._coming):
            raise MissingFile(
                f"{path} is not in what follows in the bundle {self._stream.name}",
                path=path,
                hint="a bundle is read from its beginning to its end: import it once more",
            )
        while _path(self._coming[0]) != path:
            self._pass()
        self._begin()
        return self._coming[0]

    def _pass(self) -> None:
        """Skip a file that the cache has: the progress does not count it."""
        self._begin()
        manifest = self._coming[0]
        reader = Streamed(self._stream, manifest, self._subject(_path(manifest)))
        algorithm = _digest(manifest).algorithm
        self._end(manifest, hash_read(reader, manifest.size, algorithm=algorithm))

    def _begin(self) -> None:
        if not self._is_begun:
            self._expect(data_header(self._coming[0]))
            self._is_begun = True

    def _end(self, manifest: Manifest, found: Digest) -> None:
        if found != manifest.digest:
            raise mismatched(
                manifest,
                found,
                f"in the bundle {self._stream.name}",
                path=self._stream.name,
                hint=HINT,
            )
        self._expect(padding(manifest.data_size))
        self._coming.popleft()
        self._is_begun = False


class Streamed(Reader):
    """A reader of a file as it lies in a bundle: its data, one extent after the other."""

    def __init__(self, stream: Input, manifest: Manifest, subject: Subject) -> None:
        super().__init__(-1, subject)
        self._stream = stream
        self._manifest = manifest

    def slices(self, size: int) -> Iterator[Slice]:
        """Return the slices as the record describes them."""
        return slices(self._manifest.extents or ((0, size),), size)

    def _fill(self, into: memoryview, offset: int) -> None:
        self._stream.fill(into)


def _first(manifest: Manifest) -> int:
    """:returns: the length of the data at the beginning of a file, up to its first hole"""
    offset, length = manifest.extents[0] if manifest.extents else (0, manifest.size)
    return length if not offset else 0


def told(block: bytes) -> str:
    """:returns: a description of a block for messages, if it is the header of a member"""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return "something else"
    return f"{_KINDS.get(info.type, 'something')} {info.name[:100]!r}"


def _path(manifest: Manifest) -> str:
    return layout.data(_digest(manifest))


def _digest(manifest: Manifest) -> Digest:
    assert manifest.digest is not None
    return manifest.digest
