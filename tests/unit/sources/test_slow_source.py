"""A source from which bytes come much more slowly than they would from another one is left."""

from __future__ import annotations

import pytest

from statepool.sources.slow_source import TRIAL, TooSlow, Watch

MIB = 1 << 20


class Told:
    """A progress that remembers, and a clock."""

    def __init__(self) -> None:
        self.said: list[object] = []
        self.now = 100.0

    def begin(self, what: str, total: int) -> None:
        self.said.append((what, total))

    def advance(self, count: int) -> None:
        self.said.append(count)

    def end(self) -> None:
        self.said.append("end")


@pytest.fixture
def told() -> Told:
    return Told()


def watch(told: Told, pace: float | None) -> Watch:
    return Watch(told, pace, clock=lambda: told.now)


def move(
    watching: Watch,
    told: Told,
    *,
    seconds: float,
    count: int = MIB,
    times: int = 10,
    total: int = 100 * MIB,
) -> None:
    watching.begin("get", total)
    for _ in range(times):
        told.now += seconds
        watching.advance(count)
    watching.end()


def test_everything_is_passed_on(told: Told) -> None:
    move(watch(told, None), told, seconds=10, times=2, total=5)
    assert told.said == [("get", 5), MIB, MIB, "end"]


def test_a_slow_one_is_left(told: Told) -> None:
    with pytest.raises(TooSlow) as caught:
        move(watch(told, 100.0 * MIB), told, seconds=1)
    assert (caught.value.done, caught.value.rate) == (MIB, float(MIB))
    assert told.said[-1] == MIB  # told before it is left


@pytest.mark.parametrize(
    ("pace", "seconds", "count", "total"),
    [
        (None, 10, MIB, 100 * MIB),  # there is no other
        (3.0 * MIB, 1, MIB, 100 * MIB),  # alike
        (100.0 * MIB, TRIAL / 20, 1, 100 * MIB),  # too early to say
        (100.0 * MIB, 1, MIB, 2 * MIB),  # little is left to gain
        (0.5 * MIB, 1, MIB, 100 * MIB),  # the other one is slower
    ],
)
def test_one_that_is_worth_staying_with(
    told: Told, pace: float | None, seconds: float, count: int, total: int
) -> None:
    times = min(10, total // count)
    move(watch(told, pace), told, seconds=seconds, count=count, times=times, total=total)
    assert told.said[-1] == "end"


def test_reading_what_is_here_says_nothing_of_a_source(told: Told) -> None:
    watching = watch(told, 100.0 * MIB)
    watching.begin("get", 100 * MIB)
    watching.begin("check", 50 * MIB)
    for _ in range(50):
        told.now += 1
        watching.advance(MIB)
    watching.end()
    told.now += TRIAL
    watching.advance(90 * MIB)
    watching.end()
    assert told.said[-1] == "end"
