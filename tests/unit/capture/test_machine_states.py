"""
A machine state with RAM: taken into a cache, stored in a pool, brought into another cache, and
damaged on the way.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from statepool.backends.base import DEFAULTS, Context
from statepool.backends.machines import QCOW2MachineBackend
from statepool.cache import get_journal
from statepool.cache.cache import Cache
from statepool.cache.space import make_room
from statepool.capture import capture_journal
from statepool.capture.capture import Capture, CaptureResult, files_of
from statepool.capture.capture_journal import recover
from statepool.copying import fetch
from statepool.copying.fetch import Fetch
from statepool.copying.push import Push
from statepool.errors import Conflict, DigestMismatch, HasDependants, NoSpace, NotFound, UsageError
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.outcomes import Presence, Verified
from statepool.model.progress import Progress
from statepool.pools import layout
from statepool.pools.parts import parts_of
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.sources.source import RemoteChain

if TYPE_CHECKING:
    from tests.support.lab import Lab

ON = StateId("vm1", "on", Kind.MACHINE)
RAM = b"a stream of pages" * 999


def working(lab: Lab, tag: str = "") -> dict[str, Path]:
    """Write two images and a file of RAM, as a stopped machine leaves them."""
    found = {}
    for name in ("data", "disk"):
        path = lab.root / f"{name}.qcow2"
        path.unlink(missing_ok=True)
        path.write_bytes(lab.image(name + tag))
        found[name] = path
    (lab.root / "ram").write_bytes(RAM + tag.encode())
    return found


def take(lab: Lab, cache: Cache, tag: str = "", **how: object) -> CaptureResult:
    images = working(lab, tag)
    return Capture(
        cache, ON, files_of(ON, images, lab.root / "ram"), fingerprint={"cpu": "max"}, **how
    ).run()  # type: ignore[arg-type]


def offer(pool: Pool) -> RemoteChain:
    found = PoolSource(pool, "source").resolve(ON)
    assert found is not None
    return found


def states(pool: Pool) -> set[str]:
    return {str(state) for state in pool.fold("vm1").states}


ALL = {"vm1 on", "vm1 on (RAM)", "vm1/disk on", "vm1/data on"}


def test_what_is_removed_meanwhile(lab: Lab) -> None:
    cache, pool = lab.cache(), lab.pool()
    taken = take(lab, cache)
    cache.pool.remove(ON)
    with pytest.raises(NotFound, match="there is no state on of vm1"):
        parts_of(cache.pool, taken.manifest)
    at = QCOW2MachineBackend(Context(cache, ()))._push(
        taken.manifest, PoolSource(pool, "pool"), DEFAULTS
    )
    assert (at.result, "there is no state on of vm1" in str(at.error)) == (Presence.FAILED, True)


def test_there_and_back(lab: Lab) -> None:
    cache, pool, other = lab.cache(), lab.pool(), lab.cache("other")
    taken = take(lab, cache)
    assert taken.written
    assert not (lab.root / "ram").exists()
    assert states(cache.pool) == ALL
    ram = cache.pool.find(StateId("vm1", "on", Kind.RAM))
    assert ram is not None
    assert ram.fingerprint == {"cpu": "max"}
    assert (cache.root / "vm1/on.state").read_bytes() == RAM
    at = Push(cache, pool).run(parts_of(cache.pool, taken.manifest))
    assert (at.result, states(pool)) == (Presence.STORED, ALL)
    assert Push(cache, pool).run(parts_of(cache.pool, taken.manifest)).result is Presence.PRESENT
    assert len(list((lab.root / "pool" / layout.log("vm1")).iterdir())) == 1
    fetched = Fetch(other, offer(pool)).run()
    assert (states(other.pool), fetched.verified) == (ALL, Verified.ARRIVED)
    assert fetched.bytes == sum(manifest.size for manifest in taken.members)
    assert parts_of(other.pool, fetched.chain[0]) == fetched.chain
    assert (other.root / "vm1/on.state").read_bytes() == RAM
    again = Fetch(other, offer(pool)).run()
    assert (again.bytes, again.how, again.verified) == (0, "none", Verified.TRUSTED)
    assert not lab.leftovers(other.pool)
    assert not lab.leftovers(pool)


def test_from_a_link_pool(lab: Lab) -> None:
    cache, pool, other = lab.cache(), lab.pool(), lab.cache("other")
    Push(cache, pool).run(parts_of(cache.pool, take(lab, cache).manifest))
    for path in (lab.root / "pool" / layout.DATA).iterdir():
        os.utime(path, (1, 1))
    linked = lab.pool(scheme="link", create=False)
    fetched = Fetch(other, offer(linked)).run()
    assert (fetched.how, fetched.bytes) == ("link", 0)
    assert all(path.is_symlink() for path in (other.root / layout.DATA).iterdir())


@pytest.mark.parametrize("object", ["vm1", "vm1/disk", "vm1/data"])
def test_a_damaged_member_hides_all(lab: Lab, object: str) -> None:
    cache, pool, other = lab.cache(), lab.pool(), lab.cache("other")
    taken = take(lab, cache)
    Push(cache, pool).run(parts_of(cache.pool, taken.manifest))
    member = next(manifest for manifest in taken.members if manifest.object == object)
    assert member.digest is not None
    path = lab.root / "pool" / layout.data(member.digest)
    path.chmod(0o644)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DigestMismatch, match=object):
        Fetch(other, offer(pool)).run()
    assert states(other.pool) == set()
    assert not [name for name in lab.leftovers(other.pool) if name.endswith(".json")]
    # Nor does it leave the cache that it was set in.
    path = cache.data(member.digest)
    path.chmod(0o644)
    path.write_bytes(damaged)
    empty = lab.pool("empty")
    assert (
        Push(cache, empty).attempt(parts_of(cache.pool, taken.manifest)).result is Presence.FAILED
    )
    assert states(empty) == set()


def test_ram_that_others_have_too(lab: Lab) -> None:
    """Bytes that are in the cache for the sake of another state are not moved again."""
    cache, pool = lab.cache(), lab.pool()
    taken = take(lab, cache)
    Push(cache, pool).run(parts_of(cache.pool, taken.manifest))
    other = lab.cache("other")
    Fetch(other, offer(pool)).run()
    other.pool.remove(ON)
    fetched = Fetch(other, offer(pool)).run()
    assert fetched.bytes == 0
    assert states(other.pool) == ALL


def test_ram_that_is_replaced_while_it_is_looked_at(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is used again are the bytes of the file that was looked at, as of an image."""
    cache, pool = lab.cache(), lab.pool()
    Push(cache, pool).run(parts_of(cache.pool, take(lab, cache).manifest))
    other = lab.cache("other")
    Fetch(other, offer(pool)).run()
    ram = other.pool.find(StateId("vm1", "on", Kind.RAM))
    assert ram is not None
    other.pool.remove(ON)
    real = fetch.clear_place

    def swap(cache: Cache, manifest: Manifest) -> bool:
        found = real(cache, manifest)
        if manifest.kind is Kind.RAM:
            path = cache.data(manifest.digest)  # type: ignore[arg-type]
            path.unlink()
            path.write_bytes(RAM[::-1])
        return found

    monkeypatch.setattr(fetch, "clear_place", swap)
    fetched = Fetch(other, offer(pool)).run()
    assert fetched.bytes == ram.size
    assert "had been changed or were gone" in fetched.warnings[0]
    assert (other.root / "vm1/on.state").read_bytes() == RAM


def test_where_the_ram_has_data_is_told_to_the_pool(lab: Lab) -> None:
    """Also where the cache did not know it, which only refers to the file of another pool."""
    cache, pool, other, third = lab.cache(), lab.pool(), lab.cache("other"), lab.pool("third")
    images = working(lab)
    with open(lab.root / "ram", "r+b") as file:
        file.truncate(1 << 22)
    taken = Capture(
        cache, ON, files_of(ON, images, lab.root / "ram"), fingerprint={"cpu": "max"}
    ).run()
    Push(cache, pool).run(parts_of(cache.pool, taken.manifest))
    fetched = Fetch(other, offer(lab.pool(scheme="link", create=False))).run()
    told = []

    class Told(Progress):
        def begin(self, what: str, total: int) -> None:
            told.append(total)

        def advance(self, count: int) -> None:
            told.append(-count)

    progress = Told()
    Push(other, third, progress).run(fetched.chain)
    sent = third.find(StateId("vm1", "on", Kind.RAM))
    assert sent is not None
    assert sum(length for _, length in sent.extents) < 1 << 20
    assert sum(told) == 0, "all was announced, and all was done"


def test_replaced_in_the_source(lab: Lab) -> None:
    cache, pool, other = lab.cache(), lab.pool(), lab.cache("other")
    Push(cache, pool).run(parts_of(cache.pool, take(lab, cache).manifest))
    Fetch(other, offer(pool)).run()
    with pytest.raises(Conflict):
        take(lab, cache, "new")
    new = take(lab, cache, "new", replace=True)
    with pytest.raises(Conflict):
        Push(cache, pool).run(parts_of(cache.pool, new.manifest))
    Push(cache, pool).run(parts_of(cache.pool, new.manifest), replace=True)
    fetched = Fetch(other, offer(pool)).run()
    assert fetched.chain[0].members == new.manifest.members
    assert lab.data(other.pool) == lab.data(pool) == {manifest.digest for manifest in new.members}


def test_what_was_set_here_only_is_not_given_up(lab: Lab) -> None:
    cache, pool, other = lab.cache(), lab.pool(), lab.cache("other")
    Push(cache, pool).run(parts_of(cache.pool, take(lab, cache).manifest))
    take(lab, other, "else")
    with pytest.raises(Conflict, match="was set there and is in no source"):
        Fetch(other, offer(pool)).run()
    assert states(other.pool) == ALL


def test_an_image_of_it_is_not_replaced_alone(lab: Lab) -> None:
    cache, pool = lab.cache(), lab.pool()
    taken = take(lab, cache)
    Push(cache, pool).run(parts_of(cache.pool, taken.manifest))
    lab.put(lab.pool("rival"), "on", tag="something else")
    with pytest.raises(HasDependants, match="vm1 on"):
        lab.fetch(cache, lab.pool("rival"), "on")
    assert states(cache.pool) == ALL


def test_evicted_as_a_whole(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, pool, other = lab.cache(), lab.pool(), lab.cache("other", min_free=1 << 40)
    Push(cache, pool).run(parts_of(cache.pool, take(lab, cache).manifest))
    Fetch(evolve(other, settings=cache.settings), offer(pool)).run()
    monkeypatch.setattr(type(cache.pool.transport), "free_space", lambda transport: 1 << 30)
    wanted, elsewhere = (
        [evolve(offer(pool).members[1].manifest, size=1)],
        lab.pool("third").transport,
    )
    with pytest.raises(NoSpace, match="do not fit"):
        make_room(other, wanted, elsewhere, keep=set())
    # Nobody has said that the machine state is in a source.
    assert states(other.pool) == ALL
    other.lookups.note(ON, str(pool.location), offer(pool).token, None)
    with pytest.raises(NoSpace, match="do not fit"):
        make_room(other, wanted, elsewhere, keep=set())
    assert states(other.pool) == set()
    assert lab.data(other.pool) == set()


def test_the_same_file_cannot_be_ram_too(lab: Lab) -> None:
    images = working(lab)
    with pytest.raises(UsageError, match="one file"):
        Capture(lab.cache(), ON, files_of(ON, images, images["disk"])).run()


def test_a_failure_in_the_middle_gives_all_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = lab.cache()
    images = working(lab)
    before = {path: path.read_bytes() for path in (*images.values(), lab.root / "ram")}

    def refuse(*arguments: object, **rest: object) -> None:
        raise Conflict("somebody else was faster")

    monkeypatch.setattr(capture_journal, "finish", refuse)
    monkeypatch.setattr("statepool.capture.capture.finish", refuse)
    with pytest.raises(Conflict):
        Capture(cache, ON, files_of(ON, images, lab.root / "ram")).run()
    assert {path: path.read_bytes() for path in before} == before
    assert all(path.stat().st_mode & 0o200 for path in before)
    assert not lab.leftovers(cache.pool)
    monkeypatch.undo()
    assert recover(cache) == []
    assert Capture(cache, ON, files_of(ON, images, lab.root / "ram")).run().written


def test_working_images_are_made_together_or_not(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = lab.cache()
    taken = take(lab, cache)
    chains = {
        lab.root / f"new-{manifest.object[4:]}.qcow2": (manifest,)
        for manifest in taken.members
        if manifest.kind is Kind.IMAGE
    }
    first, second = sorted(chains)
    real = get_journal.Place.put

    def fail(place: get_journal.Place) -> None:
        if place.to == second:
            raise OSError("no more")
        real(place)

    monkeypatch.setattr(get_journal.Place, "put", fail)
    with pytest.raises(OSError, match="no more"):
        get_journal.make_together(cache, chains, overwrite=False)
    assert not first.exists()
    assert not list(lab.root.glob(".statepool-*"))
    assert not lab.leftovers(cache.pool)
    monkeypatch.undo()
    get_journal.make_together(cache, chains, overwrite=False)
    assert first.is_file()
    assert second.is_file()


def test_no_image_is_left_where_one_cannot_get_its_passing_name(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = lab.cache()
    taken = take(lab, cache)
    chains = {
        lab.root / f"new-{manifest.object[4:]}.qcow2": (manifest,)
        for manifest in taken.members
        if manifest.kind is Kind.IMAGE
    }
    real = os.link

    def fail(source: Path, target: Path, **options: bool) -> None:
        if str(target).endswith("-1.tmp"):
            raise OSError("no more")
        real(source, target, **options)

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(OSError, match="no more"):
        get_journal.make_together(cache, chains, overwrite=False)
    monkeypatch.undo()
    assert not list(lab.root.glob(".statepool-*"))
    assert not list(lab.root.glob("new-*"))
    assert not lab.leftovers(cache.pool)
