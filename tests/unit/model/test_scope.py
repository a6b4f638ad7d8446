"""How far a source is."""

from __future__ import annotations

from typing import Any

import pytest

from statepool.errors import UsageError
from statepool.model.scope import Scope


def test_words() -> None:
    assert Scope.parse("own swarm cluster shared") == frozenset(Scope)
    assert Scope.parse("  own\tshared own ") == {Scope.OWN, Scope.SHARED}


def test_nearest_comes_first() -> None:
    assert list(Scope) == ["own", "swarm", "cluster", "shared"]


@pytest.mark.parametrize("text", ["", "  ", "OWN", "own,shared", "own everywhere", "SWARM"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Scope.parse(text)
    assert "own, swarm, cluster, shared" in str(caught.value.hint)


@pytest.mark.parametrize(
    "given",
    [
        ["own", "shared"],
        {Scope.OWN, Scope.SHARED},
        (Scope.SHARED, "own"),
        iter(["own", "shared"]),
        "own shared",
    ],
)
def test_one_text_or_several_scopes(given: Any) -> None:
    assert Scope.parse(given) == {Scope.OWN, Scope.SHARED}


def test_every_scope() -> None:
    assert Scope.parse("all") == Scope.parse(["all"]) == Scope.parse("own all") == frozenset(Scope)


def test_nothing_is_no_scope() -> None:
    with pytest.raises(UsageError, match="no scope is named"):
        Scope.parse([])
    with pytest.raises(UsageError, match="'nowhere'"):
        Scope.parse(["own", "nowhere"])


@pytest.mark.parametrize("given", [1, b"own", [1], [b"own"], [None]])
def test_other_values_are_no_scopes(given: Any) -> None:
    with pytest.raises(UsageError, match="not how scopes are written") as caught:
        Scope.permitted(given)
    assert "own swarm" in str(caught.value.hint)


def test_where_nobody_says_which() -> None:
    assert Scope.permitted(None) == frozenset(Scope)
    assert Scope.permitted(Scope.OWN) == {Scope.OWN}
