"""Retention: which archives stay, and why."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from statepool.archive.retention import DAY, Archive, Plan, Rules, plan
from statepool.errors import UsageError

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC).timestamp()


def ago(days: float, level: int | None = 0, keeping: str | None = None) -> Archive:
    return Archive("vm1", level, keeping, NOW - days * DAY, 10)


def staying(found: Plan) -> set[str]:
    return {str(archive) for archive in found.staying}


def reasons(found: Plan, name: str) -> tuple[str, ...]:
    (one,) = (one for one in found.decisions if str(one.archive) == name)
    return one.reasons


# -- the rules -------------------------------------------------------------------------------------


def test_the_last_ones_stay_with_all_that_they_stand_on() -> None:
    archives = [ago(9, 0, "aa"), ago(5, 0), ago(4, 1), ago(3, 2)]
    found = plan(archives, Rules(last=1), NOW)
    assert staying(found) == {"vm1", "vm1.1", "vm1.2"}
    assert reasons(found, "vm1") == ("vm1.2 stands on it",)
    assert reasons(found, "vm1.aa") == ("no rule keeps it",)


def test_the_newest_stays_whatever_the_rules_are() -> None:
    found = plan([ago(900), ago(1000, 0, "aa")], Rules(within=DAY), NOW)
    assert staying(found) == {"vm1"}
    assert reasons(found, "vm1") == ("it is the newest",)


def test_a_kept_level_stands_on_the_level_that_was_there_when_it_was_made() -> None:
    # a restart at level 1 has moved the older level 1 aside; both stand on the one level 0
    archives = [ago(9, 0), ago(8, 1, "aa"), ago(7, 2, "aa"), ago(2, 1)]
    found = plan(archives, Rules(levels={2: 1}), NOW)
    assert staying(found) == {"vm1", "vm1.1", "vm1.1.aa", "vm1.2.aa"}
    assert "vm1.2.aa stands on it" in reasons(found, "vm1")


def test_keys_say_on_what_a_level_stands_more_exactly_than_times() -> None:
    old, new = evolve(ago(9, 0, "aa"), key="a"), evolve(ago(5, 0), key="b")
    level = evolve(ago(3, 1), key="c", base="a")  # the clock was wrong when it was made
    found = plan([old, new, level], Rules(last=1), NOW)
    assert staying(found) == {"vm1.aa", "vm1.1"}


def test_series_stay_by_number_and_by_age() -> None:
    archives = [ago(40, 0, "ab"), ago(39, 1, "ab"), ago(20, 0, "aa"), ago(19, 1, "aa"), ago(3, 0)]
    assert staying(plan(archives, Rules(restarts=2), NOW)) == {"vm1", "vm1.aa", "vm1.1.aa"}
    assert staying(plan(archives, Rules(restarts_within=5 * DAY), NOW)) == {"vm1"}
    assert len(staying(plan(archives, Rules(restarts_within=40 * DAY), NOW))) == 5


def test_keeping_ids_stay_by_their_order() -> None:
    archives = [ago(1), ago(2, 0, "aa"), ago(3, 0, "ab"), ago(4, 0, "zz")]
    assert staying(plan(archives, Rules(kept=0), NOW)) == {"vm1"}
    assert staying(plan(archives, Rules(kept=2), NOW)) == {"vm1", "vm1.aa", "vm1.ab"}
    assert len(staying(plan(archives, Rules(kept=676), NOW))) == 4


def test_periods_keep_the_last_archive_of_each() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    archives = [
        ago(day, None, f"{letters[day // 26]}{letters[day % 26]}" if day else None)
        for day in range(100)
    ]
    twice = Archive("vm1", None, "zz", NOW - 3600, 1)  # another one of today
    found = plan([*archives, twice], Rules(daily=3, weekly=2, monthly=4), NOW)
    days = sorted(datetime.fromtimestamp(one.time, UTC).date().isoformat() for one in found.staying)
    assert days == [
        "2026-08-31",
        "2026-09-30",
        "2026-10-31",
        "2026-11-28",
        "2026-11-29",
        "2026-11-30",
    ]
    assert reasons(found, "vm1") == (
        "it is the newest",
        "it is the last one of 2026-11-30",
        "it is the last one of week 49 of 2026",
        "it is the last one of 2026-11",
    )


def test_each_id_is_decided_alone() -> None:
    archives = [Archive("vm1", time=NOW), Archive("vm2", time=NOW - 90 * DAY)]
    assert staying(plan(archives, Rules(last=1), NOW)) == {"vm1", "vm2"}


def test_what_lacks_a_level_is_not_counted_and_stays_unless_told() -> None:
    archives = [ago(5, 0), ago(2, 2), ago(1, 3)]  # level 1 is gone
    found = plan(archives, Rules(last=1), NOW)
    assert staying(found) == {"vm1", "vm1.2", "vm1.3"}
    assert "it is the newest" in reasons(found, "vm1")
    assert reasons(found, "vm1.2") == ("it cannot be restored: its level 1 is missing",)
    assert reasons(found, "vm1.3") == ("it cannot be restored: vm1.2 cannot be",)
    assert staying(plan(archives, Rules(last=1, orphans=False), NOW)) == {"vm1"}


def test_what_is_damaged_does_not_take_the_place_of_what_is_not() -> None:
    archives = [ago(5, 0, "aa"), evolve(ago(2, 0), problem="it is cut short"), ago(1, 1)]
    found = plan(archives, Rules(last=1, orphans=False), NOW)
    assert staying(found) == {"vm1.aa"}
    assert reasons(found, "vm1") == ("it cannot be restored: it is cut short",)


def test_kinds_are_decided_apart() -> None:
    archives = [ago(5), evolve(ago(1), kind="tar.gz"), evolve(ago(1, 1), kind="tar.gz")]
    assert len(plan(archives, Rules(last=1), NOW).staying) == 3


def test_removal_begins_with_what_nothing_stands_on() -> None:
    archives = [ago(9, 0, "aa"), ago(8, 1, "aa"), ago(7, 2, "aa"), ago(1, 0)]
    found = plan(archives, Rules(last=1), NOW)
    assert [str(one) for one in found.going] == ["vm1.2.aa", "vm1.1.aa", "vm1.aa"]


# -- rules that make no sense ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(orphans=False),
        Rules(last=-1),
        Rules(daily=-3),
        Rules(kept=677),
        Rules(levels={-1: 3}),
        Rules(levels={0: -3}),
        Rules(within=float("nan")),
        Rules(restarts_within=float("inf")),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rules: Rules) -> None:
    with pytest.raises(UsageError):
        plan([ago(1)], rules, NOW)


@pytest.mark.parametrize(
    ("level", "keeping", "time"),
    [(-1, None, 0.0), (0, "a", 0.0), (0, "AA", 0.0), (0, "é1", 0.0), (0, None, float("nan"))],
)
def test_an_archive_that_cannot_be_is_refused(level: int, keeping: str | None, time: float) -> None:
    with pytest.raises(UsageError):
        Archive("vm1", level, keeping, time)


def test_an_archive_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="twice"):
        plan([ago(1), ago(1)], Rules(last=1), NOW)


# -- what always holds -----------------------------------------------------------------------------

NUMBERS = st.none() | st.integers(0, 5)
KEEPING = st.none() | st.sampled_from(["aa", "ab", "ac", "ba", "zz"])
TIMES = st.integers(-5, 60).map(lambda days: NOW - days * DAY) | st.floats(-1e13, 1e13)


@st.composite
def archives(draw: st.DrawFn) -> list[Archive]:
    keys = st.tuples(st.sampled_from(["a", "b"]), st.none() | st.integers(0, 4), KEEPING)
    found = draw(st.lists(keys, unique=True, max_size=24))
    keys_known = draw(st.booleans())
    listed: list[Archive] = []
    for number, (name, level, keeping) in enumerate(found):
        base = str(draw(st.integers(0, len(found)))) if keys_known and draw(st.booleans()) else None
        key = str(number) if keys_known else None
        problem = draw(st.sampled_from(["", "", "", "", "it is cut short"]))
        listed.append(
            Archive(name, level, keeping, draw(TIMES), number, key, base, problem=problem)
        )
    return listed


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    ages = st.none() | st.integers(0, 40).map(lambda days: days * DAY)
    found = Rules(
        restarts=draw(NUMBERS),
        restarts_within=draw(ages),
        levels=draw(st.dictionaries(st.integers(0, 4), st.integers(0, 3), max_size=2)),
        kept=draw(NUMBERS),
        last=draw(NUMBERS),
        within=draw(ages),
        daily=draw(NUMBERS),
        weekly=draw(NUMBERS),
        monthly=draw(NUMBERS),
        orphans=draw(st.booleans()),
    )
    return found if found != Rules(orphans=found.orphans) else evolve(found, last=1)


@st.composite
def raised(draw: st.DrawFn, one: Rules) -> Rules:
    ages = ("restarts_within", "within")
    name = draw(st.sampled_from(("restarts", "kept", "last", "daily", "weekly", "monthly", *ages)))
    more = draw(st.integers(0, 4)) * (DAY if name in ages else 1)
    level = draw(st.integers(0, 4))
    levels = {**one.levels, level: one.levels.get(level, 0) + draw(st.integers(0, 2))}
    changes: dict[str, Any] = {name: (getattr(one, name) or 0) + more, "levels": levels}
    return evolve(one, **changes)


@given(archives(), rules())
def test_nothing_that_stays_loses_what_it_stands_on(listed: list[Archive], one: Rules) -> None:
    found = plan(listed, one, NOW)
    assert sorted(map(str, (*found.staying, *found.going))) == sorted(map(str, listed))
    stays = set(found.staying)
    after = {two.archive: two.base for two in plan(found.staying, one, NOW).decisions}
    for decision in found.decisions:
        assert decision.reasons
        if decision.base is not None:
            assert decision.base.depth == decision.archive.depth - 1
            if decision.stays:
                assert decision.base in stays
        if decision.stays:
            assert after[decision.archive] == decision.base  # and stands on the same one as before


@given(archives(), rules())
def test_the_newest_that_can_be_restored_stays(listed: list[Archive], one: Rules) -> None:
    found = plan(listed, one, NOW)
    bases = {decision.archive: decision.base for decision in found.decisions}

    def is_whole(archive: Archive | None) -> bool:
        while archive is not None and archive.depth and not archive.problem:
            archive = bases[archive]
        return archive is not None and not archive.problem

    for name in {archive.id for archive in listed}:
        times = [archive.time for archive in listed if archive.id == name and is_whole(archive)]
        kept = [
            archive.time for archive in found.staying if archive.id == name and is_whole(archive)
        ]
        assert max(times, default=0.0) == max(kept, default=0.0)


@given(archives(), rules())
def test_a_second_run_removes_nothing_more(listed: list[Archive], one: Rules) -> None:
    once = plan(listed, one, NOW)
    assert plan(once.staying, one, NOW).going == ()


@given(st.data(), archives(), rules())
def test_a_rule_that_is_raised_makes_nothing_more_go(
    data: st.DataObject, listed: list[Archive], one: Rules
) -> None:
    more = data.draw(raised(one))
    assert set(plan(listed, one, NOW).staying) <= set(plan(listed, more, NOW).staying)


@given(st.data(), archives(), rules())
def test_the_order_of_the_list_does_not_matter(
    data: st.DataObject, listed: list[Archive], one: Rules
) -> None:
    mixed = data.draw(st.permutations(listed))
    assert set(plan(listed, one, NOW).going) == set(plan(mixed, one, NOW).going)


@given(archives(), rules(), st.integers(0, 24))
def test_an_interrupted_removal_leaves_no_level_without_its_base(
    listed: list[Archive], one: Rules, done: int
) -> None:
    found = plan(listed, one, NOW)
    left = [archive for archive in listed if archive not in found.going[:done]]
    bases = {decision.archive: decision.base for decision in found.decisions}
    assert all(bases[archive] is None or bases[archive] in left for archive in left)
