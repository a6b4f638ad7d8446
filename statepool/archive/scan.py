"""
A reader of tar streams that is given the bytes as they pass, and tells the members.

It knows the formats that GNU tar and Python's tarfile write: POSIX.1-2001 ("pax") with the keywords
of GNU for holes and directories, and the older format of GNU. It does not extract anything.
"""

from __future__ import annotations

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
        self._begin()
        self._partial = bytearray()

    def _begin(self) -> None:
        self._headers = bytearray()  # of the current member
        self._extended: dict[bytes, bytes] = {}
        self._kind = 0  # the type of the extended header whose data follows
        self._pending = 0  # bytes of that data, padded
        self._size = 0  # of that data
        self._left = 0  # bytes of the member's data, padded
        self._entry: Entry | None = None
        self._more = False  # whether another block of the map of holes follows

    def feed(self, data: bytes | memoryview) -> None:
        """
        Read the next bytes.

        :raises IntegrityError: they are not those of a tar
        """
        view = memoryview(data)
        if self._partial and not self._left:
            taken = min(BLOCK - len(self._partial), len(view))
            self._partial += view[:taken]
            view = view[taken:]
            if len(self._partial) < BLOCK:
                return
            block, self._partial = bytes(self._partial), bytearray()
            self._block(block)
        position, length = 0, len(view)
        while position < length:
            if self._left:
                step = min(self._left, length - position)
                self._data(view[position : position + step])
            elif self.ended:
                self._trailing(view[position:])
                return
            elif length - position < BLOCK:
                self._partial += view[position:]
                return
            else:
                step = BLOCK
                if self._pending > BLOCK:  # long extended headers, all at once
                    step = min(self._pending, length - position) // BLOCK * BLOCK
                self._block(bytes(view[position : position + step]))
            position += step

    def finish(self) -> None:
        """
        :raises IntegrityError: the archive ends too early
        """
        if not self.ended or self._partial:
            raise self._bad("it was cut short")

    # -- parts -------------------------------------------------------------------------------------

    def _block(self, block: bytes) -> None:
        self.offset += len(block)
        if self._pending:
            self._headers += block
            self._pending -= len(block)
            if not self._pending:
                self._extend(bytes(self._headers[-_padded(self._size) :][: self._size]))
            return
        if self._more:
            self._headers += block
            self._more = block[504] == 1
            if not self._more:
                self._announce()
            return
        if block == _ZEROS:
            if self._headers:
                raise self._bad("an extended header is not followed by a member")
            self.ended = True
            if self._emit is not None:
                self._emit(block)
            return
        self._header(block)

    def _header(self, block: bytes) -> None:
        if _checksum(block) != _number(block[148:156]):
            raise self._bad("a header is damaged")
        kind = block[156]
        if kind not in _KNOWN:
            raise self._bad(f"it has a member of the unknown type {chr(kind)!r}")
        size = _number(block[124:136])
        self._headers += block
        if kind in _EXTENDED:
            if size < 0 or len(self._headers) + size > LONGEST_HEADERS:
                raise self._bad("an extended header is too long")
            self._kind, self._size, self._pending = kind, size, _padded(size)
            if not self._pending:
                self._extend(b"")
            return
        if b"size" in self._extended:
            size = self._int(self._extended[b"size"])
        if size < 0:
            raise self._bad("a member has a negative size")
        stored = 0 if kind in _WITHOUT_DATA else size
        self._left = _padded(stored)
        self._more = kind == _SPARSE and block[482] == 1
        self._entry = self._describe(block, stored)
        if kind == _DUMPDIR:  # its list is its data, which must be known before it passes
            self._kind, self._size, self._pending, self._left = kind, stored, self._left, 0
            if len(self._headers) + self._pending > LONGEST_HEADERS:
                raise self._bad("the list of a directory is too long")
            if not self._pending:
                self._extend(b"")
        elif not self._more:
            self._announce()

    def _describe(self, block: bytes, stored: int) -> Entry:
        """:returns: the member of a header with the extended headers before it"""
        extended = self._extended
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
            self._float(extended.get(b"mtime"), _number(block[136:148])),
            extended.get(b"linkpath", _text(block[157:257])),
            extended.get(b"GNU.dumpdir"),
        )

    def _extend(self, content: bytes) -> None:
        """Take the data of an extended header."""
        if self._kind == _DUMPDIR:
            assert self._entry is not None
            entry = self._entry
            self._entry = Entry(entry.name, entry.kind, 0, entry.mtime, dumpdir=content)
            self._announce()
        elif self._kind == _LONG_NAME:
            self._extended[b"path"] = content.rstrip(b"\0")
        elif self._kind == _LONG_LINK:
            self._extended[b"linkpath"] = content.rstrip(b"\0")
        else:
            found = self._keywords(content)
            if self._kind == _GLOBAL_HEADER:
                if found.keys() & _GLOBAL:
                    raise self._bad("a global header has what concerns one member")
                self._headers = bytearray()  # not passed on: it concerns the archive as a whole
            else:
                self._extended.update(found)

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

    def _announce(self) -> None:
        """Tell of a member whose headers are complete."""
        assert self._entry is not None
        if self._entry.dumpdir is not None and _has_renames(self._entry.dumpdir):
            self.renames = True
        wanted = self._check is None or self._check(self._entry)
        self._passes = self._emit if wanted else None
        self._hasher = blake3.blake3(self._headers)
        self._start = self.offset - len(self._headers)
        if self._passes is not None:
            self._passes(bytes(self._headers))
        if not self._left:
            self._done()

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
        self._begin()

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

    def _float(self, text: bytes | None, other: float) -> float:
        if text is None:
            return other
        try:
            return float(text)
        except ValueError as error:
            raise self._bad("an extended header has a time that is none") from error

    def _bad(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"{self._what} is damaged at byte {self.offset}: {why}",
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
    return sum(block) - sum(block[148:156]) + 8 * 32


def _number(content: bytes) -> int:
    """:returns: a number in octal digits, or in the base 256 of GNU; -1 if it is neither"""
    if content[0] & 0x80:
        value = int.from_bytes(content, "big", signed=True)
        return value if content[0] == 0xFF else value + (1 << (8 * len(content) - 1))
    digits = content.strip(b" \0")
    if not digits:
        return 0
    if not digits.isdigit() or max(digits) > ord("7"):
        return -1
    return int(digits, 8)


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
