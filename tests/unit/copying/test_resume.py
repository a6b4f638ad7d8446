"""Whose an interrupted transfer is, who may go on with it, and when it goes."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from statepool.copying.push import Push
from statepool.copying.resume import abandon, take_over
from statepool.errors import TransportError
from statepool.model.digest import Digest
from statepool.pools import layout
from statepool.pools.collect import RESUMABLE, Collector
from statepool.pools.pool import Pool
from statepool.pools.staging import Marker, Staging
from statepool.pools.writer import Writer
from statepool.testing.faults import FaultyTransport, Stop, on
from statepool.testing.memory import MemoryStore, MemoryTransport

DIGEST = Digest.of(b"wanted")
HERE = Writer.current()
DEAD = evolve(HERE, boot="another")
ELSEWHERE = evolve(HERE, machine="elsewhere", boot="another")


@pytest.fixture
def pool() -> Pool:
    found = Pool(MemoryTransport(MemoryStore(), resumes=True))
    found.create()
    return found


def left(pool: Pool, nonce: str, content: bytes, writer: Writer | None = None) -> None:
    """Somebody was interrupted."""
    if writer is not None:
        Staging.begin(pool.transport, Marker(nonce, frozenset({DIGEST}), writer))
    pool.transport.create(layout.part(nonce, DIGEST), content)


def names(pool: Pool) -> set[str]:
    return {entry.name for entry in pool.transport.scan(layout.INCOMING)}


def test_nothing_is_there(pool: Pool) -> None:
    assert take_over(pool, DIGEST, "mine") == 0
    left(pool, "other", b"")
    assert take_over(pool, DIGEST, "mine") == 0


@pytest.mark.parametrize("writer", [None, DEAD])
def test_what_nobody_works_on_is_taken_and_the_longest_of_it(
    pool: Pool, writer: Writer | None
) -> None:
    left(pool, "one", b"123", writer)
    left(pool, "two", b"12345", writer)
    assert take_over(pool, DIGEST, "mine") == 5
    assert pool.transport.read(layout.part("mine", DIGEST)) == b"12345"
    assert pool.transport.stat(layout.part("one", DIGEST)) is None
    assert take_over(pool, DIGEST, "another") == 5, "until our marker is there, it is nobody's"


def test_what_somebody_works_on_is_left_alone(pool: Pool) -> None:
    left(pool, "here", b"123", HERE)
    left(pool, "there", b"12345", ELSEWHERE)
    assert take_over(pool, DIGEST, "mine") == 0
    assert take_over(pool, DIGEST, "mine", alone=True) == 5, (
        "whoever holds the claim knows that other hosts do not"
    )
    abandon("here")
    pool.transport.remove(layout.part("mine", DIGEST))
    assert take_over(pool, DIGEST, "again") == 3, "this process said that it has given up"


def test_other_bytes_are_not_taken(pool: Pool) -> None:
    pool.transport.create(layout.part("one", Digest.of(b"other")), b"123")
    assert take_over(pool, DIGEST, "mine") == 0


def test_a_collector_leaves_it_for_a_day(pool: Pool) -> None:
    left(pool, "gone", b"123", DEAD)
    left(pool, "working", b"123", HERE)
    Collector(pool).sweep()
    assert layout.part("gone", DIGEST).rpartition("/")[2] in names(pool)
    assert "gone.json" not in names(pool)
    pool.transport.memory._clock = lambda clock=pool.transport.memory._clock: (
        clock() + (RESUMABLE + 60) * 10**9
    )  # type: ignore[attr-defined]
    gone = Collector(pool).sweep()
    assert [collected.path for collected in gone] == [layout.part("gone", DIGEST)]
    assert layout.part("working", DIGEST).rpartition("/")[2] in names(pool)


def test_a_push_goes_on_where_it_was_interrupted(lab: Any) -> None:
    cache = lab.cache()
    chain = lab.chain(cache.pool, "install")
    store, size = MemoryStore(), chain[0].size
    cut = Stop(matches=on("store"), after=size // 2, times=1)
    pool = Pool(FaultyTransport(MemoryTransport(store, resumes=True), cut))
    pool.create()
    with pytest.raises(TransportError):
        Push(cache, pool).run(chain)
    stored = Push(cache, pool).run(chain)
    assert stored.resumed > 0
    assert stored.resumed + stored.bytes == size
    assert lab.data(pool) == {chain[0].digest}
    assert [path for path in lab.leftovers(pool) if "part" in path] == []


def test_a_beginning_that_is_wrong_is_not_gone_on_with(lab: Any) -> None:
    cache = lab.cache()
    chain = lab.chain(cache.pool, "install")
    store = MemoryStore()
    transport = MemoryTransport(store, resumes=True)
    pool = Pool(transport)
    pool.create()
    transport.create(layout.part("somebody", chain[0].digest), b"not what it should be")
    stored = Push(cache, pool).run(chain)
    assert (stored.resumed, stored.bytes) == (0, chain[0].size)
