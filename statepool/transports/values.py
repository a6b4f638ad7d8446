"""Values that are passed to transports, and values that they return."""

from __future__ import annotations

import enum

from attrs import field, frozen

from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.pieces import Pieces
from statepool.model.progress import SILENT, Progress


class FileKind(enum.StrEnum):
    """The kind of file that a name in a directory refers to."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    OTHER = "other"


@frozen(slots=False)  # thousands are made, which is faster without slots
class Entry:
    """A name in a directory."""

    name: str
    kind: FileKind


@frozen
class Stat:
    """
    The facts of a file that are known without opening it. For a symbolic link: of the link, not of
    its target.

    :param kind: what it is
    :param size: in bytes
    :param mtime_ns: last change, in nanoseconds of the far side's clock; servers may round it to
        seconds
    :param identity: equal for two names of one file on this side of the transport, or None if that
        is unknown
    """

    kind: FileKind
    size: int
    mtime_ns: int
    identity: tuple[int, int] | None = None


@frozen
class Capabilities:
    """
    The capabilities of a transport.

    :param symlinks: symbolic links can be made and read
    :param durable: what has been flushed survives a power cut there
    :param local: the files can be opened on this host; see
        :meth:`~statepool.transports.base.Transport.local_path`
    :param refers: a cache refers to the files instead of copying them
    :param resumes: an interrupted transfer can be resumed; only where files can be renamed
    :param writes: files can be created and removed there; without this, no other change is possible
        either
    :param renames: a file can be given another name
    :param directories: there are directories, which must be made before a file is put into one;
        without this, a file may have any path, and a directory exists as long as a file is in it
    :param copies: ``link`` makes a copy, since a file cannot have two names there
    """

    symlinks: bool
    durable: bool
    local: bool = False
    refers: bool = False
    resumes: bool = False
    writes: bool = True
    renames: bool = True
    directories: bool = True
    copies: bool = False


@frozen
class Moved:
    """
    The result of moving a file.

    :param digest: of the bytes as they are at their new place
    :param how: ``reflink``, ``copy`` or ``stream``
    :param sent: bytes that were really moved: neither holes nor shared blocks
    :param again: how many of them had been moved before, in a failed attempt
    """

    digest: Digest
    how: str
    sent: int
    again: int = 0


@frozen
class Transfer:
    """
    The description of a file to move, or only to read.

    :param size: how long the file must be, in bytes
    :param algorithm: for the digest
    :param extents: where the source has data, as (offset, length) in bytes; empty: find out, or
        move everything
    :param progress: told of the bytes; the caller calls its begin and end
    :param done: bytes at the beginning that are at the other end already; when storing, what
        follows them there is overwritten. Where transfers can be resumed, these bytes are only
        hashed, and the rest is moved; elsewhere all are moved.
    :param pieces: gets the digests of the pieces that were hashed, where the algorithm has some.
        Those that it has of the first ``done`` bytes are kept, and these bytes are not hashed
        again.
    """

    size: int
    algorithm: str = DEFAULT_ALGORITHM
    extents: tuple[tuple[int, int], ...] = ()
    progress: Progress = SILENT
    done: int = 0
    pieces: Pieces = field(factory=Pieces, eq=False)
