"""
External overlays in a cache and a pool, in a cache alone, and with a pool that is only referred to.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from statepool.backends.base import Context, Options, Target
from statepool.backends.external import QCOW2ExtBackend
from statepool.errors import UnsafeImage, UsageError
from statepool.model.location import Location
from statepool.model.objects import Image, Machine
from statepool.model.scope import Scope
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.testing.backends import BackendContract, Bench, chain, put
from statepool.transports.registry import open_transport

OWN = frozenset({Scope.OWN})


class TestQCOW2ExtBackend(BackendContract):
    @pytest.fixture
    def bench(self, context: Context, image_bench: Callable[..., Bench]) -> Bench:
        return image_bench(QCOW2ExtBackend(context))

    def test_labels_are_kept(self, bench: Bench, context: Context) -> None:
        put(bench, bench.target(), "install", 7, Options(labels={"build": "42"}))
        (listed,) = bench.backend.show(Target(Image("vm1", "disk")))
        assert dict(listed.manifest.labels) == {"build": "42"}
        assert listed.pools == (str(context.cache.pool), str(context.sources[0]))
        assert listed.manifest.creator["statepool"] == "of a test"

    def test_only_the_pools_in_the_scope(self, bench: Bench, context: Context) -> None:
        target = bench.target()
        stored = put(bench, target, "install", 7, Options(scope=OWN))
        assert [at.pool for at in stored.pools] == [str(context.cache.pool)]
        put(bench, target, "customize", 8)
        removed = bench.backend.unset(target, "customize", Options(scope=frozenset({Scope.SHARED})))
        assert removed.states == {str(context.sources[0]): ("customize",)}
        assert bench.backend.check(target, "customize")
        assert bench.backend.unset(target, "customize", Options(scope=OWN)).states == {
            str(context.cache.pool): ("customize",)
        }
        assert not bench.backend.check(target, "customize")

    def test_a_scope_without_pools(self, bench: Bench) -> None:
        target = chain(bench)
        before = bench.photograph()
        with pytest.raises(UsageError, match="no pool is in this scope"):
            bench.backend.unset(target, "customize", Options(scope=frozenset({Scope.CLUSTER})))
        assert bench.photograph() == before

    def test_a_machine_is_not_an_image(self, bench: Bench) -> None:
        with pytest.raises(UsageError, match="vm1/disk"):
            bench.backend.check(Target(Machine("vm1")), "install")

    def test_the_working_image_can_go_on(self, bench: Bench) -> None:
        target = bench.target()
        put(bench, target, "install", 7)
        assert bench.read(target, "install") == 7
        put(bench, target, "customize", 8)
        assert bench.read(target, "customize") == 8

    def test_nothing_backs_a_root_image(self, bench: Bench) -> None:
        target = chain(bench)
        before = bench.photograph()
        with pytest.raises(UnsafeImage, match="backing") as caught:
            bench.backend.set(target, "root")
        assert caught.value.check == "backing"
        assert bench.photograph() == before


class TestWithoutSources(BackendContract):
    @pytest.fixture
    def bench(self, context: Context, image_bench: Callable[..., Bench]) -> Bench:
        return image_bench(QCOW2ExtBackend(evolve(context, sources=())))


class TestWithALinkPool(BackendContract):
    """
    What is set here is in both places; the cache refers to the pool only for what it gets from
    there.
    """

    @pytest.fixture
    def bench(self, context: Context, image_bench: Callable[..., Bench]) -> Bench:
        pool = Pool(open_transport(Location("link", context.sources[0].location.path)))
        return image_bench(QCOW2ExtBackend(evolve(context, sources=(PoolSource(pool, "linked"),))))
