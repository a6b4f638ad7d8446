"""
The protocol of a pool as a model, without a line of the code: small enough to be changed before the
code is, and explored in seconds.

A world is a log that is extended by exclusive creation, bytes named by digest, a trash, markers and
gathered bytes. Each actor is a function from the world and where it stands to the next world; each
may die at any step. A collector can also *misjudge*: it takes a living writer for dead, as when
that was suspended for longer than markers count, or another host has its name, and removes its
marker with what it has gathered.

What must hold in every state: an acknowledged publication is in the fold unless an acknowledged
removal came, and whatever is in the fold has its bytes (in ``data`` or in ``trash``) and its
parent. While its writer lives and has not taken its last look, a record may be without bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attrs import evolve, frozen


@frozen
class Change:
    """One record: a state comes, or goes."""

    name: str
    digest: str = ""
    parent: str = ""


@frozen
class World:
    """
    All that is in a pool. Markers, gathered bytes and condemnations are pairs of who made them and
    a digest.

    :param condemned: where files cannot be renamed: what a collector is about to remove where it
        lies
    :param dead: the collectors that have died
    """

    log: tuple[Change, ...] = ()
    data: frozenset[str] = frozenset()
    trash: frozenset[tuple[str, str]] = frozenset()
    marks: frozenset[tuple[str, str]] = frozenset()
    gathered: frozenset[tuple[str, str]] = frozenset()
    condemned: frozenset[tuple[str, str]] = frozenset()
    dead: frozenset[str] = frozenset()

    @property
    def states(self) -> dict[str, Change]:
        """The fold."""
        found: dict[str, Change] = {}
        for change in self.log:
            found.pop(change.name, None)
            if change.digest:
                found[change.name] = change
        return found

    def needs(self, digest: str) -> bool:
        """Whether a marker or a record names these bytes."""
        return any(marked == digest for _, marked in self.marks) or any(
            state.digest == digest for state in self.states.values()
        )

    def restored(self, digest: str) -> World:
        """The same after a look for bytes, which brings them back from the trash."""
        aside = sorted(entry for entry in self.trash if entry[1] == digest)
        if digest in self.data or not aside:
            return self
        return evolve(self, data=self.data | {digest}, trash=self.trash - {aside[0]})


BRINGS, TAKES_BACK = "brings its bytes again", "takes its record back"
DONE, FAILED, DEAD = "done", "failed", "dead"
ENDS = (DONE, FAILED, DEAD)
Place = tuple[object, ...]
Step = Callable[[World, Place], tuple[World, Place]]


@frozen
class Actor:
    """
    One process at work.

    :param step: what it does next
    :param state: what a publisher publishes
    :param removes: the name that a remover removes
    :param name: of a collector whose death others can be sure of
    """

    step: Step
    state: Change | None = None
    removes: str = ""
    name: str = ""


@frozen
class Publisher:
    """
    Publishes a state.

    :param brings: whether it still has the bytes when it finds them gone
    :param rules: those that it follows: ``again`` brings the bytes once more, ``back`` takes its
        record back, ``looks`` looks at the bytes after each fold of that, ``own`` looks, before it
        is content with the record of another writer, for one that may be about to take that back,
        and writes a record of its own then
    """

    me: str
    state: Change
    brings: bool = True
    rules: frozenset[str] = frozenset({"again", "back", "looks", "own"})

    def actor(self) -> Actor:
        """The actor."""
        return Actor(self.step, self.state)

    def step(self, world: World, place: Place) -> tuple[World, Place]:
        """One step."""
        do: Callable[..., tuple[World, Place]] = getattr(self, f"_{place[0]}")
        return do(world, *place[1:])

    @property
    def _mine(self) -> tuple[str, str]:
        return self.me, self.state.digest

    def _second(self, why: str) -> tuple[str, str]:
        return f"{self.me} {why}", self.state.digest

    def _begin(self, world: World) -> tuple[World, Place]:
        return evolve(world, marks=world.marks | {self._mine}), ("gather",)

    def _gather(self, world: World) -> tuple[World, Place]:
        return evolve(world, gathered=world.gathered | {self._mine}), ("settle",)

    def _settled(self, world: World) -> World | None:
        digest = self.state.digest
        if self._mine in world.gathered:
            return evolve(world, data=world.data | {digest})
        world = world.restored(digest)
        return world if digest in world.data else None

    def _settle(self, world: World) -> tuple[World, Place]:
        settled = self._settled(world)
        return (settled, ("fold", False)) if settled is not None else (world, (FAILED,))

    def _fold(self, world: World, forced: bool) -> tuple[World, Place]:
        there = world.states.get(self.state.name)
        if there == self.state and not forced:
            return world, ("look", False)
        if (there is not None and there != self.state) or (
            self.state.parent and self.state.parent not in world.states
        ):
            return world, ("end", FAILED)
        return world, ("append", len(world.log), forced)

    def _append(self, world: World, number: int, forced: bool) -> tuple[World, Place]:
        if len(world.log) != number:
            return world, ("fold", forced)
        return evolve(world, log=(*world.log, self.state)), ("look", True)

    def _look(self, world: World, written: bool) -> tuple[World, Place]:
        settled = self._settled(world)
        if settled is None:
            return world, ("mark",) if written else ("end", FAILED)
        return settled, ("end", DONE) if written or "own" not in self.rules else ("doubt",)

    def _doubt(self, world: World) -> tuple[World, Place]:
        others = any(
            writer.endswith(TAKES_BACK) and digest == self.state.digest
            for writer, digest in world.marks
        )
        return world, ("fold", True) if others else ("confirm",)

    def _confirm(self, world: World) -> tuple[World, Place]:
        # Who had taken the record back before we looked for its marker has done so for good.
        return world, ("end", DONE) if world.states.get(self.state.name) == self.state else (
            "fold",
            False,
        )

    # -- the bytes are gone although the record is there

    def _mark(self, world: World) -> tuple[World, Place]:
        # Another marker than the first one, which a collector may just be removing.
        if self.brings and "again" in self.rules:
            return evolve(world, marks=world.marks | {self._second(BRINGS)}), ("bring",)
        if "back" in self.rules:
            return evolve(world, marks=world.marks | {self._second(TAKES_BACK)}), ("back",)
        return world, ("end", FAILED)

    def _bring(self, world: World) -> tuple[World, Place]:
        return evolve(world, data=world.data | {self.state.digest}), ("end", DONE)

    def _back(self, world: World) -> tuple[World, Place]:
        return world, ("judge", len(world.log)) if "looks" in self.rules else (
            "take",
            len(world.log),
        )

    def _judge(self, world: World, number: int) -> tuple[World, Place]:
        world = world.restored(self.state.digest)
        there = self.state.digest in world.data
        return world, ("end", DONE) if there else ("take", number)

    def _take(self, world: World, number: int) -> tuple[World, Place]:
        if len(world.log) != number:
            return world, ("back",)
        if self.state.name not in world.states:
            return world, ("end", FAILED)
        return evolve(world, log=(*world.log, Change(self.state.name))), ("end", FAILED)

    def _end(self, world: World, how: str) -> tuple[World, Place]:
        marks = world.marks - {self._mine, self._second(BRINGS), self._second(TAKES_BACK)}
        return evolve(world, marks=marks, gathered=world.gathered - {self._mine}), (how,)


def remover(name: str) -> Actor:
    """Removes a state on which nothing stands."""

    def step(world: World, place: Place) -> tuple[World, Place]:
        if place[0] == "begin":
            return world, ("append", len(world.log))
        if len(world.log) != place[1]:
            return world, ("begin",)
        states = world.states
        if name not in states or any(state.parent == name for state in states.values()):
            return world, (FAILED,)
        return evolve(world, log=(*world.log, Change(name))), (DONE,)

    return Actor(step, removes=name)


def collector(me: str, *, misjudges: str = "") -> Actor:
    """
    Takes away one digest after the other that nobody needs; before that, if told so, the marker of
    a writer that lives.
    """

    def step(world: World, place: Place) -> tuple[World, Place]:
        if place[0] == "begin":
            gathered = frozenset(entry for entry in world.gathered if entry[0] != misjudges)
            return evolve(world, gathered=gathered), ("unmark",)
        if place[0] == "unmark":
            return evolve(
                world, marks=frozenset(entry for entry in world.marks if entry[0] != misjudges)
            ), ("choose",)
        if place[0] == "choose":
            needless = sorted(digest for digest in world.data if not world.needs(digest))
            return world, ("aside", needless[0]) if needless else (DONE,)
        digest = str(place[1])
        if place[0] == "aside":
            if digest not in world.data:
                return world, (DONE,)
            return evolve(world, data=world.data - {digest}, trash=world.trash | {(me, digest)}), (
                "look",
                digest,
            )
        if place[0] == "look":
            return world, ("return" if world.needs(digest) else "delete", digest)
        back = (
            world.data | {digest}
            if place[0] == "return" and (me, digest) in world.trash
            else world.data
        )
        return evolve(world, data=back, trash=world.trash - {(me, digest)}), (DONE,)

    return Actor(step)


# -- the explorer ----------------------------------------------------------------------------------


def explore(
    actors: Sequence[Actor], start: World, *, immortal: Sequence[int] = ()
) -> tuple[int, list[str]]:
    """
    Follow every schedule.

    :param immortal: actors that do not die: a death and a misjudgement of one writer at once are
        two faults
    :returns: how many states there are, and what is wrong with some of them
    """
    first: tuple[World, tuple[Place, ...]] = (start, tuple(("begin",) for _ in actors))
    seen, waiting, wrong = {first}, [first], []
    while waiting:
        world, places = waiting.pop()
        problem = judge(actors, world, places)
        if problem is not None:
            wrong.append(problem)
        for number, place in enumerate(places):
            if place[0] in ENDS:
                continue
            following = [actors[number].step(world, place)]
            if number not in immortal:
                name = actors[number].name
                following.append(
                    (evolve(world, dead=world.dead | {name}) if name else world, (DEAD,))
                )
            for after, there in following:
                state = after, (*places[:number], there, *places[number + 1 :])
                if state not in seen:
                    seen.add(state)
                    waiting.append(state)
    return len(seen), wrong


def judge(actors: Sequence[Actor], world: World, places: Sequence[Place]) -> str | None:
    """Say what is wrong with a state of the world, if anything is."""
    states = world.states
    have = world.data | {digest for _, digest in world.trash}
    at_work = [
        actor.state
        for actor, place in zip(actors, places, strict=True)
        if actor.state is not None and place[0] not in ENDS
    ]
    for state in states.values():
        if state.digest not in have and not any(other == state for other in at_work):
            return f"the bytes of {state.name} are gone"
        if state.parent and state.parent not in states:
            return f"the parent of {state.name} is gone"
    for actor, place in zip(actors, places, strict=True):
        if place[0] != DONE or actor.state is None:
            continue
        removed = any(
            other.removes == actor.state.name and there[0] != FAILED
            for other, there in zip(actors, places, strict=True)
        )
        if states.get(actor.state.name) != actor.state and not removed:
            return f"{actor.state.name} was acknowledged, and is gone"
        if actor.state.digest not in have and not removed:
            return f"{actor.state.name} was acknowledged, and its bytes are gone"
    return None


P = Change("P", "p")
C = Change("C", "c", "P")
C2 = Change("C", "x", "P")
WITH_P = World(log=(P,), data=frozenset("p"))
WITH_LEFTOVER = evolve(WITH_P, data=frozenset("pc"))
