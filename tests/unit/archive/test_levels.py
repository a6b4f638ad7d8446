"""Which level comes next."""

from __future__ import annotations

import pytest

from statepool.archive.directory import Stored
from statepool.archive.levels import NextLevel, Restarts, next_level
from statepool.archive.manifest import Manifest
from statepool.archive.names import ArchiveName
from statepool.errors import UsageError
from statepool.model.digest import Digest

DAY = 86_400.0


class Nights:
    """Archives of one after the other, without files."""

    def __init__(self, rules: Restarts, sizes: dict[int, int] | None = None) -> None:
        self.rules, self.sizes = rules, sizes or {}
        self.stored: dict[ArchiveName, Stored] = {}
        self.now = 1e9

    def pass_one(self) -> int:
        self.now += DAY
        possible = len(self.stored)
        chosen = next_level(self.stored, possible, self.rules, self.now)
        for name in [one for one in self.stored if one.level >= chosen.level]:
            del self.stored[name]
        name = ArchiveName("one", "tar", chosen.level)
        manifest = Manifest(
            "one", "tar", chosen.level, self.now, "host", "file:///", "external",
            self.sizes.get(chosen.level, 10), 10, Digest.of_text(str(self.now)), "",
            facts=chosen.facts,
        )  # fmt: skip
        self.stored[name] = Stored(name, str(name), name.manifest, manifest, manifest.size)
        return chosen.level

    def pass_many(self, count: int) -> list[int]:
        return [self.pass_one() for _ in range(count)]


def test_levels_grow_without_rules() -> None:
    assert Nights(Restarts(after_level=None)).pass_many(15) == list(range(15))


def test_a_restart_after_a_level() -> None:
    assert Nights(Restarts()).pass_many(13) == [*range(11), 1, 2]
    assert Nights(Restarts(2)).pass_many(8) == [0, 1, 2, 1, 2, 1, 2, 1]


def test_a_full_restart_after_a_count() -> None:
    nights = Nights(Restarts(2, full_after_count=2))
    assert nights.pass_many(10) == [0, 1, 2, 1, 2, 1, 0, 1, 2, 1]


def test_restarts_after_an_age() -> None:
    assert Nights(Restarts(None, after_age=3)).pass_many(8) == [0, 1, 2, 1, 2, 3, 1, 2]
    assert Nights(Restarts(None, full_after_age=3)).pass_many(7) == [0, 1, 2, 0, 1, 2, 0]


def test_no_restart_to_a_level_that_is_too_large() -> None:
    nights = Nights(Restarts(3, largest=50), {0: 100, 1: 51, 2: 50})
    assert nights.pass_many(8) == [0, 1, 2, 3, 2, 3, 2, 3]


def test_the_reason_is_told() -> None:
    nights = Nights(Restarts(1))
    nights.pass_many(2)
    found = next_level(nights.stored, 2, nights.rules, nights.now)
    assert found == NextLevel(
        1, "restarted: level 2 is higher than 1", {"restarts": 1, "restarted": nights.now}
    )


def test_rules_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="level 0"):
        Restarts(after_level=0)
    with pytest.raises(UsageError, match="age -1"):
        Restarts(full_after_age=-1)
