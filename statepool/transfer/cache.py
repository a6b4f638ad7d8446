"""
The pool of this host from which machines run, with what it knows beyond a pool: which files are trusted, what stands on which chain, how fresh it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from attrs import field, frozen

from statepool.errors import AccessDenied, UsageError
from statepool.model.digest import Digest
from statepool.model.outcomes import Collected
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.pool import Pool
from statepool.transfer.chains import Chains
from statepool.transfer.fresh import Freshness
from statepool.transfer.known import Knowledge
from statepool.transfer.linked import forget_use, held_by_links, note_use, referred
from statepool.transfer.trust import Trust


@frozen
class Cache:
    """
    A cache.

    :param pool: the pool that it is
    :param root: its directory
    :param trust: which of its files need not be read again
    :param chains: what working images stand on, and who they are
    :param fresh: when which source was asked
    :param known: how fast and how well the sources are
    """

    pool: Pool
    root: Path
    trust: Trust
    chains: Chains
    fresh: Freshness
    known: Knowledge
    settings: Settings = field(factory=Settings)

    @classmethod
    def open(cls, pool: Pool, settings: Settings) -> Cache:
        """
        :param pool: a pool in a file system of this host
        :raises UsageError: it is elsewhere
        """
        root = pool.transport.local_path("")
        if root is None or pool.transport.capabilities.refers:
            raise UsageError(f"a cache must be a directory of this host, not {pool.location}", hint="name a path")
        ours = root / layout.OURS
        return cls(
            pool=pool,
            root=root,
            trust=Trust(ours / "trust"),
            chains=Chains(ours / "chains"),
            fresh=Freshness(ours / "fresh", settings.fresh, time.time),
            known=Knowledge(ours / "known"),
            settings=settings,
        )

    def prepare(self) -> None:
        """
        Make the cache if it is missing: before anything is put into it.

        :raises AccessDenied: its directory cannot be written
        """
        try:
            self.pool.create()
            for name in ("trust", "chains", "fresh", "known"):
                self.pool.transport.make_directory(f"{layout.OURS}/{name}")
        except AccessDenied as error:
            raise AccessDenied(
                f"the cache {self.root} cannot be written", path=str(self.root), hint="choose another with --cache, or change its permissions"
            ) from error

    def data(self, digest: Digest) -> Path:
        """:returns: the file of some bytes"""
        return self.root / layout.data(digest)

    def working_directory(self) -> Path:
        """:returns: where working images go that nobody gave a place"""
        self.prepare()
        self.pool.transport.make_directory(layout.WORKING)
        return self.root / layout.WORKING

    @property
    def collector(self) -> Collector:
        """Takes away what neither a record, nor a working image, nor another cache needs."""
        return Collector(self.pool, self.held)

    def held(self) -> frozenset[Digest]:
        """:returns: the bytes under working images, those that some process has open, and those that caches of neighbours refer to"""
        return self.chains.held() | held_by_links(self.pool)

    def drop(self, digests: set[Digest]) -> list[Collected]:
        """
        Take away bytes and chains that nobody needs any more.

        :param digests: what may be needless now
        """
        self.chains.prune(digests, self.pool.needed())
        gone = self.collector.collect(digests)
        for digest in digests:
            if not self.data(digest).is_symlink() and not self.data(digest).exists():
                self.forget(digest)
        return gone

    def forget(self, digest: Digest) -> None:
        """Bytes are gone, or the link to them: so is what was known of them here, and what their pool was told of that link."""
        if (pool := referred(self.trust.source(digest))) is not None:
            forget_use(pool, digest, self.root)
        self.trust.forget(digest)

    def renew_uses(self, digests: Iterable[Digest]) -> None:
        """Tell the pools of these bytes that they are referred to, wherever that was lost."""
        for digest in digests:
            if self.data(digest).is_symlink() and (pool := referred(self.trust.source(digest))) is not None:
                note_use(pool, digest, self.root)
