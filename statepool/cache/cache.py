"""
The pool of this host from which machines run, with what it knows beyond a pool: which files are
trusted, what stands on which chain, how fresh it is.
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
"""Where an account has copies of its markers, if others can put files where these are."""

KINDS = (trust.DIRECTORY, lookup_cache.DIRECTORY, SOURCE_STATS, WORKING, MARKERS)
"""The directories that an account has for itself."""


@frozen
class Cache:
    """
    A cache.

    :param pool: the pool that it is
    :param root: its directory, for messages and for programs that only know paths
    :param tree: what opens the files in it
    :param notes: what this account has noted: ``trust`` and ``lookups`` are kept there, and what is
        known of the sources
    :param trust: which of its files need not be read again
    :param chains: what working images stand on, and who they are
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
        :raises UsageError: it is elsewhere
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
        Make the cache if it is missing: before anything is put into it.

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
        """:returns: the file of some bytes, for messages and for programs that only know paths"""
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
        """:returns: whether the cache only refers to these bytes"""
        found = self.file(layout.data(digest)).stat()
        return found is not None and stat.S_ISLNK(found.st_mode)

    def sign(
        self, digest: Digest, hashed: os.stat_result | None, *, flushed: bool, source: str | None
    ) -> None:
        """
        Trust the file of some bytes, if it is the one that was hashed.

        :param hashed: the status of the descriptor that was hashed; None if it changed while it was
        :param flushed: whether they are on stable storage
        :param source: the location that has them too, or None
        """
        if (found := file_of(self.tree, digest, lambda _: source)) is not None:
            # Not opened for reading: this process may hold a lease on it, as of a file that is
            # being set.
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
        As :meth:`Pool.stage`, of what the next command of this account must be able to end, and to
        believe.

        :raises AccessDenied: others can put files where the markers are, and this account has no
            place for a copy
        """
        marker = Marker(self.pool.nonce(), frozenset(digests), Writer.current(), facts)
        copy = None
        if self.notes.keeps_apart(layout.INCOMING):
            # First, and flushed: a marker without it is nobody's.
            place = self.notes.directory(MARKERS)
            copy = Beneath(place.tree, _copy_of(marker.nonce))
            write_json(
                copy.tree, copy.path, {**json.loads(marker.to_bytes()), "locked": True}, flush=True
            )
        return Staging.begin(self.pool.transport, marker, copy=copy)

    def staging(self, marker: Marker) -> Staging:
        """:returns: what a writer that is gone had under way, to be ended"""
        place = self.notes.found(MARKERS)
        return Staging(
            self.pool.transport,
            marker,
            copy=Beneath(place.tree, _copy_of(marker.nonce)) if place is not None else None,
        )

    def marker(self, nonce: str) -> Marker | None:
        """
        :returns: what this account has said that it has under way; None if it has not, or it is
            over. What another account could have written to, or put in its place, does not count.
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
        Remove the copies of markers that are gone, or were never written, by processes that are no
        more.
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
        """:returns: where working images of this account go that were not given a place"""
        return Path(self.working_place())

    def working_place(self) -> Beneath:
        """:returns: the same, to open what is in it"""
        self.prepare()
        return self.notes.directory(WORKING)

    @property
    def collector(self) -> Collector:
        """Takes away what neither a record, nor a working image, nor another cache needs."""
        return Collector(self.pool, self.gc_roots)

    def gc_roots(self) -> frozenset[Digest]:
        """
        :returns: the bytes under working images, those that some process has open, and those that
            caches of neighbours refer to
        """
        return self.chains.gc_roots() | linked_roots(self.pool)

    def drop(self, digests: set[Digest]) -> list[Collected]:
        """
        Take away bytes and chains that nobody needs any more.

        :param digests: what may be needless now
        """
        self.chains.prune(digests, self.pool.needed())
        gone = self.collector.collect(digests)
        for digest in digests:
            if self.file(layout.data(digest)).stat() is None:
                self.forget(digest)
        return gone

    def forget(self, digest: Digest) -> None:
        """
        Bytes are gone, or the link to them: so is what was known of them here, and what their pool
        was told of that link.
        """
        if (pool := referred(self.trust.source(digest))) is not None:
            forget_use(pool, digest, self.root)
        self.trust.forget(digest)

    def renew_uses(self, digests: Iterable[Digest]) -> None:
        """Tell the pools of these bytes that they are referred to, wherever that was lost."""
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
    :returns: a marker that this account has written, if it is in a directory that is its own; None
        if it is another one's, or gone
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
    place, which is followed only into that pool.

    :param tree: of the cache
    :param source: tells the location of the pool that bytes come from, if this account knows one
    :returns: the file; None if there is none, or only a link that leads elsewhere, or to nothing
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
    :returns: as :func:`file_of`, in any pool, which may be a cache of this account; None also if
        the pool is not on this host
    """
    here = pool.transport.beneath("")
    return (
        file_of(here.tree, digest, Trust(Notes(here.tree, KINDS)).source)
        if here is not None
        else None
    )
