"""Chains between a cache and one pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from statepool.backends.base import Context, Options, Target
from statepool.backends.external import QCOW2ExtBackend
from statepool.backends.transfer import QCOW2ImageTransfer
from statepool.cache.cache import Cache
from statepool.copying.push import Relation
from statepool.errors import NotFound, UsageError
from statepool.model.location import Location
from statepool.model.objects import Image
from statepool.model.settings import Settings
from statepool.pools.pool import Pool
from statepool.testing.backends import BackendContract, Bench, chain
from statepool.transports.registry import open_transport

DISK = Target(Image("vm1", "disk"))


class Cached:
    """
    The part of a bench that is about the cache: what is set comes from there, and what is got is
    looked at there.
    """

    def __init__(self, inner: Any, backend: QCOW2ImageTransfer) -> None:
        self._inner = inner
        self._own = QCOW2ExtBackend(evolve(backend.context, sources=()))

    def offer(self, target: Target, state: str) -> None:
        if state == "root":
            self._own.set(target, "root", Options(replace=True))
            return
        if self._own.check(target, state):
            self._own.unset(target, state, Options(cascade=True))
        self._own.set(target, state)

    def read(self, target: Target, state: str) -> int:
        path = target.working["disk"].with_suffix(".look.qcow2")
        looking = evolve(target, working={"disk": path})
        self._own.get(looking, state)
        try:
            return int(self._inner.value(path))
        finally:
            path.unlink()


class TestQCOW2ImageTransfer(BackendContract):
    makes_working = False

    @pytest.fixture
    def bench(
        self, context: Context, image_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
    ) -> Bench:
        backend = QCOW2ImageTransfer(context)
        bench = image_bench(backend)
        cached = Cached(bench, backend)
        monkeypatch.setattr(bench, "offer", cached.offer)
        monkeypatch.setattr(bench, "read", cached.read)
        return bench

    def test_a_chain_is_compared_by_digest(self, bench: Bench, context: Context) -> None:
        target = bench.target()
        transfer = QCOW2ImageTransfer(context)
        bench.write(target, 1)
        bench.offer(target, "install")
        transfer.transfer_chain(DISK, "install", up=True)
        bench.write(target, 2)
        bench.offer(target, "customize")
        compared = transfer.compare_chain(DISK, "customize")
        assert [(manifest.state, relation) for manifest, relation in compared] == [
            ("customize", Relation.MISSING),
            ("install", Relation.SAME),
        ]
        transfer.transfer_chain(DISK, "customize", up=True)
        assert {relation for _, relation in transfer.compare_chain(DISK, "customize")} == {
            Relation.SAME
        }

    def test_other_content_is_compared_as_different(self, bench: Bench, context: Context) -> None:
        transfer = QCOW2ImageTransfer(context)
        chain(bench)
        target = bench.target()
        bench.write(target, 100)
        bench.offer(target, "install")
        assert [relation for _, relation in transfer.compare_chain(DISK, "install")] == [
            Relation.DIFFERENT
        ]

    def test_down_again(self, bench: Bench, context: Context, tmp_path: Path) -> None:
        chain(bench)
        other = Cache.open(
            Pool(open_transport(Location("file", str(tmp_path / "other")))), Settings()
        )
        transfer = QCOW2ImageTransfer(evolve(context, cache=other))
        fetched = transfer.transfer_chain(DISK, "customize", up=False)
        assert fetched.bytes > 0
        assert {relation for _, relation in transfer.compare_chain(DISK, "customize")} == {
            Relation.SAME
        }

    def test_what_the_cache_lacks_cannot_be_compared_or_stored(self, context: Context) -> None:
        transfer = QCOW2ImageTransfer(context)
        with pytest.raises(NotFound):
            transfer.compare_chain(DISK, "install")
        with pytest.raises(NotFound):
            transfer.transfer_chain(DISK, "install", up=True)
        with pytest.raises(NotFound):
            transfer.transfer_chain(DISK, "install", up=False)

    def test_without_a_pool(self, context: Context) -> None:
        with pytest.raises(UsageError, match="no pool"):
            QCOW2ImageTransfer(evolve(context, sources=()))
