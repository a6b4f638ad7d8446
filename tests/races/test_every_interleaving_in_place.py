"""
Every interleaving of two or three actors on one pool whose files can neither be renamed nor linked,
each of which may pause or die at each step: the real code, held to what the model in
:mod:`tests.support.protocol_in_place` shows.

The second half takes away one rule at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from statepool.model.digest import Digest
from statepool.pools import collect as collect_module
from statepool.pools import layout, staging
from statepool.pools.collect import Collector
from statepool.pools.staging import Marker, Staging
from statepool.transports.base import Transport
from tests.support import pool_states, pool_worlds
from tests.support.interleave import Explored, Files
from tests.support.pool_states import D_AS_C, C, P
from tests.support.pool_worlds import Doing, collect, misjudge, publish, read, remove, sweep
from tests.support.replay import Direct

Ways = set[frozenset[str]]


def explore(doings: dict[str, Doing], files: Files, **how: Any) -> Explored:
    """As :func:`tests.support.pool_worlds.explore`, where files cannot be renamed."""
    return pool_worlds.explore(doings, files, renames=False, **how)


def pool_with(*manifests: Any, leftover: Iterable[str] = ()) -> Files:
    """As :func:`tests.support.pool_states.pool_with`, where files cannot be renamed."""
    return pool_states.pool_with(*manifests, leftover=list(leftover), renames=False)


def ways(explored: Explored) -> Ways:
    """:returns: how the actors ended together, in words, if nothing was wrong"""
    assert not explored.violations, str(explored.violations[0])
    return {frozenset(_word(outcome) for _, outcome in end) for end in explored.outcomes}


def _word(outcome: Any) -> str:
    return outcome.__name__ if isinstance(outcome, type) else str(outcome)


# -- what holds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("upload", [True, False], ids=["sent-anyway", "sent-if-missing"])
def test_bytes_are_used_again_while_a_collector_is_after_them(upload: bool) -> None:
    doings = {"a": publish(C, upload=upload), "g": collect("C")}
    assert {"published", "collected"} in ways(explore(doings, pool_with(P, leftover="C")))


def test_a_child_comes_its_parent_goes_and_bytes_are_collected() -> None:
    doings = {"a": publish(C), "r": remove("P"), "g": collect("P", "C")}
    found = ways(explore(doings, pool_with(P)))
    assert {"published", "HasDependants", "collected"} in found
    assert {"Conflict", "removed", "collected"} in found


def test_bytes_lose_one_name_and_get_another() -> None:
    doings = {"r": remove("C"), "b": publish(D_AS_C, upload=False)}
    assert {"published", "removed"} in ways(explore(doings, pool_with(P, C)))


def test_a_sweep_meets_a_writer() -> None:
    doings = {"a": publish(C, upload=False), "s": sweep()}
    assert {"published", "swept"} in ways(explore(doings, pool_with(P, leftover="C")))


def test_a_writer_meets_what_a_collector_left_that_died() -> None:
    transport = Direct(pool_with(P, leftover="C"), renames=False)
    assert C.digest is not None
    condemnation = Marker("dead", frozenset([C.digest]), staging.Writer.current(), condemns=True)
    transport.create(layout.marker("dead"), condemnation.to_bytes())
    doings = {"a": publish(C, upload=False), "s": sweep()}
    assert {"published", "swept"} in ways(explore(doings, transport.files))


def test_a_reader_finds_all_bytes() -> None:
    doings = {"g": collect("P", "C"), "x": read()}
    assert ways(explore(doings, pool_with(P, leftover="C")))


@pytest.mark.parametrize("again", [True, False], ids=["bytes-again", "taken-back"])
def test_a_writer_is_taken_for_dead(again: bool) -> None:
    doings = {"a": publish(C, again=again), "m": misjudge()}
    found = ways(explore(doings, pool_with(P), misjudged=True))
    assert {"published", "collected"} in found
    assert again or {"IntegrityError", "collected"} in found


# -- what each rule is for -------------------------------------------------------------------------

LOST = "the bytes of vm1/disk C are gone"


def lost(doings: dict[str, Doing]) -> bool:
    """:returns: whether the bytes of a state are lost in one of the schedules"""
    explored = explore(doings, pool_with(P, leftover="C"), only_bytes=True)
    return [violation.what for violation in explored.violations] == [LOST]


REUSED = {"a": publish(C, upload=False), "g": collect("C")}


def test_without_condemnations_bytes_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def remove_needless(self: Collector, digests: Iterable[Digest], *rest: Any) -> set[Digest]:
        gone = set(digests) - self._needed()
        for digest in gone:
            self._transport.remove(layout.data(digest))
        return gone

    monkeypatch.setattr(Collector, "_remove_in_place", remove_needless)
    assert lost(REUSED)


def test_without_a_look_for_condemnations_bytes_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "condemned", lambda transport: frozenset())
    assert lost(REUSED)


def test_without_spares_bytes_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "_spare", lambda self, digest: True)
    assert lost(REUSED)


def test_spares_must_stay_while_the_bytes_are_condemned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_module, "condemned", lambda transport: frozenset())
    assert lost({**REUSED, "s": clear_trash()})


def test_a_condemnation_must_stay_while_its_collector_may_live() -> None:
    assert lost({**REUSED, "j": absolve()})


def clear_trash() -> Doing:
    """Clears the trash, and nothing else."""

    def run(transport: Any) -> str:
        Collector(pool_worlds._pool_of(transport))._clear_trash(dry_run=False)
        return "cleared"

    return Doing(run)


def absolve() -> Doing:
    """Ends the condemnation of the collector ``g``, which lives."""

    def run(transport: Transport) -> str:
        transport.remove(layout.marker("g1"))
        return "absolved"

    return Doing(run)
