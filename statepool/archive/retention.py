"""
Retention: which archives stay, which go, and why.

This is one pure function, :func:`plan`: it reads no file and no clock, so it can be tried on any
list (``--dry-run``), and its guarantees can be tested on any list:

- no archive that stays loses an archive that it stands on;
- the newest archive of each id that can be restored stays, whatever the rules are;
- a rule that is raised never makes more archives go;
- a second run on what stays removes nothing more.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime

from attrs import field, frozen

from statepool.archive.names import KEEPING_IDS, age_of, check_keeping_id
from statepool.errors import UsageError

DAY = 86400.0
"""Seconds of a day: the unit of ages in AutoArchive's options."""

_LAST_DATE = 253402300799.0
"""The end of the year 9999: the last time that a date can be made of."""


@frozen
class Archive:
    """
    What retention has to know of one archive.

    :param id: of what was archived
    :param level: how many levels it stands on; None: it is not one of a series, as level 0
    :param keeping: under which keeping id it is kept, from ``aa``, the newest, to ``zz``; None: it
        is the present one
    :param time: when it was made, in seconds since the epoch
    :param size: of its file, in bytes
    :param key: by which other archives say that they stand on it, if it is known
    :param base: the key of the archive of the level below, if it is known; otherwise that is taken
        to be the last archive of this level that was made before
    :param kind: of its file, such as its extension: levels of one kind stand on each other
    :param problem: why it cannot be restored, if that is known
    """

    id: str
    level: int | None = None
    keeping: str | None = None
    time: float = 0.0
    size: int = 0
    key: str | None = None
    base: str | None = None
    kind: str = ""
    problem: str = ""

    def __attrs_post_init__(self) -> None:
        if self.level is not None and self.level < 0:
            raise UsageError(f"{self.id} cannot have the level {self.level}")
        if not math.isfinite(self.time):
            raise UsageError(f"{self} has no time")
        if self.keeping is not None:
            check_keeping_id(self.keeping)

    def __str__(self) -> str:
        level = f".{self.level}" if self.level else ""
        return f"{self.id}{level}" + (f".{self.keeping}" if self.keeping else "")

    @property
    def depth(self) -> int:
        """How many levels it stands on."""
        return self.level or 0


@frozen(kw_only=True)
class Rules:
    """
    What stays. An archive stays if one of the rules keeps it; a rule that is not given keeps
    nothing.

    Periods are those of UTC. A period without an archive does not count: ``daily=7`` keeps the last
    archive of each of the last seven days that have one.

    :param restarts: all that stands on the last so many archives of level 0
    :param restarts_within: all that stands on an archive of level 0 that is not older, in seconds
    :param levels: how many of the last archives of a level, by the level
    :param kept: those that are kept under the first so many keeping ids, and the present ones; 0:
        only the present ones
    :param last: so many of the last archives, of any level
    :param within: those that are not older, in seconds
    :param daily: the last archive of each of so many days
    :param weekly: the last archive of each of so many weeks, which begin on Monday
    :param monthly: the last archive of each of so many months
    :param orphans: whether an archive stays that cannot be restored, since it or a level below it
        is missing or damaged
    """

    restarts: int | None = None
    restarts_within: float | None = None
    levels: Mapping[int, int] = field(factory=dict)
    kept: int | None = None
    last: int | None = None
    within: float | None = None
    daily: int | None = None
    weekly: int | None = None
    monthly: int | None = None
    orphans: bool = True

    def check(self) -> Rules:
        """
        :returns: these rules
        :raises UsageError: no rule is given, or one that makes no sense
        """
        given = {
            "restarts": self.restarts,
            "restarts-within": self.restarts_within,
            "kept": self.kept,
            "last": self.last,
            "within": self.within,
            "daily": self.daily,
            "weekly": self.weekly,
            "monthly": self.monthly,
            **{f"of level {level}": number for level, number in self.levels.items()},
        }
        if all(number is None for number in given.values()):
            raise UsageError(
                "no rule says which archives stay", hint="give one, such as a number of days"
            )
        for name, number in given.items():
            if number is not None and not 0 <= number < math.inf:
                raise UsageError(
                    f"{number} archives or seconds cannot stay, as the rule {name!r} says"
                )
        if any(level < 0 for level in self.levels):
            raise UsageError(f"there is no level {min(self.levels)}", hint="the first level is 0")
        if self.kept is not None and self.kept > len(KEEPING_IDS):
            raise UsageError(
                f"{self.kept} archives cannot be kept: there are {len(KEEPING_IDS)} keeping ids",
                hint=f"keep {len(KEEPING_IDS)} or fewer",
            )
        return self


@frozen
class Decision:
    """
    What happens to one archive, and why.

    :param archive: the archive
    :param stays: whether it stays
    :param reasons: why, in words; several if several rules keep it
    :param base: the archive of the level below, if there is one
    """

    archive: Archive
    stays: bool
    reasons: tuple[str, ...]
    base: Archive | None = None


@frozen
class Plan:
    """
    What happens to all archives.

    :param decisions: in the order of a tree: each archive after the one that it stands on, series
        and ids in their order
    """

    decisions: tuple[Decision, ...]

    @property
    def staying(self) -> tuple[Archive, ...]:
        """The archives that stay."""
        return tuple(one.archive for one in self.decisions if one.stays)

    @property
    def going(self) -> tuple[Archive, ...]:
        """
        The archives that go, each before those that it stands on: so whatever was removed when a
        removal is interrupted, no archive has lost a level below it.
        """
        return tuple(one.archive for one in reversed(self.decisions) if not one.stays)


def plan(archives: Iterable[Archive], rules: Rules, now: float) -> Plan:
    """
    Decide which archives stay, and which go.

    An archive stays if a rule keeps it, if one that stays stands on it, or if it is the newest one
    of its id. Archives that cannot be restored, since a level below them is missing or damaged, are
    neither kept nor counted by a rule: they stay if ``rules.orphans`` says so.

    :param archives: all archives, of any ids; each is decided among those of its own id and kind
    :param rules: what stays
    :param now: the time, in seconds since the epoch
    :returns: what happens to each archive, with the reasons
    :raises UsageError: a rule makes no sense, or an archive is listed twice
    """
    rules.check()
    by_id: dict[tuple[str, str], list[Archive]] = defaultdict(list)
    seen: set[tuple[str, str, int | None, str | None]] = set()
    for archive in archives:
        key = archive.id, archive.kind, archive.level, archive.keeping
        if key in seen:
            raise UsageError(f"the archive {archive} is listed twice")
        seen.add(key)
        by_id[archive.id, archive.kind].append(archive)
    decisions: list[Decision] = []
    for _, listed in sorted(by_id.items()):
        decisions += _decided(listed, rules, now)
    return Plan(tuple(decisions))


def _decided(archives: Sequence[Archive], rules: Rules, now: float) -> Iterator[Decision]:
    """:returns: the decisions about the archives of one id"""
    newest_first = sorted(archives, key=_age_order)
    bases = _bases(newest_first)
    roots = {archive: _root(archive, bases) for archive in newest_first}
    whole = [archive for archive in newest_first if roots[archive] is not None]
    reasons: dict[Archive, list[str]] = {archive: [] for archive in newest_first}
    for archive, reason in _kept_by_rules(whole, roots, rules, now):
        reasons[archive].append(reason)
    for archive in [one for one in whole if reasons[one]]:
        below = bases[archive]
        while below is not None:
            reasons[below].append(f"{archive} stands on it")
            below = bases[below]
    for archive in _tree(newest_first, bases):
        if roots[archive] is None:
            told = f"it cannot be restored: {_problem(archive, bases)}"
            yield Decision(archive, rules.orphans, (told,), bases[archive])
        else:
            found = tuple(dict.fromkeys(reasons[archive])) or ("no rule keeps it",)
            yield Decision(archive, bool(reasons[archive]), found, bases[archive])


def _age_order(archive: Archive) -> tuple[float, int, int]:
    return -archive.time, age_of(archive.keeping), -archive.depth


def _bases(newest_first: Sequence[Archive]) -> dict[Archive, Archive | None]:
    """:returns: for each archive, the one of the level below, or None"""
    of_level: dict[int, list[Archive]] = defaultdict(list)
    for archive in reversed(newest_first):
        of_level[archive.depth].append(archive)
    by_key = {one.key: one for one in newest_first if one.key is not None}
    found: dict[Archive, Archive | None] = {}
    for archive in newest_first:
        below: Archive | None = None
        if archive.depth:
            if archive.base is not None and by_key:
                below = by_key.get(archive.base)
                below = below if below and below.depth == archive.depth - 1 else None
            else:
                earlier = of_level[archive.depth - 1]
                index = bisect_right(earlier, archive.time, key=lambda one: one.time)
                below = earlier[index - 1] if index else None
        found[archive] = below
    return found


def _root(archive: Archive, bases: Mapping[Archive, Archive | None]) -> Archive | None:
    """
    :returns: the archive of level 0 that an archive stands on; None if it cannot be restored
    """
    below: Archive | None = archive
    while below is not None and below.depth and not below.problem:
        below = bases[below]
    return below if below is not None and not below.problem else None


def _problem(archive: Archive, bases: Mapping[Archive, Archive | None]) -> str:
    """:returns: why an archive cannot be restored"""
    if archive.problem:
        return archive.problem
    below = bases[archive]
    if below is None:
        return f"its level {archive.depth - 1} is missing"
    return f"{below} cannot be"


def _kept_by_rules(
    newest_first: Sequence[Archive],
    roots: Mapping[Archive, Archive | None],
    rules: Rules,
    now: float,
) -> Iterator[tuple[Archive, str]]:
    """:returns: the archives that a rule keeps, with the reason; one can occur several times"""
    yield from ((archive, "it is the newest") for archive in newest_first[:1])
    full = [archive for archive in newest_first if not archive.depth]
    told = f"it is of one of the last {rules.restarts} series"
    series = dict.fromkeys(full[: rules.restarts or 0], told)
    recent = {
        root: f"its series began within {_days(rules.restarts_within or 0)}"
        for root in full
        if rules.restarts_within is not None and now - root.time <= rules.restarts_within
    }
    for archive in newest_first:
        root = roots[archive]
        assert root is not None, "only archives that can be restored are asked about"
        yield from ((archive, found[root]) for found in (series, recent) if root in found)
        if rules.kept is not None and age_of(archive.keeping) <= rules.kept:
            told = f"{archive.keeping} is one of the first {rules.kept} keeping ids"
            yield archive, told if archive.keeping is not None else "it is the present one"
        if rules.within is not None and now - archive.time <= rules.within:
            yield archive, f"it was made within {_days(rules.within)}"
    for level, number in sorted(rules.levels.items()):
        of_level = [archive for archive in newest_first if archive.depth == level]
        told = f"it is one of the last {number} of level {level}"
        yield from ((archive, told) for archive in of_level[:number])
    last = newest_first[: rules.last or 0]
    yield from ((archive, f"it is one of the last {rules.last}") for archive in last)
    periods = ((rules.daily, _day), (rules.weekly, _week), (rules.monthly, _month))
    for count, period in periods:
        for archive in _last_of(newest_first, period, count or 0):
            yield archive, f"it is the last one of {period(archive)}"


def _last_of(
    newest_first: Iterable[Archive], period: Callable[[Archive], str], number: int
) -> Sequence[Archive]:
    """:returns: the last archive of each of the last periods that have one"""
    found: dict[str, Archive] = {}
    for archive in newest_first:
        found.setdefault(period(archive), archive)
    return list(found.values())[:number]


def _date(archive: Archive) -> datetime:
    return datetime.fromtimestamp(min(max(archive.time, 0.0), _LAST_DATE), UTC)


def _day(archive: Archive) -> str:
    return f"{_date(archive):%Y-%m-%d}"


def _week(archive: Archive) -> str:
    year, week, _ = _date(archive).isocalendar()
    return f"week {week} of {year}"


def _month(archive: Archive) -> str:
    return f"{_date(archive):%Y-%m}"


def _days(seconds: float) -> str:
    return f"{seconds / DAY:g} days"


def _tree(
    newest_first: Sequence[Archive], bases: Mapping[Archive, Archive | None]
) -> Iterator[Archive]:
    """:returns: the archives, each after the one that it stands on, older series first"""
    above: dict[Archive | None, list[Archive]] = defaultdict(list)
    for archive in newest_first:
        above[bases[archive]].append(archive)
    stack = list(above[None])
    while stack:
        archive = stack.pop()
        yield archive
        stack += above[archive]
