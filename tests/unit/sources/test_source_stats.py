"""What is remembered of sources, from one process to the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from statepool.beneath import Tree
from statepool.errors import DigestMismatch, TransportError
from statepool.model.location import Location
from statepool.pools.json_files import Notes
from statepool.pools.pool import Pool
from statepool.sources import source_stats as module
from statepool.sources.pool_source import PoolSource
from statepool.sources.ranking import NOTHING, Known
from statepool.sources.source_stats import ENOUGH, SLOW, SourceStats, surroundings
from statepool.transports.registry import open_transport

MIB = 1 << 20


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def source(tmp_path: Path) -> PoolSource:
    return PoolSource(Pool(open_transport(Location("file", str(tmp_path / "pool")))), "pool")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "cache/.statepool/known").mkdir(parents=True)
    return tmp_path / "cache"


def knowledge_in(cache: Path, *clock: Clock) -> SourceStats:
    return SourceStats(Notes(Tree(cache), ("known",)), *clock)


def kept_in(cache: Path) -> list[Path]:
    return sorted(cache.glob(".statepool/known/*"))


def test_nothing_is_known_at_first(place: Path, source: PoolSource) -> None:
    assert knowledge_in(place).of(source) == NOTHING
    assert knowledge_in(place / "nowhere").of(source) == NOTHING


def test_kept_when_saved(place: Path, source: PoolSource) -> None:
    knowledge = knowledge_in(place, Clock())
    knowledge.answered(source, 0.5)
    knowledge.delivered(source, 100 * MIB, 2.0)
    knowledge.failed(source, TransportError("it broke"))
    expected = Known(latency=0.5, rate=50.0 * MIB, failures=1, failed=1000.0, problem="it broke")
    assert knowledge.of(source) == expected
    assert knowledge_in(place).of(source) == NOTHING
    knowledge.save()
    assert knowledge_in(place).of(source) == expected
    assert [path.suffix for path in kept_in(place)] == [".json"]


def test_without_a_cache_it_is_remembered_here(place: Path, source: PoolSource) -> None:
    knowledge = knowledge_in(place / "later", Clock())
    knowledge.answered(source, 0.5)
    knowledge.save()
    assert kept_in(place) == []
    assert knowledge.of(source).latency == 0.5
    (place / "later/.statepool/known").mkdir(parents=True)
    knowledge.save()
    assert knowledge_in(place / "later").of(source).latency == 0.5


def test_old_measurements_fade(place: Path, source: PoolSource) -> None:
    knowledge = knowledge_in(place)
    for seconds in (1.0, 3.0, 4.0):
        knowledge.answered(source, seconds)
    assert knowledge.of(source).latency == 3.0


def test_what_differs_little_is_not_written(place: Path, source: PoolSource) -> None:
    knowledge = knowledge_in(place)
    knowledge.answered(source, 1.0)
    knowledge.save()
    (path,) = kept_in(place)
    before = path.stat().st_ino
    knowledge.answered(source, 1.1)
    knowledge.did_well(source)
    knowledge.save()
    assert path.stat().st_ino == before
    knowledge.answered(source, 9.0)
    knowledge.save()
    assert path.stat().st_ino != before


@pytest.mark.parametrize(
    ("count", "seconds", "rate"),
    [
        (ENOUGH, 1.0, float(ENOUGH)),
        (ENOUGH - 1, 0.1, None),
        (MIB, 1.0, float(MIB)),
        (SLOW, 1.0, None),
        (0, 1.0, None),
        (ENOUGH, 0.0, None),
    ],
)
def test_what_says_how_fast_a_source_is(
    place: Path, source: PoolSource, count: int, seconds: float, rate: float | None
) -> None:
    knowledge = knowledge_in(place)
    knowledge.delivered(source, count, seconds)
    assert knowledge.of(source).rate == rate


def test_failures_add_up_until_it_does_well(place: Path, source: PoolSource) -> None:
    clock = Clock()
    knowledge = knowledge_in(place, clock)
    knowledge.failed(source, TransportError("it broke"))
    assert knowledge.rest(source) == 10
    clock.now += 5
    knowledge.failed(source, DigestMismatch("wrong bytes"))
    known = knowledge.of(source)
    assert (known.failures, known.failed, known.problem, known.corrupt) == (
        2,
        1005.0,
        "wrong bytes",
        True,
    )
    assert knowledge.rest(source) == 600
    knowledge.answered(source, 0.1)
    assert knowledge.of(source).failures == 2
    knowledge.did_well(source)
    assert knowledge.of(source) == Known(latency=0.1)
    assert knowledge.rest(source) == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"latency": 1}', b"\xff"])
def test_a_torn_file_counts_as_none(place: Path, source: PoolSource, content: bytes) -> None:
    knowledge = knowledge_in(place)
    knowledge.answered(source, 1.0)
    knowledge.save()
    (path,) = kept_in(place)
    path.write_bytes(content)
    assert knowledge_in(place).of(source) == NOTHING


@pytest.mark.parametrize("value", [-1.0, "fast", True, None, float("nan")])
def test_a_number_that_cannot_be(place: Path, source: PoolSource, value: object) -> None:
    knowledge = knowledge_in(place)
    knowledge.answered(source, 1.0)
    knowledge.save()
    (path,) = kept_in(place)
    path.write_text(json.dumps({**json.loads(path.read_text()), "latency": value}))
    assert knowledge_in(place).of(source).latency is None


def test_where_this_host_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    routes = tmp_path / "route"
    routes.write_text(
        "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "tun0\t0000000A\t010200C0\t0003\t0\t0\t0\t000000FF\t0\t0\t0\n"
    )
    monkeypatch.setattr(module, "_ROUTES", routes)
    surroundings.cache_clear()
    assert [str(network) for network in surroundings().networks] == ["192.0.2.0/24"]
    monkeypatch.setattr(module, "_ROUTES", tmp_path / "none")
    surroundings.cache_clear()
    assert surroundings().networks == ()
    surroundings.cache_clear()
