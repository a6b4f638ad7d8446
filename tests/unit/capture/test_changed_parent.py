"""
A state of the cache into which somebody has written, as root can and a block commit does: nothing
is built on it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import statepool
from statepool.cache.cache import Cache
from statepool.capture import capture_journal
from statepool.capture.capture import Capture, files_of
from statepool.copying.push import Push
from statepool.copying.sync import Sync
from statepool.errors import DigestMismatch
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.model.outcomes import Presence
from tests.support.images import CHILD

CHILD_ID = StateId("vm1/disk", "child")

READY = StateId("vm1", "ready", Kind.MACHINE)


@pytest.fixture
def chain(lab: Any, cache: Cache) -> tuple[Manifest, ...]:
    """Two states, of the pool and of the cache; tip first."""
    made: tuple[Manifest, ...] = lab.chain(lab.pool(), "install", "customize")
    lab.fetch(cache, lab.pool(), "customize")
    return made


def working(cache: Cache, path: Path, tag: str = "work") -> Path:
    backing = os.fsencode(cache.chains.prepare(cache.pool.chain(StateId("vm1/disk", "customize"))))
    path.write_bytes(
        evolve(CHILD, backing=backing, extensions=((0x12345678, tag.encode()),)).build()
    )
    return path


def write_into(cache: Cache, manifest: Manifest) -> None:
    """In its place, and of the same length; the modification time is put back."""
    path = cache.data(manifest.digest)
    status, content = path.stat(), path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    path.chmod(0o444)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("member", [0, 1], ids=["parent", "its parent"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_no_child_is_set_on_it(
    lab: Any, cache: Cache, chain: tuple[Manifest, ...], member: int, dry_run: bool
) -> None:
    work = working(cache, lab.root / "work.qcow2")
    write_into(cache, chain[member])
    before = work.read_bytes()
    with pytest.raises(
        DigestMismatch,
        match=f"stands on {chain[member].id}, whose bytes in the cache .* have been changed",
    ) as caught:
        Capture(cache, CHILD_ID, {CHILD_ID: work}).run(dry_run=dry_run)
    assert f"qemu-img convert -f qcow2 -O qcow2 {work} NEW.qcow2" in str(caught.value.hint)
    assert work.read_bytes() == before
    assert cache.pool.find(CHILD_ID) is None
    assert lab.leftovers(cache.pool) == []


def test_no_child_is_set_on_one_that_is_cut_short(
    lab: Any, cache: Cache, chain: tuple[Manifest, ...]
) -> None:
    work = working(cache, lab.root / "work.qcow2")
    path = cache.data(chain[1].digest)
    path.chmod(0o644)
    os.truncate(path, chain[1].size - 1)
    with pytest.raises(DigestMismatch):
        Capture(cache, CHILD_ID, {CHILD_ID: work}).run()


def test_one_that_changes_while_the_child_is_hashed(
    lab: Any, cache: Cache, chain: tuple[Manifest, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = working(cache, lab.root / "work.qcow2")
    before, real = work.read_bytes(), capture_journal.clear_place
    monkeypatch.setattr(
        capture_journal,
        "clear_place",
        lambda *arguments: [write_into(cache, chain[0]), real(*arguments)][1],
    )
    with pytest.raises(DigestMismatch):
        Capture(cache, CHILD_ID, {CHILD_ID: work}).run()
    assert work.read_bytes() == before
    assert cache.pool.find(CHILD_ID) is None
    assert lab.leftovers(cache.pool) == []


def test_a_change_that_changed_nothing(lab: Any, cache: Cache, chain: tuple[Manifest, ...]) -> None:
    work = working(cache, lab.root / "work.qcow2")
    cache.data(chain[0].digest).chmod(0o644)
    os.utime(cache.data(chain[0].digest))
    assert Capture(cache, CHILD_ID, {CHILD_ID: work}).run().written


def test_an_image_that_stands_on_it_is_not_taken_for_it(
    lab: Any, cache: Cache, chain: tuple[Manifest, ...]
) -> None:
    disk = statepool.StatePool(cache.root, [lab.root / "pool"]).image("vm1/disk")
    disk.get("customize", to=lab.root / "work.qcow2")
    write_into(cache, chain[0])
    with pytest.raises(DigestMismatch):
        disk.set("customize", source=lab.root / "work.qcow2")


def test_no_machine_is_set_on_it(lab: Any, cache: Cache, chain: tuple[Manifest, ...]) -> None:
    work, alone = working(cache, lab.root / "work.qcow2"), lab.root / "alone.qcow2"
    alone.write_bytes(lab.image("alone"))
    write_into(cache, chain[1])
    before = work.read_bytes(), alone.read_bytes()
    with pytest.raises(DigestMismatch):
        Capture(cache, READY, files_of(READY, {"disk": work, "other": alone})).run()
    assert (work.read_bytes(), alone.read_bytes()) == before
    assert {state.state for state in cache.pool.fold("vm1").states} == {"install", "customize"}
    assert lab.leftovers(cache.pool) == []


@pytest.mark.parametrize("member", [0, 1], ids=["state", "its parent"])
def test_a_working_image_is_made_of_what_is_mended(
    lab: Any, cache: Cache, chain: tuple[Manifest, ...], member: int
) -> None:
    disk = statepool.StatePool(cache.root, [lab.root / "pool"]).image("vm1/disk")
    above = disk.get("customize", to=lab.root / "above.qcow2").working
    write_into(cache, chain[member])
    got = disk.get("customize", to=lab.root / "new.qcow2")
    (warning,) = got.warnings
    assert f"the bytes of {chain[member].id} in the cache {cache.root} had been changed" in warning
    assert str(above) in warning
    assert [problem.problem for problem in statepool.StatePool(cache.root).verify("vm1/disk")] == [
        None,
        None,
    ]


def test_without_a_source_no_working_image_is_made_of_it(
    lab: Any, cache: Cache, chain: tuple[Manifest, ...]
) -> None:
    write_into(cache, chain[1])
    with pytest.raises(DigestMismatch, match="damaged or gone"):
        statepool.StatePool(cache.root).image("vm1/disk").get(
            "customize", to=lab.root / "new.qcow2"
        )
    assert not (lab.root / "new.qcow2").exists()


def test_it_is_not_sent_to_a_pool(lab: Any, cache: Cache, chain: tuple[Manifest, ...]) -> None:
    write_into(cache, chain[0])
    there = lab.pool("there")
    stored = Push(cache, there).attempt(chain)
    assert stored.result is Presence.FAILED
    assert chain[0].digest not in lab.data(there)
    (copied, failed) = Sync(cache.pool, lab.pool("elsewhere")).run().states
    assert (copied.state, copied.error, failed.state) == ("install", None, "customize")
    assert failed.error is not None
    assert lab.leftovers(there) == []


def test_a_child_that_was_set_before_is_sent_to_a_pool_that_has_a_good_parent(
    lab: Any, cache: Cache, chain: tuple[Manifest, ...]
) -> None:
    Capture(cache, CHILD_ID, {CHILD_ID: working(cache, lab.root / "work.qcow2")}).run()
    write_into(cache, chain[1])
    assert Push(cache, lab.pool()).attempt(cache.pool.chain(CHILD_ID)).result is Presence.STORED
