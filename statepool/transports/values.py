"""What transports are told, and what they answer."""

from __future__ import annotations

import enum

from attrs import field, frozen

from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.pieces import Pieces
from statepool.model.progress import SILENT, Progress


class FileKind(enum.StrEnum):
    """What a name in a directory stands for."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    OTHER = "other"


@frozen(slots=False)  # made by the thousand, which is quicker so
class Entry:
    """A name in a directory."""

    name: str
    kind: FileKind


@frozen
class Stat:
    """
    What is known of a file without opening it; of a symbolic link, not of what it points to.

    :param kind: what it is
    :param size: in bytes
    :param mtime_ns: last change, in nanoseconds of the far side's clock; servers may round it to
        seconds
    :param identity: the same for two names of one file on this side of the transport, or None where
        that is not known
    """

    kind: FileKind
    size: int
    mtime_ns: int
    identity: tuple[int, int] | None = None


@frozen
class Capabilities:
    """
    What a transport can do, and what it cannot.

    :param symlinks: symbolic links can be made and read
    :param durable: what has been flushed survives a power cut there
    :param local: the files can be opened on this host, see
        :meth:`~statepool.transports.base.Transport.local_path`
    :param refers: a cache refers to the files instead of copying them
    :param resumes: what an interrupted transfer has moved need not be moved again; only where files
        can be renamed
    :param writes: files can be made and removed there; without, nothing of the rest that changes
        something can be done either
    :param renames: a file can be given another name
    :param directories: there are directories, which are made before a file is put into one;
        without, a file may have any path, and a directory is there as long as a file is in it
    :param copies: ``link`` makes a copy, as no file can have two names there
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
    A file has been moved.

    :param digest: of the bytes as they are at their new place
    :param how: ``reflink``, ``copy`` or ``stream``
    :param sent: bytes that really had to be moved: neither holes nor shared blocks
    :param again: how many of them had been moved before, in an attempt that failed
    """

    digest: Digest
    how: str
    sent: int
    again: int = 0


@frozen
class Transfer:
    """
    What is said of a file whose bytes are moved, or only read.

    :param size: how long the file must be, in bytes
    :param algorithm: for the digest
    :param extents: where the source has data, as (offset, length) in bytes; empty: find out, or
        take all
    :param progress: told of the bytes; begin and end are the caller's
    :param done: so many bytes at the beginning are at the other end already; where something is
        stored, what is there behind them gives way. Where transfers can be resumed, they are
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
