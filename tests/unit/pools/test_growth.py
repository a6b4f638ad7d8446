"""
Work that grows with what a pool holds, and no faster: each operation is done on twice as much, and
its steps are counted.

Lines of Python that are executed are counted: not time, which a busy machine makes long.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from attrs import evolve

from statepool.care.gc import thin_keys
from statepool.copying.sync import in_order
from statepool.model.digest import Digest
from statepool.model.keys import LABEL_KEY, LABEL_STATE
from statepool.model.manifest import Kind, Manifest, Parent, StateId
from statepool.model.outcomes import Listed
from statepool.model.trees import arrange
from statepool.pools.collect import Collector
from statepool.pools.fold import Change, Fold, Publish, Remove
from statepool.pools.locks import NoLocks
from statepool.pools.log import MachineLog
from statepool.pools.pool import Pool
from statepool.pools.records import Checkpoint, Record
from statepool.pools.records import apply as apply_record
from statepool.sources.merge import merged
from statepool.sources.pool_source import listing
from statepool.testing.memory import MemoryStore, MemoryTransport

SMALL = 120


def steps(work: Callable[[], object]) -> int:
    """:returns: how many lines of Python are executed"""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def digest(number: int, version: str = "") -> Digest:
    return Digest.of(f"{number}{version}".encode())


def image(number: int, below: Manifest | None, version: str = "", **facts: Any) -> Manifest:
    parent = (
        Parent(below.state, below.digest)
        if below is not None and below.digest is not None
        else None
    )
    return Manifest(
        "vm1/disk", f"s{number}", size=1, digest=digest(number, version), parent=parent, **facts
    )


def chain(count: int) -> list[Manifest]:
    made: list[Manifest] = []
    for number in range(count):
        made.append(image(number, made[-1] if made else None))
    return made


def star(count: int) -> list[Manifest]:
    root = image(0, None)
    return [root, *(image(number, root) for number in range(1, count))]


def machines(count: int) -> list[Manifest]:
    disks = chain(count)
    return [
        *disks,
        *(
            Manifest("vm1", disk.state, Kind.MACHINE, members={"vm1/disk": disk.digest})
            for disk in disks
            if disk.digest is not None
        ),
    ]


SHAPES = {"chain": chain, "star": star, "machines": machines}


def held(manifests: list[Manifest]) -> Fold:
    return Fold("vm1").after(1, "n", map(Publish, manifests))


def removal(manifest: Manifest) -> Remove:
    return Remove(manifest.id, manifest.digest)


def supersede(manifests: list[Manifest]) -> list[Change]:
    """New content for a chain, from its root up."""
    changes: list[Change] = []
    new: Manifest | None = None
    for number, old in enumerate(one for one in manifests if one.kind is Kind.IMAGE):
        new = image(number, new, "new")
        changes.append(Publish(new, supersedes=old.digest))
    return changes


def one_by_one(fold: Fold, changes: list[Change]) -> None:
    """As a log is read: each is a record."""
    for number, change in enumerate(changes, fold.number + 1):
        fold.apply(number, "n", [change])


def restored(fold: Fold, *, backwards: bool = False) -> Fold:
    states = list(fold.states.values())
    return Fold.restore(
        "vm1",
        fold.number,
        dict(fold.nonces),
        states[::-1] if backwards else states,
        fold.superseded,
    )


def superseded(manifests: list[Manifest]) -> Fold:
    fold = held(manifests)
    one_by_one(fold, supersede(manifests)[:-1])
    return fold


def replaced(made: list[Manifest]) -> list[Change]:
    return [change for one in made for change in (removal(one), Publish(evolve(one, created=1.0)))]


def read(made: list[Manifest]) -> None:
    content = Record(1, "n", 1.0, "x", tuple(map(Publish, made))).to_bytes()
    apply_record(Fold("vm1"), Record.from_bytes(content, 1, "x"), "x")


ON_FOLDS: dict[str, Callable[[list[Manifest], Fold], object]] = {
    "publish in one record": lambda made, fold: held(made),
    "publish tips first": lambda made, fold: held(made[::-1]),
    "publish one by one": lambda made, fold: one_by_one(Fold("vm1"), list(map(Publish, made))),
    "remove in one record": lambda made, fold: fold.after(2, "n", map(removal, made)),
    "remove in one record, tips first": lambda made, fold: fold.after(
        2, "n", map(removal, made[::-1])
    ),
    "remove one by one": lambda made, fold: one_by_one(fold, list(map(removal, made[::-1]))),
    "replace in one record": lambda made, fold: fold.after(2, "n", replaced(made)),
    "dependants of the first": lambda made, fold: fold.dependants([made[0].id]),
    "dependants of all": lambda made, fold: fold.dependants([one.id for one in made]),
    "standing on the first": lambda made, fold: fold.standing_on(made[0]),
    "checkpoint": lambda made, fold: Checkpoint.from_bytes(
        Checkpoint.of(fold), "vm1", 1, "x"
    ).fold(),
    "restore": lambda made, fold: restored(fold),
    "restore backwards": lambda made, fold: restored(fold, backwards=True),
    "read a record": lambda made, fold: read(made),
    "order for a copy": lambda made, fold: in_order(fold, made),
    "tree": lambda made, fold: list(arrange([Listed(one, ("pool",)) for one in made])),
    "merge": lambda made, fold: merged([[Listed(one, (name,)) for one in made] for name in "ab"]),
}


def on_fold(operation: str, made: list[Manifest]) -> int:
    fold = held(made)
    return steps(lambda: ON_FOLDS[operation](made, fold))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", ON_FOLDS)
def test_operations_on_the_states_of_a_machine(operation: str, shape: str) -> None:
    small, large = (on_fold(operation, SHAPES[shape](count)) for count in (SMALL, 2 * SMALL))
    assert large < 2.6 * small, f"{small} steps, and {large} for twice as much"


def test_a_chain_that_is_superseded_one_by_one() -> None:
    small, large = (
        steps(lambda count=count: superseded(chain(count))) for count in (SMALL, 2 * SMALL)
    )  # type: ignore[misc]
    assert large < 2.6 * small


def test_a_superseded_chain_is_restored_and_goes() -> None:
    def work(count: int) -> Callable[[], object]:
        fold = superseded(chain(count))
        named = in_order(fold, fold.states.values())[::-1]
        return lambda: one_by_one(restored(fold), list(map(removal, named)))

    small, large = (steps(work(count)) for count in (SMALL, 2 * SMALL))
    assert large < 2.6 * small


def filled(manifests: list[Manifest]) -> Pool:
    pool = Pool(MemoryTransport(MemoryStore()), locks=NoLocks())
    pool.create()
    MachineLog(pool.transport, "vm1").append(
        lambda fold: [Publish(one) for one in manifests if one.id not in fold.states]
    )
    for one in manifests:
        if one.digest is not None:
            pool.transport.create(f".statepool/data/{one.digest.file_name}", b"x")
    return pool


def built(manifests: list[Manifest]) -> list[Manifest]:
    return [evolve(one, labels={LABEL_KEY: one.state, LABEL_STATE: "it"}) for one in manifests]


def nothing(pool: Pool) -> None:
    """Is there to be done first."""


def remove_all(pool: Pool) -> None:
    pool.remove(StateId("vm1/disk", "s0"), cascade=True)


ON_POOLS: dict[str, tuple[Callable[[Pool], object], Callable[[list[Manifest], Pool], object]]] = {
    "list": (nothing, lambda made, pool: listing(pool, "vm1")),
    "remove with all that stands on it": (nothing, lambda made, pool: remove_all(pool)),
    "collect": (remove_all, lambda made, pool: Collector(pool).sweep()),
    "look for old versions": (nothing, lambda made, pool: thin_keys(pool, 1, dry_run=True)),
    "plan": (nothing, lambda made, pool: pool.check_publishable(made)),
    "plan to replace": (
        nothing,
        lambda made, pool: pool.check_publishable(
            [evolve(one, created=2.0) for one in made], replace=True
        ),
    ),
    "show in the view": (
        nothing,
        lambda made, pool: pool.view.update([one.id for one in made], lambda: pool.fold("vm1")),
    ),
}


def on_pool(operation: str, made: list[Manifest]) -> int:
    pool = filled(built(made))
    before, work = ON_POOLS[operation]
    before(pool)
    return steps(lambda: work(made, pool))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", ON_POOLS)
def test_operations_on_a_pool(operation: str, shape: str) -> None:
    small, large = (on_pool(operation, SHAPES[shape](count)) for count in (SMALL, 2 * SMALL))
    assert large < 2.6 * small, f"{small} steps, and {large} for twice as much"
