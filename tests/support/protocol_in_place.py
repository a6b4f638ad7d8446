"""
The protocol of a pool whose files cannot be renamed, as a model: other actors in the world of
:mod:`tests.support.protocol`.

Bytes are removed where they lie, under a name that comes back with the same bytes, and no process
can call back a removal that it has sent. So a collector says beforehand what it is about to remove:
it *condemns* bytes, looks whether they are needed, removes them, and ends the condemnation. A
publisher that finds its bytes condemned puts a *spare* of them into the trash before it depends on
them. A condemnation of a collector that may be alive stays, and so do the spares: they cost room,
and nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable

from attrs import evolve, frozen

from tests.support.protocol import BRINGS, DONE, FAILED, Actor, Place, Publisher, World


@frozen
class PublisherInPlace(Publisher):
    """
    Publishes a state. Whenever it makes sure of its bytes, it is told what comes then.

    :param gathers: whether it gathers the bytes even if they are there
    """

    gathers: bool = True

    def _gather(self, world: World) -> tuple[World, Place]:
        if self.gathers or not self._is_somewhere(world):
            world, _ = super()._gather(world)
        return world, ("seek", ("fold", False))

    def _seek(self, world: World, then: Place) -> tuple[World, Place]:
        return world, ("spare" if self._is_condemned(world) else "name", then)

    def _is_condemned(self, world: World) -> bool:
        return any(digest == self.state.digest for _, digest in world.condemned)

    def _has_gathered(self, world: World) -> bool:
        return any(entry in world.gathered for entry in (self._mine, self._second(BRINGS)))

    def _is_somewhere(self, world: World) -> bool:
        there = self.state.digest in world.data or self._spares(world) != ()
        return there or self._has_gathered(world)

    def _spares(self, world: World) -> tuple[tuple[str, str], ...]:
        return tuple(entry for entry in world.trash if entry[1] == self.state.digest)

    def _spare(self, world: World, then: Place) -> tuple[World, Place]:
        # A copy is read in one step and made in another: what it is made of may be gone by then.
        return (world, ("spared", then)) if self._is_somewhere(world) else self._gone(world, then)

    def _spared(self, world: World, then: Place) -> tuple[World, Place]:
        older = {entry for entry in self._spares(world) if entry[0].startswith(f"{self.me} at ")}
        return evolve(world, trash=world.trash - older | {self._fresh(then)}), ("name", then)

    def _fresh(self, then: Place) -> tuple[str, str]:
        """A name for a spare that this publisher has not used before."""
        return f"{self.me} at {then[0]}", self.state.digest

    def _name(self, world: World, then: Place) -> tuple[World, Place]:
        if self._has_gathered(world) or self.state.digest in world.data:
            return evolve(world, data=world.data | {self.state.digest}), then
        return (world, ("restore", then)) if self._spares(world) else self._gone(world, then)

    def _restore(self, world: World, then: Place) -> tuple[World, Place]:
        return evolve(world, data=world.data | {self.state.digest}), then

    def _gone(self, world: World, then: Place) -> tuple[World, Place]:
        return world, ("mark",) if then == ("looked", True) else ("end", FAILED)

    def _look(self, world: World, written: bool) -> tuple[World, Place]:
        return world, ("seek", ("looked", written))

    def _looked(self, world: World, written: bool) -> tuple[World, Place]:
        return world, ("end", DONE) if written or "own" not in self.rules else ("doubt",)

    def _bring(self, world: World) -> tuple[World, Place]:
        world = evolve(world, gathered=world.gathered | {self._second(BRINGS)})
        return world, ("seek", ("brought",))

    def _brought(self, world: World) -> tuple[World, Place]:
        return world, ("end", DONE)

    def _judge(self, world: World, number: int) -> tuple[World, Place]:
        there = self.state.digest in world.data or self._spares(world)
        return world, ("end", DONE) if there else ("take", number)

    def _end(self, world: World, how: str) -> tuple[World, Place]:
        world, place = super()._end(world, how)
        return evolve(world, gathered=world.gathered - {self._second(BRINGS)}), place


@frozen
class CollectorInPlace:
    """
    Removes bytes that nobody needs where they lie; before that, if told so, the marker of a writer
    that lives.

    :param me: its name
    :param misjudges: the writer
    """

    me: str
    misjudges: str = ""

    def actor(self) -> Actor:
        """The actor."""
        return Actor(self.step, name=self.me)

    def step(self, world: World, place: Place) -> tuple[World, Place]:
        """One step."""
        do: Callable[..., tuple[World, Place]] = getattr(self, f"_{place[0]}")
        return do(world, *place[1:])

    def _begin(self, world: World) -> tuple[World, Place]:
        if not self.misjudges:
            return self._choose(world)
        gathered = frozenset(entry for entry in world.gathered if entry[0] != self.misjudges)
        return evolve(world, gathered=gathered), ("unmark",)

    def _unmark(self, world: World) -> tuple[World, Place]:
        marks = frozenset(entry for entry in world.marks if entry[0] != self.misjudges)
        return evolve(world, marks=marks), ("choose",)

    def _choose(self, world: World) -> tuple[World, Place]:
        needless = sorted(digest for digest in world.data if not world.needs(digest))
        return world, ("condemn", needless[0]) if needless else (DONE,)

    def _condemn(self, world: World, digest: str) -> tuple[World, Place]:
        return evolve(world, condemned=world.condemned | {(self.me, digest)}), ("ask", digest)

    def _ask(self, world: World, digest: str) -> tuple[World, Place]:
        # Markers first: their writers remove them only after the record is there.
        marked = any(wanted == digest for _, wanted in world.marks)
        return world, ("absolve", digest) if marked else ("fold", digest)

    def _fold(self, world: World, digest: str) -> tuple[World, Place]:
        recorded = any(state.digest == digest for state in world.states.values())
        return world, ("absolve", digest) if recorded else ("delete", digest)

    def _delete(self, world: World, digest: str) -> tuple[World, Place]:
        return evolve(world, data=world.data - {digest}), ("absolve", digest)

    def _absolve(self, world: World, digest: str) -> tuple[World, Place]:
        return evolve(world, condemned=world.condemned - {(self.me, digest)}), (DONE,)


Listed = tuple[tuple[str, str], ...]
"""Spares in the trash."""

Found = tuple[tuple[tuple[str, str], bool], ...]
"""Spares, and whether they are needed."""


@frozen
class Sweeper:
    """
    Ends the condemnations of collectors that surely are dead, and clears the trash: spares that are
    needed become the bytes under their name again.

    :param presumes: whether it takes collectors for dead that may live
    """

    presumes: bool = False

    def actor(self) -> Actor:
        """The actor."""
        return Actor(self.step)

    def step(self, world: World, place: Place) -> tuple[World, Place]:
        """One step."""
        do: Callable[..., tuple[World, Place]] = getattr(self, f"_{place[0]}")
        return do(world, *place[1:])

    def _begin(self, world: World) -> tuple[World, Place]:
        alive = {entry for entry in world.condemned if entry[0] not in world.dead}
        return evolve(world, condemned=frozenset() if self.presumes else frozenset(alive)), (
            "list",
        )

    def _list(self, world: World) -> tuple[World, Place]:
        return world, ("ask", tuple(sorted(world.trash)))

    def _ask(self, world: World, listed: Listed) -> tuple[World, Place]:
        marked = {digest for _, digest in world.marks}
        return world, ("fold", tuple((entry, entry[1] in marked) for entry in listed))

    def _fold(self, world: World, found: Found) -> tuple[World, Place]:
        recorded = {state.digest for state in world.states.values()}
        judged = ((entry, marked or entry[1] in recorded) for entry, marked in found)
        return self._next(world, tuple(judged))

    def _next(self, world: World, found: Found) -> tuple[World, Place]:
        return world, ("seek", found) if found else (DONE,)

    def _seek(self, world: World, found: Found) -> tuple[World, Place]:
        (_, digest), needed = found[0]
        if not needed:
            return world, ("drop", found)
        doomed = any(condemned == digest for _, condemned in world.condemned)
        return world, ("name", found, doomed)

    def _name(self, world: World, found: Found, doomed: bool) -> tuple[World, Place]:
        entry = found[0][0]
        if entry[1] not in world.data and entry in world.trash:
            return world, ("restore", found, doomed)
        return world, ("keep" if doomed or entry[1] not in world.data else "drop", found)

    def _restore(self, world: World, found: Found, doomed: bool) -> tuple[World, Place]:
        world = evolve(world, data=world.data | {found[0][0][1]})
        return world, ("keep" if doomed else "drop", found)

    def _keep(self, world: World, found: Found) -> tuple[World, Place]:
        return self._next(world, found[1:])

    def _drop(self, world: World, found: Found) -> tuple[World, Place]:
        return self._next(evolve(world, trash=world.trash - {found[0][0]}), found[1:])
