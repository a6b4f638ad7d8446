"""
A reader of tar streams that is given the bytes as they pass, and tells the members.

It knows the formats that GNU tar and Python's tarfile write: POSIX.1-2001 ("pax") with the keywords
of GNU for holes and directories, and the older format of GNU. It does not extract anything.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

import blake3
from attrs import frozen

from statepool.archive.manifest import Member
from statepool.errors import IntegrityError
from statepool.model.digest import Digest

BLOCK = 512
"""Bytes of a header; data is padded to a multiple of it (POSIX.1-1988)."""

LONGEST_HEADERS = 256 << 20
"""Most bytes of extended headers: a directory of a million files lists their names there."""

_EXTENDED = b"xgLK"
"""Types of headers that are about the next one: of pax, and long names of GNU."""

_KNOWN = b"0\x0012345675DxgLKS"
"""Types of headers that are read."""

_WITHOUT_DATA = b"123456"
"""Types of members whose size says nothing about data in the archive."""

_GLOBAL = frozenset({b"path", b"linkpath", b"size", b"GNU.sparse.name", b"GNU.dumpdir"})
"""Keywords that make no sense for all members."""


@frozen
class Entry:
    """
    A member, as its headers describe it.

    :param name: its path
    :param kind: its type flag, one character
    :param size: of its content, in bytes
    :param mtime: seconds since the epoch
    :param link: what a link leads to
    :param dumpdir: of a directory in an incremental archive, the list of GNU tar: for each name a
        letter, the name, and a zero byte
    """

    name: bytes
    kind: str
    size: int
    mtime: float
    link: bytes = b""
    dumpdir: bytes | None = None


Check = Callable[[Entry], bool]
"""A function that is given each member before its bytes pass, and tells whether they are wanted."""


class Scanner:
    """
    The reader.

    :param what: the name of the archive, for messages
    :param take: is given each member, after its last byte
    :param check: see :data:`Check`; all are wanted if not given
    :param emit: is given all bytes of wanted members, and of the end of the archive
    """

    def __init__(
        self,
        what: str,
        take: Callable[[Member], object],
        *,
        check: Check | None = None,
        emit: Callable[[bytes | memoryview], object] | None = None,
    ) -> None:
        self.offset = 0
        """Bytes that were read."""
        self.ended = False
        """Whether the end of the archive was reached."""
        self.renames = False
        """Whether a directory was renamed since the level below."""
        self._what, self._take, self._check, self._emit = what, take, check, emit
        self._partial = bytearray()  # the first bytes of headers that are not complete
        self._entry: Entry | None = None
        self._start = 0  # where the member begins
        self._left = 0  # bytes of it that are still to come

    def feed(self, data: bytes | memoryview) -> None:
        """
        Read the next bytes.

        :raises IntegrityError: they are not those of a tar
        """
        partial = self._partial
        if partial:
            partial += data
            self._partial = bytearray()
        view = memoryview(partial or data)
        position, length = 0, len(view)
        while position < length:
            if self._left:
                step = min(self._left, length - position)
                self._data(view[position : position + step])
                position += step
            elif self.ended:
                self._trailing(view[position:])
                return
            elif (end := self._headers(view, position)) is not None:
                position = end
            else:  # long headers are gathered without a copy for each call
                self._partial = partial if partial and not position else bytearray(view[position:])
                return

    def finish(self) -> None:
        """
        :raises IntegrityError: the archive ends too early
        """
        if not self.ended or self._partial:
            raise self._bad("it was cut short")

    # -- parts -------------------------------------------------------------------------------------

    def _headers(self, view: memoryview, start: int) -> int | None:
        """
        Read the headers of the next member, or the block of zeros that ends the archive.

        :param start: where they begin
        :returns: where they end; None if they are not complete
        """
        extended: dict[bytes, bytes] = {}
        at = start
        while True:
            block = bytes(view[at : at + BLOCK])
            at += BLOCK
            if len(block) < BLOCK:
                return None
            kind = block[156]
            if not kind and block == _ZEROS:
                return self._end(start, at)
            self._require(block, at - start)
            if kind not in _EXTENDED:
                return self._member(view, start, at, block, extended)
            size = _number(block[124:136])
            if size < 0 or at - start + size > LONGEST_HEADERS:
                raise self._bad("an extended header is too long", at - start)
            if at + _padded(size) > len(view):
                return None
            content = bytes(view[at : at + size])
            at += _padded(size)
            if kind == _LONG_NAME:
                extended[b"path"] = content.rstrip(b"\0")
            elif kind == _LONG_LINK:
                extended[b"linkpath"] = content.rstrip(b"\0")
            elif kind != _GLOBAL_HEADER:
                extended.update(self._keywords(content))
            elif self._keywords(content).keys() & _GLOBAL:
                raise self._bad("a global header has what concerns one member", at - start)
            else:  # not passed on: it concerns the archive as a whole
                self.offset += at - start
                start = at

    def _require(self, block: bytes, further: int) -> None:
        """
        :raises IntegrityError: it is not a header
        """
        if _checksum(block) != _number(block[148:156]):
            raise self._bad("a header is damaged", further)
        if block[156] not in _KNOWN:
            raise self._bad(f"it has a member of the unknown type {chr(block[156])!r}", further)

    def _member(
        self, view: memoryview, start: int, at: int, block: bytes, extended: dict[bytes, bytes]
    ) -> int | None:
        """
        Begin with a member.

        :param at: where its last header ends
        :param block: that header
        :param extended: the extended headers before it
        :returns: as :meth:`_headers`; the data that is here already is read with the headers
        """
        kind = block[156]
        size = _number(block[124:136])
        if b"size" in extended:
            size = self._int(extended[b"size"])
        if size < 0:
            raise self._bad("a member has a negative size", at - start)
        if kind in _WITHOUT_DATA:
            size = 0
        left = _padded(size)
        if kind == _SPARSE and block[482] == 1:  # more blocks of the map of holes follow
            while at <= len(view) - BLOCK and view[at + 504] == 1:
                at += BLOCK
            at += BLOCK
        elif kind == _DUMPDIR:  # its list is its data, which must be known before it passes
            if at - start + left > LONGEST_HEADERS:
                raise self._bad("the list of a directory is too long", at - start)
            at += left
        if at > len(view):
            return None
        if kind == _DUMPDIR:
            extended[b"GNU.dumpdir"] = bytes(view[at - left : at - left + size])
            left = size = 0
        # Hashing the headers of a small file together with its data costs half as much.
        end = min(at + left, len(view))
        self._begin(self._describe(block, size, extended), at + left - start)
        self._data(view[start:end])
        return end

    def _end(self, start: int, at: int) -> int:
        if at - start > BLOCK:
            raise self._bad("an extended header is not followed by a member", at - start)
        self.ended = True
        self.offset += BLOCK
        if self._emit is not None:
            self._emit(_ZEROS)
        return at

    def _describe(self, block: bytes, stored: int, extended: dict[bytes, bytes]) -> Entry:
        """:returns: the member of a header with the extended headers before it"""
        name = _text(block[0:100])
        if block[257:263] == b"ustar\0" and block[345]:
            name = _text(block[345:500]) + b"/" + name
        real = extended.get(b"GNU.sparse.realsize", extended.get(b"GNU.sparse.size"))
        size = self._int(real) if real is not None else stored
        if block[156] == _SPARSE:
            size = _number(block[483:495])
        return Entry(
            extended.get(b"GNU.sparse.name") or extended.get(b"path", name),
            chr(block[156] or ord("0")),
            size,
            self._mtime(block, extended.get(b"mtime")),
            extended.get(b"linkpath", _text(block[157:257])),
            extended.get(b"GNU.dumpdir"),
        )

    def _keywords(self, content: bytes) -> dict[bytes, bytes]:
        found = {}
        position = 0
        while position < len(content):
            blank = content.find(b" ", position, position + 12)
            digits = content[position:blank]
            if blank < 0 or not digits.isdigit():
                raise self._bad("an extended header is damaged")
            end = position + int(digits)
            equals = content.find(b"=", blank, end)
            if equals < 0 or end > len(content) or content[end - 1 : end] != b"\n":
                raise self._bad("an extended header is damaged")
            found[content[blank + 1 : equals]] = content[equals + 1 : end - 1]
            position = end
        return found

    def _begin(self, entry: Entry, length: int) -> None:
        """
        Begin with a member.

        :param length: of its headers and data, in bytes
        """
        if entry.dumpdir is not None and _has_renames(entry.dumpdir):
            self.renames = True
        wanted = self._check is None or self._check(entry)
        self._passes = self._emit if wanted else None
        self._hasher = blake3.blake3()
        self._entry, self._start, self._left = entry, self.offset, length

    def _data(self, data: memoryview) -> None:
        self._hasher.update(data)
        self.offset += len(data)
        self._left -= len(data)
        if self._passes is not None:
            self._passes(data)
        if not self._left:
            self._done()

    def _done(self) -> None:
        entry = self._entry
        assert entry is not None
        self._take(
            Member(
                entry.name.decode("utf-8", "surrogateescape"),
                entry.kind,
                self._start,
                self.offset - self._start,
                entry.size,
                entry.mtime,
                Digest("blake3", self._hasher.hexdigest()),
                entry.link.decode("utf-8", "surrogateescape"),
            )
        )

    def _trailing(self, data: memoryview) -> None:
        if any(data):
            raise self._bad("there is something after its end")
        self.offset += len(data)
        if self._emit is not None:
            self._emit(data)

    def _int(self, text: bytes) -> int:
        if not text.isdigit() or len(text) > 20:
            raise self._bad("an extended header has a number that is none")
        return int(text)

    def _mtime(self, block: bytes, text: bytes | None) -> float:
        if text is None:
            return _number(block[136:148])
        try:
            return float(text)
        except ValueError as error:
            raise self._bad("an extended header has a time that is none") from error

    def _bad(self, why: str, further: int = 0) -> IntegrityError:
        return IntegrityError(
            f"{self._what} is damaged at byte {self.offset + further}: {why}",
            path=self._what,
            hint="use an older archive that is kept, and make a new one",
        )


_ZEROS = bytes(BLOCK)
_SPARSE: Final = ord("S")
_DUMPDIR: Final = ord("D")
_LONG_NAME: Final = ord("L")
_LONG_LINK: Final = ord("K")
_GLOBAL_HEADER: Final = ord("g")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(content: bytes) -> bytes:
    return content.partition(b"\0")[0]


def _checksum(block: bytes) -> int:
    """:returns: the sum of all bytes, with blanks in place of the checksum (POSIX.1-1988)"""
    blanked = block[:148] + b" " * 8 + block[156:]
    # The low half of Adler-32 is the sum modulo 65521, which that of 256 bytes cannot reach. This
    # is ten times as fast as sum().
    return (zlib.adler32(blanked[:256], 0) & 0xFFFF) + (zlib.adler32(blanked[256:], 0) & 0xFFFF)


def _number(content: bytes) -> int:
    """:returns: a number in octal digits, or in the base 256 of GNU; -1 if it is neither"""
    digits = content.strip(b" \0")
    if digits.isdigit():
        try:
            return int(digits, 8)
        except ValueError:
            return -1
    if not digits:
        return 0
    if not content[0] & 0x80:
        return -1
    value = int.from_bytes(content, "big", signed=True)
    return value if content[0] == 0xFF else value + (1 << (8 * len(content) - 1))


def names_in(dumpdir: bytes) -> list[tuple[str, bytes]]:
    """:returns: the letters and names in the list of a directory, see :class:`Entry`"""
    return [(chr(item[0]), item[1:]) for item in dumpdir.split(b"\0") if item]


def renames_in(dumpdir: bytes) -> dict[bytes, bytes]:
    """
    Read the renames of a list: ``R`` from, ``T`` to. An empty name stands for a temporary
    directory, by which directories change their names among each other.

    GNU tar 1.34 lists a change of names among three directories more than once, and a directory
    that left a renamed one by the old name of that. So the renames are not steps, but tell for each
    directory the name on the level below and the name on this one.

    :returns: the new names, by the old ones
    """
    found: dict[bytes, bytes] = {}
    source = aside = b""
    for letter, name in names_in(dumpdir):
        if letter == "R":
            source = name or aside
        elif letter == "T" and name:
            found[source] = name
        elif letter == "T":
            aside = source
    return found


def _has_renames(dumpdir: bytes) -> bool:
    return any(letter in "RTX" for letter, _ in names_in(dumpdir))
