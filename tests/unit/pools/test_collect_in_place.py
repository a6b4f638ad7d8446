"""Collecting in a pool whose files cannot be renamed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from statepool.errors import RefusedError, TransportError, UnsupportedFormat
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.pools import collect, layout
from statepool.pools.claims import Claims
from statepool.pools.collect import Collector
from statepool.pools.pool import Pool
from statepool.pools.records import decode
from statepool.pools.staging import Marker, condemned, read_markers
from statepool.pools.writer import Writer
from statepool.testing.faults import FaultyTransport, Stop, on
from statepool.testing.memory import MemoryStore, MemoryTransport
from tests.support.primitives import Store

BYTES = b"some bytes"
DIGEST = Digest.of(BYTES)
INSTALL = Manifest("vm1/disk", "install", size=len(BYTES), digest=DIGEST)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def pool(store: Store) -> Pool:
    pool = Pool(store)
    pool.create()
    return pool


def publish(pool: Pool) -> None:
    staging = pool.stage([DIGEST])
    pool.transport.create(staging.path(DIGEST), BYTES)
    pool.publish([INSTALL], staging)
    staging.end()


def names(store: Store, directory: str) -> list[str]:
    return sorted(entry.name for entry in store.scan(directory))


def condemn(store: Store, writer: Writer) -> str:
    """:returns: the file of a condemnation that a collector has left"""
    path = layout.marker("left")
    store.create(path, Marker("left", frozenset([DIGEST]), writer, condemns=True).to_bytes())
    return path


def test_what_no_state_needs_goes(pool: Pool, store: Store) -> None:
    publish(pool)
    assert Collector(pool).collect([DIGEST]) == []
    pool.remove(INSTALL.id)
    (gone,) = Collector(pool).collect([DIGEST])
    assert (gone.path, gone.bytes) == (layout.data(DIGEST), len(BYTES))
    for path in (layout.DATA, layout.INCOMING, layout.TRASH):
        assert names(store, path) == []
    assert Collector(pool).collect([DIGEST]) == []


def test_bytes_are_condemned_while_it_is_looked_who_needs_them(pool: Pool, store: Store) -> None:
    store.create(layout.data(DIGEST), BYTES)
    seen = []

    def held() -> frozenset[Digest]:
        seen.append(condemned(store))
        return frozenset()

    Collector(pool, held).collect([DIGEST])
    assert seen == [frozenset(), {DIGEST}]


def test_bytes_that_are_needed_after_all_stay(pool: Pool, store: Store) -> None:
    store.create(layout.data(DIGEST), BYTES)
    answers = iter([frozenset[Digest](), frozenset([DIGEST])])
    assert Collector(pool, lambda: next(answers)).collect([DIGEST]) == []
    assert store.read(layout.data(DIGEST)) == BYTES
    assert names(store, layout.INCOMING) == []


def test_a_look_that_fails_ends_the_condemnation(pool: Pool, store: Store) -> None:
    store.create(layout.data(DIGEST), BYTES)
    broken = FaultyTransport(store, Stop(matches=on("scan", path=layout.LOG), first=2))
    with pytest.raises(TransportError):
        Collector(Pool(broken)).collect([DIGEST])
    assert store.read(layout.data(DIGEST)) == BYTES
    assert names(store, layout.INCOMING) == []


def test_a_condemnation_outlives_a_removal_that_failed(pool: Pool, store: Store) -> None:
    store.create(layout.data(DIGEST), BYTES)
    broken = FaultyTransport(store, Stop(matches=on("remove", path=layout.data(DIGEST))))
    with pytest.raises(TransportError):
        Collector(Pool(broken)).collect([DIGEST])
    assert condemned(store) == {DIGEST}
    publish(pool)
    # The removal arrives at last.
    store.remove(layout.data(DIGEST))
    assert pool.has_bytes(DIGEST)
    assert store.read(layout.data(DIGEST)) == BYTES


def ended(writer: Writer) -> Writer:
    return evolve(writer, start=writer.start - 1)


def elsewhere(writer: Writer) -> Writer:
    return evolve(writer, host="other", machine="0" * 32, boot="other")


def alive(writer: Writer) -> Writer:
    return writer


@pytest.mark.parametrize(
    ("who", "passing", "stays"),
    [(ended, -1, False), (ended, 3600, True), (elsewhere, -1, True), (alive, -1, True)],
    ids=["dead for long", "just dead", "perhaps alive", "alive"],
)
def test_who_may_end_a_condemnation(
    pool: Pool,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    who: Callable[[Writer], Writer],
    passing: int,
    stays: bool,
) -> None:
    condemn(store, who(Writer.current()))
    monkeypatch.setattr(store, "now", lambda path: 1e-9)
    monkeypatch.setattr(collect, "PASSING", passing)
    monkeypatch.setattr(collect, "ABANDONED", -1)
    Collector(pool).sweep()
    assert [marker.condemns for marker in read_markers(store)] == [True] * stays


def test_a_spare_stays_as_long_as_the_condemnation(pool: Pool, store: Store) -> None:
    path = condemn(store, elsewhere(Writer.current()))
    publish(pool)
    spares = names(store, layout.TRASH)
    assert [layout.trashed(name) for name in spares] == [DIGEST]
    store.remove(layout.data(DIGEST))
    Collector(pool).sweep()
    assert store.read(layout.data(DIGEST)) == BYTES
    assert names(store, layout.TRASH) == spares
    store.remove(path)
    Collector(pool).sweep()
    assert names(store, layout.TRASH) == []
    assert store.read(layout.data(DIGEST)) == BYTES


def test_spares_of_what_no_state_needs_go(pool: Pool, store: Store) -> None:
    condemn(store, elsewhere(Writer.current()))
    publish(pool)
    pool.remove(INSTALL.id)
    Collector(pool).sweep()
    assert (names(store, layout.TRASH), names(store, layout.DATA)) == ([], [])


def test_a_pool_that_was_made_with_renames_is_not_collected_without(store: Store) -> None:
    store.create(layout.POOL_FILE, b'{"format": 1}')
    store.create(layout.data(DIGEST), BYTES)
    with pytest.raises(TransportError, match="cannot rename"):
        Collector(Pool(store)).collect([DIGEST])
    assert store.read(layout.data(DIGEST)) == BYTES


def test_versions_that_would_not_heed_condemnations_are_kept_away(pool: Pool, store: Store) -> None:
    with pytest.raises(UnsupportedFormat):
        decode(store.read(layout.POOL_FILE), layout.POOL_FILE)
    assert pool.in_place


def test_a_pool_that_was_made_without_renames_is_not_opened_with(pool: Pool, store: Store) -> None:
    there = MemoryTransport(MemoryStore())
    there.make_directory(layout.OURS)
    there.create(layout.POOL_FILE, store.read(layout.POOL_FILE))
    uses: list[Callable[[Pool], object]] = [Pool.require, lambda pool: pool.fold("vm1")]
    for use in uses:
        with pytest.raises(RefusedError, match="was made where files cannot be renamed") as caught:
            use(Pool(there))
        assert caught.value.pool == str(there.location)
        assert layout.POOL_FILE in str(caught.value.hint)


def test_a_claim_ends_without_a_rename(pool: Pool, store: Store) -> None:
    claims = Claims(store)
    for number in 1, 2:
        with claims.hold("store-1", 0):  # and the next one need not wait
            pass
        assert f"store-1.{number}.end" in names(store, layout.LOCKS)
        assert f"store-1.{number}" not in names(store, layout.LOCKS)


def test_where_files_can_be_renamed_no_one_looks_for_condemnations() -> None:
    there = FaultyTransport(MemoryTransport(MemoryStore()))
    assert condemned(there) == frozenset()
    assert there.calls == []
