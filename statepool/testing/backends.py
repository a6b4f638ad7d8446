"""
The contract of backends: the tests that every backend must pass.

A test file for a new backend says how its object is worked on, and what the backend can do::

    from statepool.testing.backends import BackendContract, Bench

    class MyBench(Bench):
        def target(self): ...
        def write(self, target, value): ...
        def read(self, target, state): ...

    class TestMyBackend(BackendContract):
        chains = False

        @pytest.fixture
        def bench(self, tmp_path):
            pool = statepool.init(tmp_path / "pool") ...
            return MyBench(MyBackend(context), [tmp_path])

States are distinguished by one number, the *value* that a guest has written everywhere it can.
Attributes of the class say which optional features a backend has; tests of missing features are
absent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from attrs import evolve

from statepool.backends.base import DEFAULTS, Options, StateBackend, Target
from statepool.errors import Conflict, FileInTheWay, HasDependants, InvalidName, NotFound
from statepool.model.names import ROOT, ROOT_STATES
from statepool.model.outcomes import Presence, SetResult
from statepool.testing.contracts import Contract, only_if
from statepool.testing.trees import photograph

REPLACE = Options(replace=True)
CASCADE = Options(cascade=True)
OVERWRITE = Options(overwrite=True)


class Bench(ABC):
    """
    The workplace for one kind of object.

    :param backend: the backend under test; nothing has been stored with it yet
    :param directories: all that it may change
    """

    def __init__(self, backend: StateBackend, directories: Sequence[Path]) -> None:
        self.backend = backend
        self.directories = tuple(directories)

    @abstractmethod
    def target(self) -> Target:
        """
        :returns: the object, always the same one, with new working images (or a new machine) that
            are empty and have no backing file
        """

    @abstractmethod
    def write(self, target: Target, value: int) -> None:
        """Write ``value`` (1 to 255) wherever a guest can write, as a guest would."""

    @abstractmethod
    def read(self, target: Target, state: str) -> int:
        """:returns: the value that a guest finds in a state, which has just been got"""

    def offer(self, target: Target, state: str) -> None:
        """
        Prepare what :meth:`StateBackend.set` takes, if that is not the target's working image.
        ``state`` may be ``root``.
        """
        return None

    def bare(self, target: Target) -> Target:
        """
        :returns: the target with only what is needed to list an object's states; working images are
            not needed, unless the states are in them
        """
        return evolve(target, working={})

    def photograph(self) -> dict[str, str]:
        """:returns: a snapshot of everything that the backend may change"""
        return photograph(*self.directories)


class BackendContract(Contract):
    """The contract tests of backends. Derive from it and give it a fixture ``bench``."""

    chains = True
    """
    Whether a state depends on the one that it was made from, which then cannot be removed or
    replaced.
    """

    comparable = True
    """Whether the backend can tell that two contents it is given are the same."""

    makes_working = True
    """Whether a get makes the target's working image."""

    roots = True
    """Whether the object itself can be stored."""

    @pytest.fixture
    def bench(self) -> Bench:
        """The workplace for the object."""
        raise NotImplementedError("derive from BackendContract and define the fixture `bench`")

    # -- one state ---------------------------------------------------------------------------------

    def test_without_states(self, bench: Bench) -> None:
        target = bench.target()
        assert not bench.backend.check(target, "install")
        assert names(bench, target) == []

    def test_there_and_back(self, bench: Bench) -> None:
        target = bench.target()
        stored = put(bench, target, "install", 7)
        assert (stored.object, stored.state, stored.complete) == (
            str(target.object),
            "install",
            True,
        )
        assert bench.backend.check(target, "install")
        assert names(bench, target) == ["install"]
        got = bench.backend.get(target, "install", OVERWRITE)
        assert (got.object, got.state, got.chain[0]) == (str(target.object), "install", "install")
        assert got.digest == stored.digest
        assert bench.read(target, "install") == 7

    def test_got_twice(self, bench: Bench) -> None:
        target = bench.target()
        put(bench, target, "install", 7)
        assert (
            bench.backend.get(target, "install", OVERWRITE).digest
            == bench.backend.get(target, "install", OVERWRITE).digest
        )
        assert bench.read(target, "install") == 7

    def test_several_states(self, bench: Bench) -> None:
        for state, value in (("one", 1), ("two", 2), ("three", 3)):
            put(bench, bench.target(), state, value)
        target = bench.target()
        assert names(bench, target) == ["one", "three", "two"]
        for state, value in (("two", 2), ("three", 3), ("one", 1)):
            bench.backend.get(target, state, OVERWRITE)
            assert bench.read(target, state) == value

    def test_removed(self, bench: Bench) -> None:
        put(bench, bench.target(), "other", 8)
        target = bench.target()
        put(bench, target, "install", 7)
        assert (
            next(
                state
                for states in bench.backend.unset(target, "install").states.values()
                for state in states
            )
            == "install"
        )
        assert not bench.backend.check(target, "install")
        assert names(bench, target) == ["other"]

    def test_a_name_can_be_used_again(self, bench: Bench) -> None:
        target = bench.target()
        put(bench, target, "install", 7)
        bench.backend.unset(target, "install")
        target = bench.target()
        put(bench, target, "install", 8)
        bench.backend.get(target, "install", OVERWRITE)
        assert bench.read(target, "install") == 8

    @only_if("makes_working")
    def test_a_working_image_in_the_way(self, bench: Bench) -> None:
        target = bench.target()
        put(bench, target, "install", 7)
        before = bench.photograph()
        with pytest.raises(FileInTheWay):
            bench.backend.get(target, "install")
        assert bench.photograph() == before

    # -- what is not there, or cannot be -----------------------------------------------------------

    def test_a_state_that_is_not_there(self, bench: Bench) -> None:
        target = bench.target()
        put(bench, target, "install", 7)
        before = bench.photograph()
        with pytest.raises(NotFound, match="nothing"):
            bench.backend.get(target, "nothing", OVERWRITE)
        with pytest.raises(NotFound, match="nothing"):
            bench.backend.unset(target, "nothing")
        with pytest.raises(NotFound, match="nothing"):
            bench.backend.unset(target, "nothing", CASCADE)
        assert bench.photograph() == before

    @pytest.mark.parametrize(
        "state",
        [
            "",
            ".",
            "..",
            "../install",
            "a/b",
            "-a",
            "a\n",
            "install.qcow2",
            "a.lock",
            "x" * 129,
            *sorted(ROOT_STATES - {ROOT}),
        ],
    )
    def test_a_name_that_no_state_can_have(self, bench: Bench, state: str) -> None:
        target = bench.target()
        bench.write(target, 7)
        before = bench.photograph()
        for operation in (
            bench.backend.check,
            bench.backend.set,
            bench.backend.unset,
            partial(bench.backend.get, options=OVERWRITE),
        ):
            with pytest.raises(InvalidName):
                operation(target, state)
        assert bench.photograph() == before

    # -- a name that is taken ----------------------------------------------------------------------

    @only_if("comparable")
    def test_the_same_content_again(self, bench: Bench) -> None:
        first = put(bench, bench.target(), "install", 7)
        again = put(bench, bench.target(), "install", 7)
        assert again.digest == first.digest
        assert {at.result for at in again.pools} == {Presence.PRESENT}

    def test_other_content_is_a_conflict(self, bench: Bench) -> None:
        put(bench, bench.target(), "install", 7)
        target = bench.target()
        bench.write(target, 8)
        bench.offer(target, "install")
        before = bench.photograph()
        with pytest.raises(Conflict, match="install"):
            bench.backend.set(target, "install")
        assert bench.photograph() == before

    def test_replaced_when_asked_for(self, bench: Bench) -> None:
        put(bench, bench.target(), "install", 7)
        target = bench.target()
        assert {at.result for at in put(bench, target, "install", 8, REPLACE).pools} == {
            Presence.STORED
        }
        assert names(bench, target) == ["install"]
        bench.backend.get(target, "install", OVERWRITE)
        assert bench.read(target, "install") == 8

    # -- states that stand on others ---------------------------------------------------------------

    @only_if("chains")
    def test_a_chain(self, bench: Bench) -> None:
        target = chain(bench)
        assert bench.backend.get(target, "customize", OVERWRITE).chain == ("customize", "install")
        assert bench.read(target, "customize") == 8
        bench.backend.get(target, "install", OVERWRITE)
        assert bench.read(target, "install") == 7

    @only_if("chains")
    def test_what_others_stand_on_is_not_removed(self, bench: Bench) -> None:
        target = chain(bench)
        before = bench.photograph()
        with pytest.raises(HasDependants) as caught:
            bench.backend.unset(target, "install")
        assert caught.value.dependants == (f"{target.object} customize",)
        assert bench.photograph() == before

    @only_if("chains")
    def test_all_are_removed_when_asked_for(self, bench: Bench) -> None:
        target = chain(bench)
        removed = bench.backend.unset(target, "install", CASCADE)
        assert set(removed.states.values()) == {("customize", "install")}
        assert names(bench, target) == []

    @only_if("chains")
    def test_what_others_stand_on_is_not_replaced(self, bench: Bench) -> None:
        chain(bench)
        target = bench.target()
        bench.write(target, 9)
        bench.offer(target, "install")
        before = bench.photograph()
        with pytest.raises(HasDependants):
            bench.backend.set(target, "install", REPLACE)
        assert bench.photograph() == before

    # -- dry runs ----------------------------------------------------------------------------------

    def test_a_dry_run_changes_nothing(self, bench: Bench) -> None:
        target = chain(bench) if self.chains else bench.target()
        if not self.chains:
            put(bench, target, "install", 7)
        bench.offer(target, "more")
        before = bench.photograph()
        would_get = bench.backend.get(target, "install", Options(overwrite=True, dry_run=True))
        would_store = bench.backend.set(target, "more", Options(dry_run=True))
        would_remove = bench.backend.unset(target, "install", Options(cascade=True, dry_run=True))
        assert bench.photograph() == before
        assert (would_get.state, would_store.state) == ("install", "more")
        assert {at.result for at in would_store.pools} == {Presence.STORED}
        assert all("install" in states for states in would_remove.states.values())

    def test_a_dry_run_says_what_would_go_wrong(self, bench: Bench) -> None:
        dry = Options(dry_run=True, overwrite=True)
        target = chain(bench) if self.chains else bench.target()
        with pytest.raises(NotFound):
            bench.backend.get(target, "nothing", dry)
        with pytest.raises(NotFound):
            bench.backend.unset(target, "nothing", dry)
        if self.chains:
            with pytest.raises(HasDependants):
                bench.backend.unset(target, "install", dry)

    # -- the object itself -------------------------------------------------------------------------

    @only_if("roots")
    def test_the_object_itself(self, bench: Bench) -> None:
        target = bench.target()
        assert not bench.backend.check(target, ROOT)
        stored = put(bench, target, ROOT, 7)
        assert stored.complete
        assert bench.backend.check(target, ROOT)
        assert bench.backend.get(target, ROOT, OVERWRITE).digest == stored.digest
        assert bench.read(target, ROOT) == 7
        assert bench.backend.unset(target, ROOT).states
        assert not bench.backend.check(target, ROOT)

    @only_if("roots")
    def test_the_object_itself_that_is_not_there(self, bench: Bench) -> None:
        target = bench.target()
        before = bench.photograph()
        with pytest.raises(NotFound):
            bench.backend.get(target, ROOT, OVERWRITE)
        with pytest.raises(NotFound):
            bench.backend.unset(target, ROOT)
        assert bench.photograph() == before

    @only_if("roots")
    def test_the_object_itself_is_not_replaced_by_chance(self, bench: Bench) -> None:
        put(bench, bench.target(), ROOT, 7)
        target = bench.target()
        bench.write(target, 8)
        bench.offer(target, ROOT)
        before = bench.photograph()
        with pytest.raises(Conflict):
            bench.backend.set(target, ROOT)
        assert bench.photograph() == before
        target = bench.target()
        put(bench, target, ROOT, 8, REPLACE)
        bench.backend.get(target, ROOT, OVERWRITE)
        assert bench.read(target, ROOT) == 8

    @only_if("roots")
    def test_the_object_itself_in_a_dry_run(self, bench: Bench) -> None:
        target = bench.target()
        bench.write(target, 7)
        bench.offer(target, ROOT)
        before = bench.photograph()
        assert {
            at.result for at in bench.backend.set(target, ROOT, Options(dry_run=True)).pools
        } == {Presence.STORED}
        assert bench.photograph() == before
        bench.backend.set(target, ROOT)
        before = bench.photograph()
        bench.backend.get(target, ROOT, Options(overwrite=True, dry_run=True))
        assert bench.backend.unset(target, ROOT, Options(dry_run=True)).states
        assert bench.photograph() == before

    @only_if("roots")
    def test_the_object_itself_is_not_a_state_of_it(self, bench: Bench) -> None:
        put(bench, bench.target(), ROOT, 7)
        target = bench.target()
        put(bench, target, "install", 8)
        assert bench.backend.check(target, "install")
        bench.backend.unset(target, "install")
        assert bench.backend.check(target, ROOT)


def put(
    bench: Bench, target: Target, state: str, value: int, options: Options = DEFAULTS
) -> SetResult:
    """Write a value, and store it as a state."""
    bench.write(target, value)
    bench.offer(target, state)
    return bench.backend.set(target, state, options)


def chain(bench: Bench) -> Target:
    """
    :returns: a target with the states ``install`` and, backed by it, ``customize``, which has been
        written to since
    """
    target = bench.target()
    put(bench, target, "install", 7)
    put(bench, target, "customize", 8)
    bench.write(target, 9)
    return target


def names(bench: Bench, target: Target) -> list[str]:
    """
    :returns: the names of the states that a backend lists for the target's object, except for the
        object itself
    """
    return sorted(
        {listed.manifest.state for listed in bench.backend.show(bench.bare(target))} - {ROOT}
    )
