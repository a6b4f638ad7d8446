"""
The cache: the pool of this host from which machines run, with what a cache knows beyond a pool:
which files are trusted, which working images use which chain, when which source was asked.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from attrs import field, frozen

from statepool.beneath import Beneath, Tree
from statepool.cache import lookup_cache, trust
from statepool.cache.chains import Chains
from statepool.cache.linked import forget_use, linked_roots, note_use, referred
from statepool.cache.lookup_cache import LookupCache
from statepool.cache.trust import Trust
from statepool.errors import AccessDenied, MissingFile, UsageError
from statepool.model.digest import Digest
from statepool.model.outcomes import Collected
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.json_files import SOURCE_STATS, Notes, names_in, write_json
from statepool.pools.log import MAX_RECORD
from statepool.pools.pool import Pool
from statepool.pools.staging import Marker, Staging
from statepool.pools.writer import Writer
from statepool.qcow2.files import open_regular
from statepool.transports.base import FileKind

WORKING = "working"

MARKERS = "markers"
"""
The directory for an account's copies of its markers, if other accounts can put files where the
markers are.
"""

KINDS = (trust.DIRECTORY, lookup_cache.DIRECTORY, SOURCE_STATS, WORKING, MARKERS)
"""The private directories of an account."""


@frozen
class Cache:
    """
    A cache.

    :param pool: the cache as a pool
    :param root: its directory, for messages and for programs that only know paths
    :param tree: opens the files in it
    :param notes: the notes of this account: ``trust`` and ``lookups`` are kept there, and what is
        known of the sources
    :param trust: which of its files need not be read again
    :param chains: the chains that back working images, and their uses
    :param lookups: when which source was asked
    """

    pool: Pool
    root: Path
    tree: Tree
    notes: Notes
    trust: Trust
    chains: Chains
    lookups: LookupCache
    settings: Settings = field(factory=Settings)

    @classmethod
    def open(cls, pool: Pool, settings: Settings) -> Cache:
        """
        :param pool: a pool in a file system of this host
        :raises UsageError: the pool is elsewhere
        """
        root, here = pool.transport.local_path(""), pool.transport.beneath("")
        if root is None or here is None or pool.transport.capabilities.refers:
            raise UsageError(
                f"a cache must be a directory of this host, not {pool.location}", hint="name a path"
            )
        tree = here.tree
        notes = Notes(tree, KINDS)
        hashed = Trust(notes)
        return cls(
            pool=pool,
            root=root,
            tree=tree,
            notes=notes,
            trust=hashed,
            chains=Chains(tree, lambda digest: file_of(tree, digest, hashed.source)),
            lookups=LookupCache(notes, settings.fresh, time.time),
            settings=settings,
        )

    def prepare(self) -> None:
        """
        Make the cache if it is missing, before anything is put into it.

        :raises AccessDenied: its directory cannot be written
        """
        try:
            self.pool.create()
            self.pool.transport.make_directory(f"{layout.OURS}/chains")
            self.notes.prepare()
        except AccessDenied as error:
            raise AccessDenied(
                f"the cache {self.root} cannot be written",
                path=str(self.root),
                hint="choose another with --cache, or change its permissions",
            ) from error

    def data(self, digest: Digest) -> Path:
        """:returns: the path of some bytes, for messages and for programs that only know paths"""
        return self.root / layout.data(digest)

    def file(self, path: str) -> Beneath:
        """
        :returns: a file of the cache; ``path`` is relative, as :mod:`~statepool.pools.layout` gives
            it
        """
        return Beneath(self.tree, path)

    def bytes(self, digest: Digest) -> Beneath | None:
        """:returns: as :func:`file_of`"""
        return file_of(self.tree, digest, self.trust.source)

    def status(self, digest: Digest) -> os.stat_result | None:
        """:returns: the status of the file that holds some bytes; None if there is none"""
        found = self.file(layout.data(digest)).stat()
        if found is not None and stat.S_ISLNK(found.st_mode):
            there = self.bytes(digest)
            return there.stat() if there is not None else None
        return found

    def is_link(self, digest: Digest) -> bool:
        """:returns: whether the cache has only a link to these bytes"""
        found = self.file(layout.data(digest)).stat()
        return found is not None and stat.S_ISLNK(found.st_mode)

    def sign(
        self, digest: Digest, hashed: os.stat_result | None, *, flushed: bool, source: str | None
    ) -> None:
        """
        Trust the file of some bytes, if it is the file that was hashed.

        :param hashed: the status of the descriptor that was hashed; None if the file changed
            meanwhile
        :param flushed: whether the bytes are on stable storage
        :param source: the location of a pool that has the bytes, too, or None
        """
        if (found := file_of(self.tree, digest, lambda _: source)) is not None:
            # Not opened for reading: this process may hold a lease on the file, as on a file that
            # is being set.
            with found.open(os.O_PATH) as descriptor:
                self.trust.record(
                    digest,
                    descriptor,
                    hashed,
                    flushed=flushed,
                    source=source,
                    ours=found.tree is self.tree,
                )

    def stage(self, digests: Iterable[Digest], **facts: str) -> Staging:
        """
        Begin to publish, as :meth:`Pool.stage`. The next command of this account must be able to
        recover from the marker, and to trust it.

        :raises AccessDenied: other accounts can put files where the markers are, and this account
            has no place for a copy
        """
        marker = Marker(self.pool.nonce(), frozenset(digests), Writer.current(), facts)
        copy = None
        if self.notes.keeps_apart(layout.INCOMING):
            # The copy comes first, and is flushed: a marker without a copy belongs to no account.
            place = self.notes.directory(MARKERS)
            copy = Beneath(place.tree, _copy_of(marker.nonce))
            write_json(
                copy.tree, copy.path, {**json.loads(marker.to_bytes()), "locked": True}, flush=True
            )
        return Staging.begin(self.pool.transport, marker, copy=copy)

    def staging(self, marker: Marker) -> Staging:
        """:returns: the staging of a writer that has ended, for recovery"""
        place = self.notes.found(MARKERS)
        return Staging(
            self.pool.transport,
            marker,
            copy=Beneath(place.tree, _copy_of(marker.nonce)) if place is not None else None,
        )

    def marker(self, nonce: str) -> Marker | None:
        """
        :returns: a marker of this account; None if there is none, or its work is over. A marker
            that another account could have written or replaced does not count.
        """
        if self.file(layout.marker(nonce)).stat() is None:
            return None
        if not self.notes.keeps_apart(layout.INCOMING):
            return _own_marker(self.file(layout.marker(nonce)), nonce)
        place = self.notes.found(MARKERS)
        return (
            _own_marker(Beneath(place.tree, _copy_of(nonce)), nonce) if place is not None else None
        )

    def clear_markers(self) -> None:
        """
        Remove copies of markers, if the process that wrote the copy has ended, and the marker was
        removed or never written.
        """
        place = self.notes.found(MARKERS)
        for name in names_in(place.tree, MARKERS) if place is not None else []:
            assert place is not None
            nonce = name.removesuffix(".json")
            marker = _own_marker(Beneath(place.tree, _copy_of(nonce)), nonce)
            if (
                marker is not None
                and marker.writer.has_ended_here
                and self.file(layout.marker(nonce)).stat() is None
            ):
                Beneath(place.tree, _copy_of(nonce)).remove()

    def working_directory(self) -> Path:
        """:returns: the default directory for working images of this account"""
        return Path(self.working_place())

    def working_place(self) -> Beneath:
        """:returns: the default directory for working images, to open the files in it"""
        self.prepare()
        return self.notes.directory(WORKING)

    @property
    def collector(self) -> Collector:
        """The garbage collector: it keeps what a record, a working image or another cache needs."""
        return Collector(self.pool, self.gc_roots)

    def gc_roots(self) -> frozenset[Digest]:
        """
        :returns: the garbage collection roots: the bytes that back working images, those that a
            process has open, and those to which caches of neighbours refer
        """
        return self.chains.gc_roots() | linked_roots(self.pool)

    def drop(self, digests: set[Digest]) -> list[Collected]:
        """
        Remove bytes and chains that are not needed any more.

        :param digests: bytes that may not be needed any more
        """
        self.chains.prune(digests, self.pool.needed())
        gone = self.collector.collect(digests)
        for digest in digests:
            if self.file(layout.data(digest)).stat() is None:
                self.forget(digest)
        return gone

    def forget(self, digest: Digest) -> None:
        """
        Forget what the cache knows of bytes that were removed, or whose link was removed. Also
        remove the note of that link in the pool of the bytes.
        """
        if (pool := referred(self.trust.source(digest))) is not None:
            forget_use(pool, digest, self.root)
        self.trust.forget(digest)

    def renew_uses(self, digests: Iterable[Digest]) -> None:
        """
        Note in the pools of these bytes that this cache refers to them, where that note was lost.
        """
        wanted = list(digests)
        for digest, found in zip(
            wanted,
            self.pool.transport.stat_many([layout.data(digest) for digest in wanted]),
            strict=True,
        ):
            if (
                found is not None
                and found.kind is FileKind.LINK
                and (pool := referred(self.trust.source(digest))) is not None
            ):
                note_use(pool.transport, digest, self.root)


def _copy_of(nonce: str) -> str:
    return f"{MARKERS}/{nonce}.json"


def _own_marker(file: Beneath, nonce: str) -> Marker | None:
    """
    :returns: a marker in a private directory that this account has written; None if another account
        has written it, or it was removed
    """
    try:
        with open_regular(file) as descriptor:
            if os.fstat(descriptor).st_uid != os.geteuid():
                return None
            content = os.read(descriptor, MAX_RECORD)
    except MissingFile:
        return None
    return Marker.from_bytes(nonce, content, str(file)) if content else None


def file_of(tree: Tree, digest: Digest, source: Callable[[Digest], str | None]) -> Beneath | None:
    """
    Find the file that holds some bytes. A cache that refers to a pool has a symbolic link in its
    place. The link is followed only into that pool.

    :param tree: of the cache
    :param source: returns the location of the pool from which bytes come, if this account knows it
    :returns: the file; None if there is no file, or only a link that is dead or leads elsewhere
    """
    file = Beneath(tree, layout.data(digest))
    found = file.stat()
    if found is None or not stat.S_ISLNK(found.st_mode):
        return file if found is not None else None
    pool = referred(source(digest))
    root = pool.transport.beneath("") if pool is not None else None
    target = tree.readlink(file.path)
    if root is None or not target.startswith(f"{root.tree}/"):
        return None
    there = Beneath(root.tree, target.removeprefix(f"{root.tree}/"))
    return there if there.stat() is not None else None


def file_in(pool: Pool, digest: Digest) -> Beneath | None:
    """
    :returns: as :func:`file_of`, for any pool, which may be a cache of this account; also None if
        the pool is not on this host
    """
    here = pool.transport.beneath("")
    return (
        file_of(here.tree, digest, Trust(Notes(here.tree, KINDS)).source)
        if here is not None
        else None
    )
