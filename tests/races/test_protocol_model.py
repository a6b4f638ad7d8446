"""
The protocol of a pool whose files can be renamed, as a model: see :mod:`tests.support.protocol`.
The first half shows that it holds, the second half what each rule is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.support.protocol import (
    C2,
    WITH_LEFTOVER,
    WITH_P,
    Actor,
    C,
    Publisher,
    World,
    collector,
    explore,
    remover,
)

# -- what holds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actors", "start"),
    [
        pytest.param(
            (Publisher("a", C).actor(), remover("P"), collector("g")),
            WITH_P,
            id="a child comes while its parent goes",
        ),
        pytest.param(
            (Publisher("a", C).actor(), collector("g"), collector("h")),
            WITH_LEFTOVER,
            id="two collectors",
        ),
        pytest.param(
            (Publisher("a", C).actor(), Publisher("b", C).actor(), collector("g")),
            WITH_LEFTOVER,
            id="the same twice",
        ),
        pytest.param(
            (Publisher("a", C).actor(), Publisher("b", C2).actor(), collector("g")),
            WITH_P,
            id="two contents for one name",
        ),
    ],
)
def test_writers_that_are_judged_rightly_may_die_anywhere(
    actors: Sequence[Actor], start: World
) -> None:
    states, wrong = explore(actors, start)
    # A writer that died after its record is never taken for one that lives: its bytes were there
    # when it wrote.
    assert not wrong, wrong[0]
    assert states > 100


WAYS = pytest.mark.parametrize(
    "brings", [True, False], ids=["that still has the bytes", "that does not"]
)


@WAYS
def test_a_writer_that_is_taken_for_dead(brings: bool) -> None:
    actors = (Publisher("a", C, brings).actor(), collector("g", misjudges="a"), collector("h"))
    _, wrong = explore(actors, WITH_P, immortal=[0])
    assert not wrong, wrong[0]


@WAYS
def test_a_writer_that_is_taken_for_dead_while_another_publishes_the_same(brings: bool) -> None:
    actors = (
        Publisher("a", C, brings).actor(),
        Publisher("b", C).actor(),
        collector("g", misjudges="a"),
    )
    _, wrong = explore(actors, WITH_P, immortal=[0])
    assert not wrong, wrong[0]


@WAYS
def test_a_writer_that_is_taken_for_dead_while_its_state_is_removed(brings: bool) -> None:
    actors = (Publisher("a", C, brings).actor(), remover("C"), collector("g", misjudges="a"))
    _, wrong = explore(actors, WITH_P, immortal=[0])
    assert not wrong, wrong[0]


# -- what each rule is for -------------------------------------------------------------------------


def test_without_a_remedy_a_record_is_left_without_bytes() -> None:
    actors = (Publisher("a", C, rules=frozenset()).actor(), collector("g", misjudges="a"))
    _, wrong = explore(actors, WITH_P, immortal=[0])
    assert "the bytes of C are gone" in wrong


def test_without_a_look_after_each_fold_what_another_has_published_is_taken_back() -> None:
    rules = frozenset({"back", "own"})
    actors = (
        Publisher("a", C, False, rules).actor(),
        Publisher("b", C).actor(),
        collector("g", misjudges="a"),
    )
    _, wrong = explore(actors, WITH_P, immortal=[0])
    assert "C was acknowledged, and is gone" in wrong


def test_without_a_record_of_its_own_the_other_is_not_seen() -> None:
    plain = frozenset({"again", "back", "looks"})
    actors = (
        Publisher("a", C, False, plain).actor(),
        Publisher("b", C, rules=plain).actor(),
        collector("g", misjudges="a"),
    )
    _, wrong = explore(actors, WITH_P, immortal=[0])
    assert "C was acknowledged, and is gone" in wrong


def test_without_the_marker_that_says_so_the_other_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Publisher, "_mark", lambda self, world: (world, ("back",)))
    actors = (
        Publisher("a", C, False).actor(),
        Publisher("b", C).actor(),
        collector("g", misjudges="a"),
    )
    _, wrong = explore(actors, WITH_P, immortal=[0])
    assert "C was acknowledged, and is gone" in wrong
