"""
Manifests of archives: one file beside each archive.

A manifest has a line of JSON for each fact that is needed later: first the head, an object; then
each member, a list; at the end an object with the digest of all lines above it. So a manifest of a
million members is written and read line by line, and a manifest that was cut or altered is noticed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any

import blake3
from attrs import asdict, field, frozen

from statepool.archive.names import ArchiveName
from statepool.errors import BadRecord, UnsupportedFormat
from statepool.model.decoding import Form
from statepool.model.digest import Digest

FORMAT = 1
"""The version of the format of manifests that this version writes and reads."""

LONGEST_LINE = 1 << 20
"""Most bytes of a line: a path has at most 4096, and the head some paths."""


@frozen
class Member:
    """
    A member of an archive.

    :param name: as in the tar; bytes that are not UTF-8 are surrogates, as :func:`os.fsdecode`
        makes them
    :param kind: the type flag of the tar, one character: ``0`` a file, ``5`` or ``D`` a directory,
        ``1`` a hard link, ``2`` a symbolic link, ``3`` and ``4`` devices, ``6`` a FIFO
    :param offset: of its first header in the tar, in bytes
    :param length: of its headers and data in the tar, in bytes
    :param size: of its content, in bytes, as the tree had it
    :param mtime: seconds since the epoch
    :param digest: of its headers and data
    :param link: what a link leads to
    """

    name: str
    kind: str
    offset: int
    length: int
    size: int
    mtime: float
    digest: Digest
    link: str = ""

    def line(self) -> bytes:
        """:returns: its line in a manifest"""
        fields = [
            self.name,
            self.kind,
            self.offset,
            self.length,
            self.size,
            self.mtime,
            self.digest.hex,
            self.link,
        ]
        return _compact(fields).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes, what: str) -> Member:
        """
        :param what: the name of the manifest, for messages
        :raises BadRecord: the line is not that of a member
        """
        try:
            name, kind, offset, length, size, mtime, digest, link = json.loads(line)
            numbers = (offset, length, size)
            if not (
                all(isinstance(text, str) for text in (name, kind, digest, link))
                and all(type(number) is int and number >= 0 for number in numbers)
                and type(mtime) in (int, float)
            ):
                raise ValueError(line)
        except (ValueError, TypeError, RecursionError) as error:
            raise BadRecord(f"{what} has a line that is not a member: {line[:80]!r}") from error
        return cls(name, kind, offset, length, size, mtime, Digest(_ALGORITHM, digest), link)


_ALGORITHM = "blake3"

_compact = json.JSONEncoder(separators=(",", ":")).encode
"""json.dumps() makes an encoder for each call."""


@frozen
class Manifest:
    """
    What is known of an archive.

    :param backup_id: the id of the backup
    :param extension: of the archive
    :param level: None of an archive without levels
    :param created: when the tree was begun to be read, in seconds since the epoch
    :param host: the name of the host that made it
    :param root: what was archived: the location of a directory or a pool
    :param provider: the archiver that made it
    :param size: of the archive, in bytes
    :param content_size: of the tar in it, in bytes
    :param digest: of the archive
    :param nonce: a random text: two archives can have the same bytes and stand on different ones
    :param base: the key of the level below; None for level 0
    :param snapshot: the digest of the snapshot file that the next level begins with; None if there
        is none
    :param renames: whether the tar says of directories that they were renamed
    :param members: how many there are
    :param events: how many events of each kind occurred
    :param facts: of the provider
    :param format: the version of the format
    """

    backup_id: str
    extension: str
    level: int | None
    created: float
    host: str
    root: str
    provider: str
    size: int
    content_size: int
    digest: Digest
    nonce: str
    base: Digest | None = None
    snapshot: Digest | None = None
    renames: bool = False
    members: int = 0
    events: dict[str, int] = field(factory=dict)
    facts: dict[str, Any] = field(factory=dict)
    format: int = FORMAT

    @property
    def key(self) -> Digest:
        """What the next level refers to it by."""
        return Digest.of_text(f"{self.nonce} {self.digest}")

    @property
    def name(self) -> ArchiveName:
        """The name that the archive was made under."""
        return ArchiveName(self.backup_id, self.extension, self.level or 0)


_FORM = Form(Manifest)


_READ = 1 << 20
"""Bytes that are read at a time."""


def _end(hasher: blake3.blake3) -> bytes:
    """:returns: the last line of a manifest with these lines before it"""
    return json.dumps({"end": f"{_ALGORITHM}:{hasher.hexdigest()}"}).encode() + b"\n"


_LAST = len(_end(blake3.blake3()))
"""Bytes of the last line."""


def digest_of(descriptor: int) -> Digest:
    """:returns: the digest of an open file"""
    hasher = blake3.blake3()
    position = 0
    while chunk := os.pread(descriptor, 4 << 20, position):
        hasher.update(chunk)
        position += len(chunk)
    return Digest(_ALGORITHM, hasher.hexdigest())


def write_manifest(out: IO[bytes], manifest: Manifest, lines: IO[bytes]) -> None:
    """
    Write a manifest.

    :param out: a file that is open for writing
    :param lines: of the members, see :meth:`Member.line`
    """
    hasher = blake3.blake3()
    content = json.dumps(asdict(manifest)).encode() + b"\n"
    while content:
        hasher.update(content)
        out.write(content)
        content = lines.read(_READ)
    out.write(_end(hasher))


def read_manifest(source: IO[bytes], what: str) -> Manifest:
    """
    Read a manifest, without its members.

    :param source: a file, open at its beginning
    :param what: its name, for messages
    :raises BadRecord: it was cut or altered
    :raises UnsupportedFormat: a later version wrote it
    """
    line = _line(source, what)
    manifest = _head(line, what)
    hasher = blake3.blake3(line)
    members, last = 0, b""
    while content := source.read(_READ):
        content = last + content
        content, last = content[:-_LAST], content[-_LAST:]
        hasher.update(content)
        members += content.count(b"\n")
    if members != manifest.members or last != _end(hasher):
        raise _altered(what)
    return manifest


def read_members(source: IO[bytes], what: str) -> Iterator[Member]:
    """
    Yield the members of a manifest.

    :param source: a file, open at its beginning
    :param what: its name, for messages
    :raises BadRecord: the manifest was cut or altered, which may only be noticed at its end
    """
    lines = _lines(source, what)
    next(lines)
    for line in lines:
        yield Member.parse(line, what)


def _lines(source: IO[bytes], what: str) -> Iterator[bytes]:
    """Yield the head, and the lines of all members."""
    hasher = blake3.blake3()
    line = _line(source, what)
    for _ in range(_head(line, what).members):
        hasher.update(line)
        yield line
        line = _line(source, what)
    hasher.update(line)
    yield line
    if source.read(_LAST + 1) != _end(hasher):
        raise _altered(what)


def _line(source: IO[bytes], what: str) -> bytes:
    line = source.readline(LONGEST_LINE)
    if not line.endswith(b"\n"):
        raise _altered(what)
    return line


def _altered(what: str) -> BadRecord:
    return BadRecord(
        f"{what} was cut or altered", hint="its archive cannot be relied on: make a new one"
    )


def _head(line: bytes, what: str) -> Manifest:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{what} is not the manifest of an archive") from error
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise UnsupportedFormat(
            f"{what} is not a manifest of format {FORMAT}", hint="another version wrote it"
        )
    return _FORM.convert(data, what)
