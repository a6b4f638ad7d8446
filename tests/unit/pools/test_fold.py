from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from attrs import evolve

from statepool.errors import BadRecord
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, Parent, StateId
from statepool.pools import fold as fold_module
from statepool.pools import lineage
from statepool.pools.fold import KEEP_NONCES, Change, Fold, Publish, Remove, member_ids

State = Callable[..., Manifest]
MachineState = Callable[..., list[Manifest]]


def after(fold: Fold, *changes: Change) -> Fold:
    return fold.after(fold.number + 1, f"n{fold.number + 1}", changes)


def publish(fold: Fold, *manifests: Manifest) -> Fold:
    return after(fold, *map(Publish, manifests))


def remove(manifest: Manifest) -> Remove:
    return Remove(manifest.id, manifest.digest)


@pytest.fixture
def chain(state: State) -> list[Manifest]:
    """Root first."""
    install = state("install")
    customize = state("customize", parent=install)
    return [install, customize, state("connect", parent=customize)]


@pytest.fixture
def fold(chain: list[Manifest]) -> Fold:
    return publish(Fold("vm1"), *chain)


def test_what_is_published_is_there(fold: Fold, chain: list[Manifest]) -> None:
    assert dict(fold.states) == {manifest.id: manifest for manifest in chain}
    assert fold.digests == {manifest.digest for manifest in chain}
    assert fold.chain(chain[2]) == (chain[2], chain[1], chain[0])
    assert (fold.number, fold.nonces) == (1, {1: "n1"})


def test_a_fold_does_not_change_with_the_next_one(fold: Fold, chain: list[Manifest]) -> None:
    before = dict(fold.states)
    after(fold, remove(chain[2]))
    assert dict(fold.states) == before
    assert fold.number == 1


def test_a_refused_record_changes_nothing(fold: Fold, chain: list[Manifest]) -> None:
    with pytest.raises(BadRecord, match="on which others stand"):
        after(fold, remove(chain[0]))
    assert publish(after(fold, remove(chain[2])), chain[2]).states == fold.states


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_whole_chain_goes_in_any_order_within_one_record(
    fold: Fold, chain: list[Manifest], order: tuple[int, ...]
) -> None:
    gone = after(fold, *(remove(chain[number]) for number in order))
    assert (dict(gone.states), gone.digests) == ({}, set())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_whole_chain_comes_in_any_order_within_one_record(
    chain: list[Manifest], order: tuple[int, ...]
) -> None:
    assert len(publish(Fold("vm1"), *(chain[number] for number in order)).states) == 3


def test_a_child_without_its_parent_cannot_come(chain: list[Manifest]) -> None:
    with pytest.raises(BadRecord, match="without its parent install"):
        publish(Fold("vm1"), chain[1])


def test_a_child_of_other_content_cannot_come(fold: Fold, state: State) -> None:
    with pytest.raises(BadRecord, match="without its parent"):
        publish(fold, state("other", parent=state("install", "else")))


def test_parents_are_of_the_same_object(fold: Fold, chain: list[Manifest], state: State) -> None:
    with pytest.raises(BadRecord, match="without its parent"):
        publish(fold, state("other", parent=chain[0], object="vm1/data"))


def test_records_speak_of_their_machine_only(state: State) -> None:
    with pytest.raises(BadRecord, match="speaks of vm2/disk"):
        publish(Fold("vm1"), state("install", object="vm2/disk"))


def test_no_state_is_its_own_ancestor(state: State) -> None:
    one, two = state("one"), state("two")
    with pytest.raises(BadRecord, match="its own ancestor"):
        publish(
            Fold("vm1"),
            evolve(one, parent=Parent("two", two.digest)),
            evolve(two, parent=Parent("one", one.digest)),
        )  # type: ignore[arg-type]


def test_a_name_cannot_be_published_twice(fold: Fold, state: State) -> None:
    with pytest.raises(BadRecord, match="over what is there"):
        publish(fold, state("install", "else"))


def test_what_is_not_there_cannot_go(fold: Fold, chain: list[Manifest]) -> None:
    with pytest.raises(BadRecord, match="which is not there"):
        after(fold, Remove(chain[2].id, Digest.of(b"else")))
    with pytest.raises(BadRecord, match="which is not there"):
        after(fold, Remove(StateId("vm1/disk", "else"), None))


def test_a_replacement_is_one_record(fold: Fold, chain: list[Manifest], state: State) -> None:
    new = state("connect", "new", parent=chain[1])
    replaced = after(fold, remove(chain[2]), Publish(new))
    assert replaced.states[new.id] is new
    assert chain[2].digest not in replaced.digests


# -- superseding -----------------------------------------------------------------------------------


def test_a_superseded_state_stays_for_its_children(
    fold: Fold, chain: list[Manifest], state: State
) -> None:
    new = state("install", "new")
    fold = after(fold, Publish(new, supersedes=chain[0].digest))
    assert fold.states[new.id] is new
    assert fold.superseded == [chain[0]]
    assert fold.chain(chain[2])[-1] is chain[0]
    assert fold.dependants([new.id]) == []


def test_a_superseded_state_goes_with_its_last_child(
    fold: Fold, chain: list[Manifest], state: State
) -> None:
    new = state("install", "new")
    fold = after(fold, Publish(new, supersedes=chain[0].digest))
    fold = after(fold, remove(chain[2]))
    assert fold.superseded == [chain[0]]
    fold = after(fold, remove(chain[1]))
    assert fold.superseded == []
    assert fold.digests == {new.digest}


def test_a_superseded_state_without_children_goes_at_once(
    fold: Fold, chain: list[Manifest], state: State
) -> None:
    fold = after(
        fold, Publish(state("connect", "new", parent=chain[1]), supersedes=chain[2].digest)
    )
    assert fold.superseded == []
    assert chain[2].digest not in fold.digests


def test_a_whole_chain_is_superseded_and_goes_below_its_tip(
    fold: Fold, chain: list[Manifest], state: State
) -> None:
    install = state("install", "install 2")
    customize = state("customize", "customize 2", parent=install)
    fold = after(fold, Publish(install, supersedes=chain[0].digest))
    fold = after(fold, Publish(customize, supersedes=chain[1].digest))
    assert {manifest.id.state for manifest in fold.superseded} == {"install", "customize"}
    fold = after(fold, remove(chain[2]))
    assert (fold.superseded, fold.digests) == ([], {install.digest, customize.digest})


def test_what_is_superseded_must_be_what_is_there(fold: Fold, state: State) -> None:
    with pytest.raises(BadRecord, match="over what is there"):
        after(fold, Publish(state("install", "new"), supersedes=Digest.of(b"else")))


# -- machine states --------------------------------------------------------------------------------


def test_a_machine_state_comes_with_its_members(state: State, machine_state: MachineState) -> None:
    disk = state("on")
    ram, machine = machine_state("on", disk)
    fold = publish(Fold("vm1"), disk, ram, machine)
    assert set(member_ids(machine)) == {disk.id, ram.id}
    assert fold.dependants([disk.id]) == [machine.id]
    assert fold.dependants([ram.id]) == [machine.id]
    assert fold.digests == {disk.digest, ram.digest}


def test_a_machine_state_without_a_member_cannot_come(
    state: State, machine_state: MachineState
) -> None:
    disk = state("on")
    ram, machine = machine_state("on", disk)
    with pytest.raises(BadRecord, match="lists vm1/disk"):
        publish(Fold("vm1"), ram, machine)
    with pytest.raises(BadRecord, match="lists ram"):
        publish(Fold("vm1"), disk, machine)


def test_a_member_cannot_go_alone(state: State, machine_state: MachineState) -> None:
    disk = state("on")
    ram, machine = machine_state("on", disk)
    fold = publish(Fold("vm1"), disk, ram, machine)
    for member in (disk, ram):
        with pytest.raises(BadRecord, match="takes"):
            after(fold, remove(member))
    with pytest.raises(BadRecord, match="takes"):
        after(fold, Publish(state("on", "new"), supersedes=disk.digest))
    assert not after(fold, remove(machine), remove(disk), remove(ram)).states


def test_dependants_of_a_state_below_a_machine_state(
    state: State, machine_state: MachineState
) -> None:
    install = state("install")
    disk = state("on", parent=install)
    ram, machine = machine_state("on", disk)
    fold = publish(Fold("vm1"), install, disk, ram, machine)
    assert fold.dependants([install.id]) == [machine.id, disk.id]


def test_dependants_are_tips_first(fold: Fold, chain: list[Manifest]) -> None:
    assert fold.dependants([chain[0].id]) == [chain[2].id, chain[1].id]
    assert fold.dependants([chain[2].id]) == []
    assert fold.dependants([StateId("vm1/disk", "else")]) == []


# -- looking ---------------------------------------------------------------------------------------


def test_content_is_found_by_the_digest_before_it_was_rewritten(state: State) -> None:
    original = Digest.of(b"before")
    install = state("install", origin=original)
    fold = publish(Fold("vm1"), install)
    assert fold.find_content(install.id, original) is install
    assert fold.find_content(install.id, install.digest) is install  # type: ignore[arg-type]
    assert fold.find_content(StateId("vm1/disk", "else"), original) is None


def test_the_same_bytes_under_two_names_are_needed_until_both_are_gone(state: State) -> None:
    one, two = state("one", "bytes"), state("two", "bytes")
    fold = publish(Fold("vm1"), one, two)
    fold = after(fold, remove(one))
    assert fold.digests == {two.digest}
    assert after(fold, remove(two)).digests == set()


def test_nonces_are_remembered_for_a_while(state: State) -> None:
    fold = Fold("vm1")
    one = state("one")
    for _ in range(KEEP_NONCES):
        fold = after(publish(fold, one), remove(one))
    assert len(fold.nonces) == KEEP_NONCES
    assert max(fold.nonces) == fold.number


# -- checkpoints -----------------------------------------------------------------------------------


def restored(fold: Fold) -> Fold:
    return Fold.restore(
        fold.machine, fold.number, dict(fold.nonces), fold.states.values(), fold.superseded
    )


def test_a_restored_fold_goes_on_like_the_first(
    fold: Fold, chain: list[Manifest], state: State
) -> None:
    fold = after(fold, Publish(state("install", "new"), supersedes=chain[0].digest))
    again = restored(fold)
    assert (again.number, again.nonces, again.states, again.superseded) == (
        fold.number,
        fold.nonces,
        fold.states,
        fold.superseded,
    )
    for tip in (chain[2], chain[1]):
        fold, again = after(fold, remove(tip)), after(again, remove(tip))
        assert (again.states, again.superseded, again.digests) == (
            fold.states,
            fold.superseded,
            fold.digests,
        )


def test_a_checkpoint_that_lacks_a_parent(chain: list[Manifest]) -> None:
    with pytest.raises(BadRecord, match="without its parent"):
        Fold.restore("vm1", 1, {}, chain[1:], [])


def test_a_checkpoint_that_lists_a_name_twice(state: State) -> None:
    with pytest.raises(BadRecord, match="twice"):
        Fold.restore("vm1", 1, {}, [state("one"), state("one", "else")], [])


def test_a_checkpoint_in_which_states_stand_on_each_other(
    chain: list[Manifest], state: State
) -> None:
    install, customize, connect = chain
    assert connect.digest is not None
    round_about = evolve(install, parent=Parent(connect.state, connect.digest))
    on_it = state("on", parent=connect)
    itself = state("self")
    assert itself.digest is not None
    itself = evolve(itself, parent=Parent("self", itself.digest))
    for states, name in (
        ([on_it, round_about, customize, connect], "install|customize|connect"),
        ([customize, install, itself], "self"),
    ):
        with pytest.raises(
            BadRecord, match=f"checkpoint 1 of vm1 makes vm1/disk ({name}) its own ancestor"
        ) as caught:
            Fold.restore("vm1", 1, {}, states, [])
        assert caught.value.object == "vm1"


def test_a_checkpoint_in_which_a_chain_has_a_name_twice(
    chain: list[Manifest], state: State
) -> None:
    again = state("install", "new", parent=chain[1])
    for tip in ([], [state("tip", parent=again)]):
        with pytest.raises(BadRecord, match="makes vm1/disk install its own ancestor"):
            Fold.restore("vm1", 1, {}, [again, chain[1], *tip], [chain[0]])
    beside = state("install", "new")
    assert len(Fold.restore("vm1", 1, {}, [beside, *chain[1:]], [chain[0]]).digests) == 4


def test_the_order_in_a_checkpoint_does_not_matter(chain: list[Manifest]) -> None:
    for states in (chain, chain[::-1], [chain[1], chain[2], chain[0]]):
        assert len(Fold.restore("vm1", 1, {}, states, []).chain(chain[2])) == 3


@pytest.mark.parametrize("closed", [False, True])
def test_a_checkpoint_with_a_very_long_chain(state: State, closed: bool) -> None:
    made = [state("0")]
    for number in range(1, 20_000):
        made.append(state(str(number), parent=made[-1]))
    assert made[-1].digest is not None
    if closed:
        made[0] = evolve(made[0], parent=Parent(made[-1].state, made[-1].digest))
        with pytest.raises(BadRecord, match="its own ancestor"):
            Fold.restore("vm1", 1, {}, reversed(made), [])
    else:
        assert len(Fold.restore("vm1", 1, {}, reversed(made), []).states) == 20_000


def test_a_chain_is_as_long_as_a_log_permits(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fold_module, lineage):
        monkeypatch.setattr(module, "MOST_IN_CHAIN", 10)
    made = [state("0")]
    for number in range(1, 11):
        made.append(state(str(number), parent=made[-1]))
    for states in (made[:-1], made[-2::-1]):
        assert len(publish(Fold("vm1"), *states).chain(made[-2])) == 10
        assert len(Fold.restore("vm1", 1, {}, states, []).chain(made[-2])) == 10
    for states in (made, made[::-1]):
        with pytest.raises(BadRecord, match="more than 10 states"):
            publish(Fold("vm1"), *states)
        with pytest.raises(BadRecord, match="more than 10 states"):
            Fold.restore("vm1", 1, {}, states, [])
    with pytest.raises(BadRecord, match="more than 10 states"):
        publish(publish(Fold("vm1"), *made[:-1]), made[-1])


def test_a_name_comes_back_on_a_chain_that_a_writer_may_make(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To see that it is not in the chain yet, a reader walks no longer than that."""
    monkeypatch.setattr(fold_module, "DEEPEST", 10)
    old = state("one")
    made = [state("0")]
    for number in range(1, 11):
        made.append(state(str(number), parent=made[-1]))
    fold = publish(Fold("vm1"), old, state("on it", parent=old), *made)
    assert after(
        fold, Publish(state("one", "new", parent=made[-3]), supersedes=old.digest)
    ).superseded == [old]
    with pytest.raises(BadRecord, match="above more states than any writer may"):
        after(fold, Publish(state("one", "new", parent=made[-2]), supersedes=old.digest))


def test_a_checkpoint_with_a_machine_state_that_lacks_a_member(
    state: State, machine_state: MachineState
) -> None:
    disk = state("on")
    assert disk.digest is not None
    ghost = Manifest(
        "vm1", "on", Kind.MACHINE, members={"vm1/disk": disk.digest, "ram": Digest.of(b"RAM")}
    )
    with pytest.raises(
        BadRecord, match="checkpoint 1 of vm1 lists ram in vm1 on, which is not there"
    ):
        Fold.restore("vm1", 1, {}, [disk, ghost], [])
    with pytest.raises(BadRecord, match="lists vm1/disk in vm1 on, which is not there"):
        Fold.restore(
            "vm1", 1, {}, [evolve(ghost, members={"vm1/disk": Digest.of(b"other")}), disk], []
        )
    with pytest.raises(BadRecord, match="lists vm1/disk in vm1 on"):
        Fold.restore("vm1", 1, {}, [evolve(ghost, members={"vm1/disk": disk.digest})], [disk])


def test_a_checkpoint_with_states_of_another_machine(state: State) -> None:
    child = state("child", object="vm2/disk", parent=state("old", object="vm2/disk"))
    with pytest.raises(BadRecord, match="checkpoint 1 of vm1 speaks of vm2/disk"):
        Fold.restore("vm1", 1, {}, [state("one"), state("one", object="vm2/disk")], [])
    with pytest.raises(BadRecord, match="checkpoint 1 of vm1 speaks of vm2/disk"):
        Fold.restore("vm1", 1, {}, [child], [state("old", object="vm2/disk")])


def test_a_checkpoint_that_keeps_a_machine_state_without_its_name(state: State) -> None:
    disk = state("on")
    assert disk.digest is not None
    with pytest.raises(BadRecord, match="keeps vm1 on, which has no bytes"):
        Fold.restore(
            "vm1",
            1,
            {},
            [disk],
            [Manifest("vm1", "on", Kind.MACHINE, members={"vm1/disk": disk.digest})],
        )


def test_a_checkpoint_that_lists_bytes_twice(state: State) -> None:
    with pytest.raises(BadRecord, match="lists vm1/disk one twice"):
        Fold.restore("vm1", 1, {}, [state("one")], [state("one")])
    with pytest.raises(BadRecord, match="lists vm1/disk one twice"):
        Fold.restore("vm1", 1, {}, [], [state("one"), state("one")])


def test_kinds_are_told_apart(state: State) -> None:
    ram = state("on", "RAM", object="vm1", kind=Kind.RAM)
    machine = Manifest("vm1", "on", Kind.MACHINE, members={"ram": ram.digest})  # type: ignore[dict-item]
    assert len({ram.id, machine.id}) == 2
    assert len(publish(Fold("vm1"), ram, machine).states) == 2


# -- the same bytes again --------------------------------------------------------------------------


@pytest.fixture
def replaced(fold: Fold, chain: list[Manifest], state: State) -> Fold:
    """
    ``customize`` was superseded: its old bytes are kept without a name, for the sake of
    ``connect``.
    """
    new = state("customize", "new", parent=chain[0])
    return after(fold, Publish(new, supersedes=chain[1].digest))


def test_bytes_that_get_their_name_back_are_counted_once(
    replaced: Fold, chain: list[Manifest], state: State
) -> None:
    new = replaced.states[chain[1].id]
    back = after(replaced, Publish(chain[1], supersedes=new.digest))
    assert [back.has_children(manifest) for manifest in chain] == [True, True, False]
    for fold in (back, restored(back)):
        gone = after(after(after(fold, remove(chain[2])), remove(chain[1])), remove(chain[0]))
        assert (dict(gone.states), gone.digests) == ({}, set())


@pytest.mark.parametrize("named", [True, False])
def test_bytes_stay_on_their_parent_under_those_that_stand_on_them(
    fold: Fold, replaced: Fold, chain: list[Manifest], state: State, named: bool
) -> None:
    """A child that nobody wrote to is the same bytes on any parent."""
    now = fold if named else replaced
    other = state("other")
    moved = evolve(chain[1], parent=Parent("other", other.digest))
    now = publish(now, other)
    with pytest.raises(BadRecord, match="another parent under those that stand on it"):
        after(now, Publish(moved, supersedes=now.states[chain[1].id].digest))
    with pytest.raises(BadRecord, match="another parent under those that stand on it"):
        after(now, remove(now.states[chain[1].id]), Publish(moved))
    free = after(now, remove(chain[2]))
    assert after(free, Publish(moved, supersedes=free.states[chain[1].id].digest)).chain(moved) == (
        moved,
        other,
    )


def test_whoever_stands_on_bytes_is_known_with_and_without_a_name(
    replaced: Fold, chain: list[Manifest]
) -> None:
    assert replaced.standing_on(chain[1]) == [chain[2].id]
    assert replaced.standing_on(replaced.states[chain[1].id]) == []


def test_a_child_of_what_lost_its_name_goes_while_another_one_stays(state: State) -> None:
    """
    The name means other content, which is removed; then one of two that stand on the old content.
    """
    old, new = state("one"), state("one", "new")
    left, right = state("left", parent=old), state("right", parent=old)
    superseded = after(publish(Fold("vm1"), old, left, right), Publish(new, supersedes=old.digest))
    for fold in (superseded, restored(superseded)):
        later = after(after(fold, remove(new)), remove(left))
        assert later.superseded == [old]
        assert not after(later, remove(right)).digests


def test_a_name_that_comes_back_above_what_has_lost_it(state: State) -> None:
    old, new = state("one"), state("one", "new")
    tip = state("tip", parent=old)
    superseded = after(publish(Fold("vm1"), old, tip), Publish(new, supersedes=old.digest))
    for fold in (superseded, restored(superseded), after(superseded, remove(new))):
        supersedes = new.digest if fold.states.get(new.id) is not None else None
        with pytest.raises(BadRecord, match="makes vm1/disk one its own ancestor"):
            after(fold, Publish(state("one", "third", parent=tip), supersedes=supersedes))
        assert after(
            fold,
            Publish(state("one", "third", parent=state("root")), supersedes=supersedes),
            Publish(state("root")),
        ).states
    with pytest.raises(BadRecord, match="its own ancestor"):
        after(
            publish(Fold("vm1"), old, tip),
            Publish(state("one", "third", parent=tip), supersedes=old.digest),
        )


def test_what_one_record_publishes_and_supersedes(state: State) -> None:
    first, second = state("one", "first"), state("one", "second")
    tip = state("tip", parent=first)
    fold = after(
        Fold("vm1"), Publish(first), Publish(tip), Publish(second, supersedes=first.digest)
    )
    assert (fold.superseded, fold.chain(tip)) == ([first], (tip, first))
    with pytest.raises(BadRecord, match="its own ancestor"):
        after(
            Fold("vm1"),
            Publish(second),
            Publish(state("tip", parent=second)),
            Publish(state("one", parent=state("tip", parent=second)), second.digest),
        )
