"""The public names: imported when they are asked for, and all of them there."""

from __future__ import annotations

import importlib

import pytest

import statepool


@pytest.mark.parametrize("name", statepool.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(statepool, name) is not None
    assert name in dir(statepool)


def test_each_has_one_home() -> None:
    rooms = statepool._ROOMS
    named = [name for names in rooms.values() for name in names]
    assert sorted([*named, "__version__"]) == sorted(statepool.__all__)
    for room, names in rooms.items():
        module = importlib.import_module(f"statepool.{room}")
        assert all(getattr(module, name) is getattr(statepool, name) for name in names)


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'StatePol'"):
        _ = statepool.StatePol  # type: ignore[attr-defined]  # that is the point
