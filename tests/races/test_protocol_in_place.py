"""
The protocol of a pool whose files cannot be renamed, as a model: see
:mod:`tests.support.protocol_in_place`. The first half shows that it holds, the second half what
each rule is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from attrs import evolve, frozen

from tests.support.protocol import (
    DONE,
    WITH_LEFTOVER,
    WITH_P,
    Actor,
    C,
    Change,
    P,
    Place,
    World,
    explore,
    remover,
)
from tests.support.protocol_in_place import CollectorInPlace, Found, PublisherInPlace, Sweeper

D = Change("D", "c", "P")
"""Another name for the bytes of C."""

WITH_C = evolve(WITH_LEFTOVER, log=(P, C))


def publisher(me: str, state: Change = C, *, brings: bool = True, gathers: bool = False) -> Actor:
    return PublisherInPlace(me, state, brings, gathers=gathers).actor()


def collector(me: str, *, misjudges: str = "") -> Actor:
    return CollectorInPlace(me, misjudges).actor()


def sweeper() -> Actor:
    return Sweeper().actor()


# -- what holds ------------------------------------------------------------------------------------

GATHERS = pytest.mark.parametrize("gathers", [True, False], ids=["sent-anyway", "sent-if-missing"])


@GATHERS
@pytest.mark.parametrize(
    ("others", "start"),
    [
        pytest.param((remover("P"), collector("g")), WITH_P, id="its parent goes"),
        pytest.param((collector("g"), collector("h")), WITH_LEFTOVER, id="two collectors"),
        pytest.param((publisher("b"), collector("g")), WITH_LEFTOVER, id="the same twice"),
        pytest.param((publisher("b", D), collector("g")), WITH_LEFTOVER, id="two names"),
        pytest.param((remover("C"), collector("g")), WITH_LEFTOVER, id="it goes again"),
        pytest.param((collector("g"), sweeper(), sweeper()), WITH_LEFTOVER, id="two sweepers"),
    ],
)
def test_all_may_die_anywhere(gathers: bool, others: Sequence[Actor], start: World) -> None:
    _, wrong = explore((publisher("a", gathers=gathers), *others), start)
    assert not wrong, wrong[0]


def test_bytes_lose_one_name_and_get_another() -> None:
    _, wrong = explore((publisher("a", D), remover("C"), collector("g"), Sweeper().actor()), WITH_C)
    assert not wrong, wrong[0]


def test_no_process_waits_for_a_collector_that_died() -> None:
    dead = evolve(WITH_LEFTOVER, condemned=frozenset({("x", "c")}))
    actor = publisher("a")
    world, place = dead, ("begin",)
    while place[0] != DONE:
        world, place = actor.step(world, place)
    assert C in world.states.values()
    # Whatever the collector does when it comes back from the dead, there is a spare.
    assert {digest for _, digest in world.trash} == {"c"}


@pytest.mark.parametrize("brings", [True, False], ids=["that still has the bytes", "that does not"])
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(collector("h"), id="collector"),
        pytest.param(sweeper(), id="sweeper"),
        pytest.param(publisher("b"), id="publisher"),
    ],
)
def test_a_writer_is_taken_for_dead_beside_another_process(brings: bool, other: Actor) -> None:
    actors = (publisher("a", brings=brings), other, collector("g", misjudges="a"))
    _, wrong = explore(actors, WITH_LEFTOVER, immortal=[0])
    assert not wrong, wrong[0]


# -- what each rule is for -------------------------------------------------------------------------

LOST = "the bytes of C are gone"


def problems(*actors: Actor, immortal: Sequence[int] = ()) -> set[str]:
    return set(explore(actors, WITH_LEFTOVER, immortal=immortal)[1])


def test_without_condemnations_bytes_are_removed_under_a_writer_that_saw_them() -> None:
    class Unannounced(CollectorInPlace):
        def _condemn(self, world: World, digest: str) -> tuple[World, Place]:
            return world, ("ask", digest)

    assert LOST in problems(publisher("a"), Unannounced("g").actor())


def test_a_writer_that_does_not_heed_condemnations_loses_its_bytes() -> None:
    class Heedless(PublisherInPlace):
        def _is_condemned(self, world: World) -> bool:
            return False

    assert LOST in problems(Heedless("a", C, gathers=False).actor(), collector("g"))


def test_a_writer_that_looks_before_it_has_made_its_marker_misses_a_condemnation() -> None:
    class MarksLate(PublisherInPlace):
        def _begin(self, world: World) -> tuple[World, Place]:
            return world, ("seek", ("late",))

        def _late(self, world: World) -> tuple[World, Place]:
            return super()._begin(world)[0], ("fold", False)

    assert LOST in problems(MarksLate("a", C, gathers=False).actor(), collector("g"))


def test_a_writer_that_looks_for_its_bytes_first_takes_those_that_are_removed_meanwhile() -> None:
    class OutOfOrder(PublisherInPlace):
        def _seek(self, world: World, then: Place) -> tuple[World, Place]:
            return self._name(world, ("after", then))

        def _after(self, world: World, then: Place) -> tuple[World, Place]:
            return (world, ("spare", then)) if self._is_condemned(world) else (world, then)

    assert LOST in problems(OutOfOrder("a", C, gathers=False).actor(), collector("g"))


def test_without_a_spare_before_the_record_a_writer_that_dies_leaves_no_bytes() -> None:
    class SparesLate(PublisherInPlace):
        def _seek(self, world: World, then: Place) -> tuple[World, Place]:
            return (world, ("name", then)) if then[0] == "fold" else super()._seek(world, then)

    assert LOST in problems(SparesLate("a", C, gathers=False).actor(), collector("g"))


def test_a_spare_of_the_first_look_does_not_do_for_the_last_one() -> None:
    class SparesOnce(PublisherInPlace):
        def _fresh(self, then: Place) -> tuple[str, str]:
            return self.me, self.state.digest

    spares_once = SparesOnce("a", C, gathers=False).actor()
    assert LOST in problems(spares_once, collector("g", misjudges="a"), sweeper(), immortal=[0])


def test_a_collector_that_does_not_look_after_it_has_condemned_removes_what_is_needed() -> None:
    class Blind(CollectorInPlace):
        def _ask(self, world: World, digest: str) -> tuple[World, Place]:
            return world, ("delete", digest)

    assert LOST in problems(publisher("a"), Blind("g").actor())


def test_a_collector_that_ends_its_condemnation_before_it_removes_is_not_seen() -> None:
    class TooSoon(CollectorInPlace):
        def _fold(self, world: World, digest: str) -> tuple[World, Place]:
            world, place = super()._fold(world, digest)
            if place[0] == "delete":
                world, _ = self._absolve(world, digest)
            return world, place

    assert LOST in problems(publisher("a"), TooSoon("g").actor())


def test_a_condemnation_of_a_collector_that_lives_must_not_be_ended_by_others() -> None:
    assert LOST in problems(publisher("a"), collector("g"), Sweeper(presumes=True).actor())


def test_spares_of_what_is_condemned_must_stay() -> None:
    @frozen
    class Hasty(Sweeper):
        def _name(self, world: World, found: Found, doomed: bool) -> tuple[World, Place]:
            return super()._name(world, found, False)

    assert LOST in problems(publisher("a"), collector("g"), Hasty().actor())
