"""
The packets of SFTP: version 3 of the protocol (draft-ietf-secsh-filexfer-02), which all servers
support, and some extensions of OpenSSH (its file ``PROTOCOL``).

Names are bytes here, as on the wire.
"""

from __future__ import annotations

import enum
import stat
import struct

from attrs import frozen

VERSION = 3


class Kind(enum.IntEnum):
    """Types of packets."""

    INIT = 1
    VERSION = 2
    OPEN = 3
    CLOSE = 4
    READ = 5
    WRITE = 6
    LSTAT = 7
    FSTAT = 8
    SETSTAT = 9
    FSETSTAT = 10
    OPENDIR = 11
    READDIR = 12
    REMOVE = 13
    MKDIR = 14
    RMDIR = 15
    REALPATH = 16
    STAT = 17
    RENAME = 18
    READLINK = 19
    SYMLINK = 20
    STATUS = 101
    HANDLE = 102
    DATA = 103
    NAME = 104
    ATTRS = 105
    EXTENDED = 200
    EXTENDED_REPLY = 201


class Code(enum.IntEnum):
    """
    Codes of a status. OpenSSH reports all errors without a code as FAILURE: EEXIST, ENOSPC, EIO,
    ENOTEMPTY and others.
    """

    OK = 0
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4
    BAD_MESSAGE = 5
    NO_CONNECTION = 6
    CONNECTION_LOST = 7
    UNSUPPORTED = 8


class Flag(enum.IntFlag):
    """Flags for opening a file."""

    READ = 1
    WRITE = 2
    CREATE = 8
    TRUNCATE = 16
    EXCLUSIVE = 32


FSYNC = b"fsync@openssh.com"
HARDLINK = b"hardlink@openssh.com"
POSIX_RENAME = b"posix-rename@openssh.com"
LIMITS = b"limits@openssh.com"
STATVFS = b"statvfs@openssh.com"

_SIZE, _OWNER, _MODE, _TIMES, _EXTENDED = 1, 2, 4, 8, 0x80000000


MOST_WORDS = 1000
"""
The most bytes of a server's text that are passed on: they end up in messages, and a server may send
megabytes.
"""


class Refused(Exception):
    """
    An error: the server refused a request.

    :param code: of its status
    :param text: its text
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text or f"status {code}")
        self.code = code
        self.text = text


class Garbled(Exception):
    """
    An error: the server sent something that is no valid answer.

    :param text: what it sent instead of SFTP, if that is text
    """

    def __init__(self, message: str, text: str | None = None) -> None:
        super().__init__(message)
        self.text = text


@frozen
class Attributes:
    """
    The attributes of a file.

    :param size: in bytes
    :param mode: its kind and its permissions, as in stat(2)
    :param mtime: last change, in seconds since the epoch by the server's clock
    """

    size: int = 0
    mode: int = 0
    mtime: int = 0

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)


@frozen
class Limits:
    """
    The most bytes of one request.

    :param read: of a request that reads
    :param write: of a request that writes
    """

    read: int = 32 << 10
    write: int = 32 << 10


@frozen
class Answer:
    """
    An answer of the server.

    :param kind: type of the packet
    :param parts: its content after the request number, in pieces as they arrived
    """

    kind: int
    parts: tuple[memoryview, ...]

    @property
    def length(self) -> int:
        return sum(map(len, self.parts))

    @property
    def body(self) -> bytes:
        return bytes(self.parts[0]) if len(self.parts) == 1 else b"".join(self.parts)


def string(value: bytes) -> bytes:
    """:returns: the string as it goes over the wire"""
    return len(value).to_bytes(4, "big") + value


def attributes(*, size: int | None = None, mode: int | None = None) -> bytes:
    """:returns: attributes to be set, as they go over the wire"""
    flags = (_SIZE if size is not None else 0) | (_MODE if mode is not None else 0)
    return (
        struct.pack(">I", flags)
        + (struct.pack(">Q", size) if size is not None else b"")
        + (struct.pack(">I", mode) if mode is not None else b"")
    )


class Reader:
    """A parser of an answer."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def is_done(self) -> bool:
        return self._at >= len(self._data)

    def take(self, count: int) -> bytes:
        found = self._data[self._at : self._at + count]
        if len(found) != count:
            raise Garbled("an answer is shorter than it says")
        self._at += count
        return found

    def number(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def long(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def string(self) -> bytes:
        return self.take(self.number())

    def attributes(self) -> Attributes:
        flags = self.number()
        size = self.long() if flags & _SIZE else 0
        if flags & _OWNER:
            self.take(8)
        mode = self.number() if flags & _MODE else 0
        mtime = 0
        if flags & _TIMES:
            self.take(4)
            mtime = self.number()
        if flags & _EXTENDED:
            for _ in range(self.number()):
                self.string()
                self.string()
        return Attributes(size, mode, mtime)


def extension(name: bytes, *arguments: bytes) -> tuple[int, bytes]:
    """:returns: a request of an extension"""
    return Kind.EXTENDED, string(name) + b"".join(arguments)


def check(answer: Answer) -> Answer:
    """:raises Refused: it is a status other than success"""
    if answer.kind == Kind.STATUS:
        reader = Reader(answer.body)
        code = reader.number()
        if code != Code.OK:
            raise Refused(
                code,
                "" if reader.is_done else reader.string()[:MOST_WORDS].decode("utf-8", "replace"),
            )
    return answer


def checked(answer: Answer) -> Answer | Refused:
    """:returns: the answer, or what :func:`check` would raise"""
    try:
        return check(answer)
    except Refused as refused:
        return refused


# -- reading answers -------------------------------------------------------------------------------


def handle_in(answer: Answer) -> bytes:
    """:returns: the handle of an opened file"""
    _require(answer, Kind.HANDLE)
    return Reader(answer.body).string()


def attributes_in(answer: Answer) -> Attributes:
    """:returns: the attributes of a file"""
    _require(answer, Kind.ATTRS)
    return Reader(answer.body).attributes()


def names_in(answer: Answer) -> list[tuple[bytes, Attributes]]:
    """:returns: names in a directory, or the one requested name, with their attributes"""
    _require(answer, Kind.NAME)
    reader, found = Reader(answer.body), []
    for _ in range(reader.number()):
        name = reader.string()
        reader.string()  # the line of a listing, meant for display
        found.append((name, reader.attributes()))
    if not found:
        # at the end of a directory, the server has to send a status
        raise Garbled("the server answers with no name at all")
    return found


def data_in(answer: Answer) -> list[memoryview]:
    """:returns: bytes of a file, in pieces: at least one byte"""
    _require(answer, Kind.DATA)
    head, parts = split(list(answer.parts), 4)
    if sum(map(len, parts)) != int.from_bytes(head, "big"):
        raise Garbled("an answer is not as long as it says")
    if not parts:
        # at the end of a file, the server has to send a status
        raise Garbled("the server answers with no byte at all")
    return parts


def numbers_in(answer: Answer, count: int) -> list[int]:
    """:returns: the first numbers of 64 bits that an extension answers with"""
    _require(answer, Kind.EXTENDED_REPLY)
    reader = Reader(answer.body)
    return [reader.long() for _ in range(count)]


def _require(answer: Answer, kind: int) -> None:
    if answer.kind != kind:
        raise Garbled(f"the server answers with a packet of type {answer.kind}, not {kind}")


def extensions_in(reader: Reader) -> dict[bytes, bytes]:
    """:returns: the extensions that a server names in its version message"""
    found = {}
    while not reader.is_done:
        name = reader.string()
        found[name] = reader.string()
    return found


def split(parts: list[memoryview], count: int) -> tuple[bytes, list[memoryview]]:
    """:returns: the first ``count`` bytes, and the rest"""
    head = b""
    for index, part in enumerate(parts):
        missing = count - len(head)
        head += bytes(part[:missing])
        if len(head) == count:
            rest = part[missing:]
            return head, ([rest] if rest else []) + parts[index + 1 :]
    raise Garbled("an answer is shorter than it says")
