"""
Pools where there are the primitives only, and where files can only be read, such as on a web
server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from statepool.api import StatePool
from statepool.copying.push import Push
from statepool.errors import AccessDenied
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.pool import Pool
from statepool.pools.staging import Marker
from statepool.pools.writer import Writer
from statepool.sources.pool_source import PoolSource
from tests.support.primitives import Shelf, Store


def shelved(root: Path) -> Shelf:
    """:returns: the files of a pool that are no links, where they can only be read"""
    return Shelf(
        {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and not path.is_symlink()
        }
    )


def test_the_primitives_are_enough_for_setting_and_fetching(lab: Any) -> None:
    cache, pool = lab.cache(), Pool(Store())
    assert pool.create()
    chain = lab.chain(cache.pool, "install", "customize")
    assert Push(cache, pool).run(chain).bytes == sum(manifest.size for manifest in chain)
    assert lab.data(pool) == {manifest.digest for manifest in chain}
    assert lab.leftovers(pool) == []
    assert lab.fetch(lab.cache("other"), Pool(pool.transport), "customize").chain == chain


def test_what_no_state_needs_is_collected_without_rename(lab: Any) -> None:
    cache, pool = lab.cache(), Pool(Store())
    pool.create()
    chain = lab.chain(cache.pool, "install")
    Push(cache, pool).run(chain)
    pool.remove(chain[0].id)
    Collector(pool).collect([chain[0].digest])
    assert lab.data(pool) == set()
    assert lab.leftovers(pool) == []


def test_bytes_that_a_late_collector_removes_are_fetched_from_the_spare(lab: Any) -> None:
    cache, pool = lab.cache(), Pool(Store())
    pool.create()
    chain = lab.chain(cache.pool, "install")
    late = Marker("late", frozenset([chain[0].digest]), Writer.current(), condemns=True)
    pool.transport.create(layout.marker("late"), late.to_bytes())
    Push(cache, pool).run(chain)
    pool.transport.remove(layout.data(chain[0].digest))
    states = StatePool(lab.root / "other", [PoolSource(Pool(pool.transport), "common")])
    assert states.image("vm1/disk").get("install").digest == chain[0].digest


def test_states_are_fetched_from_it(lab: Any) -> None:
    pool, cache = lab.pool(), lab.cache()
    chain = lab.chain(pool, "install", "customize")
    there = Pool(shelved(lab.root / "pool"))
    before = dict(there.transport.files)
    assert there.is_managed
    fetched = lab.fetch(cache, there, "customize")
    assert lab.names(fetched.chain) == ["customize", "install"]
    assert lab.data(cache.pool) == {manifest.digest for manifest in chain}
    assert there.transport.files == before


def test_a_push_to_it_is_refused_and_says_why(lab: Any) -> None:
    lab.pool()
    cache = lab.cache()
    chain = lab.chain(cache.pool, "install")
    with pytest.raises(AccessDenied, match="it can only be read") as caught:
        Push(cache, Pool(shelved(lab.root / "pool"))).run(chain)
    assert caught.value.pool == "shelf:///pool"
