"""Bringing a chain from a source into the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from statepool.cache.cache import Cache
from statepool.cache.trust import FileStatus
from statepool.copying.fetch import Fetch
from statepool.errors import (
    AccessDenied,
    Conflict,
    DigestMismatch,
    IntegrityError,
    NoSpace,
    StatePoolError,
    UnsafeImage,
)
from statepool.model.digest import Digest
from statepool.model.manifest import StateId
from statepool.model.outcomes import Verified
from statepool.pools import layout
from statepool.testing.faults import Fault, FaultyTransport, Flip, Full, Stop, Truncate, on
from statepool.testing.trees import photograph

DATA = ".statepool/data/*"


def state(name: str) -> StateId:
    return StateId("vm1/disk", name)


def test_a_whole_chain(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    chain = lab.chain(pool, "install", "customize", "connect")
    fetched = lab.fetch(cache, pool, "connect")
    assert fetched.chain == chain
    assert (fetched.verified, fetched.how) == (Verified.ARRIVED, "copy")
    assert fetched.bytes > 0
    for manifest in chain:
        path = cache.data(manifest.digest)
        assert Digest.of(path.read_bytes()) == manifest.digest
        assert path.stat().st_mode & 0o777 == 0o444
        assert cache.trust.file_status(manifest.digest, path.stat()) is FileStatus.TRUSTED
        assert cache.trust.source(manifest.digest) == str(pool)
        assert (cache.root / layout.view(manifest.id)).resolve() == path
    assert lab.leftovers(cache.pool) == []


def test_only_what_is_missing(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    chain = lab.chain(pool, "install", "customize")
    first = lab.fetch(cache, pool, "install")
    second = lab.fetch(cache, pool, "customize")
    again = lab.fetch(cache, pool, "customize")
    assert second.chain == chain
    assert first.bytes > 0 < second.bytes
    assert (again.bytes, again.how, again.verified) == (0, "none", Verified.TRUSTED)


def test_bytes_that_two_states_share_are_there_once(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    lab.put(pool, "one", tag="same")
    lab.put(pool, "two", tag="same")
    lab.fetch(cache, pool, "one")
    lab.fetch(cache, pool, "two")
    assert len(lab.data(cache.pool)) == 1
    assert set(cache.pool.fold("vm1").states) == {state("one"), state("two")}


FAULTS: dict[str, tuple[Callable[[], Fault], type[StatePoolError]]] = {
    "flipped": (lambda: Flip(matches=on("fetch", path=DATA), offset=200), DigestMismatch),
    "cut": (lambda: Truncate(matches=on("fetch", path=DATA), keep=5000), IntegrityError),
    "stopped": (lambda: Stop(matches=on("fetch", path=DATA)), StatePoolError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_arrives_spoilt_leaves_nothing(lab: Any, cache: Cache, fault: str) -> None:
    make, error = FAULTS[fault]
    lab.chain(lab.pool(), "install", "customize")
    before = photograph(cache.root)
    spoilt = lab.pool(transport=FaultyTransport(lab.pool().transport, make()))
    with pytest.raises(error):
        lab.fetch(cache, spoilt, "customize")
    assert photograph(cache.root) == before
    assert lab.fetch(cache, lab.pool(), "customize").verified is Verified.ARRIVED


def test_a_tip_that_arrives_spoilt_leaves_its_parents(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    tip, install = lab.chain(pool, "install", "customize")
    spoilt = lab.pool(
        transport=FaultyTransport(
            pool.transport, Flip(matches=on("fetch", path=f"*{tip.digest.hex}"), offset=200)
        )
    )
    with pytest.raises(DigestMismatch) as caught:
        lab.fetch(cache, spoilt, "customize")
    assert caught.value.expected == str(tip.digest)
    assert caught.value.actual.startswith("blake3p:")
    assert caught.value.state == "customize"
    assert set(cache.pool.fold("vm1").states) == {install.id}
    assert lab.leftovers(cache.pool) == []


def test_a_replaced_tip(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    old = lab.put(pool, "install", tag="old")
    lab.fetch(cache, pool, "install")
    new = lab.put(pool, "install", tag="new", replace=True)
    fetched = lab.fetch(cache, pool, "install")
    assert fetched.chain == (new,)
    assert lab.data(cache.pool) == {new.digest}
    assert cache.trust.source(old.digest) is None


def test_a_replaced_state_with_a_cached_child(lab: Any, cache: Cache) -> None:
    """The child keeps the old parent, which has no name any more; they go together."""
    pool, other = lab.pool(), lab.pool("other")
    child, old = lab.chain(pool, "install", "customize")
    lab.fetch(cache, pool, "customize")
    new = lab.put(other, "install", tag="new")
    lab.fetch(cache, other, "install")
    fold = cache.pool.fold("vm1")
    assert fold.states[old.id] == new
    assert fold.chain(fold.states[child.id]) == (child, old)
    assert lab.data(cache.pool) == {child.digest, old.digest, new.digest}
    gone = cache.pool.remove(child.id)
    cache.drop({manifest.digest for manifest in gone} | {old.digest})
    assert lab.data(cache.pool) == {new.digest}


def test_the_same_bytes_over_another_parent(lab: Any, cache: Cache) -> None:
    """
    A child that nobody wrote to has the same bytes over any parent: those in the cache are only
    right over the parent that came with them.
    """
    child, old = lab.chain(lab.pool(), "install", "customize")
    lab.fetch(cache, lab.pool(), "customize")
    other = lab.pool("other")
    new = lab.put(other, "install", tag="new")
    same = lab.put(other, "customize", new)
    assert same.digest == child.digest
    assert new.digest != old.digest
    fetched = lab.fetch(cache, other, "customize")
    assert fetched.chain == (same, new)
    assert cache.pool.chain(child.id) == (same, new)


def test_what_only_the_cache_has_is_not_lost(lab: Any, cache: Cache) -> None:
    mine = lab.put(cache.pool, "install", tag="mine")
    pool = lab.pool()
    lab.put(pool, "install", tag="theirs")
    before = photograph(cache.root)
    with pytest.raises(Conflict, match="is in no source"):
        lab.fetch(cache, pool, "install")
    assert photograph(cache.root) == before
    cache.sign(mine.digest, cache.status(mine.digest), flushed=True, source="file:///elsewhere")
    assert lab.fetch(cache, pool, "install").chain[0].digest != mine.digest


def test_a_damaged_file_is_mended(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    (install,) = lab.chain(pool, "install")
    lab.fetch(cache, pool, "install")
    path = cache.data(install.digest)
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    fetched = lab.fetch(cache, pool, "install")
    assert fetched.bytes > 0
    assert Digest.of(path.read_bytes()) == install.digest


def test_a_touched_file_is_hashed_and_not_moved(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    (install,) = lab.chain(pool, "install")
    lab.fetch(cache, pool, "install")
    cache.data(install.digest).chmod(0o644)
    fetched = lab.fetch(cache, pool, "install")
    assert (fetched.bytes, fetched.verified) == (0, Verified.REHASHED)


def test_a_file_that_is_gone_comes_again(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    (install,) = lab.chain(pool, "install")
    lab.fetch(cache, pool, "install")
    cache.data(install.digest).unlink()
    assert lab.fetch(cache, pool, "install").bytes > 0
    assert cache.data(install.digest).exists()


# -- files of another tool -------------------------------------------------------------------------


def test_files_of_another_tool_get_digests(lab: Any, cache: Cache) -> None:
    lab.unmanaged("pool", "install")
    lab.unmanaged("pool", "customize", "install")
    fetched = lab.fetch(cache, lab.pool(create=False), "customize")
    assert fetched.verified is Verified.UNMANAGED
    tip, root = fetched.chain
    assert tip.parent is not None
    assert tip.parent.digest == root.digest
    assert Digest.of(cache.data(tip.digest).read_bytes()) == tip.digest
    assert tip.origin is None  # it had a plain sibling name already


def test_a_hostile_file_is_refused_before_anything_moves(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    lab.chain(pool, "install")
    before = photograph(cache.root)
    content = lab.image("x", "install").replace(b"install.qcow2", b"../stall.qcow")
    path = lab.root / "pool" / layout.data(Digest.of(content))
    path.write_bytes(content)
    lab.unmanaged("pool", "bad").write_bytes(content)
    with pytest.raises(UnsafeImage) as caught:
        lab.fetch(cache, pool, "bad")
    assert caught.value.check == "backing-outside"
    assert photograph(cache.root) == before


# -- space -----------------------------------------------------------------------------------------


def test_no_space_is_known_before_anything_moves(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, pool = lab.cache(), lab.pool()
    lab.chain(pool, "install", "customize")
    before = photograph(cache.root)
    monkeypatch.setattr(cache.pool.transport, "free_space", lambda: 4096)
    with pytest.raises(NoSpace) as caught:
        lab.fetch(cache, pool, "customize")
    assert caught.value.needed > caught.value.available == 4096
    assert photograph(cache.root) == before


def test_a_disk_that_fills_meanwhile(lab: Any, cache: Cache) -> None:
    lab.chain(lab.pool(), "install")
    before = photograph(cache.root)
    full = lab.pool(transport=FaultyTransport(lab.pool().transport, Full(matches=on("fetch"))))
    with pytest.raises(NoSpace):
        lab.fetch(cache, full, "install")
    assert photograph(cache.root) == before


def test_the_least_recently_used_goes(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, pool = lab.cache(min_free=1 << 20), lab.pool()
    for number, name in enumerate(("one", "two", "three")):
        (made,) = lab.chain(pool, name)
        lab.fetch(cache, pool, name)
        os.utime(
            cache.root / f".statepool/trust/{made.digest.file_name}.json",
            (1000 + number, 1000 + number),
        )
    mine = lab.put(cache.pool, "mine")
    lab.chain(pool, "four")
    used = cache.chains.use(cache.pool.chain(state("one")), lab.root / "work.qcow2")
    assert used.stat() is not None
    (size,) = {
        entry.size
        for entry in (
            manifest for manifest in cache.pool.fold("vm1").manifests if manifest.state == "two"
        )
    }

    def free() -> int:
        # Room for what comes as soon as one state is gone, beside what must stay free.
        return (1 << 20) * 2 + size * (4 - len(lab.data(cache.pool)))

    monkeypatch.setattr(cache.pool.transport, "free_space", free)
    lab.fetch(cache, pool, "four")
    # "one" is older, but a working image stands on it; what nobody else has stays as well.
    assert {found.state for found in cache.pool.fold("vm1").states} == {
        "one",
        "three",
        "four",
        "mine",
    }
    assert mine.digest in lab.data(cache.pool)


def test_nothing_goes_for_what_no_room_can_be_made_for(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source can claim any length."""
    cache, pool = lab.cache(min_free=1 << 20), lab.pool()
    for name in ("one", "two"):
        lab.chain(pool, name)
        lab.fetch(cache, pool, name)
    offer = lab.offer(pool, "one")
    monkeypatch.setattr(cache.pool.transport, "free_space", lambda: 1 << 21)
    claimed = evolve(offer.members[0].manifest, size=1 << 50, digest=Digest.of(b"claimed"))
    with pytest.raises(NoSpace):
        Fetch(cache, evolve(offer, members=(evolve(offer.members[0], manifest=claimed),))).run()
    assert {found.state for found in cache.pool.fold("vm1").states} == {"one", "two"}


# -- link pools ------------------------------------------------------------------------------------


def test_a_link_pool_is_referred_to(lab: Any, cache: Cache) -> None:
    lab.chain(lab.pool(), "install", "customize")
    linked = lab.pool(scheme="link")
    fetched = lab.fetch(cache, linked, "customize")
    assert (fetched.how, fetched.bytes) == ("link", 0)
    for manifest in fetched.chain:
        assert cache.data(manifest.digest).is_symlink()
        assert os.path.samefile(
            cache.data(manifest.digest), lab.root / "pool" / layout.data(manifest.digest)
        )


def test_data_is_never_replaced_by_a_link(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    lab.chain(pool, "install")
    lab.fetch(cache, pool, "install")
    again = lab.fetch(cache, lab.pool(scheme="link"), "install")
    assert not cache.data(again.chain[0].digest).is_symlink()


def test_a_dead_link_is_mended(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    (install,) = lab.chain(pool, "install")
    lab.fetch(cache, lab.pool(scheme="link"), "install")
    spare = lab.cache("spare")
    lab.fetch(spare, pool, "install")
    (lab.root / "pool" / layout.data(install.digest)).unlink()
    assert lab.fetch(cache, spare.pool, "install").bytes > 0
    assert not cache.data(install.digest).is_symlink()
    assert Digest.of(cache.data(install.digest).read_bytes()) == install.digest


def test_a_link_whose_file_was_changed_is_not_used(lab: Any, cache: Cache) -> None:
    pool = lab.pool()
    (install,) = lab.chain(pool, "install")
    path = lab.root / "pool" / layout.data(install.digest)
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    linked = lab.pool(scheme="link")
    lab.fetch(cache, linked, "install")
    path.chmod(0o644)
    path.write_bytes(lab.image("other"))
    with pytest.raises(IntegrityError):
        lab.fetch(cache, linked, "install")


def test_a_link_pool_that_may_not_be_written(
    lab: Any, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.chain(lab.pool(), "install")
    linked = lab.pool(scheme="link")

    def create(path: str, data: bytes, *, flush: bool = True) -> None:
        raise AccessDenied("read-only")

    monkeypatch.setattr(linked.transport, "create", create)
    assert lab.fetch(cache, linked, "install").how == "link"
