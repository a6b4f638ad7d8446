"""Sources that are all slow, or fail: the state comes from the least slow of them."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import frozen

from statepool.cache.cache import Cache
from statepool.copying.supply import Supply
from statepool.model.manifest import StateId
from statepool.sources.mirrors import Mirrors
from statepool.sources.pool_source import PoolSource
from statepool.sources.slow_source import TooSlow
from statepool.sources.source_stats import SourceStats
from statepool.testing.faults import Call, Fault, FaultyTransport, Stop, on

INSTALL = StateId("vm1/disk", "install")
MIB = 1 << 20


@frozen
class Left(Fault):
    """The source is left for another one, as one that is watched."""

    rate: float = 0.0

    def before(self, call: Call) -> None:
        raise TooSlow(0, self.rate)


@pytest.mark.parametrize(
    "rates", [{"one": 3 * MIB, "two": 1 * MIB}, {"one": 1 * MIB, "two": 3 * MIB}]
)
def test_the_least_slow_one_is_the_last_resort(lab: Any, rates: dict[str, float]) -> None:
    """
    Both are left for a source that then fails: so one of them has to do, and it is the faster one,
    whichever was tried first.
    """
    cache: Cache = lab.cache()
    transports = {name: lab.pool(name).transport for name in ("one", "two", "broken")}
    for name in transports:
        lab.chain(lab.pool(name), "install")
    for name, rate in rates.items():
        transports[name] = FaultyTransport(
            transports[name], Left(matches=on("fetch"), times=1, rate=rate)
        )
    transports["broken"] = FaultyTransport(transports["broken"], Stop(matches=on("fetch")))
    sources = tuple(
        PoolSource(lab.pool(name, transport=transport), name)
        for name, transport in transports.items()
    )
    offers = [offer for source in sources if (offer := source.resolve(INSTALL)) is not None]
    brought = Supply(cache, Mirrors(sources, SourceStats(cache.notes), cache.settings)).bring(
        INSTALL, offers
    )
    assert brought.offer.source.name == max(rates, key=rates.__getitem__)
    assert brought.fetched.bytes > 0
    assert ["was left for another source" in warning for warning in brought.warnings] == [
        True,
        True,
        False,
    ]
