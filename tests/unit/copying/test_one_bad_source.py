"""What goes wrong with one source does not keep the others from being used, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import field, frozen

import statepool
from statepool.copying.supply import Supply
from statepool.errors import (
    BadRecord,
    BuildFailed,
    Conflict,
    Incompatible,
    InvalidName,
    MachineError,
    NoSpace,
    NotFound,
    ReadOnlyPool,
    StatePoolError,
    ToolError,
    UnsafeImage,
)
from statepool.model.manifest import StateId
from statepool.pools import layout
from statepool.sources.mirrors import Mirrors
from statepool.sources.pool_source import PoolSource
from statepool.sources.source_stats import SourceStats
from statepool.testing.faults import Call, Fault, FaultyTransport, on

ERRORS = (BadRecord, BuildFailed, InvalidName, MachineError, NotFound, ToolError, UnsafeImage)


@frozen
class Refuse(Fault):
    """Whatever goes wrong with a transfer."""

    error: StatePoolError = field(kw_only=True)

    def before(self, call: Call) -> None:
        raise self.error


def bring(lab: Any, make: Any) -> tuple[Any, Any]:
    """:returns: what came from two sources, of which the first one fails, and the cache"""
    cache = lab.cache()
    sources = tuple(PoolSource(lab.pool(name), name) for name in ("bad", "good"))
    for source in sources:
        lab.chain(source.pool, "install")
    wanted = StateId("vm1/disk", "install")
    error = make(str(sources[0]), str(cache.pool))
    bad = FaultyTransport(sources[0].transport, Refuse(matches=on("fetch"), error=error))
    sources = (PoolSource(lab.pool("bad", transport=bad), "bad"), sources[1])
    offers = [offer for source in sources if (offer := source.resolve(wanted)) is not None]
    return Supply(cache, Mirrors(sources, SourceStats(cache.notes), cache.settings)).bring(
        wanted, offers
    ), cache


@pytest.mark.parametrize("kind", ERRORS)
def test_a_source_whose_transfer_fails(lab: Any, kind: type[StatePoolError]) -> None:
    def make(source: str, cache: str) -> StatePoolError:
        return (
            UnsafeImage("it is odd", check="odd")
            if kind is UnsafeImage
            else kind("it is odd", pool=source)
        )

    brought, _ = bring(lab, make)
    assert brought.offer.source.name == "good"
    assert "it is odd" in brought.warnings[0]


@pytest.mark.parametrize("kind", [Incompatible, ReadOnlyPool, Conflict])
def test_a_refusal_counts_for_whom_it_speaks_of(lab: Any, kind: type[StatePoolError]) -> None:
    def of_source(source: str, cache: str) -> StatePoolError:
        return (
            Incompatible("it is odd", differences=[], pool=source)
            if kind is Incompatible
            else kind("it is odd", pool=source)
        )

    brought, _ = bring(lab, of_source)
    assert brought.offer.source.name == "good"


@pytest.mark.parametrize("named", [True, False])
def test_what_is_wrong_with_the_cache_is_wrong_with_every_source(lab: Any, named: bool) -> None:
    for error in (
        Conflict("no", pool=str(lab.cache().pool) if named else None),
        NoSpace("full", needed=1, available=0),
    ):
        with pytest.raises(type(error)):
            bring(lab, lambda source, cache, error=error: error)


def damaged_and_good(tmp_path: Path) -> statepool.StatePool:
    for name in ("bad", "good"):
        statepool.init(str(tmp_path / name))
    (tmp_path / "bad" / layout.log("vm1")).mkdir()
    (tmp_path / "bad" / layout.record("vm1", 1)).write_text("nonsense")
    (tmp_path / "good" / layout.TRASH / "n-what").touch()
    return statepool.StatePool(
        cache=str(tmp_path / "cache"), sources=[str(tmp_path / "bad"), str(tmp_path / "good")]
    )


def test_a_damaged_log_does_not_end_a_collection(tmp_path: Path) -> None:
    states = damaged_and_good(tmp_path)
    (tmp_path / "bad" / layout.DATA / ("blake3-" + "0" * 64)).touch()
    collected = states.gc(everywhere=True)
    assert any("bad" in one.pool and "not JSON" in (one.problem or "") for one in collected)
    assert not list((tmp_path / "good" / layout.TRASH).iterdir())


def test_a_damaged_log_does_not_end_a_verification(tmp_path: Path) -> None:
    problems = [one.problem or "" for one in damaged_and_good(tmp_path).verify()]
    assert any("not JSON" in problem for problem in problems)
