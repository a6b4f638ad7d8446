"""
A cache and pools with small images made byte by byte: what is tested here is what happens to bytes,
not what is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import evolve

from statepool.cache.cache import Cache
from statepool.copying.fetch import Fetch, Fetched
from statepool.model.digest import DEFAULT_ALGORITHM, Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest, Parent, StateId
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.sources.source import RemoteChain
from statepool.transports.base import Transport
from statepool.transports.registry import open_transport
from tests.support.images import CHILD, GOOD

DISK = "vm1/disk"
_PRIVATE_EXTENSION = 0x12345678


class Lab:
    """Caches and pools under one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def location(self, name: str, scheme: str = "file") -> Location:
        return Location(scheme, str(self.root / name))

    def pool(
        self,
        name: str = "pool",
        *,
        scheme: str = "file",
        transport: Transport | None = None,
        create: bool = True,
    ) -> Pool:
        pool = Pool(transport or open_transport(self.location(name, scheme)))
        if create:
            pool.create()
        return pool

    def cache(self, name: str = "cache", **settings: Any) -> Cache:
        cache = Cache.open(Pool(open_transport(self.location(name))), Settings(**settings))
        cache.prepare()
        return cache

    @staticmethod
    def image(tag: str, parent: str | None = None) -> bytes:
        """:returns: an image that differs from others by ``tag``"""
        forged = GOOD if parent is None else evolve(CHILD, backing=f"{parent}.qcow2".encode())
        return evolve(forged, extensions=((_PRIVATE_EXTENSION, tag.encode()),)).build()

    def put(
        self,
        pool: Pool,
        state: str,
        parent: Manifest | None = None,
        *,
        tag: str | None = None,
        replace: bool = False,
        algorithm: str = DEFAULT_ALGORITHM,
    ) -> Manifest:
        """
        Publish a state of vm1/disk, as another implementation would. :returns: what is known of it
        """
        content = self.image(tag or state, parent.state if parent else None)
        digest = Digest.of(content, algorithm)
        assert parent is None or parent.digest is not None
        manifest = Manifest(
            DISK,
            state,
            size=len(content),
            digest=digest,
            parent=Parent(parent.state, parent.digest) if parent and parent.digest else None,
            virtual_size=1 << 20,
            cluster_size=1 << 12,
        )
        staging = pool.stage([digest])
        path = pool.transport.local_path(staging.path(digest))
        assert path is not None
        path.write_bytes(content)
        path.chmod(0o444)
        pool.publish([manifest], staging, replace=replace)
        staging.end()
        return manifest

    def chain(self, pool: Pool, *states: str) -> tuple[Manifest, ...]:
        """
        Publish states that stand on one another, the first one on nothing. :returns: them, tip
        first
        """
        made: list[Manifest] = []
        for state in states:
            made.append(self.put(pool, state, made[-1] if made else None))
        return tuple(reversed(made))

    def unmanaged(
        self, name: str, state: str, parent: str | None = None, *, tag: str | None = None
    ) -> Path:
        """Write a file as another tool would."""
        path = self.root / name / layout.view(StateId(DISK, state))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.image(tag or state, parent))
        return path

    def offer(self, pool: Pool, state: str) -> RemoteChain:
        offer = PoolSource(pool, "source").resolve(StateId(DISK, state))
        assert offer is not None
        return offer

    def fetch(self, cache: Cache, pool: Pool, state: str, **options: Any) -> Fetched:
        return Fetch(cache, self.offer(pool, state), **options).run()

    @staticmethod
    def names(chain: Sequence[Manifest]) -> list[str]:
        return [manifest.state for manifest in chain]

    @staticmethod
    def leftovers(pool: Pool) -> list[str]:
        """:returns: what is in the places where nothing is when nobody is at work"""
        return [
            entry.name
            for directory in (layout.INCOMING, layout.TRASH)
            for entry in pool.transport.scan(directory)
        ]

    @staticmethod
    def data(pool: Pool) -> set[Digest]:
        digests = (Digest.from_file_name(entry.name) for entry in pool.transport.scan(layout.DATA))
        return {digest for digest in digests if digest is not None}
