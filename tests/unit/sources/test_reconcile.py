"""Whether sources mean the same by one name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from statepool.copying.fetch import Fetch
from statepool.errors import Conflict, DigestMismatch
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.sources.reconcile import content_of, difference, is_same, reconcile
from statepool.sources.source import RemoteChain

if TYPE_CHECKING:
    from tests.support.lab import Lab

WANTED = StateId("vm1/disk", "customize")


def offer(pool: Pool, state: str = "customize") -> RemoteChain:
    found = PoolSource(pool, pool.location.path.rpartition("/")[2]).resolve(
        StateId("vm1/disk", state)
    )
    assert found is not None
    return found


def names(offers: tuple[RemoteChain, ...]) -> list[str]:
    return [one.source.name for one in offers]


def test_the_same_everywhere(lab: Lab) -> None:
    offers = []
    for name in "abc":
        pool = lab.pool(name)
        lab.chain(pool, "install", "customize")
        offers.append(offer(pool))
    agreed = reconcile(WANTED, offers)
    assert (names(agreed.offers), agreed.warnings) == (["a", "b", "c"], ())
    assert difference(offers[0], offers[1]) is None


def test_a_file_that_nobody_vouches_for_comes_last(lab: Lab) -> None:
    lab.unmanaged("loose", "install")
    lab.unmanaged("loose", "customize", "install", tag="other")
    pool = lab.pool("kept")
    lab.chain(pool, "install", "customize")
    agreed = reconcile(WANTED, [offer(lab.pool("loose", create=False)), offer(pool)])
    assert names(agreed.offers) == ["kept", "loose"]


def test_other_content_is_a_conflict_that_names_all(lab: Lab) -> None:
    offers = []
    for name in "abc":
        pool = lab.pool(name)
        (base,) = lab.chain(pool, "install")
        lab.put(pool, "customize", base, tag=name)
        offers.append(offer(pool))
    with pytest.raises(Conflict) as caught:
        reconcile(WANTED, offers)
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
    with pytest.raises(Conflict, match=r"in install below it: .*a has blake3p:.*b has blake3p:"):
        reconcile(WANTED, offers)


def test_a_longer_chain_is_other_content(lab: Lab) -> None:
    one, other = lab.pool("a"), lab.pool("b")
    lab.chain(one, "install", "customize")
    base = lab.put(other, "install", lab.put(other, "base"))
    lab.put(other, "customize", base)
    assert difference(offer(one), offer(other)) is not None
    with pytest.raises(Conflict):
        reconcile(WANTED, [offer(one), offer(other)])


def test_the_history_of_a_log_is_no_proof(lab: Lab) -> None:
    """Whoever can write a log can write that it had, and replaced, what another source has."""
    old, new = lab.pool("old"), lab.pool("new")
    for pool in (old, new):
        lab.chain(pool, "install", "customize")
    lab.put(new, "customize", new.find(StateId("vm1/disk", "install")), tag="newer", replace=True)
    for offers in ([offer(old), offer(new)], [offer(new), offer(old)]):
        with pytest.raises(Conflict, match="the sources disagree") as caught:
            reconcile(WANTED, offers)
        assert "authority = true" in str(caught.value.hint)


def test_the_authority_is_right(lab: Lab) -> None:
    offers = []
    for name in "abc":
        pool = lab.pool(name)
        lab.put(pool, "customize", lab.put(pool, "install"), tag="right" if name == "c" else name)
        offers.append(offer(pool))
    right = evolve(offers[1], source=evolve(offers[1].source, authority=True))
    agreed = reconcile(WANTED, [offers[0], right, offers[2]])
    assert names(agreed.offers) == ["b"]
    assert len(agreed.warnings) == 2
    assert all(
        f"than {right.source}, which is the authority" in warning for warning in agreed.warnings
    )
    another = evolve(offers[2], source=evolve(offers[2].source, authority=True))
    with pytest.raises(Conflict) as caught:  # of two, nobody knows which one is
        reconcile(WANTED, [offers[0], right, another])
    assert str(offers[0].source) not in caught.value.message


def claiming(one: RemoteChain, other: RemoteChain) -> RemoteChain:
    """
    :returns: an offer whose log says of each of its members that it was rewritten from that of the
        other one
    """
    pairs = zip(one.members, other.members, strict=True)
    return evolve(
        one,
        members=tuple(
            evolve(mine, manifest=evolve(mine.manifest, origin=yours.manifest.digest))
            for mine, yours in pairs
        ),
    )


def test_an_origin_gives_way_and_takes_nothing(lab: Lab) -> None:
    """
    The bytes are those of the source that claims nothing, wherever it stands in the order; the
    other one is not even a second choice.
    """
    pools = [lab.pool(name) for name in ("good", "evil")]
    for pool in pools:
        lab.put(
            pool, "customize", lab.put(pool, "install"), tag=pool.location.path.rpartition("/")[2]
        )
    good, evil = map(offer, pools)
    evil = claiming(evil, good)
    for offers in ([good, evil], [evil, good]):
        agreed = reconcile(WANTED, offers)
        assert (names(agreed.offers), agreed.warnings) == (["good"], ())
    with pytest.raises(Conflict):  # each says that the other one is right
        reconcile(WANTED, [claiming(good, evil), evil])
    # The same origin, which nobody has, makes them no more alike.
    third = lab.pool("third")
    lab.put(third, "customize", lab.put(third, "install"), tag="third")
    with pytest.raises(Conflict):
        reconcile(WANTED, [claiming(good, offer(third)), claiming(evil, offer(third))])


def test_another_parent_is_no_origin(lab: Lab) -> None:
    one, other = lab.pool("one"), lab.pool("other")
    lab.put(one, "customize", lab.put(one, "install", tag="one"))
    lab.put(other, "customize", lab.put(other, "install", tag="other"))
    lying = claiming(offer(one), offer(other))
    lying = evolve(lying, members=(lying.members[0], offer(one).members[1]))
    with pytest.raises(Conflict):
        reconcile(WANTED, [lying, offer(other)])


def test_a_file_that_nobody_vouches_for_must_have_the_bytes_that_a_log_does(lab: Lab) -> None:
    lab.unmanaged("loose", "install")
    lab.unmanaged("loose", "customize", "install", tag="other")
    lab.unmanaged("short", "customize")
    pool = lab.pool("kept")
    lab.chain(pool, "install", "customize")
    kept = offer(pool)
    agreed = reconcile(
        WANTED,
        [offer(lab.pool("short", create=False)), offer(lab.pool("loose", create=False)), kept],
    )
    assert names(agreed.offers) == ["kept", "loose"]
    assert [member.manifest.digest for member in agreed.offers[1].members] == [
        member.manifest.digest for member in kept.members
    ]
    with pytest.raises(DigestMismatch):
        Fetch(lab.cache(), agreed.offers[1]).run()


def test_nobody_has_hashed_it() -> None:
    digests = [Digest("blake3", str(number) * 64) for number in range(3)]
    one = Manifest("vm1/disk", "a", digest=digests[0])
    assert is_same(one, evolve(one, digest=None))
    assert not is_same(one, evolve(one, digest=digests[1]))
    assert not is_same(one, evolve(one, digest=digests[1], origin=digests[0]))


def test_what_a_machine_state_lists_is_its_content() -> None:
    digests = [Digest("blake3", str(number) * 64) for number in range(2)]
    state = Manifest(
        "vm1", "on", kind=Kind.MACHINE, members={"vm1/a": digests[0], "vm1/b": digests[1]}
    )
    assert content_of(state) == content_of(
        evolve(state, members={"vm1/b": digests[1], "vm1/a": digests[0]})
    )
    assert content_of(state) != content_of(
        evolve(state, members={"vm1/a": digests[1], "vm1/b": digests[1]})
    )
    assert content_of(Manifest("vm1/a", "on", digest=digests[0])) == digests[0]
