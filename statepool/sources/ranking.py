"""
The order in which sources are asked.

:func:`rank` is a pure function: from sources and what is known of them, it computes an order and
the reasons. It contacts no source and reads no clock. The first of these criteria in which two
sources differ decides:

1. **Health.** A source that failed recently rests: it comes after all other sources. The rest gets
   longer with each failure in a row (:func:`resting`), and ends by itself. A resting source is
   still asked if no other source has the state.
2. **Speed.** How long :data:`REFERENCE` bytes would take, by the latency and the rate that were
   measured, and by what is usual at this distance (:data:`USUAL`) where nothing was. Only large
   differences count: all sources that take less than :data:`ALIKE` times as long as the fastest one
   are one class, those that are slower by up to the same factor again are the next class, and so
   on. So the order does not change with every measurement.
3. **Scope**: swarm, cluster, shared. A neighbour comes before the common pool, which all hosts ask.
4. **Proximity**: this host, this network, elsewhere.
5. The **order in which they are configured**.
"""

from __future__ import annotations

import enum
import ipaddress
import math
from collections.abc import Iterable

from attrs import frozen

from statepool.model.location import Location
from statepool.model.scope import Scope

REFERENCE = 64 << 20
"""Bytes of a transfer of usual size: an overlay that a test leaves."""

ALIKE = 4.0
"""The factor by which two sources must differ in speed for the difference to count."""

FIRST_REST = 10.0
"""
How long a source rests after its first failure, in seconds; twice as long after each further
failure in a row.
"""

LONGEST_REST = 3600.0
"""Longest rest of a source, in seconds."""

CORRUPT_FACTOR = 30
"""
The factor by which a source rests longer if it delivered wrong data: that does not pass by itself.
"""


class Proximity(enum.IntEnum):
    """How far a source is, according to its address."""

    HOST = 0
    NETWORK = 1
    ELSEWHERE = 2

    def __str__(self) -> str:
        return ("this host", "this network", "elsewhere")[self]


USUAL = {
    Proximity.HOST: (0.001, 150e6),
    Proximity.NETWORK: (0.02, 100e6),
    Proximity.ELSEWHERE: (0.1, 20e6),
}
"""
Latency (seconds) and throughput (bytes per second) that are assumed until they are measured: a
disk, a network of 1 Gbit/s, and a line between two sites. They are cautious: a source that works
and was measured is worse than this only if it is very slow.
"""


@frozen
class Known:
    """
    What is known of one source.

    :param latency: how long it took to answer, in seconds; None if it was never measured
    :param rate: its throughput for images, in bytes per second; None if it was never measured
    :param failures: how often in a row it failed
    :param failed: when it failed last, in seconds since the epoch; 0 for never
    :param problem: what went wrong then, or None
    :param corrupt: whether it then delivered wrong data
    """

    latency: float | None = None
    rate: float | None = None
    failures: int = 0
    failed: float = 0.0
    problem: str | None = None
    corrupt: bool = False


NOTHING = Known()
"""What is known of a source that was never asked."""


@frozen
class Surroundings:
    """
    The position of this host in the network.

    :param names: its own names
    :param networks: the networks to which it is connected without a router between
    """

    names: frozenset[str] = frozenset()
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()


@frozen
class Candidate:
    """
    A source to be ranked.

    :param name: what the user calls it
    :param location: where it is
    :param scope: how far it is, as the user configured it
    :param known: what is known of it
    """

    name: str
    location: Location
    scope: Scope
    known: Known = NOTHING


@frozen
class Ranked:
    """
    A source with what determines its position.

    :param candidate: the source
    :param proximity: how far it is
    :param seconds: how long :data:`REFERENCE` bytes would take
    :param rest: for how many more seconds it rests; 0 if it does not
    """

    candidate: Candidate
    proximity: Proximity
    seconds: float
    rest: float

    @property
    def why(self) -> str:
        """What determined its position, for people."""
        known = self.candidate.known
        words = [str(self.proximity), str(self.candidate.scope)]
        words.append(
            "speed not measured yet"
            if known.rate is None and known.latency is None
            else "speed measured"
        )
        if self.rest:
            times = "once" if known.failures == 1 else f"{known.failures} times in a row"
            words.insert(
                0,
                f"left alone for {self.rest:.0f} s: {'was corrupt' if known.corrupt else 'failed'}"
                f" {times}",
            )
        return ", ".join(words)


def rank(
    candidates: Iterable[Candidate], *, scope: frozenset[Scope], now: float, here: Surroundings
) -> list[Ranked]:
    """
    :param candidates: the sources, in the order in which they are configured
    :param scope: the permitted scopes
    :param now: seconds since the epoch
    :param here: the position of this host
    :returns: the permitted sources, best first
    """
    found = []
    for candidate in candidates:
        if candidate.scope in scope:
            near = proximity(candidate.location, candidate.scope, here)
            found.append(
                Ranked(
                    candidate, near, expected(candidate.known, near), resting(candidate.known, now)
                )
            )
    best = min((chosen.seconds for chosen in found), default=0.0)
    far = list(Scope)
    # sorted() is stable: equal sources stay in the order of the configuration
    return sorted(
        found,
        key=lambda chosen: (
            chosen.rest > 0,
            _class(chosen.seconds, best),
            far.index(chosen.candidate.scope),
            chosen.proximity,
        ),
    )


def is_alike(one: Ranked, other: Ranked) -> bool:
    """:returns: whether two sources are equally near, about as fast, and do not rest"""
    slower, faster = sorted((one.seconds, other.seconds), reverse=True)
    return (
        not one.rest
        and not other.rest
        and one.candidate.scope is other.candidate.scope
        and one.proximity is other.proximity
        and slower < ALIKE * faster
    )


def _class(seconds: float, best: float) -> int:
    return int(math.log(seconds / best, ALIKE)) if best > 0 and seconds > best else 0


def expected(known: Known, near: Proximity) -> float:
    """:returns: how long :data:`REFERENCE` bytes would take, in seconds"""
    usual_latency, usual_rate = USUAL[near]
    latency = known.latency if known.latency is not None else usual_latency
    return latency + REFERENCE / (
        known.rate if known.rate is not None and known.rate > 0 else usual_rate
    )


def resting(known: Known, now: float) -> float:
    """
    :param now: seconds since the epoch
    :returns: for how many more seconds a source rests; 0 if it does not, or if its failure is in
        the future, since the clock was set back
    """
    if not known.failures or known.failed > now:
        return 0.0
    rest = (
        FIRST_REST * (CORRUPT_FACTOR if known.corrupt else 1) * 2.0 ** min(known.failures - 1, 32)
    )
    return max(0.0, known.failed + min(rest, LONGEST_REST) - now)


def proximity(location: Location, scope: Scope, here: Surroundings) -> Proximity:
    """
    :returns: how far a location is, without contact to any host: by its address, by the names of
        this host, and by the configured scope
    """
    if location.is_local:
        return Proximity.HOST
    host = location.host
    if host is None:
        return Proximity.ELSEWHERE
    if host == "localhost" or host in here.names:
        return Proximity.HOST
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        # A name without a dot is resolved in the domain of this network.
        return (
            Proximity.NETWORK
            if scope is Scope.SWARM or "." not in host or host.endswith(".local")
            else Proximity.ELSEWHERE
        )
    if address.is_loopback:
        return Proximity.HOST
    near = (
        scope is Scope.SWARM
        or address.is_link_local
        or any(
            address in network for network in here.networks if network.version == address.version
        )
    )
    return Proximity.NETWORK if near else Proximity.ELSEWHERE
