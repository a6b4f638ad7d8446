"""Whether sources mean the same by one name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from statepool.errors import Conflict
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools.pool import Pool
from statepool.transfer.agree import agree, content_of, difference, is_same
from statepool.transfer.offers import Offer, Source, find_offer

if TYPE_CHECKING:
    from conftest import Lab

WANTED = StateId("vm1/disk", "customize")


def offer(pool: Pool, state: str = "customize") -> Offer:
    found = find_offer(Source(pool, pool.location.path.rpartition("/")[2]), StateId("vm1/disk", state))
    assert found is not None
    return found


def names(offers: tuple[Offer, ...]) -> list[str]:
    return [one.source.name for one in offers]


def test_the_same_everywhere(lab: Lab) -> None:
    offers = []
    for name in "abc":
        pool = lab.pool(name)
        lab.chain(pool, "install", "customize")
        offers.append(offer(pool))
    agreed = agree(WANTED, offers)
    assert (names(agreed.offers), agreed.warnings) == (["a", "b", "c"], ())
    assert difference(offers[0], offers[1]) is None


def test_a_file_that_nobody_vouches_for_comes_last(lab: Lab) -> None:
    lab.unmanaged("loose", "install")
    lab.unmanaged("loose", "customize", "install", tag="other")
    pool = lab.pool("kept")
    lab.chain(pool, "install", "customize")
    agreed = agree(WANTED, [offer(lab.pool("loose", create=False)), offer(pool)])
    assert names(agreed.offers) == ["kept", "loose"]


def test_other_content_is_a_conflict_that_names_all(lab: Lab) -> None:
    offers = []
    for name in "abc":
        pool = lab.pool(name)
        (base,) = lab.chain(pool, "install")
        lab.put(pool, "customize", base, tag=name)
        offers.append(offer(pool))
    with pytest.raises(Conflict) as caught:
        agree(WANTED, offers)
    for one in offers:
        assert f"{one.source} has {one.members[0].manifest.digest}" in caught.value.message
        assert f"--from {one.source.name}" in str(caught.value.hint)


def test_another_parent_is_other_content(lab: Lab) -> None:
    offers = []
    for name in "ab":
        pool = lab.pool(name)
        lab.put(pool, "customize", lab.put(pool, "install", tag=name))
        offers.append(offer(pool))
    assert offers[0].members[0].manifest.digest == offers[1].members[0].manifest.digest
    with pytest.raises(Conflict, match=r"in install below it: .*a has blake3:.*b has blake3:"):
        agree(WANTED, offers)


def test_a_longer_chain_is_other_content(lab: Lab) -> None:
    one, other = lab.pool("a"), lab.pool("b")
    lab.chain(one, "install", "customize")
    base = lab.put(other, "install", lab.put(other, "base"))
    lab.put(other, "customize", base)
    assert difference(offer(one), offer(other)) is not None
    with pytest.raises(Conflict):
        agree(WANTED, [offer(one), offer(other)])


def test_one_has_replaced_what_the_other_has(lab: Lab) -> None:
    old, new = lab.pool("old"), lab.pool("new")
    for pool in (old, new):
        lab.chain(pool, "install", "customize")
    lab.put(new, "customize", new.find(StateId("vm1/disk", "install")), tag="newer", replace=True)
    for offers in ([offer(old), offer(new)], [offer(new), offer(old)]):
        agreed = agree(WANTED, offers)
        assert names(agreed.offers) == ["new"]
        assert len(agreed.warnings) == 1
        assert "old has older content of vm1/disk customize" in agreed.warnings[0]
    # There and back again on one side: now each has replaced what the other has.
    parent = old.find(StateId("vm1/disk", "install"))
    lab.put(old, "customize", parent, tag="newer", replace=True)
    lab.put(old, "customize", parent, replace=True)
    with pytest.raises(Conflict):
        agree(WANTED, [offer(old), offer(new)])


def test_a_copy_that_was_rewritten_is_the_same() -> None:
    digests = [Digest("blake3", str(number) * 64) for number in range(3)]
    one = Manifest("vm1/disk", "a", digest=digests[0])
    assert is_same(one, evolve(one, digest=digests[1], origin=digests[0]))
    assert is_same(evolve(one, digest=digests[2], origin=digests[0]), evolve(one, digest=digests[1], origin=digests[0]))
    assert is_same(one, evolve(one, digest=None))
    assert not is_same(one, evolve(one, digest=digests[1]))


def test_what_a_machine_state_lists_is_its_content() -> None:
    digests = [Digest("blake3", str(number) * 64) for number in range(2)]
    state = Manifest("vm1", "on", kind=Kind.MACHINE, members={"vm1/a": digests[0], "vm1/b": digests[1]})
    assert content_of(state) == content_of(evolve(state, members={"vm1/b": digests[1], "vm1/a": digests[0]}))
    assert content_of(state) != content_of(evolve(state, members={"vm1/a": digests[1], "vm1/b": digests[1]}))
    assert content_of(Manifest("vm1/a", "on", digest=digests[0])) == digests[0]
