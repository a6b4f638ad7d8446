"""Storing a cached chain in another pool."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from statepool.cache.cache import Cache
from statepool.copying.push import Push, Relation, relations
from statepool.errors import Conflict, DigestMismatch, HasDependants, NoSpace, ReadOnlyPool
from statepool.model.outcomes import Presence
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.pool import Pool
from statepool.testing.faults import FaultyTransport, Full, Stop, on
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.testing.trees import photograph
from statepool.transports.base import Entry, Moved, Transfer


def test_parents_first(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    chain = lab.chain(cache.pool, "install", "customize")
    stored = Push(cache, pool).run(chain)
    assert (stored.result, stored.durable) == (Presence.STORED, True)
    assert stored.bytes > 0
    assert [str(change) for record in pool.log("vm1").records() for change in record.changes] == [
        f"publish vm1/disk install as {chain[1].digest.short}",
        f"publish vm1/disk customize as {chain[0].digest.short}",
    ]
    assert lab.data(pool) == {manifest.digest for manifest in chain}
    assert lab.leftovers(pool) == []


def test_what_is_there_is_skipped(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    chain = lab.chain(cache.pool, "install", "customize")
    Push(cache, pool).run(chain[1:])
    assert [relation for _, relation in relations(chain, pool)] == [Relation.MISSING, Relation.SAME]
    whole = Push(cache, pool).run(chain)
    again = Push(cache, pool).run(chain)
    assert 0 < whole.bytes < sum(manifest.size for manifest in chain)
    assert (again.result, again.bytes) == (Presence.PRESENT, 0)


def test_bytes_that_are_there_under_another_name(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    lab.put(pool, "other", tag="same")
    stored = Push(cache, pool).run((lab.put(cache.pool, "install", tag="same"),))
    assert (stored.result, stored.bytes) == (Presence.STORED, 0)


def test_other_content_is_a_conflict(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    lab.put(pool, "install", tag="theirs")
    chain = lab.chain(cache.pool, "install", "customize")
    before = photograph(lab.root)
    with pytest.raises(Conflict, match="other content"):
        Push(cache, pool).run(chain)
    with pytest.raises(Conflict, match="other content"):  # a parent is never replaced
        Push(cache, pool).run(chain, replace=True)
    failed = Push(cache, pool).attempt(chain)
    assert (failed.result, failed.durable) == (Presence.FAILED, False)
    assert "other content" in (failed.error or "")
    assert photograph(lab.root) == before


def test_a_tip_is_replaced_when_asked_for(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    old = lab.put(pool, "install", tag="theirs")
    chain = lab.chain(cache.pool, "install")
    assert Push(cache, pool).run(chain, replace=True).result is Presence.STORED
    assert lab.data(pool) == {chain[0].digest}
    assert old.digest not in lab.data(pool)


def test_what_others_stand_on_is_never_replaced(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    theirs = lab.put(pool, "install", tag="theirs")
    lab.put(pool, "customize", theirs)
    chain = lab.chain(cache.pool, "install")
    before = photograph(pool.transport.local_path(""))
    with pytest.raises(HasDependants):
        Push(cache, pool).run(chain, replace=True)
    assert photograph(pool.transport.local_path("")) == before


def test_a_parent_with_other_bytes_around_the_same_content(lab: Any, cache: Cache) -> None:
    """
    The cache's copy was rewritten, as its origin says: the child is stored on the pool's own copy.
    """
    pool = lab.pool()
    there = lab.put(pool, "install", tag="as it was")
    here = lab.put(cache.pool, "install", tag="rewritten")
    cache.pool.remove(here.id)
    staging = cache.pool.stage([here.digest])
    here = evolve(here, origin=there.digest)
    cache.pool.publish([here], staging)
    staging.end()
    child = lab.put(cache.pool, "customize", here)
    assert [relation for _, relation in relations((child, here), pool)] == [
        Relation.MISSING,
        Relation.SAME,
    ]
    Push(cache, pool).run((child, here))
    stored = pool.find(child.id)
    assert stored is not None
    assert stored.parent is not None
    assert (stored.digest, stored.parent.digest) == (child.digest, there.digest)
    assert Push(cache, pool).run((child, here)).result is Presence.PRESENT


def test_a_damaged_cache_spreads_nothing(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    chain = lab.chain(cache.pool, "install")
    path = cache.data(chain[0].digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().swapcase())
    before = photograph(lab.root / "pool")
    with pytest.raises(DigestMismatch) as caught:
        Push(cache, pool).run(chain)
    assert caught.value.expected == str(chain[0].digest)
    assert photograph(lab.root / "pool") == before


@pytest.mark.parametrize("fault", [Full(matches=on("store")), Stop(matches=on("store"))])
def test_what_stops_on_the_way_leaves_nothing(lab: Any, cache: Cache, fault: Any) -> None:
    chain = lab.chain(cache.pool, "install")
    pool = lab.pool()
    before = photograph(lab.root / "pool")
    failed = Push(cache, lab.pool(transport=FaultyTransport(pool.transport, fault))).attempt(chain)
    assert failed.result is Presence.FAILED
    assert photograph(lab.root / "pool") == before
    assert Push(cache, pool).run(chain).result is Presence.STORED


def test_no_space_is_known_before_anything_moves(
    lab: Any, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = lab.pool()
    chain = lab.chain(cache.pool, "install")
    before = photograph(lab.root / "pool")
    monkeypatch.setattr(pool.transport, "free_space", lambda: 4096)
    with pytest.raises(NoSpace):
        Push(cache, pool).run(chain)
    assert photograph(lab.root / "pool") == before


def test_a_pool_of_another_tool_is_only_read(lab: Any, cache: Cache) -> None:
    lab.unmanaged("pool", "install")
    before = photograph(lab.root / "pool")
    with pytest.raises(ReadOnlyPool, match="statepool init"):
        Push(cache, lab.pool(create=False)).run(lab.chain(cache.pool, "other"))
    assert photograph(lab.root / "pool") == before


def test_what_another_pool_has_may_be_evicted(lab: Any, cache: Cache) -> None:
    chain = lab.chain(cache.pool, "install")
    cache.sign(chain[0].digest, cache.status(chain[0].digest), flushed=True, source=None)
    pool = lab.pool()
    Push(cache, pool).run(chain)
    assert cache.trust.source(chain[0].digest) == str(pool)


def test_of_two_that_store_the_same_one_sends_it_and_the_other_waits(
    lab: Any, cache: Cache
) -> None:
    """
    In a place without locks of a kernel: the one that sends goes on as soon as the other has begun
    to wait.
    """

    class Watched(MemoryTransport):
        sent = 0
        looks = 0

        def scan(self, directory: str) -> list[Entry]:
            self.looks += directory == layout.LOCKS
            if not self.sent and self.looks >= 3:
                waits.set()
            return super().scan(directory)

        def store(self, source: int, path: str, transfer: Transfer) -> Moved:
            self.sent += 1
            assert waits.wait(100)
            return super().store(source, path, transfer)

    waits = threading.Event()
    store = MemoryStore()
    here, there = Watched(store), Watched(store)
    Pool(here).create()
    chain = lab.chain(cache.pool, "install", "customize")
    with ThreadPoolExecutor(2) as threads:
        results = list(
            threads.map(lambda transport: Push(cache, Pool(transport)).run(chain), [here, there])
        )
    assert here.sent + there.sent == len(chain), "each member was sent once"
    assert sum(result.bytes for result in results) == sum(manifest.size for manifest in chain)
    assert lab.data(Pool(here)) == {manifest.digest for manifest in chain}
    assert lab.leftovers(Pool(here)) == []


@pytest.mark.parametrize("whole", [True, False], ids=["sends again", "takes back"])
def test_who_is_taken_for_dead_leaves_no_state_without_bytes(
    lab: Any, cache: Cache, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The writer is suspended before its record for longer than its marker counts, and a collector
    comes.
    """
    pool = lab.pool()
    (tip,) = chain = lab.chain(cache.pool, "install")
    real, calls = pool.transport.draft, []

    def paused(directory: str, data: bytes) -> Any:
        if not calls:
            calls.append(directory)
            for path in (tmp_path / "pool" / layout.INCOMING).iterdir():
                path.unlink()
            Collector(lab.pool()).collect([tip.digest])
            if not whole:
                cache.data(tip.digest).unlink()
                cache.data(tip.digest).write_bytes(b"?" * tip.size)
        return real(directory, data)

    monkeypatch.setattr(pool.transport, "draft", paused)
    stored = Push(cache, pool).attempt(chain)
    fresh = lab.pool()
    assert (stored.result is Presence.STORED) == whole, stored.error
    assert (fresh.find(tip.id) is not None) == whole
    assert not fresh.lacking(fresh.fold("vm1").digests)
    assert lab.leftovers(fresh) == []
