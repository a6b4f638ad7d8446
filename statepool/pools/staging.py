"""
Staging: what a writer has in progress in a pool. A marker names the digests that the writer is
about to need, and files gather their bytes.

The marker is created first and removed last. A collector that has moved bytes aside reads the
markers afterwards. So the bytes that a marker names are safe from the moment the marker exists,
also if the pool had them before and they are only used again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable
from contextlib import suppress

from attrs import evolve, field, frozen

from statepool.beneath import Beneath, Descriptor
from statepool.errors import BadRecord, FileExists, IntegrityError, MissingFile
from statepool.model.digest import Digest
from statepool.model.pieces import Pieces
from statepool.pools import layout
from statepool.pools.log import MAX_RECORD
from statepool.pools.pieces import create_list, is_proven
from statepool.pools.records import decode
from statepool.pools.talks import VAIN
from statepool.pools.writer import Writer
from statepool.transports.base import Transport
from statepool.transports.local import LocalTransport


@frozen
class Marker:
    """
    A marker: what a writer declares about its work in progress.

    :param nonce: distinguishes it from all others; the names of its files begin with it
    :param digests: the bytes that the writer is about to need
    :param writer: the process
    :param facts: what the process that recovers after a crash must know
    :param locked: whether the writer holds a kernel lock on the marker's file for as long as it
        lives. Containers of one host can see that lock, though they do not see each other's
        processes.
    :param taking_back: whether the writer is about to take back the record that needs these bytes,
        since they were removed
    :param condemns: whether the writer is a collector that is about to remove these bytes in place,
        since files cannot be renamed there
    """

    nonce: str
    digests: frozenset[Digest]
    writer: Writer
    facts: dict[str, str] = field(factory=dict)
    locked: bool = field(default=False, eq=False)
    taking_back: bool = False
    condemns: bool = False

    def to_bytes(self) -> bytes:
        """:returns: the content of its file"""
        data = {
            "format": layout.FORMAT,
            "digests": sorted(map(str, self.digests)),
            "writer": self.writer.to_json(),
            "facts": self.facts,
            **{name: True for name in ("locked", "taking_back", "condemns") if getattr(self, name)},
        }
        return json.dumps(data).encode() + b"\n"

    @classmethod
    def from_bytes(cls, nonce: str, content: bytes, where: str) -> Marker:
        """:raises BadRecord: the content is not a marker"""
        data = decode(content, where)
        digests, facts = data.get("digests"), data.get("facts", {})
        if not isinstance(digests, list) or not isinstance(facts, dict):
            raise BadRecord(f"{where} is not a marker", path=where)
        return cls(
            nonce,
            frozenset(Digest.parse(str(digest)) for digest in digests),
            Writer.from_json(data.get("writer")),
            {str(key): str(value) for key, value in facts.items()},
            data.get("locked") is True,
            data.get("taking_back") is True,
            data.get("condemns") is True,
        )


def read_markers(transport: Transport) -> list[Marker]:
    """
    :returns: the markers in a pool
    :raises IntegrityError: they cannot be read, or are longer than all markers together can be
    """
    names = [entry.name.partition(".") for entry in transport.scan(layout.INCOMING)]
    nonces = [nonce for nonce, dot, suffix in names if dot and suffix == "json"]
    contents = transport.read_many([layout.marker(nonce) for nonce in nonces], MAX_RECORD)
    # no content: the writer has ended meanwhile
    found = [
        (nonce, content)
        for nonce, content in zip(nonces, contents, strict=True)
        if content is not None
    ]
    return [
        (
            Marker(nonce, frozenset(), Writer.gone())
            if _is_torn(content)
            else Marker.from_bytes(nonce, content, f"{transport.location}/{layout.marker(nonce)}")
        )
        for nonce, content in found
    ]


def condemned(transport: Transport) -> frozenset[Digest]:
    """
    :returns: the bytes that collectors are about to remove in place; empty where bytes are renamed
        before they are removed
    """
    if transport.capabilities.renames:
        return frozenset()
    return frozenset(
        digest for marker in read_markers(transport) if marker.condemns for digest in marker.digests
    )


def _is_torn(content: bytes) -> bool:
    """
    Return whether a power cut took the content of a marker. A marker is complete before it gets its
    name, but it is not flushed if it has no facts.
    """
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return True
    return False


class Staging:
    """
    What one writer has in progress.

    :param transport: reaches the pool
    :param marker: its marker, which must exist
    :param copy: a copy of the marker to which no other account can write, if the writer has one
    """

    def __init__(
        self,
        transport: Transport,
        marker: Marker,
        lock: Descriptor | None = None,
        *,
        copy: Beneath | None = None,
    ) -> None:
        self.marker = marker
        self._transport = transport
        self._lock = lock
        self._copy = copy
        self._spares: dict[Digest, str] = {}
        self._looks = 0
        self._lists: dict[Digest, tuple[bytes, bool]] = {}

    @classmethod
    def begin(cls, transport: Transport, marker: Marker, *, copy: Beneath | None = None) -> Staging:
        """:returns: a new staging, whose marker exists from now on"""
        path = layout.marker(marker.nonce)
        if not marker.facts:
            # The marker is only for processes that are running now: it is not needed after a power
            # cut.
            transport.create(path, marker.to_bytes(), flush=False)
            return cls(transport, marker)
        marker = evolve(marker, locked=isinstance(transport, LocalTransport))
        transport.create(path, marker.to_bytes())
        return cls(
            transport,
            marker,
            (
                _open_locked(transport, path, fcntl.LOCK_SH)
                if isinstance(transport, LocalTransport)
                else None
            ),
            copy=copy,
        )

    def path(self, digest: Digest) -> str:
        """:returns: the file in which to gather the bytes of this name"""
        return layout.incoming(self.marker.nonce, digest)

    def list_pieces(self, digest: Digest, size: int, pieces: Pieces, *, flush: bool = True) -> None:
        """
        Plan to put the list of their pieces beside bytes, when the bytes get their name.

        :param size: of the bytes
        :param pieces: of these bytes, as far as they are known; an incomplete list is left out
        :param flush: whether the list has to be on stable storage
        """
        if layout.has_pieces(digest, size) and is_proven(pieces, digest, size):
            self._lists[digest] = bytes(pieces), flush

    def settle(self, digests: Iterable[Digest]) -> None:
        """
        Give bytes their names, if they do not have them. It may be called again: gathered bytes are
        kept until :meth:`end`.

        :raises IntegrityError: the bytes were not gathered, and the pool does not have them
        """
        # Read this before the bytes are looked at: a collector ends its condemnation only after it
        # has removed them.
        doomed = condemned(self._transport)
        self._looks += 1
        for digest in dict.fromkeys(digests):
            if (digest in doomed and not self._spare(digest)) or not self._settle(digest):
                raise IntegrityError(
                    f"the bytes {digest} are not in {self._transport.location}: they were removed"
                    " there meanwhile",
                    pool=str(self._transport.location),
                    hint="nothing was published; do it once more",
                )

    def _settle(self, digest: Digest) -> bool:
        try:
            self._transport.link(self.path(digest), layout.data(digest))
        except FileExists:
            pass
        except MissingFile:
            if not restore(self._transport, digest):
                return False
        if digest in self._lists:
            content, flush = self._lists.pop(digest)
            create_list(self._transport, digest, content, flush=flush)
        return True

    def _spare(self, digest: Digest) -> bool:
        """
        Put a spare of condemned bytes into the trash, from which they can be brought back whatever
        happens to the bytes in ``data/``. Each look makes a new spare: a collector may be about to
        remove the spare of the look before.

        :returns: whether the bytes existed
        """
        spare, before = (
            layout.trash(f"{self.marker.nonce}{self._looks}", digest),
            self._spares.get(digest),
        )
        for source in (self.path(digest), layout.data(digest), *_aside(self._transport, digest)):
            try:
                self._transport.link(source, spare)
            except MissingFile:
                continue
            self._spares[digest] = spare
            if before is not None:
                self._transport.remove(before)
            return True
        return False

    def end(self) -> None:
        """Remove the gathered files, and then the marker."""
        for digest in sorted(self.marker.digests):
            self._transport.remove(self.path(digest))
        self._transport.remove(layout.marker(self.marker.nonce))
        if self._copy is not None:
            self._copy.remove()
        if self._lock is not None:
            self._lock.close()


LOCKING = 60
"""
Age in seconds, by the clock of the place, from which the file of a marker is certainly locked if
its writer lives: the file gets its lock after its name.
"""

_NO_LOCKS = frozenset({errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS})
"""The errors of the kernel where a file system has no locks (``man 2 flock``)."""


def is_let_go(transport: Transport, marker: Marker, now: float) -> bool:
    """
    :param now: by the clock of the place, in seconds since the epoch
    :returns: whether the writer of a locked marker has certainly ended, in any container of this
        host
    """
    path = layout.marker(marker.nonce)
    if (
        not marker.locked
        or not marker.writer.is_of_this_boot
        or not isinstance(transport, LocalTransport)
    ):
        return False
    found = transport.stat(path)
    if found is None or now - found.mtime_ns / 1e9 < LOCKING:
        return False
    return _open_locked(transport, path, fcntl.LOCK_EX) is not None


def _open_locked(transport: LocalTransport, path: str, how: int) -> Descriptor | None:
    """
    :returns: the descriptor of a file with a lock that lasts as long as the descriptor; None if the
        lock cannot be taken
    """
    try:
        descriptor = transport.tree.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.flock(descriptor.number, how | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError, PermissionError):
        return None  # the file is locked, was removed, or is closed to this account
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return descriptor


LOOKS = 3
"""
How often bytes must be found in neither place before they count as missing. Between two looks,
several collectors may have moved them from one place to the other and back, but each collector
moves them at most once.
"""


def restore(transport: Transport, digest: Digest) -> bool:
    """
    Make sure that bytes which a record or a marker needs are in ``data/``: a collector may just
    have moved them aside, to check whether they are needed.

    :returns: whether they are there
    """
    looks = moves = 0
    while looks < LOOKS and moves < VAIN:
        if transport.stat(layout.data(digest)) is not None:
            return True
        aside = _aside(transport, digest)
        if not aside:
            looks += 1
            continue
        try:
            bring_back(transport, aside[0], digest)
            return True
        except MissingFile:
            moves += 1  # another process moved it back, or removed it: look again
    return transport.stat(layout.data(digest)) is not None


def _aside(transport: Transport, digest: Digest) -> list[str]:
    """:returns: the files in the trash with these bytes"""
    paths = (f"{layout.TRASH}/{entry.name}" for entry in transport.scan(layout.TRASH))
    return [path for path in paths if layout.untrashed(path) == layout.data(digest)]


def bring_back(transport: Transport, path: str, digest: Digest) -> None:
    """
    Give bytes in the trash their name again. Where files cannot be renamed, a copy gets the name,
    and the file in the trash stays.

    :raises MissingFile: the bytes are not in the trash any more
    """
    if transport.capabilities.renames:
        transport.rename(path, layout.data(digest))
        return
    with suppress(FileExists):
        transport.link(path, layout.data(digest))
