from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve

from statepool.errors import (
    Conflict,
    HasDependants,
    IntegrityError,
    NotAPool,
    NotFound,
    ReadOnlyPool,
    RefusedError,
    UnsafeImage,
    UnsupportedFormat,
)
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, Parent, StateId
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.local import LocalTransport

State = Callable[..., Manifest]
MachineState = Callable[..., list[Manifest]]
Put = Callable[..., bool]


@pytest.fixture
def chain(pool: Pool, state: State, put: Put) -> list[Manifest]:
    """Root first, and in the pool."""
    install = state("install")
    customize = state("customize", parent=install)
    chain = [install, customize, state("connect", parent=customize)]
    for manifest in chain:
        put(pool, manifest)
    return chain


def log_length(pool: Pool) -> int:
    return pool.fold("vm1").number


# -- being a pool ----------------------------------------------------------------------------------


def test_a_pool_is_made_once(tmp_path: Path) -> None:
    pool = Pool(LocalTransport(Location("file", str(tmp_path))))
    assert not pool.is_managed
    assert pool.create()
    assert not pool.create()
    assert pool.is_managed
    assert {entry.name for entry in pool.transport.scan(layout.OURS)} == {
        "pool.json",
        "data",
        "log",
        "incoming",
        "trash",
        "locks",
        "uses",
    }
    pool.require(write=True)


def test_an_empty_directory_is_no_pool(tmp_path: Path) -> None:
    for pool in (
        Pool(LocalTransport(Location("file", str(tmp_path)))),
        Pool(LocalTransport(Location("file", str(tmp_path / "gone")))),
    ):
        with pytest.raises(NotAPool) as caught:
            pool.require()
        assert caught.value.hint is not None
        assert "statepool init" in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_a_pool_of_another_tool_can_only_be_read() -> None:
    pool = Pool(MemoryTransport(MemoryStore()))
    pool.transport.make_directory("vm1/disk")
    pool.transport.create("vm1/disk/install.qcow2", b"data")
    pool.require()
    with pytest.raises(ReadOnlyPool):
        pool.require(write=True)


@pytest.mark.parametrize("content", [b'{"format": 3}', b'{"format": 99, "else": {}}'])
def test_a_pool_of_a_newer_format(transport: MemoryTransport, content: bytes) -> None:
    transport.make_directory(layout.OURS)
    transport.create(layout.POOL_FILE, content)
    with pytest.raises(UnsupportedFormat):
        Pool(transport).require()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}"])
def test_a_pool_file_that_is_none(transport: MemoryTransport, content: bytes) -> None:
    transport.make_directory(layout.OURS)
    transport.create(layout.POOL_FILE, content)
    with pytest.raises(IntegrityError):
        Pool(transport).require()


# -- publishing ------------------------------------------------------------------------------------


def test_what_is_published_is_there(pool: Pool, chain: list[Manifest]) -> None:
    assert pool.chain(chain[2].id) == (chain[2], chain[1], chain[0])
    assert pool.find(chain[0].id) == chain[0]
    assert pool.transport.read(layout.data(chain[0].digest)) == b"install"  # type: ignore[arg-type]
    assert pool.transport.scan(layout.INCOMING) == []


def test_the_same_again_changes_nothing(pool: Pool, chain: list[Manifest], put: Put) -> None:
    before = log_length(pool)
    assert not put(pool, chain[0])
    assert log_length(pool) == before


def test_other_content_is_a_conflict(
    pool: Pool, chain: list[Manifest], state: State, put: Put
) -> None:
    before = log_length(pool)
    with pytest.raises(Conflict, match="other content") as caught:
        put(pool, state("connect", "new", parent=chain[1]), data=b"new")
    assert (caught.value.object, caught.value.state, caught.value.pool) == (
        "vm1/disk",
        "connect",
        str(pool),
    )
    assert log_length(pool) == before
    assert pool.find(chain[2].id) == chain[2]
    assert pool.transport.scan(layout.INCOMING) == []


def test_another_parent_is_other_content(
    pool: Pool, chain: list[Manifest], state: State, put: Put
) -> None:
    with pytest.raises(Conflict, match="other content"):
        put(pool, state("connect", parent=chain[0]))


def test_other_content_can_be_asked_for(
    pool: Pool, chain: list[Manifest], state: State, put: Put
) -> None:
    new = state("connect", "new", parent=chain[1])
    before = log_length(pool)
    assert put(pool, new, data=b"new", replace=True)
    assert pool.find(new.id) == new
    assert log_length(pool) == before + 1


@pytest.mark.parametrize("how", [{"replace": True}, {"replace": True, "supersede": False}])
def test_replacing_never_overrides_dependants(
    pool: Pool, chain: list[Manifest], state: State, put: Put, how: dict[str, bool]
) -> None:
    with pytest.raises(HasDependants) as caught:
        put(pool, state("install", "new"), data=b"new", **how)
    assert caught.value.dependants == ("vm1/disk connect", "vm1/disk customize")
    assert pool.find(chain[0].id) == chain[0]


def test_superseding_leaves_the_old_to_its_children(
    pool: Pool, chain: list[Manifest], state: State, put: Put
) -> None:
    new = state("install", "new")
    assert put(pool, new, data=b"new", supersede=True)
    assert pool.find(new.id) == new
    assert pool.chain(chain[2].id)[-1] == chain[0]
    assert pool.has_bytes(chain[0].digest)  # type: ignore[arg-type]


def test_a_child_of_what_was_superseded_can_still_come(
    pool: Pool, chain: list[Manifest], state: State, put: Put
) -> None:
    put(pool, state("install", "new"), data=b"new", supersede=True)
    late = state("late", parent=chain[0])
    assert put(pool, late)
    assert pool.chain(late.id) == (late, chain[0])


def test_a_child_without_its_parent(pool: Pool, state: State, put: Put) -> None:
    with pytest.raises(Conflict, match="which is not there"):
        put(pool, state("customize", parent=state("install")))
    assert log_length(pool) == 0


def test_a_child_of_a_parent_that_has_changed(
    pool: Pool, chain: list[Manifest], state: State, put: Put
) -> None:
    with pytest.raises(Conflict, match="is there with the digest"):
        put(pool, state("other", parent=state("install", "else")))


def test_a_chain_can_come_in_one_record(pool: Pool, state: State, put: Put) -> None:
    install = state("install")
    assert put(pool, install, state("customize", parent=install))
    assert log_length(pool) == 1


def test_chains_have_a_greatest_depth(
    pool: Pool, chain: list[Manifest], state: State, put: Put
) -> None:
    pool.max_depth = 3
    with pytest.raises(UnsafeImage, match="more than 3") as caught:
        put(pool, state("deeper", parent=chain[2]))
    assert caught.value.check == "depth"
    assert put(pool, state("beside", parent=chain[1]))


@pytest.mark.parametrize("how", [{}, {"replace": True}, {"supersede": True}])
def test_no_state_stands_on_one_of_its_own_name(
    pool: Pool, chain: list[Manifest], state: State, put: Put, how: dict[str, bool]
) -> None:
    before = log_length(pool)
    for parent in (chain[0], chain[1]):
        with pytest.raises(Conflict, match="whose chain has a state of that name"):
            put(pool, state("install", "new", parent=parent), data=b"new", **how)
    assert log_length(pool) == before


def test_bytes_that_never_came(pool: Pool, state: State) -> None:
    install = state("install")
    staging = pool.stage([Digest.of(b"install")])
    with pytest.raises(IntegrityError, match="are not in"):
        pool.publish([install], staging)
    assert pool.find(install.id) is None


def test_a_file_of_another_tool_is_in_the_way(pool: Pool, state: State, put: Put) -> None:
    pool.transport.make_directory("vm1/disk")
    pool.transport.create("vm1/disk/install.qcow2", b"data")
    with pytest.raises(Conflict, match="statepool adopt"):
        put(pool, state("install"))
    assert pool.transport.read("vm1/disk/install.qcow2") == b"data"
    assert log_length(pool) == 0


def test_a_look_says_what_publishing_would_do(
    pool: Pool, chain: list[Manifest], state: State
) -> None:
    before = log_length(pool)
    assert not pool.check_publishable([chain[0]])
    assert pool.check_publishable([state("beside", parent=chain[0])])
    with pytest.raises(Conflict):
        pool.check_publishable([state("connect", "new")])
    assert log_length(pool) == before


def test_a_machine_state_is_one_record(
    pool: Pool, state: State, machine_state: MachineState, put: Put
) -> None:
    disk = state("on")
    ram, machine = machine_state("on", disk)
    with pytest.raises(Conflict, match="lists vm1/disk"):
        put(pool, ram, machine)
    assert put(pool, disk, ram, machine)
    assert log_length(pool) == 1
    assert pool.find(machine.id) == machine


# -- removing --------------------------------------------------------------------------------------


def test_what_is_removed_is_gone_and_its_bytes_wait_for_a_collector(
    pool: Pool, chain: list[Manifest]
) -> None:
    assert pool.remove(chain[2].id) == [chain[2]]
    assert pool.find(chain[2].id) is None
    assert pool.has_bytes(chain[2].digest)  # type: ignore[arg-type]
    assert chain[2].digest not in pool.needed()


def test_dependants_keep_a_state(pool: Pool, chain: list[Manifest]) -> None:
    with pytest.raises(HasDependants, match="cannot be removed") as caught:
        pool.remove(chain[0].id)
    assert caught.value.dependants == ("vm1/disk connect", "vm1/disk customize")
    assert len(pool.fold("vm1").states) == 3


def test_dependants_go_too_if_asked_for(pool: Pool, chain: list[Manifest]) -> None:
    before = log_length(pool)
    assert pool.plan_removal(chain[0].id, cascade=True) == [chain[2].id, chain[1].id, chain[0].id]
    assert pool.remove(chain[0].id, cascade=True) == [chain[2], chain[1], chain[0]]
    assert not pool.fold("vm1").states
    assert log_length(pool) == before + 1


def test_a_machine_state_keeps_its_members(
    pool: Pool, state: State, machine_state: MachineState, put: Put
) -> None:
    disk = state("on")
    ram, machine = machine_state("on", disk)
    put(pool, disk, ram, machine)
    with pytest.raises(HasDependants):
        pool.remove(disk.id)
    # RAM is of no use without its machine state.
    assert {gone.id for gone in pool.remove(disk.id, cascade=True)} == {disk.id, machine.id, ram.id}


def test_a_machine_state_goes_with_all_that_it_lists(
    pool: Pool, state: State, machine_state: MachineState, put: Put
) -> None:
    disk, data = state("on"), state("on", "other disk", object="vm1/data")
    ram, machine = machine_state("on", disk, data)
    put(pool, disk)
    put(pool, data, data=b"other disk")
    put(pool, ram, machine)
    child = state("next", object="vm1/data", parent=data)
    put(pool, child)
    before = log_length(pool)
    with pytest.raises(HasDependants, match="vm1/data next depend") as caught:
        pool.remove(machine.id)
    assert caught.value.dependants == ("vm1/data next",)
    assert log_length(pool) == before
    pool.remove(child.id)
    assert pool.remove(machine.id) == [machine, disk, data, ram]
    assert log_length(pool) == before + 2
    assert not pool.fold("vm1").states


def test_a_machine_state_is_replaced_as_a_whole(
    pool: Pool, state: State, machine_state: MachineState, put: Put
) -> None:
    disk = state("on")
    ram, machine = machine_state("on", disk)
    put(pool, disk, ram, machine)
    new = state("on", "new")
    assert new.digest is not None
    off = Manifest("vm1", "on", Kind.MACHINE, members={"vm1/disk": new.digest})
    for how in ({"replace": True}, {"supersede": True}):
        with pytest.raises(HasDependants, match="vm1 on"):
            put(pool, new, data=b"new", **how)
    staging = pool.stage([new.digest])
    pool.transport.create(staging.path(new.digest), b"new")
    assert pool.publish([new, off], staging, replace=True)
    staging.end()
    # the RAM went with the machine state that it was part of
    assert set(pool.fold("vm1").states) == {new.id, off.id}


def test_what_is_not_there_cannot_be_removed(pool: Pool, chain: list[Manifest]) -> None:
    with pytest.raises(NotFound, match="no state else"):
        pool.remove(StateId("vm1/disk", "else"))
    with pytest.raises(NotFound):
        pool.chain(StateId("vm2/disk", "install"))


def test_a_removal_can_be_refused_for_the_sake_of_bytes(pool: Pool, chain: list[Manifest]) -> None:
    def allowed(digests: set[Digest]) -> None:
        assert digests == {chain[2].digest}
        raise RefusedError("no")

    with pytest.raises(RefusedError, match="no"):
        pool.remove(chain[2].id, allowed=allowed)
    assert pool.find(chain[2].id) == chain[2]


# -- what is needed --------------------------------------------------------------------------------


def test_records_and_markers_need_bytes(pool: Pool, chain: list[Manifest]) -> None:
    records = {manifest.digest for manifest in chain}
    assert pool.needed() == records
    staging = pool.stage([Digest.of(b"coming")])
    assert pool.needed() == records | {Digest.of(b"coming")}
    staging.end()
    assert pool.needed() == records


def test_a_pool_with_damage_refuses_to_say_what_is_needed(
    pool: Pool, chain: list[Manifest]
) -> None:
    pool.transport.create(layout.record("vm1", 4), json.dumps({"format": 1}).encode())
    with pytest.raises(IntegrityError):
        pool.needed()


def test_the_same_bytes_of_two_machines_are_kept_once(
    pool: Pool, chain: list[Manifest], state: State, put: Put
) -> None:
    other = state("install", object="vm2/disk")
    assert put(pool, other)
    assert len(pool.transport.scan(layout.DATA)) == 3
    pool.remove(chain[0].id, cascade=True)
    assert chain[0].digest in pool.needed()
    assert pool.logged_machines() == ["vm1", "vm2"]


def test_bytes_that_others_stand_on_are_not_put_on_another_parent(
    pool: Pool, chain: list[Manifest], state: State, put: Put
) -> None:
    """
    A child that nobody wrote to is the same bytes on any parent: also where its name has gone to
    other bytes meanwhile.
    """
    parent, tip = chain[0], chain[1]
    put(pool, state("more", parent=tip), data=b"more")
    put(pool, state(tip.state, "new", parent=parent), data=b"new", supersede=True)
    put(pool, state("other"), data=b"other")
    moved = evolve(tip, parent=Parent("other", Digest.of(b"other")))
    before = dict(pool.fold("vm1").states)
    with pytest.raises(
        HasDependants, match="cannot be put on another parent: vm1/disk connect, vm1/disk more"
    ):
        put(pool, moved, data=tip.state.encode(), supersede=True)
    assert dict(pool.fold("vm1").states) == before
