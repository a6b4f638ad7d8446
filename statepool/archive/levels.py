"""
The level that comes next, by the rules of AutoArchive for restarts. It is a pure function.

Restarts keep the chain of levels short. A restart goes back to level 1, which stands on level 0; a
full restart goes back to level 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from statepool.archive.directory import Stored
from statepool.archive.manifest import Manifest
from statepool.archive.names import ArchiveName
from statepool.errors import UsageError

_DAY = 86_400

_RESTARTS, _RESTARTED = "restarts", "restarted"
"""Facts in manifests: how many restarts there were since level 0, and when the last one was."""


@frozen
class Restarts:
    """
    When levels are restarted. A rule that is None never applies.

    :param after_level: the highest level; 10 is the default of AutoArchive
    :param after_age: days since the last restart after which another one is made
    :param full_after_count: restarts after which a full one is made
    :param full_after_age: days since level 0 after which a full one is made
    :param largest: the largest size of a level that may be restarted to, as a percentage of the
        size of level 0
    :raises UsageError: a rule makes no sense
    """

    after_level: int | None = 10
    after_age: float | None = None
    full_after_count: int | None = None
    full_after_age: float | None = None
    largest: float | None = None

    def __attrs_post_init__(self) -> None:
        for what, value in (
            ("level", self.after_level),
            ("age", self.after_age),
            ("count of restarts", self.full_after_count),
            ("age", self.full_after_age),
            ("size", self.largest),
        ):
            if value is not None and value < 1:
                raise UsageError(f"levels cannot be restarted after the {what} {value}")


@frozen
class NextLevel:
    """
    The level that comes next.

    :param level: the level
    :param reason: why, for people
    :param facts: for the manifest of its archive
    """

    level: int
    reason: str
    facts: dict[str, Any]


def next_level(
    stored: Mapping[ArchiveName, Stored], possible: int, rules: Restarts, now: float
) -> NextLevel:
    """
    :param stored: the archives of a backup; kept ones count for nothing
    :param possible: the highest level that can be made
    :param now: in seconds since the epoch
    """
    current = {
        one.manifest.level: one.manifest
        for name, one in stored.items()
        if name.keeping_id is None and one.manifest is not None and one.manifest.level is not None
    }
    if possible == 0 or 0 not in current:
        return _full("there is no level that another one could stand on", now)
    last = max(current.values(), key=lambda manifest: manifest.created)
    restarts = _fact(last, _RESTARTS, 0)
    restarted = _fact(last, _RESTARTED, current[0].created)
    if rules.full_after_count is not None and restarts >= rules.full_after_count:
        return _full(f"there were {restarts:g} restarts", now)
    age = (now - current[0].created) / _DAY
    if rules.full_after_age is not None and age >= rules.full_after_age:
        return _full(f"level 0 is {age:.1f} days old", now)
    reason = ""
    if rules.after_level is not None and possible > rules.after_level:
        reason = f"level {possible} is higher than {rules.after_level}"
    age = (now - restarted) / _DAY
    if rules.after_age is not None and age >= rules.after_age and possible > 1:
        reason = f"the last restart was {age:.1f} days ago"
    if not reason:
        facts = {_RESTARTS: restarts, _RESTARTED: restarted}
        return NextLevel(possible, "it is the next one", facts)
    level = 1
    while level < possible and _is_too_large(level, current, rules):
        level += 1
    return NextLevel(level, f"restarted: {reason}", {_RESTARTS: restarts + 1, _RESTARTED: now})


def _full(reason: str, now: float) -> NextLevel:
    return NextLevel(0, reason, {_RESTARTS: 0, _RESTARTED: now})


def _is_too_large(level: int, current: Mapping[int, Manifest], rules: Restarts) -> bool:
    return (
        rules.largest is not None
        and level in current
        and current[level].size > current[0].size * rules.largest / 100
    )


def _fact(manifest: Manifest, name: str, other: float) -> float:
    found = manifest.facts.get(name)
    return found if isinstance(found, int | float) else other
