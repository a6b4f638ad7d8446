"""What is exported can be imported, and is the same wherever it is exported again."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest

import statepool
from statepool import Kind, StatePool
from statepool.pools import layout
from tests.support.bundles import DISK, World, names
from tests.support.images import GOOD

COMPRESSIONS = ["zstd", "none"]


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_chain(world: World, compress: str) -> None:
    bundle = world.export(compress=compress)
    would = world.bring(bundle, dry_run=True)
    assert (would.object, would.state, would.chain) == (DISK, "customize", ("customize", "install"))
    assert would.bytes
    assert names(world.away) == []
    imported = world.bring(bundle)
    assert (imported.chain, imported.bytes) == (would.chain, would.bytes)
    assert imported.digest == world.home.image(DISK).get("customize").digest
    assert names(world.away) == [f"{DISK} customize", f"{DISK} install"]
    assert world.data("away") == world.data("home")
    assert [one.problem for one in world.away.verify()] == [None, None]
    assert world.export(pool="away", compress=compress) == bundle
    again = world.bring(bundle)
    assert again.bytes == 0


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_machine_with_its_ram(world: World, compress: str) -> None:
    world.log_in()
    bundle = world.export("loggedin", compress=compress)
    imported = world.bring(bundle)
    assert (imported.object, imported.state, imported.digest) == ("vm1", "loggedin", "")
    shown = {(one.manifest.object, one.manifest.kind) for one in world.away.show()}
    assert shown == {
        ("vm1", Kind.MACHINE),
        ("vm1", Kind.RAM),
        (DISK, Kind.IMAGE),
        ("vm1/data", Kind.IMAGE),
    }
    assert world.data("away").items() <= world.data("home").items()
    (ram,) = [one.manifest for one in world.away.show() if one.manifest.kind is Kind.RAM]
    assert dict(ram.fingerprint) == {"qemu": "7.2.22", "cpu": "max"}
    assert world.export("loggedin", pool="away", compress=compress) == bundle


def test_a_bundle_that_is_made_while_it_is_taken(world: World) -> None:
    """Its length is known before, and it is the one that an export writes, and can be read."""
    world.log_in()
    for subject, state in (("vm1", "loggedin"), (DISK, "customize")):
        bundle = world.home.bundle(subject, state)
        taken = io.BytesIO()
        bundle.write(taken.write)
        assert taken.getvalue() == world.export(state, compress="none")
        assert len(taken.getvalue()) == bundle.size
        taken.seek(0)
        assert world.away.import_bundle(taken).state == state
    with pytest.raises(statepool.NotFound):
        world.home.bundle(DISK, "none")


def test_what_is_wrong_with_a_bundle_in_memory(world: World) -> None:
    cut = io.BytesIO(world.export(compress="none")[:-600])
    with pytest.raises(statepool.IntegrityError, match="the bundle /memory is cut short"):
        world.away.import_bundle(cut)
    assert names(world.away) == []


def test_all_of_it_becomes_visible_in_one_record(world: World) -> None:
    world.bring(world.export())
    assert len(list((world.root / "away" / layout.log("vm1")).iterdir())) == 1


def test_only_what_is_missing_is_written(world: World) -> None:
    world.bring(world.export("install"))
    before = world.photograph()
    imported = world.bring(world.export("customize"))
    sizes = {digest: len(content) for digest, content in world.data("away").items()}
    assert imported.bytes <= sizes[imported.digest]
    assert before.items() <= world.photograph().items()
    assert names(world.away) == [f"{DISK} customize", f"{DISK} install"]


def test_damaged_bytes_of_the_cache_are_mended(world: World) -> None:
    world.bring(world.export())
    (damaged, *_) = (world.root / "away" / layout.DATA).iterdir()
    damaged.chmod(0o644)
    damaged.write_bytes(b"damaged")
    imported = world.bring(world.export())
    assert imported.warnings
    assert world.data("away") == world.data("home")


def test_what_was_imported_is_durable_and_not_evicted(world: World) -> None:
    world.bring(world.export())
    cache = world.cache("away")
    for manifest in cache.pool.fold("vm1").states.values():
        assert manifest.digest is not None
        assert cache.trust.is_flushed(manifest.digest)
        assert cache.trust.source(manifest.digest) is None


def test_another_state_that_only_the_cache_has_stays(world: World) -> None:
    other = world.root / "other.qcow2"
    other.write_bytes(GOOD.build() + b"other" * 100)
    world.away.image(DISK).set("install", source=other)
    before = world.photograph()
    with pytest.raises(statepool.Conflict, match="was set there and is in no source"):
        world.bring(world.export())
    assert world.photograph() == before


def test_states_that_a_source_has_give_way(world: World) -> None:
    """As they do when the source itself has replaced them, with all that stands on them."""
    statepool.init(world.root / "pool")
    other = world.root / "other.qcow2"
    other.write_bytes(GOOD.build() + b"other" * 100)
    elsewhere = StatePool(world.root / "elsewhere", [world.root / "pool"])
    for state in ("install", "customize"):
        elsewhere.image(DISK).set(state, source=other)
    away = StatePool(world.root / "away", [world.root / "pool"])
    away.image(DISK).get("customize")
    old = world.data("away")
    world.bring(world.export())
    assert world.data("away") == world.data("home")
    assert world.data("away") != old
    assert [one.problem for one in world.away.verify()] == [None, None]


def test_into_another_pool_too(world: World) -> None:
    statepool.init(world.root / "pool")
    imported = world.bring(world.export(), to=world.root / "pool")
    assert imported.stored is not None
    assert imported.complete
    assert names(StatePool(world.root / "pool")) == [f"{DISK} customize", f"{DISK} install"]
    missing = world.bring(world.export(), to=world.root / "nowhere")
    assert not missing.complete


def test_unpacked_by_tar_it_is_a_pool(world: World) -> None:
    world.log_in()
    for number, state in enumerate(("customize", "loggedin")):
        (world.root / "tar").write_bytes(world.export(state, compress="none"))
        pool = world.root / f"pool{number}"
        pool.mkdir()
        done = subprocess.run(
            ["tar", "-C", pool, "-xf", world.root / "tar"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        opened = StatePool(world.root / f"cache{number}", [pool])
        handle = opened.machine("vm1") if state == "loggedin" else opened.image(DISK)
        assert handle.get(state).source == f"file://{pool}"
        for link in pool.glob("vm1/**/*.*"):
            assert link.resolve(strict=True).parent == pool / layout.DATA
        # It is a pool in every respect: something can be stored in it.
        assert world.home.image(DISK).store("install", to=pool).complete


def test_holes_stay_holes(world: World) -> None:
    world.log_in()
    bundle = world.export("loggedin", compress="none")
    assert len(bundle) < 1 << 20
    world.bring(bundle)
    (world.root / "tar").write_bytes(bundle)
    (world.root / "pool").mkdir()
    subprocess.run(["tar", "-C", world.root / "pool", "-xf", world.root / "tar"], check=True)
    (ram,) = [one.manifest for one in world.away.show() if one.manifest.kind is Kind.RAM]
    assert ram.digest is not None
    for place in ("away", "pool"):
        found = os.stat(world.root / place / layout.data(ram.digest))
        assert found.st_blocks * 512 < found.st_size // 2


def test_the_same_bytes_wherever_holes_are(world: World) -> None:
    world.log_in()
    bundle = world.export("loggedin")
    for path in (world.root / "home" / layout.DATA).iterdir():
        dense = path.read_bytes()
        path.unlink()
        path.write_bytes(dense)
        path.chmod(0o444)
    assert world.export("loggedin") == bundle


def test_through_a_pipe(world: World) -> None:
    read, write = os.pipe()
    with open(read, "rb") as there, open(write, "wb") as here:
        with pytest.raises(statepool.UsageError, match="needs a file"):
            world.home.image(DISK).export("install", to=here, flat=True)
        assert world.home.image(DISK).export("install", to=here, compress="zstd").path is None
        here.close()
        assert world.away.import_bundle(there).state == "install"


def test_what_cannot_be_exported(world: World, tmp_path: Path) -> None:
    disk = world.home.image(DISK)
    with pytest.raises(statepool.NotFound, match="there is no state nothing"):
        disk.export("nothing", to=tmp_path / "x")
    with pytest.raises(statepool.FileInTheWay, match="exists"):
        disk.export("install", to=tmp_path / "work.qcow2")
    with pytest.raises(statepool.RefusedError, match="inside the cache"):
        disk.export("install", to=world.root / "home" / "x")
    with pytest.raises(statepool.UsageError, match="a bundle cannot be compressed with 'zlib'"):
        disk.export("install", to=tmp_path / "x", compress="zlib")
    with pytest.raises(statepool.UsageError, match="that of each of its images"):
        world.home.machine("vm1").export("root", to=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_cache_is_not_exported(world: World, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    manifest = world.cache("home").pool.chain(statepool.StateId(DISK, "install"))[0]
    assert manifest.digest is not None
    data = world.root / "home" / layout.data(manifest.digest)
    found = data.stat()
    data.chmod(0o644)
    with data.open("r+b") as file:
        file.seek(found.st_size - 1)
        file.write(b"X")
    data.chmod(0o444)
    with pytest.raises(statepool.IntegrityError, match="damaged or gone"):
        world.home.image(DISK).export("customize", to=tmp_path / "x")
    assert sorted(tmp_path.iterdir()) == before
