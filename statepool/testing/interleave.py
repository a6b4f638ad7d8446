"""
Every interleaving of several actors on one pool, with all pauses and deaths, run on the real code.

::

    world = World(actors={"a": publish, "b": remove}, files=files, check=check)
    explored = world.explore()
    assert not explored.violations

An actor is a function that is given a :class:`Replay`, a transport, and does its work with it: with a :class:`~statepool.pools.pool.Pool`, a
:class:`~statepool.pools.log.MachineLog`, or whatever stands on transports. It must do the same whenever it sees the same: no random names, no clocks.

No threads are needed. What an actor does next is a function of what it has seen, so it is run from its beginning with the recorded answers, and
stopped by :class:`NextOperation` where they end. The state of the world is then the files, who holds which lock, and what each actor has seen; states
that were seen before are not followed again, so all schedules are covered though nobody could count them.

A dead actor is one that never does anything again. Every state is checked, so whatever holds in all of them holds if any of the actors died there;
only who holds a lock must die expressly, since that lets the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attrs import define, field, frozen

from statepool.errors import StatePoolError
from statepool.testing.replay import Answer, Direct, Files, NextOperation, Node, Operation, Replay

__all__ = ["Actor", "Check", "Direct", "Explored", "Files", "NextOperation", "Node", "Operation", "Outcomes", "Replay", "Step", "Violation", "World"]

# -- the explorer ------------------------------------------------------------------------------------------------------------------------------------

Actor = Callable[[Replay], Any]

Outcomes = Mapping[str, Any]
"""What became of each actor that has ended: what it returned (hashable), or the class of the error it raised."""

Check = Callable[[Files, Outcomes], str | None]
"""Says what is wrong with a state, or None."""

Step = Callable[[Files, Files], str | None]
"""Says what is wrong with a change of the files, or None."""

_DEAD = -1


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
        return f"{self.states} states, {self.snapshots} snapshots, {self.ends} ends, {len(self.violations)} violations"


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
    :param locks: whether locks hold
    :param private: tells operations that can neither influence nor be influenced by what the others do: they are done at once, which saves states
    :param hidden: tells names that nobody takes notice of in a listing
    :param at_once: what :meth:`Replay.at_once` does, by name: given the files, which it may change
    :param limit: how many violations are enough
    """

    actors: Mapping[str, Actor]
    files: Files
    check: Check
    step: Step = lambda before, after: None
    symlinks: bool = False
    locks: bool = False
    private: Callable[[str, Operation], bool] = lambda name, operation: False
    hidden: Callable[[str], bool] = lambda name: False
    at_once: Mapping[str, Callable[[Direct], Any]] = field(factory=dict)
    limit: int = 1
    _names: tuple[str, ...] = field(init=False)
    _snapshots: _Interned = field(init=False, factory=_Interned)
    _answers: _Interned = field(init=False, factory=_Interned)
    _histories: list[_Seen] = field(init=False, factory=list)
    _done: dict[tuple[int, Operation], tuple[int, int]] = field(init=False, factory=dict)
    _endings: dict[tuple[int, Any], int] = field(init=False, factory=dict)
    _violations: list[Violation] = field(init=False, factory=list)
    _before: dict[_State, tuple[_State, int] | None] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        self._names = tuple(self.actors)

    def explore(self) -> Explored:
        """:returns: what was found, after all states were seen, or enough violations"""
        first: _State = (self._snapshot(self.files), (), tuple(self._begin(actor) for actor in range(len(self._names))))
        for actor in range(len(self._names)):
            first = self._through_private(first, actor)
        self._before[first] = None
        waiting = [first]
        checked: dict[tuple[int, tuple[int, ...]], str | None] = {}
        ends, outcomes = 0, set()
        while waiting and len(self._violations) < self.limit:
            state = waiting.pop()
            ended = tuple(position if self._ended(position) else _DEAD for position in state[2])
            if (state[0], ended) not in checked:
                checked[state[0], ended] = self.check(self._snapshots.values[state[0]], self._outcomes(ended))
                self._note(state, checked[state[0], ended])
            following = [(actor, after) for actor in range(len(self._names)) for after in self._after(state, actor)]
            if all(after[2][actor] == _DEAD for actor, after in following):
                if any(position != _DEAD and not self._ended(position) for position in state[2]):
                    self._note(state, "the actors wait for each other's locks")
                ends += 1
                outcomes.add(tuple(self._outcomes(ended).items()))
            for actor, after in following:
                if after not in self._before:
                    self._before[after] = (state, actor)
                    waiting.append(after)
        return Explored(len(self._before), len(self._snapshots.values), ends, frozenset(outcomes), tuple(self._violations))

    def _outcomes(self, positions: Sequence[int]) -> Outcomes:
        return {name: self._histories[at].outcome for name, at in zip(self._names, positions, strict=True) if at != _DEAD}

    def _ended(self, position: int) -> bool:
        return position != _DEAD and self._histories[position].next is None

    # -- what follows ------------------------------------------------------------------------------------------------------------------------------

    def _after(self, state: _State, actor: int) -> Iterator[_State]:
        files, locks, positions = state
        if positions[actor] == _DEAD or self._ended(positions[actor]):
            return
        mine = any(holder == actor for _, holder in locks)
        if mine:
            left = tuple(lock for lock in locks if lock[1] != actor)
            yield files, left, (*positions[:actor], _DEAD, *positions[actor + 1 :])
        after = self._advance(state, actor)
        if after is not None:
            if after[0] != files:
                self._note(state, self._step(files, after[0]))
            yield self._through_private(after, actor)

    def _step(self, before: int, after: int) -> str | None:
        return self.step(self._snapshots.values[before], self._snapshots.values[after])

    def _through_private(self, state: _State, actor: int) -> _State:
        while True:
            operation = self._histories[state[2][actor]].next
            if operation is None or not self.private(self._names[actor], operation):
                return state
            after = self._advance(state, actor)
            assert after is not None, "a lock is never private"
            state = after

    def _advance(self, state: _State, actor: int) -> _State | None:
        """:returns: the state after the actor's next operation, or None if it has to wait"""
        files, locks, positions = state
        operation = self._histories[positions[actor]].next
        assert operation is not None
        if operation[0] == "lock":
            if any(name == operation[1] for name, _ in locks):
                return None
            locks = tuple(sorted((*locks, (operation[1], actor))))
            answer = self._answers.number(("value", None), ("value", None))
        elif operation[0] == "unlock":
            locks = tuple(lock for lock in locks if lock != (operation[1], actor))
            answer = self._answers.number(("value", None), ("value", None))
        else:
            files, answer = self._perform(files, operation)
        return files, locks, (*positions[:actor], self._follow(positions[actor], answer), *positions[actor + 1 :])

    def _perform(self, files: int, operation: Operation) -> tuple[int, int]:
        found = self._done.get((files, operation))
        if found is None:
            system = Direct(self._snapshots.values[files], symlinks=self.symlinks)
            answer: Answer
            try:
                answer = ("value", self.at_once[operation[1]](system) if operation[0] == "at_once" else system.do(*operation))
                if operation[0] == "scan":
                    answer = ("value", tuple(entry for entry in answer[1] if not self.hidden(entry.name)))
            except StatePoolError as error:
                answer = ("error", (type(error), error.message))
            after = files if system.files is self._snapshots.values[files] else self._snapshot(system.files)
            found = self._done[files, operation] = after, self._answers.number(answer, answer)
        return found

    def _snapshot(self, files: Files) -> int:
        return self._snapshots.number(frozenset(files.items()), files)

    # -- histories ---------------------------------------------------------------------------------------------------------------------------------

    def _begin(self, actor: int) -> int:
        self._histories.append(self._replayed(_Seen(actor, None, None)))
        return len(self._histories) - 1

    def _follow(self, position: int, answer: int) -> int:
        here = self._histories[position]
        if answer not in here.following:
            after = self._replayed(_Seen(here.actor, position, self._answers.values[answer]))
            number = len(self._histories)
            if after.next is None:
                # All histories of an actor that end alike become one: how it came to its end matters no more.
                number = self._endings.setdefault((after.actor, after.outcome), number)
            if number == len(self._histories):
                self._histories.append(after)
            here.following[answer] = number
        return here.following[answer]

    def _replayed(self, seen: _Seen) -> _Seen:
        transport = Replay(self._names[seen.actor], self._history(seen), symlinks=self.symlinks, locks=self.locks)
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

    # -- what is wrong -----------------------------------------------------------------------------------------------------------------------------

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
        lines = []
        while was != now:
            operation = self._histories[was[2][actor]].next
            after = self._advance(was, actor)
            assert operation is not None
            assert after is not None
            answer = self._answers.values[self._perform(was[0], operation)[1]] if operation[0] not in ("lock", "unlock") else ("value", None)
            ended = f", and ends with {self._histories[after[2][actor]].outcome}" if self._ended(after[2][actor]) else ""
            lines.append(f"{name}: {' '.join(map(_shown, operation))} -> {_shown(answer[1])}{ended}")
            was = after
        return lines


def _shown(value: Any) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text.strip() if len(text) <= 200 else text[:197] + "..."
