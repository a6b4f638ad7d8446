"""
A writer that is suspended before its record, for longer than its marker counts: a collector has
come when it goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statepool.cache.cache import Cache
from statepool.capture.capture import Capture, files_of
from statepool.copying.adopt import Adoption
from statepool.copying.push import Push
from statepool.copying.sync import Sync
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, StateId
from statepool.model.outcomes import Presence
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.parts import parts_of
from statepool.pools.pool import Pool

Suspend = Callable[..., None]

ON = StateId("vm1", "on", Kind.MACHINE)


@pytest.fixture
def suspend(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Suspend:
    def do(pool: Pool, *, record: int = 0, then: Callable[[], object] = lambda: None) -> None:
        """Suspend what writes to a pool before its first record, or before a later one."""
        real, drafts = pool.transport.draft, []
        place = pool.transport.local_path("")
        assert place is not None

        def draft(directory: str, data: bytes) -> Any:
            drafts.append(directory)
            if len(drafts) == record + 1:
                for path in (place / layout.INCOMING).iterdir():
                    path.unlink()
                other = Pool(lab.pool(place.name).transport)
                found = (
                    Digest.from_file_name(path.name) for path in (place / layout.DATA).iterdir()
                )
                Collector(other).collect([digest for digest in found if digest is not None])
                then()
            return real(directory, data)

        monkeypatch.setattr(pool.transport, "draft", draft)

    return do


def require_whole(lab: Any, name: str = "pool") -> None:
    pool = lab.pool(name)
    assert not pool.lacking(pool.fold("vm1").digests)
    assert lab.leftovers(pool) == []


@pytest.mark.parametrize("record", [0, 1, 2])
def test_a_chain_is_synced(lab: Any, cache: Cache, suspend: Suspend, record: int) -> None:
    lab.chain(cache.pool, "install", "customize", "connect")
    there = lab.pool()
    suspend(there, record=record)
    assert [state.error for state in Sync(cache.pool, there).run().states] == [None] * 3
    assert len(lab.pool().fold("vm1").states) == 3
    require_whole(lab)


def take(lab: Any, cache: Cache) -> Any:
    images: dict[str, Path] = {}
    for name in ("data", "disk"):
        images[name] = lab.root / f"{name}.qcow2"
        images[name].write_bytes(lab.image(name))
    (lab.root / "ram").write_bytes(b"pages" * 999)
    return (
        Capture(cache, ON, files_of(ON, images, lab.root / "ram"), fingerprint={"cpu": "max"})
        .run()
        .manifest
    )


def test_a_machine_is_stored(lab: Any, cache: Cache, suspend: Suspend) -> None:
    machine, there = take(lab, cache), lab.pool()
    suspend(there)
    assert Push(cache, there).attempt(parts_of(cache.pool, machine)).result is Presence.STORED
    assert len(lab.pool().fold("vm1").states) == 4
    require_whole(lab)


def test_a_machine_is_stored_of_which_a_part_is_lost(
    lab: Any, cache: Cache, suspend: Suspend
) -> None:
    machine, there = take(lab, cache), lab.pool()
    disk = cache.pool.find(StateId("vm1/disk", "on"))
    assert disk is not None
    assert disk.digest is not None
    digest = disk.digest

    def spoil() -> None:
        cache.data(digest).chmod(0o644)
        cache.data(digest).write_bytes(b"?" * disk.size)

    suspend(there, then=spoil)
    at = Push(cache, there).attempt(parts_of(cache.pool, machine))
    assert at.result is Presence.FAILED
    assert at.error is not None
    assert str(digest) in at.error
    assert lab.pool().fold("vm1").states == {}, "all or none"
    require_whole(lab)
    assert cache.pool.find(StateId("vm1", "on", Kind.MACHINE)) is not None


def test_a_file_is_adopted(lab: Any, suspend: Suspend) -> None:
    path = lab.unmanaged("pool", "install")
    pool = lab.pool()
    suspend(pool)
    assert [found.problem for found in Adoption(pool).run()] == [None]
    assert path.samefile(lab.root / "pool" / layout.data(Digest.of(path.read_bytes())))
    require_whole(lab)
