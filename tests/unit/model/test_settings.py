"""The knobs and their defaults."""

from __future__ import annotations

import attrs
import pytest

from statepool.model.settings import Settings


def test_defaults_are_those_of_the_documentation() -> None:
    assert attrs.asdict(Settings()) == {
        "fresh": 60.0,
        "offline": False,
        "min_free": 0,
        "lock_timeout": 3600.0,
        "max_depth": 256,
        "tool_timeout": 60.0,
    }


@pytest.mark.parametrize(
    "facts", [{"fresh": -1}, {"min_free": -1}, {"lock_timeout": -0.1}, {"max_depth": 0}, {"max_depth": 4097}, {"tool_timeout": 0}], ids=str
)
def test_values_that_make_no_sense_are_refused(facts) -> None:
    with pytest.raises(ValueError, match=next(iter(facts))):
        Settings(**facts)


def test_limits_themselves_are_fine() -> None:
    assert Settings(fresh=0, lock_timeout=0, max_depth=1) == Settings(fresh=0.0, lock_timeout=0.0, max_depth=1)
    assert Settings(max_depth=4096).max_depth == 4096
