"""Which source is asked first: a pure function, shown by examples."""

from __future__ import annotations

import ipaddress

import pytest

from statepool.model.location import Location
from statepool.model.scope import Scope
from statepool.sources.ranking import (
    CORRUPT_FACTOR,
    FIRST_REST,
    LONGEST_REST,
    Candidate,
    Known,
    Proximity,
    Surroundings,
    expected,
    proximity,
    rank,
    resting,
)

ALL = frozenset(Scope)
HERE = Surroundings(
    frozenset({"me", "me.lab"}),
    (ipaddress.ip_network("192.0.2.0/24"), ipaddress.ip_network("2001:db8::/64")),
)
MIB = float(1 << 20)
NOW = 1_000_000.0


def source(
    name: str, location: str = "", scope: Scope = Scope.SHARED, **known: object
) -> Candidate:
    return Candidate(name, Location.parse(location or f"/srv/{name}"), scope, Known(**known))  # type: ignore[arg-type]


def order(*candidates: Candidate, scope: frozenset[Scope] = ALL, now: float = NOW) -> str:
    return " ".join(
        chosen.candidate.name for chosen in rank(candidates, scope=scope, now=now, here=HERE)
    )


def test_the_order_of_the_configuration_if_nothing_else_differs() -> None:
    assert order() == ""
    assert order(source("b"), source("a"), source("c")) == "b a c"


def test_only_what_the_scope_permits() -> None:
    sources = [
        source("near", scope=Scope.SWARM),
        source("far", scope=Scope.CLUSTER),
        source("common", scope=Scope.SHARED),
    ]
    assert order(*sources, scope=frozenset({Scope.CLUSTER, Scope.SHARED})) == "far common"
    assert order(*sources, scope=frozenset({Scope.OWN})) == ""


def test_a_nearer_scope_first() -> None:
    assert (
        order(
            source("common", scope=Scope.SHARED),
            source("far", scope=Scope.CLUSTER),
            source("near", scope=Scope.SWARM),
        )
        == "near far common"
    )


def test_nearer_first_until_it_is_measured() -> None:
    far, network, host = (
        source("far", "ssh://store.example.org/p"),
        source("network", "ssh://192.0.2.7/p"),
        source("host"),
    )
    assert order(far, network, host) == "host network far"
    assert (
        order(source("far", "ssh://store.example.org/p", rate=900 * MIB, latency=0.01), network)
        == "far network"
    )


def test_what_was_measured_counts_if_it_matters() -> None:
    assert order(source("slow", rate=1 * MIB), source("fast", rate=500 * MIB)) == "fast slow"
    assert order(source("one", rate=300 * MIB), source("other", rate=500 * MIB)) == "one other"
    assert (
        order(source("one", rate=300 * MIB), source("other", rate=500 * MIB, scope=Scope.SWARM))
        == "other one"
    )
    assert (
        order(
            source("neighbour", rate=1 * MIB, scope=Scope.SWARM), source("common", rate=100 * MIB)
        )
        == "common neighbour"
    )
    assert order(source("late", latency=3.0), source("prompt")) == "prompt late"


def test_slower_and_slower() -> None:
    rates = {"a": 100, "b": 3, "c": 900, "d": 20}
    assert order(*(source(name, rate=rate * MIB) for name, rate in rates.items())) == "c a d b"


def test_one_that_failed_is_left_alone_and_then_tried_again() -> None:
    failed = source("failed", failures=1, failed=NOW)
    assert order(failed, source("well")) == "well failed"
    assert order(failed, source("well"), now=NOW + FIRST_REST - 1) == "well failed"
    assert order(failed, source("well"), now=NOW + FIRST_REST) == "failed well"
    assert (
        order(
            source("failed", failures=1, failed=NOW, rate=900 * MIB, scope=Scope.SWARM),
            source("slow", rate=MIB),
        )
        == "slow failed"
    )


@pytest.mark.parametrize(
    ("known", "rest"),
    [
        (Known(), 0),
        (Known(failures=1, failed=NOW), FIRST_REST),
        (Known(failures=2, failed=NOW), 2 * FIRST_REST),
        (Known(failures=3, failed=NOW), 4 * FIRST_REST),
        (Known(failures=3, failed=NOW - 30), 4 * FIRST_REST - 30),
        (Known(failures=1, failed=NOW, corrupt=True), CORRUPT_FACTOR * FIRST_REST),
        (Known(failures=10_000, failed=NOW), LONGEST_REST),
        (Known(failures=10_000, failed=NOW, corrupt=True), LONGEST_REST),
        (Known(failures=1, failed=NOW - 2 * FIRST_REST), 0),
        (Known(failures=1, failed=NOW + 5), 0),
        (Known(failures=0, failed=NOW), 0),
    ],
)
def test_for_how_long(known: Known, rest: float) -> None:
    assert resting(known, NOW) == rest


@pytest.mark.parametrize(
    ("location", "scope", "near"),
    [
        ("/srv/pool", Scope.SHARED, Proximity.HOST),
        ("link:///srv/pool", Scope.CLUSTER, Proximity.HOST),
        ("ssh://localhost/p", Scope.SHARED, Proximity.HOST),
        ("ssh://127.0.0.9/p", Scope.SHARED, Proximity.HOST),
        ("ssh://[::1]:2222/p", Scope.SHARED, Proximity.HOST),
        ("ssh://me.lab/p", Scope.SHARED, Proximity.HOST),
        ("ssh://192.0.2.200/p", Scope.SHARED, Proximity.NETWORK),
        ("ssh://[2001:db8::7]/p", Scope.CLUSTER, Proximity.NETWORK),
        ("ssh://[fe80::1]/p", Scope.SHARED, Proximity.NETWORK),
        ("ssh://store/p", Scope.SHARED, Proximity.NETWORK),
        ("ssh://store.local/p", Scope.SHARED, Proximity.NETWORK),
        ("ssh://w2.example.org/p", Scope.SWARM, Proximity.NETWORK),
        ("ssh://198.51.100.7/p", Scope.SHARED, Proximity.ELSEWHERE),
        ("ssh://store.example.org/p", Scope.SHARED, Proximity.ELSEWHERE),
        ("oci:///p", Scope.SHARED, Proximity.ELSEWHERE),
    ],
)
def test_how_far_an_address_is(location: str, scope: Scope, near: Proximity) -> None:
    assert proximity(Location.parse(location), scope, HERE) is near


def test_what_is_not_measured_is_thought_to_be_usual() -> None:
    assert (
        expected(Known(), Proximity.HOST)
        < expected(Known(), Proximity.NETWORK)
        < expected(Known(), Proximity.ELSEWHERE)
    )
    assert expected(Known(rate=0.0), Proximity.HOST) == expected(Known(), Proximity.HOST)
    assert expected(Known(rate=64 * MIB, latency=0.5), Proximity.HOST) == pytest.approx(1.5)


def test_it_says_why() -> None:
    chosen = rank(
        [source("a", rate=MIB), source("b", failures=2, failed=NOW, corrupt=True)],
        scope=ALL,
        now=NOW,
        here=HERE,
    )
    assert [one.why for one in chosen] == [
        "this host, shared, speed measured",
        (
            "left alone for 600 s: was corrupt 2 times in a row, this host, shared, speed not"
            " measured yet"
        ),
    ]


def test_among_a_hundred() -> None:
    many = [
        source(f"s{number}", rate=(number % 7 + 1) * MIB, failures=number % 2, failed=NOW)
        for number in range(100)
    ]
    chosen = rank(many, scope=ALL, now=NOW, here=HERE)
    assert len(chosen) == 100
    assert [bool(one.rest) for one in chosen] == [False] * 50 + [True] * 50


def test_one_failure_is_not_said_to_be_several() -> None:
    (chosen,) = rank([source("a", failures=1, failed=NOW)], scope=ALL, now=NOW, here=HERE)
    assert (
        chosen.why
        == f"left alone for {FIRST_REST:.0f} s: failed once, this host, shared, speed not"
        " measured yet"
    )
