"""
Every interleaving of several actors on one pool, with all pauses and deaths, run on the real code.

::

    world = World(actors={"a": publish, "b": remove}, files=files, check=check)
    explored = world.explore()
    assert not explored.violations

An actor is a function that is given a :class:`Replay`, a transport, and does its work with it: with
a :class:`~statepool.pools.pool.Pool`, a :class:`~statepool.pools.log.MachineLog`, or whatever
stands on transports. It must do the same whenever it sees the same: no random names, no clocks.

No threads are needed. What an actor does next is a function of what it has seen, so it is run from
its beginning with the recorded answers, and stopped by :class:`NextOperation` where they end. The
state of the world is then the files, who holds which lock, and what each actor has seen; states
that were seen before are not followed again, so all schedules are covered though nobody could count
them.

A dead actor is one that never does anything again. Every state is checked, so whatever holds in all
of them holds if any of the actors died there; only who holds a lock must die expressly, since that
lets the others go on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attrs import define, field, frozen

from statepool.errors import StatePoolError
from tests.support.replay import Answer, Direct, Files, NextOperation, Node, Operation, Replay

__all__ = [
    "Actor",
    "Check",
    "Direct",
    "Explored",
    "Files",
    "NextOperation",
    "Node",
    "Operation",
    "Outcomes",
    "Replay",
    "Step",
    "Violation",
    "World",
]

# -- the explorer ----------------------------------------------------------------------------------

Actor = Callable[[Replay], Any]

Outcomes = Mapping[str, Any]
"""
What became of each actor that has ended: what it returned (hashable), or the class of the error it
raised.
"""

Check = Callable[[Files, Outcomes], str | None]
"""Says what is wrong with a state, or None."""

Step = Callable[[Files, Files], str | None]
"""Says what is wrong with a change of the files, or None."""

_DEAD = -1

_NOTHING: Answer = ("value", None)
"""The answer of what can only succeed."""


@frozen
class Violation:
    """
    Something that must never be.

    :param what: in words
    :param schedule: how it came to be: who did what, and what came of it
    """

    what: str
    schedule: tuple[str, ...]

    def __str__(self) -> str:
        return "\n  ".join([self.what, *self.schedule])


@frozen
class Explored:
    """
    What was found.

    :param states: how many states of the world were seen
    :param snapshots: how many different sets of files were among them
    :param ends: in how many of the states nobody had anything left to do
    :param outcomes: all ways in which the actors ended together
    :param violations: what must never be, at most :attr:`World.limit` of them
    """

    states: int
    snapshots: int
    ends: int
    outcomes: frozenset[tuple[tuple[str, Any], ...]]
    violations: tuple[Violation, ...]

    def __str__(self) -> str:
        return (
            f"{self.states} states, {self.snapshots} snapshots, {self.ends} ends,"
            f" {len(self.violations)} violations"
        )


_Locks = tuple[tuple[str, int], ...]
_State = tuple[int, _Locks, tuple[int, ...]]


class _Interned:
    """Gives equal values one small number."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[Any, int] = {}

    def number(self, key: Any, value: Any) -> int:
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.values)
            self.values.append(value)
        return found


@define
class _Seen:
    """All that one actor has seen so far: a node in the tree of its histories."""

    actor: int
    above: int | None
    answer: Answer | None
    next: Operation | None = None
    outcome: Any = None
    following: dict[int, int] = field(factory=dict)


@define
class World:
    """
    Some actors and the files they meet.

    :param actors: by name, which begins their nonces
    :param files: what is there at first
    :param check: what must hold in every state
    :param step: what must hold of every change of the files
    :param symlinks: whether the pool's place has symbolic links
    :param renames: whether files can be renamed and linked there
    :param locks: whether locks hold
    :param at_once: what :meth:`Replay.at_once` does, by name: given the files, which it may change
    :param limit: how many violations are enough
    """

    actors: Mapping[str, Actor]
    files: Files
    check: Check
    step: Step = lambda before, after: None
    symlinks: bool = False
    renames: bool = True
    locks: bool = False
    at_once: Mapping[str, Callable[[Direct], Any]] = field(factory=dict)
    limit: int = 1
    _names: tuple[str, ...] = field(init=False)
    _snapshots: _Interned = field(init=False, factory=_Interned)
    _answers: _Interned = field(init=False, factory=_Interned)
    _histories: list[_Seen] = field(init=False, factory=list)
    _going: set[int] = field(init=False, factory=set)
    """Histories that go on."""
    _done: dict[tuple[int, Operation], tuple[int, int]] = field(init=False, factory=dict)
    _moves: dict[tuple[int, int], tuple[int, int]] = field(init=False, factory=dict)
    """
    By files and history, what comes of the next operation: most are met in many states, which
    differ in what the others have seen.
    """
    _steps: dict[tuple[int, int], str | None] = field(init=False, factory=dict)
    _endings: dict[tuple[int, Any], int] = field(init=False, factory=dict)
    _violations: list[Violation] = field(init=False, factory=list)
    _before: dict[_State, tuple[_State, int] | None] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self._names = tuple(self.actors)

    def explore(self) -> Explored:
        """:returns: what was found, after all states were seen, or enough violations"""
        collects = gc.isenabled()
        # it would look at millions of tuples again and again, none of which is in a circle
        gc.disable()
        try:
            return self._explore()
        finally:
            if collects:
                gc.enable()

    def _explore(self) -> Explored:
        actors = range(len(self._names))
        first: _State = (
            self._snapshot(self.files),
            (),
            tuple(self._begin(actor) for actor in actors),
        )
        self._before[first] = None
        waiting = [first]
        checked: set[tuple[int, tuple[int, ...]]] = set()
        ends, outcomes = 0, set()
        while waiting and len(self._violations) < self.limit:
            state = waiting.pop()
            files, locks, positions = state
            ended = tuple(
                [_DEAD if position in self._going else position for position in positions]
            )
            if (files, ended) not in checked:
                checked.add((files, ended))
                self._note(state, self.check(self._snapshots.values[files], self._outcomes(ended)))
            going = [actor for actor in actors if positions[actor] in self._going]
            holders = {holder for _, holder in locks}
            following = [(actor, self._dead(state, actor)) for actor in going if actor in holders]
            moved = [
                (actor, after)
                for actor in going
                if (after := self._advance(state, actor)) is not None
            ]
            for _, after in moved:
                if after[0] != files:
                    self._note(state, self._step(files, after[0]))
            if not moved:
                if going:
                    self._note(state, "the actors wait for each other's locks")
                ends += 1
                outcomes.add(tuple(self._outcomes(ended).items()))
            for actor, after in [*following, *moved]:
                if after not in self._before:
                    self._before[after] = (state, actor)
                    waiting.append(after)
        return Explored(
            len(self._before),
            len(self._snapshots.values),
            ends,
            frozenset(outcomes),
            tuple(self._violations),
        )

    def _outcomes(self, positions: Sequence[int]) -> Outcomes:
        return {
            name: self._histories[at].outcome
            for name, at in zip(self._names, positions, strict=True)
            if at != _DEAD
        }

    # -- what follows ------------------------------------------------------------------------------

    @staticmethod
    def _dead(state: _State, actor: int) -> _State:
        """:returns: the state after an actor that held locks has died, which frees them"""
        files, locks, positions = state
        return (
            files,
            tuple(lock for lock in locks if lock[1] != actor),
            (*positions[:actor], _DEAD, *positions[actor + 1 :]),
        )

    def _step(self, before: int, after: int) -> str | None:
        if (before, after) not in self._steps:
            self._steps[before, after] = self.step(
                self._snapshots.values[before], self._snapshots.values[after]
            )
        return self._steps[before, after]

    def _advance(self, state: _State, actor: int) -> _State | None:
        """:returns: the state after the actor's next operation, or None if it has to wait"""
        files, locks, positions = state
        position = positions[actor]
        move = self._moves.get((files, position))
        if move is None:
            operation = self._histories[position].next
            assert operation is not None
            if operation[0] == "lock":
                if any(name == operation[1] for name, _ in locks):
                    return None
                locks = tuple(sorted((*locks, (operation[1], actor))))
            elif operation[0] == "unlock":
                locks = tuple(lock for lock in locks if lock != (operation[1], actor))
            if operation[0] in ("lock", "unlock"):
                move = files, self._follow(position, self._answers.number(_NOTHING, _NOTHING))
            else:
                after, answer = self._perform(files, operation)
                move = self._moves[files, position] = after, self._follow(position, answer)
        return move[0], locks, (*positions[:actor], move[1], *positions[actor + 1 :])

    def _perform(self, files: int, operation: Operation) -> tuple[int, int]:
        found = self._done.get((files, operation))
        if found is None:
            system = Direct(
                self._snapshots.values[files], symlinks=self.symlinks, renames=self.renames
            )
            answer: Answer
            try:
                answer = (
                    "value",
                    (
                        self.at_once[operation[1]](system)
                        if operation[0] == "at_once"
                        else system.do(*operation)
                    ),
                )
            except StatePoolError as error:
                answer = ("error", (type(error), error.message))
            after = (
                files
                if system.files is self._snapshots.values[files]
                else self._snapshot(system.files)
            )
            found = self._done[files, operation] = after, self._answers.number(answer, answer)
        return found

    def _snapshot(self, files: Files) -> int:
        return self._snapshots.number(frozenset(files.items()), files)

    # -- histories ---------------------------------------------------------------------------------

    def _begin(self, actor: int) -> int:
        return self._kept(self._replayed(_Seen(actor, None, None)))

    def _kept(self, seen: _Seen) -> int:
        """:returns: the number of a history"""
        number = len(self._histories)
        if seen.next is None:
            # All histories of an actor that end alike become one: how it came to its end matters no
            # more.
            number = self._endings.setdefault((seen.actor, seen.outcome), number)
        if number == len(self._histories):
            self._histories.append(seen)
            if seen.next is not None:
                self._going.add(number)
        return number

    def _follow(self, position: int, answer: int) -> int:
        here = self._histories[position]
        if answer not in here.following:
            here.following[answer] = self._kept(
                self._replayed(_Seen(here.actor, position, self._answers.values[answer]))
            )
        return here.following[answer]

    def _replayed(self, seen: _Seen) -> _Seen:
        transport = Replay(
            self._names[seen.actor],
            self._history(seen),
            symlinks=self.symlinks,
            renames=self.renames,
            locks=self.locks,
        )
        try:
            seen.outcome = self.actors[transport.name](transport)
        except NextOperation as stopped:
            seen.next = stopped.operation
        except StatePoolError as error:
            seen.outcome = type(error)
        return seen

    def _history(self, seen: _Seen) -> list[Answer]:
        answers = []
        here = seen
        while here.answer is not None and here.above is not None:
            answers.append(here.answer)
            here = self._histories[here.above]
        return answers[::-1]

    # -- what is wrong -----------------------------------------------------------------------------

    def _note(self, state: _State, wrong: str | None) -> None:
        if wrong is not None:
            self._violations.append(Violation(wrong, tuple(self._schedule(state))))

    def _schedule(self, state: _State) -> list[str]:
        """:returns: one way in which a state comes to be, in words"""
        lines: list[str] = []
        here: _State | None = state
        while here is not None and (before := self._before[here]) is not None:
            was, actor = before
            lines[:0] = self._describe(was, here, actor)
            here = was
        return lines

    def _describe(self, was: _State, now: _State, actor: int) -> list[str]:
        name = self._names[actor]
        if now[2][actor] == _DEAD:
            return [f"{name} dies"]
        operation = self._histories[was[2][actor]].next
        assert operation is not None
        answer = (
            self._answers.values[self._perform(was[0], operation)[1]]
            if operation[0] not in ("lock", "unlock")
            else _NOTHING
        )
        ended = (
            f", and ends with {self._histories[now[2][actor]].outcome}"
            if now[2][actor] not in self._going
            else ""
        )
        return [f"{name}: {' '.join(map(_shown, operation))} -> {_shown(answer[1])}{ended}"]


def _shown(value: Any) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text.strip() if len(text) <= 200 else text[:197] + "..."
