"""
Trust: which cached files need not be read again.

A file is trusted if this account hashed it, or wrote and hashed it, and its stat signature has not
changed since. Any write changes the modification time. The resolution of that time does not matter:
it is set back before the signature is taken, so that every later write is visible.
"""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Iterable
from contextlib import suppress

from attrs import frozen

from statepool.model.digest import Digest
from statepool.pools.json_files import Notes
from statepool.pools.writer import Writer

DIRECTORY = "trust"
"""Where these notes are."""

SETTLED_NS = 2_000_000_000
"""
A signature is only reliable if the modification time is at least this many nanoseconds ago: file
systems round times, FAT to two seconds.
"""

_BACK_NS = 10_000_000_000


class FileStatus(enum.Enum):
    """The trust status of a file."""

    TRUSTED = "trusted"
    DOUBTFUL = "doubtful"
    """The file must be hashed before it is used."""
    MISSING = "missing"
    """The file does not exist, or the link to it is dead."""


@frozen
class Signature:
    """The values of :func:`os.stat` that change when a file changes."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Signature:
        """:returns: the signature in a stat"""
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class Trust:
    """
    The signatures of a cache's files.

    :param notes: where they are kept: one small file for each digest. Its own modification time is
        the time of the last use of the bytes.
    """

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    @staticmethod
    def _file(digest: Digest) -> str:
        return f"{DIRECTORY}/{digest.file_name}.json"

    def record(
        self,
        digest: Digest,
        descriptor: int,
        hashed: os.stat_result | None,
        *,
        flushed: bool,
        source: str | None,
        ours: bool = True,
    ) -> None:
        """
        Trust a file that was hashed, if it is the file that has the name now. The names of the file
        must not change any more.

        :param descriptor: of the file that has the name; a descriptor opened with ``O_PATH`` is
            enough
        :param hashed: the status of the descriptor that was hashed, by which the file is
            recognised; None if the file changed while it was hashed
        :param ours: whether only this account changes the file: then a change of its names, and not
            of its bytes, does not matter, and its times may be set
        :param flushed: whether the bytes are on stable storage; if not, the signature counts for
            this boot only
        :param source: the location of a pool that has the bytes, too, or None: bytes that no other
            pool has are never evicted
        """
        stat = os.fstat(descriptor)
        if hashed is None or not _is_still(hashed, stat, ours=ours):
            if not self._read(digest):
                self._write(digest, None, flushed=flushed, source=source)
            return  # a signature from another process stays: it counts for the file that it hashed
        settled = time.time_ns() - stat.st_mtime_ns >= SETTLED_NS
        # The times of a file of another pool or account must not be set: it gets no signature, and
        # is hashed each time, until it is old enough.
        if not settled and ours:
            with suppress(PermissionError):
                os.utime(
                    f"/proc/self/fd/{descriptor}", ns=(stat.st_atime_ns, time.time_ns() - _BACK_NS)
                )
                stat, settled = os.fstat(descriptor), True
        self._write(digest, Signature.of(stat) if settled else None, flushed=flushed, source=source)

    def _write(
        self, digest: Digest, signature: Signature | None, *, flushed: bool, source: str | None
    ) -> None:
        numbers = (
            [signature.size, signature.mtime_ns, signature.ctime_ns, signature.inode]
            if signature is not None
            else None
        )
        note = {
            "format": 1,
            "signature": numbers,
            "boot": Writer.current().boot,
            "flushed": flushed,
            "source": source,
        }
        self._notes.write(self._file(digest), note)

    def _read(self, digest: Digest) -> dict[str, object]:
        # empty if the file was never hashed, or a power cut tore the note: then the file is hashed
        # again
        return self._notes.read(self._file(digest))

    def file_status(self, digest: Digest, stat: os.stat_result | None) -> FileStatus:
        """
        :param stat: the status of the file; None if it does not exist
        :returns: its trust status
        """
        if stat is None:
            return FileStatus.MISSING
        data = self._read(digest)
        signature = Signature.of(stat)
        known = data.get("signature") == [
            signature.size,
            signature.mtime_ns,
            signature.ctime_ns,
            signature.inode,
        ]
        safe = data.get("flushed") is True or data.get("boot") == Writer.current().boot
        return FileStatus.TRUSTED if known and safe else FileStatus.DOUBTFUL

    def is_flushed(self, digest: Digest) -> bool:
        """:returns: whether these bytes are known to be on stable storage"""
        return self._read(digest).get("flushed") is True

    def source(self, digest: Digest) -> str | None:
        """
        :returns: the location of a pool that had these bytes, too; None if no other pool is known
            to have them
        """
        source = self._read(digest).get("source")
        return source if isinstance(source, str) else None

    def note_source(self, digest: Digest, source: str) -> None:
        """Note that another pool has these bytes now."""
        data = self._read(digest)
        if data and data.get("source") is None:
            self._notes.write(self._file(digest), {**data, "source": source})

    def touch(self, digests: Iterable[Digest]) -> None:
        """Note that bytes have been used. Nothing is noted for bytes that were not hashed yet."""
        self._notes.touch(DIRECTORY, [f"{digest.file_name}.json" for digest in digests])

    def last_used(self, digest: Digest) -> float:
        """
        :returns: when the bytes were last used, in seconds since the epoch; 0 if that is not known
        """
        found = self._notes.status(self._file(digest))
        return found.st_mtime if found is not None else 0.0

    def forget(self, digest: Digest) -> None:
        """Forget the signature of a file that was removed."""
        self._notes.remove(self._file(digest))


def _is_still(hashed: os.stat_result, stat: os.stat_result, *, ours: bool) -> bool:
    """
    Return whether a file is the one that was hashed, with the same bytes. A change of names or
    modes changes only the ctime, which no process can set.
    """
    same = os.path.samestat(hashed, stat) and (hashed.st_size, hashed.st_mtime_ns) == (
        stat.st_size,
        stat.st_mtime_ns,
    )
    return same and (ours or hashed.st_ctime_ns == stat.st_ctime_ns)
