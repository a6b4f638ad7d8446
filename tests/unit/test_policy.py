"""
Every mode of every operation, valid and not; what is left out; and that nothing is touched where
something is refused.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import statepool
from statepool.backends.base import DEFAULTS, Options, StateBackend, Target
from statepool.errors import InvalidName
from statepool.model.objects import Image, Machine, Object
from statepool.model.outcomes import GetResult, Listed, Presence, Removed, SetResult, StoredAt
from statepool.policy import Done, Item, ItemOutcome, Outcome, Policy, items_of

LETTERS = "arif"
WORK = {"disk": Path("work.qcow2")}


class Recorder(StateBackend):
    """Keeps names in a set, and what was asked of it."""

    def __init__(self, *states: str, dependants: bool = False) -> None:
        self.states = set(states)
        self.calls: list[str] = []
        self.dependants = dependants

    def show(self, target: Target) -> list[Listed]:
        raise NotImplementedError

    def check(self, target: Target, state: str) -> bool:
        return state in self.states

    def get(self, target: Target, state: str, options: Options = DEFAULTS) -> GetResult:
        self._require(target, state)
        self._note("get", target, state, options)
        return GetResult(str(target.object), state, (state,), "")

    def set(self, target: Target, state: str, options: Options = DEFAULTS) -> SetResult:
        if state in self.states and not options.replace:
            raise statepool.Conflict(f"{state} exists")
        if state in self.states and self.dependants:
            raise statepool.HasDependants(f"{state} has children")
        self._note("set", target, state, options)
        if not options.dry_run:
            self.states.add(state)
        return SetResult(str(target.object), state, "", (StoredAt("here", Presence.STORED),))

    def unset(self, target: Target, state: str, options: Options = DEFAULTS) -> Removed:
        self._require(target, state)
        if self.dependants and not options.cascade:
            raise statepool.HasDependants(f"{state} has children")
        self._note("unset", target, state, options)
        if not options.dry_run:
            self.states.discard(state)
        return Removed(str(target.object), {"here": (state,)})

    def _require(self, target: Target, state: str) -> None:
        if state not in self.states:
            raise statepool.NotFound(f"no {state} of {target.object}")

    def _note(self, what: str, target: Target, state: str, options: Options) -> None:
        if not options.dry_run:
            self.calls.append(
                f"{what} {target.object} {state}" + (" replacing" if options.replace else "")
            )


def policy(backend: StateBackend, **how: object) -> Policy:
    return Policy(lambda subject: backend, **how)  # type: ignore[arg-type]


def run(
    subject: Policy,
    operation: str,
    items: list[Item],
    mode: str | None = None,
    options: Options = DEFAULTS,
) -> Outcome:
    outcome = getattr(subject, operation)(items, mode=mode, options=options)
    assert isinstance(outcome, Outcome)
    return outcome


EXISTS: dict[str, dict[str, tuple[Done, list[str]]]] = {
    "get": {
        "a": (Done.ABORTED, []),
        "r": (Done.DONE, ["get vm1/disk here"]),
        "i": (Done.IGNORED, []),
    },
    "set": {
        "a": (Done.ABORTED, []),
        "r": (Done.KEPT, []),
        "f": (Done.DONE, ["set vm1/disk here replacing"]),
    },
    "unset": {"r": (Done.KEPT, []), "f": (Done.DONE, ["unset vm1/disk here"])},
    "push": {
        "a": (Done.ABORTED, []),
        "r": (Done.KEPT, []),
        "f": (Done.DONE, ["set vm1/disk here replacing"]),
    },
    "pop": {
        "a": (Done.ABORTED, []),
        "r": (Done.DONE, ["get vm1/disk here", "unset vm1/disk here"]),
        "i": (Done.IGNORED, []),
    },
}
"""
What each first letter means for a state that is there; letters that are not named are no letters.
"""

MISSING: dict[str, dict[str, tuple[Done, list[str]]]] = {
    "get": {"a": (Done.ABORTED, []), "i": (Done.IGNORED, [])},
    "set": {"a": (Done.ABORTED, []), "f": (Done.DONE, ["set vm1/disk new"])},
    "unset": {"a": (Done.ABORTED, []), "i": (Done.IGNORED, [])},
    "push": {"a": (Done.ABORTED, []), "f": (Done.DONE, ["set vm1/disk new"])},
    "pop": {"a": (Done.ABORTED, []), "i": (Done.IGNORED, [])},
}
"""What each second letter means for a state that is not there."""


@pytest.mark.parametrize("operation", list(EXISTS))
@pytest.mark.parametrize("mode", ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)])
def test_every_mode(operation: str, mode: str) -> None:
    for state, expected in (
        ("here", EXISTS[operation].get(mode[0])),
        ("new", MISSING[operation].get(mode[1])),
    ):
        backend = Recorder("here")
        item = Item(Image("vm1", "disk"), state, WORK)
        if mode[0] not in EXISTS[operation] or mode[1] not in MISSING[operation]:
            with pytest.raises(statepool.UsageError, match=f"{operation} has no mode '{mode}'"):
                run(policy(backend), operation, [item], mode)
            assert backend.calls == []
            continue
        assert expected is not None
        outcome = run(policy(backend), operation, [item], mode)
        (found,) = outcome.items
        assert (found.done, backend.calls) == expected
        assert found.exists == (state == "here")
        assert found.object == "vm1/disk"
        assert found.state == state
        assert outcome.complete == (expected[0] is not Done.ABORTED)
        assert outcome.exit_code == {(Done.ABORTED, True): 4, (Done.ABORTED, False): 3}.get(
            (expected[0], found.exists), 0
        )
        assert f"{LONG[mode[0] if found.exists else mode[1]]}" in found.why


LONG = {"a": "abort", "r": "reuse", "i": "ignore", "f": "force"}

CHECKS = [
    # mode, what is there, a working image, present, what is done
    ("rf", {"root", "here"}, True, True, []),
    ("rf", {"here"}, True, True, ["set vm1/disk root"]),
    ("rf", {"here"}, False, True, []),
    ("rf", {"root"}, True, False, []),
    ("rr", {"here"}, True, False, []),
    ("rr", {"root", "here"}, True, True, []),
    ("fr", {"root", "here"}, True, True, ["set vm1/disk root replacing"]),
    ("fr", {"here"}, True, False, []),
    ("ff", {"root"}, True, False, ["set vm1/disk root replacing"]),
    ("ff", {"here"}, True, True, ["set vm1/disk root"]),
]


@pytest.mark.parametrize(("mode", "there", "works", "present", "calls"), CHECKS)
def test_every_mode_of_a_check(
    mode: str, there: set[str], works: bool, present: bool, calls: list[str]
) -> None:
    backend = Recorder(*there)
    outcome = run(
        policy(backend), "check", [Item(Image("vm1", "disk"), "here", WORK if works else {})], mode
    )
    assert outcome.complete == present
    assert outcome.exit_code == (0 if present else 3)
    assert outcome.items[0].done is (Done.KEPT if present else Done.ABSENT)
    assert backend.calls == calls


@pytest.mark.parametrize(
    "mode",
    [pair[0] + pair[1] for pair in itertools.product(LETTERS, repeat=2) if set(pair) & {"a", "i"}],
)
def test_modes_that_a_check_does_not_have(mode: str) -> None:
    backend = Recorder("here")
    with pytest.raises(statepool.UsageError, match="check has no mode"):
        run(policy(backend), "check", [Item(Image("vm1", "disk"), "here", WORK)], mode)
    assert backend.calls == []


@pytest.mark.parametrize("operation", [*EXISTS, "check"])
@pytest.mark.parametrize("mode", ["", "a", "xx", "rrr", "RA", "r ", "fż"])
def test_what_is_no_mode_is_found_out_first(operation: str, mode: str) -> None:
    with pytest.raises(statepool.UsageError, match="two letters"):
        run(Policy(never), operation, [Item(Image("vm1", "disk"), "here", WORK)], mode)


def never(subject: Object) -> StateBackend:
    raise AssertionError(f"somebody looked at {subject}")


@pytest.mark.parametrize(
    ("operation", "state", "done"),
    [
        ("check", "here", Done.KEPT),
        ("get", "here", Done.DONE),
        ("get", "new", Done.ABORTED),
        ("set", "here", Done.DONE),
        ("set", "new", Done.DONE),
        ("unset", "here", Done.DONE),
        ("unset", "new", Done.IGNORED),
        ("push", "here", Done.ABORTED),
        ("push", "new", Done.DONE),
        ("pop", "here", Done.DONE),
        ("pop", "new", Done.ABORTED),
    ],
)
def test_defaults(operation: str, state: str, done: Done) -> None:
    outcome = run(policy(Recorder("here")), operation, [Item(Image("vm1", "disk"), state)])
    assert [item.done for item in outcome.items] == [done]


# -- many objects ----------------------------------------------------------------------------------

VM1 = Machine("vm1", ("disk", "data"))
VM2 = Machine("vm2", ("disk",))


@pytest.mark.parametrize(
    ("kinds", "skip", "expected"),
    [
        (("machines",), (), ["get vm1 here", "get vm2 here"]),
        (("images",), (), ["get vm1/disk here", "get vm1/data here", "get vm2/disk here"]),
        (
            ("images", "machines"),
            (),
            [
                "get vm1/disk here",
                "get vm1/data here",
                "get vm1 here",
                "get vm2/disk here",
                "get vm2 here",
            ],
        ),
        (("images", "machines"), ("images",), ["get vm1 here", "get vm2 here"]),
        (
            ("images", "machines"),
            ("machines",),
            ["get vm1/disk here", "get vm1/data here", "get vm2/disk here"],
        ),
        (("images", "machines"), ("machines", "images"), []),
    ],
)
def test_machines_and_images(
    kinds: tuple[str, ...], skip: tuple[str, ...], expected: list[str]
) -> None:
    backend = Recorder("here")
    outcome = run(policy(backend, skip=skip), "get", items_of([VM1, VM2], "here", kinds=kinds))
    assert backend.calls == expected
    assert [item.done for item in outcome.items].count(Done.SKIPPED) == len(outcome.items) - len(
        expected
    )
    assert all("are skipped" in item.why for item in outcome.items if item.done is Done.SKIPPED)


def test_read_only_images() -> None:
    seen: list[Target] = []

    class Seeing(Recorder):
        def set(self, target: Target, state: str, options: Options = DEFAULTS) -> SetResult:
            seen.append(target)
            return super().set(target, state, options)

    working = {"vm1": {"disk": Path("disk.qcow2"), "data": Path("data.qcow2")}}
    items = items_of(
        [VM1], "new", kinds=("images", "machines"), working=working, read_only=["vm1/data"]
    )
    outcome = run(Policy(lambda subject: Seeing()), "set", items, "rf")
    assert [(item.object, item.done) for item in outcome.items] == [
        ("vm1/disk", Done.DONE),
        ("vm1/data", Done.SKIPPED),
        ("vm1", Done.DONE),
    ]
    assert outcome.items[1].why == "it is read-only"
    assert seen[-1].working == {"disk": Path("disk.qcow2")}
    assert seen[-1].object.images == ("disk",)  # type: ignore[union-attr]
    outcome = run(policy(Recorder()), "set", items_of([VM2], "new", read_only=["vm2/disk"]))
    assert (outcome.items[0].done, outcome.items[0].why) == (
        Done.SKIPPED,
        "all its images are read-only",
    )


def test_nothing_asked_and_root_states() -> None:
    backend = Recorder("root")
    disk = Image("vm1", "disk")
    assert run(policy(backend), "get", [Item(disk, None)]).items[0].why == "no state is asked for"
    for operation in ("push", "pop"):
        assert run(policy(backend), operation, [Item(disk, "root")]).items[0].done is Done.SKIPPED
        for name in ("0root", "boot", "0boot"):  # names of avocado-i2n, which its plugin reads
            with pytest.raises(InvalidName):
                run(policy(backend), operation, [Item(disk, name)])
    assert backend.calls == []
    for operation in ("get", "set", "unset"):
        assert (
            run(policy(backend), operation, [Item(disk, "root", WORK)]).items[0].done is Done.DONE
        )
    assert backend.calls == [
        "get vm1/disk root",
        "set vm1/disk root replacing",
        "unset vm1/disk root",
    ]
    assert run(policy(backend), "check", [Item(disk, "root")]).items[0].done is Done.ABSENT


def test_an_abort_of_one_leaves_all_as_they_are() -> None:
    backends = {"vm1/disk": Recorder(), "vm2/disk": Recorder("new"), "vm3/disk": Recorder()}
    items = [Item(Image(name, "disk"), "new", WORK) for name in ("vm1", "vm2", "vm3")]
    outcome = Policy(lambda subject: backends[str(subject)]).push(items)
    assert [item.done for item in outcome.items] == [Done.UNTOUCHED, Done.ABORTED, Done.UNTOUCHED]
    assert all(not backend.calls for backend in backends.values())
    assert outcome.exit_code == 4
    assert not outcome.complete


def test_one_that_fails_does_not_hide_what_the_others_did() -> None:
    backends = {"vm1/disk": Recorder("here", dependants=True), "vm2/disk": Recorder("here")}
    items = [Item(Image(name, "disk"), "here", WORK) for name in ("vm1", "vm2")]
    for operation in ("set", "unset", "pop"):
        backends["vm2/disk"].states.add("here")
        outcome = getattr(Policy(lambda subject: backends[str(subject)]), operation)(items)
        # Force never overrides what stands on a state.
        assert [item.done for item in outcome.items] == [Done.FAILED, Done.DONE]
        assert "has children" in outcome.items[0].why
        assert outcome.exit_code == 4
    assert backends["vm1/disk"].calls == []
    assert len(backends["vm2/disk"].calls) == 4


@pytest.mark.parametrize("operation", list(EXISTS))
def test_dry_runs_and_values(operation: str) -> None:
    backend = Recorder("here")
    state = "here" if operation in ("get", "unset", "pop") else "new"
    outcome = run(
        policy(backend),
        operation,
        [Item(Image("vm1", "disk"), state, WORK)],
        options=Options(dry_run=True),
    )
    assert backend.calls == []
    assert backend.states == {"here"}
    assert outcome.items[0].why.startswith("it would be")
    assert pickle.loads(pickle.dumps(outcome)) == outcome
    assert isinstance(outcome.items[0], ItemOutcome)


def test_bad_names_and_kinds() -> None:
    with pytest.raises(statepool.InvalidName):
        Policy(never).get([Item(Image("vm1", "disk"), "here"), Item(Image("vm1", "disk"), "../x")])
    with pytest.raises(statepool.UsageError, match="cannot be skipped"):
        Policy(never, skip=["nets"])
    with pytest.raises(statepool.UsageError, match="nets"):
        items_of([VM1], "here", kinds=["nets"])


# -- with real backends ----------------------------------------------------------------------------


def test_with_images_and_machines(
    tmp_path: Path, make_image: Callable[..., Path], write_to_image: Callable[..., None]
) -> None:
    statepool.init(tmp_path / "pool")
    pool = statepool.StatePool(tmp_path / "cache", [tmp_path / "pool"])
    working = {
        "vm1": {
            name: make_image(tmp_path / f"{name}.qcow2", 1 << 20, writes=[(0, 65536, 1)])
            for name in ("disk", "data")
        }
    }
    items = items_of([VM1], "step", working=working)
    assert pool.policy().push(items).complete
    assert pool.machine("vm1").check("step")
    again = pool.policy().push(items)
    assert [item.done for item in again.items] == [Done.ABORTED]
    # What stands on the state itself and was written to since is its new content, if that is
    # forced.
    disk = items_of(
        [VM1], "alone", kinds=["images"], working={"vm1": {"disk": working["vm1"]["disk"]}}
    )[:1]
    assert pool.policy().set(disk).complete
    write_to_image(working["vm1"]["disk"], [(65536, 65536, 2)])
    assert pool.policy().set(disk, mode="rf").items[0].done is Done.KEPT
    forced = pool.policy().set(disk)
    assert forced.complete, forced
    assert pool.policy().unset(items_of([VM1], "alone", kinds=["images"])[:1]).complete
    popped = pool.policy().pop(
        items_of(
            [VM1],
            "step",
            working={
                "vm1": {name: tmp_path / "run" / f"{name}.qcow2" for name in ("disk", "data")}
            },
        )
    )
    assert popped.items[0].done is Done.FAILED
    assert "no directory" in popped.items[0].why
    (tmp_path / "run").mkdir()
    popped = pool.policy().pop(
        items_of(
            [VM1],
            "step",
            working={
                "vm1": {name: tmp_path / "run" / f"{name}.qcow2" for name in ("disk", "data")}
            },
        )
    )
    assert popped.complete, popped
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "data.qcow2",
        "disk.qcow2",
    ]
    assert not pool.machine("vm1").check("step")
    assert isinstance(pool.policy(), Policy)
