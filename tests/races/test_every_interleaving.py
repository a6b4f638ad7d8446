"""
Every interleaving of up to three actors on one pool, each of which may pause or die at each step,
with locks and without.

The actors are the real code, down to the primitives of a transport; what they do and what must hold
is in :mod:`tests.support.pool_worlds`. A scenario has up to half a million states; where the view
would make millions of them, it is left to scenarios of fewer actors, and where records must come
faster than an actor can take its steps, they come in one step each.

The second half takes away one rule at a time, and shows that the explorer finds what the rule is
for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from statepool.model.digest import Digest
from statepool.pools import layout
from statepool.pools import log as log_module
from statepool.pools.collect import Collector
from statepool.pools.fold import Fold
from statepool.pools.lastlook import LastLook
from statepool.pools.log import MachineLog
from statepool.pools.staging import Staging
from tests.support.interleave import Explored, Replay
from tests.support.pool_states import C2, D_AS_C, P2, C, D, E, P, pool_with
from tests.support.pool_worlds import (
    Doing,
    append,
    collect,
    compact,
    explore,
    misjudge,
    oversleep,
    publish,
    read,
    remove,
    rush,
    sweep,
)

# -- the scenarios ---------------------------------------------------------------------------------

LOCKS = pytest.mark.parametrize("locks", [False, True], ids=["without-locks", "with-locks"])


def assert_sound(explored: Explored, *ways: set[str]) -> None:
    """
    :param ways: how actors must be able to end together, in words; so that a scenario in which
        nothing happens does not pass
    """
    assert not explored.violations, str(explored.violations[0])
    found = {
        frozenset(
            outcome.__name__ if isinstance(outcome, type) else str(outcome) for _, outcome in end
        )
        for end in explored.outcomes
    }
    for way in ways:
        assert way in found, found


@LOCKS
def test_a_child_comes_its_parent_goes_and_bytes_are_collected(locks: bool) -> None:
    doings = {"a": publish(C), "r": remove("P"), "g": collect("P", "C")}
    explored = explore(doings, pool_with(P, symlinks=True), locks=locks, symlinks=True)
    assert_sound(
        explored, {"published", "HasDependants", "collected"}, {"Conflict", "removed", "collected"}
    )


@LOCKS
def test_a_child_comes_while_its_parent_goes_with_all_its_children(locks: bool) -> None:
    doings = {"a": publish(C), "r": remove("P", cascade=True, also="C")}
    explored = explore(doings, pool_with(P, symlinks=True), locks=locks, symlinks=True)
    assert_sound(explored, {"published", "removed"}, {"Conflict", "removed"})


@LOCKS
def test_two_contents_for_one_name(locks: bool) -> None:
    doings = {"a": publish(C, upload=False), "b": publish(C2), "g": collect("C")}
    assert_sound(
        explore(doings, pool_with(P, leftover=["C"]), locks=locks),
        {"published", "Conflict", "collected"},
    )


@LOCKS
def test_bytes_are_used_again_while_two_collectors_are_after_them(locks: bool) -> None:
    doings = {"a": publish(C, upload=False), "g": collect("C"), "h": collect("C")}
    assert_sound(
        explore(doings, pool_with(P, leftover=["C"]), locks=locks), {"published", "collected"}
    )


@LOCKS
def test_the_same_bytes_under_two_names(locks: bool) -> None:
    doings = {"a": publish(C), "b": publish(D_AS_C, upload=False), "g": collect("C")}
    assert_sound(explore(doings, pool_with(P), locks=locks), {"published", "collected"})


@LOCKS
def test_a_state_goes_and_comes_back_while_a_child_comes(locks: bool) -> None:
    # Without a view, which makes millions of states of it: the next one has it.
    doings = {"a": publish(C), "r": remove("P"), "b": publish(P)}
    explored = explore(doings, pool_with(P), locks=locks)
    assert_sound(
        explored,
        {"published", "removed"},
        {"published", "HasDependants"},
        {"published", "removed", "Conflict"},
    )


@LOCKS
def test_the_last_state_of_a_directory_goes_while_it_comes_back(locks: bool) -> None:
    doings = {"r": remove("P"), "b": publish(P)}
    explored = explore(doings, pool_with(P, symlinks=True), locks=locks, symlinks=True)
    assert_sound(explored, {"published", "removed"})


@LOCKS
def test_a_name_comes_and_goes_and_comes(locks: bool) -> None:
    doings = {"a": publish(C), "r": remove("C"), "g": collect("C")}
    explored = explore(doings, pool_with(P, C, symlinks=True), locks=locks, symlinks=True)
    assert_sound(explored, {"published", "removed", "collected"})


@LOCKS
def test_a_reader_sees_what_is_whole(locks: bool) -> None:
    doings = {"a": publish(C), "r": remove("C"), "x": read(2)}
    assert_sound(explore(doings, pool_with(P), locks=locks))


@LOCKS
def test_a_reader_finds_all_bytes_while_they_are_moved_about(locks: bool) -> None:
    doings = {"a": publish(C, upload=False), "g": collect("P", "C"), "x": read()}
    assert_sound(explore(doings, pool_with(P, leftover=["C"]), locks=locks))


@LOCKS
@pytest.mark.parametrize("how", ["replace", "supersede"])
def test_a_state_gives_way_while_a_child_comes(locks: bool, how: str) -> None:
    doings = {"a": publish(P2, **{how: True}), "b": publish(C), "g": collect("P", "C")}
    explored = explore(doings, pool_with(P), locks=locks)
    last = (
        {"published", "collected"}
        if how == "supersede"
        else {"published", "HasDependants", "collected"}
    )
    assert_sound(explored, {"published", "Conflict", "collected"}, last)


@LOCKS
def test_a_sweep_meets_a_writer_and_what_a_dead_one_left(locks: bool) -> None:
    doings = {"a": publish(C), "s": sweep()}
    explored = explore(
        doings, pool_with(P, leftover=["C", "D"], symlinks=True), locks=locks, symlinks=True
    )
    assert_sound(explored, {"published", "swept"})


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes have lists of their pieces, however few they are."""
    monkeypatch.setattr(layout, "has_pieces", lambda digest, size: True)


@LOCKS
def test_bytes_with_a_list_are_used_again_while_they_are_collected(
    locks: bool, listed: None
) -> None:
    doings = {"a": publish(C, upload=False), "g": collect("C")}
    assert_sound(
        explore(doings, pool_with(P, leftover=["C"]), locks=locks), {"published", "collected"}
    )


def test_a_sweep_meets_a_writer_of_bytes_with_a_list(listed: None) -> None:
    doings = {"a": publish(C), "s": sweep()}
    assert_sound(explore(doings, pool_with(P, leftover=["C"])), {"published", "swept"})


@LOCKS
def test_a_state_with_a_list_goes_and_its_bytes_are_collected_twice(
    locks: bool, listed: None
) -> None:
    doings = {"r": remove("C"), "g": collect("C"), "h": collect("C")}
    assert_sound(explore(doings, pool_with(P, C), locks=locks), {"removed", "collected"})


@LOCKS
@pytest.mark.parametrize("again", [True, False], ids=["bytes-again", "taken-back"])
def test_a_writer_is_taken_for_dead(locks: bool, again: bool) -> None:
    doings = {"a": publish(C, again=again), "m": misjudge()}
    last = {"published", "collected"} if again else {"IntegrityError", "collected"}
    assert_sound(
        explore(doings, pool_with(P), locks=locks, misjudged=True), {"published", "collected"}, last
    )


@pytest.mark.parametrize("again", [True, False], ids=["bytes-again", "taken-back"])
def test_a_writer_is_taken_for_dead_while_another_publishes_the_same(again: bool) -> None:
    doings = {"a": publish(C, again=again), "b": publish(C), "m": misjudge(at_once=True)}
    assert_sound(explore(doings, pool_with(P), misjudged=True), {"published", "collected"})


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.fixture
def short_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record makes a checkpoint, and all before it go."""
    monkeypatch.setattr(log_module, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(log_module, "KEEP_RECORDS", 1)
    monkeypatch.setattr(log_module, "KEEP_CHECKPOINTS", 1)


@LOCKS
def test_a_child_comes_its_parent_goes_and_the_log_is_compacted(
    locks: bool, short_logs: None
) -> None:
    doings = {"a": publish(C), "r": remove("P"), "k": compact()}
    explored = explore(doings, pool_with(P), locks=locks)
    assert_sound(
        explored, {"published", "HasDependants", "compacted"}, {"Conflict", "removed", "compacted"}
    )


@LOCKS
def test_two_publishers_that_compact(locks: bool, short_logs: None) -> None:
    assert_sound(
        explore({"a": publish(C), "b": publish(D)}, pool_with(P), locks=locks), {"published"}
    )


@LOCKS
def test_a_publisher_meets_a_log_that_goes_on_without_it(locks: bool, short_logs: None) -> None:
    doings = {"a": publish(C), "s": rush(D, E), "g": collect("C")}
    assert_sound(
        explore(doings, pool_with(P, leftover="DE"), locks=locks),
        {"published", "rushed", "collected"},
    )


@LOCKS
def test_records_that_come_too_late_count_for_nothing(locks: bool, short_logs: None) -> None:
    doings = {"a": append(C), "k": compact(), "s": rush(D, E)}
    assert_sound(
        explore(doings, pool_with(P, leftover="CDE"), locks=locks),
        {"appended", "compacted", "rushed"},
    )


@LOCKS
def test_two_writers_and_a_log_that_goes_on_without_them(locks: bool, short_logs: None) -> None:
    doings = {"a": append(C), "b": append(D), "s": rush(E)}
    assert_sound(explore(doings, pool_with(P, leftover="CDE"), locks=locks), {"appended", "rushed"})


def a_reader_and_one_that_overslept() -> Explored:
    return explore(
        {"w": oversleep(2), "s": rush(C, E), "x": read(2, look=False)},
        pool_with(P, D, leftover="CE"),
    )


def test_a_reader_is_not_deceived_by_a_record_that_comes_too_late(short_logs: None) -> None:
    assert_sound(a_reader_and_one_that_overslept())


# -- what each rule is for -------------------------------------------------------------------------


def test_without_markers_bytes_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    files = pool_with(P, leftover=["C"])
    monkeypatch.setattr(
        Staging, "begin", classmethod(lambda cls, transport, marker: cls(transport, marker))
    )
    (violation,) = explore(
        {"a": publish(C, upload=False), "g": collect("C"), "h": collect("C")},
        files,
        only_bytes=True,
    ).violations
    assert violation.what == "the bytes of vm1/disk C are gone"


def test_without_the_trash_bytes_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def delete(self: Collector, digests: Iterable[Digest], *rest: object) -> set[Digest]:
        gone = set(digests)
        for digest in gone:
            self._transport.remove(layout.data(digest))
        return gone

    monkeypatch.setattr(Collector, "_put_aside", delete)
    (violation,) = explore(
        {"a": publish(C, upload=False), "g": collect("C")},
        pool_with(P, leftover=["C"]),
        only_bytes=True,
    ).violations
    assert violation.what == "the bytes of vm1/disk C are gone"


def test_without_a_remedy_who_is_taken_for_dead_leaves_a_record_without_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LastLook, "_take_back", lambda self, machine, published: False)
    (violation,) = explore(
        {"a": publish(C, again=False), "m": misjudge()}, pool_with(P), misjudged=True
    ).violations
    assert violation.what == "the bytes of vm1/disk C are gone"


def test_without_a_record_of_its_own_what_another_has_published_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LastLook, "is_doubted", lambda self: False)
    doings = {"a": publish(C, again=False), "b": publish(C), "m": misjudge(at_once=True)}
    (violation,) = explore(doings, pool_with(P), misjudged=True).violations
    assert violation.what == "b published vm1/disk C, and it is not there"


def test_without_void_records_what_was_acknowledged_is_lost(
    short_logs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MachineLog, "_is_void", lambda self, nonce, number: False)
    doings = {"a": append(C), "s": rush(D, E)}
    (violation,) = explore(doings, pool_with(P, leftover="CDE")).violations
    assert "published vm1/disk C, and it is not there" in violation.what


def test_without_nonces_a_reader_is_deceived(
    short_logs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MachineLog, "_is_same", lambda self, content, number, nonces: True)
    (violation,) = a_reader_and_one_that_overslept().violations
    assert "was not the newest when it began" in violation.what


def test_without_exclusive_records_the_log_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    def place(
        self: MachineLog, place: Any, fold: Fold, nonce: str, drafted: Any, plan: Any, alone: Any
    ) -> Any:
        path = layout.record("vm1", fold.number + 1)
        self._transport.remove(path)
        place(path)
        return fold, drafted, fold.after(fold.number + 1, nonce, drafted)

    files = pool_with(P, leftover="CD")
    monkeypatch.setattr(MachineLog, "_place", place)
    (violation,) = explore({"a": append(C), "b": append(D)}, files).violations
    assert "the log was" in violation.what


def test_a_violation_tells_how_it_came_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    files = pool_with(P)
    monkeypatch.setattr(Staging, "settle", lambda self, digests: None)
    (violation,) = explore({"a": publish(C)}, files).violations
    assert violation.what.startswith("the bytes of vm1/disk C are gone")
    assert violation.schedule[0].startswith(f"a: create {layout.marker('a1')}")
    assert violation.schedule[-1].startswith(f"a: create {layout.record('vm1', 2)}")


def test_actors_that_wait_for_each_other_are_found() -> None:
    def both(first: str, second: str) -> Doing:
        def run(transport: Replay) -> str:
            with transport.hold(first, 0), transport.hold(second, 0):
                return "done"

        return Doing(run)

    explored = explore({"a": both("x", "y"), "b": both("y", "x")}, pool_with(P), locks=True)
    assert explored.violations[0].what == "the actors wait for each other's locks"
    assert_sound(
        explore({"a": both("x", "y"), "b": both("x", "y")}, pool_with(P), locks=True), {"done"}
    )
