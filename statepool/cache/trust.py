"""
Which cached files need not be read again.

A file is trusted if it was hashed, or written and hashed, by us and its stat signature has not
changed since. Any write changes the modification time, and the resolution of that time does not
matter here: we set it back before we take the signature, so that every later write shows.
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
A modification time must lie this many nanoseconds back for a signature to mean anything: file
systems round times, FAT to two seconds.
"""

_BACK_NS = 10_000_000_000


class FileStatus(enum.Enum):
    """What is known of a file."""

    TRUSTED = "trusted"
    DOUBTFUL = "doubtful"
    """It must be hashed before it is used."""
    MISSING = "missing"
    """It is not there, or a link to it is dead."""


@frozen
class Signature:
    """What :func:`os.stat` says of a file, as far as it changes with the file."""

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
    Keeps the signatures of a cache's files.

    :param notes: where: one small file for each digest, whose own modification time says when the
        bytes were last used
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
        Trust a file that was hashed, if it is the one that has the name now. No name of it will
        change any more.

        :param descriptor: of the file that has the name; one that was opened as a place only
            (``O_PATH``) will do
        :param hashed: the status of the descriptor that was hashed, by which the file is known
            again; None if it changed while it was hashed
        :param ours: whether only this account changes it: then a change of its names, and not of
            its bytes, does not matter, and its times may be set
        :param flushed: whether they are on stable storage; if not, they count for this boot only
        :param source: the location that has them too, or None: what nobody else has is never
            evicted
        """
        stat = os.fstat(descriptor)
        if hashed is None or not _is_still(hashed, stat, ours=ours):
            if not self._read(digest):
                self._write(digest, None, flushed=flushed, source=source)
            return  # what another process has signed meanwhile counts for what it hashed
        settled = time.time_ns() - stat.st_mtime_ns >= SETTLED_NS
        # A file of another pool or account is not ours to change: without a signature it is hashed
        # each time until it is old enough.
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
        # nothing if never hashed, or torn by a power cut: hashing once more settles it
        return self._notes.read(self._file(digest))

    def file_status(self, digest: Digest, stat: os.stat_result | None) -> FileStatus:
        """
        :param stat: the status of the file; None if it is not there
        :returns: what is known of it
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
        :returns: a location that had these bytes too, or None if nobody else is known to have them
        """
        source = self._read(digest).get("source")
        return source if isinstance(source, str) else None

    def note_source(self, digest: Digest, source: str) -> None:
        """Another pool has these bytes now."""
        data = self._read(digest)
        if data and data.get("source") is None:
            self._notes.write(self._file(digest), {**data, "source": source})

    def touch(self, digests: Iterable[Digest]) -> None:
        """Note that bytes have been used; what was not hashed yet has no age."""
        self._notes.touch(DIRECTORY, [f"{digest.file_name}.json" for digest in digests])

    def last_used(self, digest: Digest) -> float:
        """
        :returns: when the bytes were last used, in seconds since the epoch; 0 if that is not known
        """
        found = self._notes.status(self._file(digest))
        return found.st_mtime if found is not None else 0.0

    def forget(self, digest: Digest) -> None:
        """The file is gone."""
        self._notes.remove(self._file(digest))


def _is_still(hashed: os.stat_result, stat: os.stat_result, *, ours: bool) -> bool:
    """
    Whether a file is the one that was hashed, with the same bytes. Names and modes change the ctime
    alone, which nobody can set.
    """
    same = os.path.samestat(hashed, stat) and (hashed.st_size, hashed.st_mtime_ns) == (
        stat.st_size,
        stat.st_mtime_ns,
    )
    return same and (ours or hashed.st_ctime_ns == stat.st_ctime_ns)
