"""
Pools as avocado-i2n 103.0 writes them: absolute backing names into the directory where the states
were made, with their format; no manifests; lock files beside the images.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import statepool
from statepool.errors import Conflict, HasDependants, NotAPool, UnsafeImage
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.outcomes import Listed, Presence, Verified
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.qcow2.header import read_header_file
from statepool.testing.trees import photograph
from tests.support.images import CHILD

KIB = 1 << 10
SIZE = 1 << 20
BLOCK = 64 * KIB

Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]
Run = Callable[..., Any]
Tool = Callable[..., str]
Blocks = Callable[[Path], list[int]]

NO_MEMORY = Settings(fresh=0)
"""Sources are asked every time."""


@pytest.fixture
def pool(tmp_path: Path, make_image: Make) -> Path:
    """
    What was made in ``swarm/`` and copied to ``pool/``: vm1 with two disks (install, customize and
    connect of one, install of the other) and a root image, vm2 with one disk, the RAM of vm1, and
    lock files. ``swarm/`` is on another host.
    """
    swarm, pool = tmp_path / "swarm", tmp_path / "pool"
    for number, (image, state, parent) in enumerate(
        [
            ("vm1/disk", "install", None),
            ("vm1/disk", "customize", "install"),
            ("vm1/disk", "connect", "customize"),
            ("vm1/data", "install", None),
            ("vm2/disk", "install", None),
        ],
        start=1,
    ):
        backing = swarm / image / f"{parent}.qcow2" if parent else None
        make_image(
            swarm / image / f"{state}.qcow2",
            SIZE,
            backing=backing,
            writes=[(number * BLOCK, BLOCK, number)],
        )
    make_image(swarm / "vm1/disk.qcow2", SIZE, writes=[(0, BLOCK, 9)])
    (swarm / "vm1/loggedin.state").write_bytes(b"RAM")
    for path in list(swarm.rglob("*.qcow2")):
        path.with_name(f"{path.name}.lock").touch()
    shutil.copytree(swarm, pool)
    swarm.rename(tmp_path / "not-here")
    return pool


@pytest.fixture
def blocks(qemu_img: Tool, tmp_path: Path) -> Blocks:
    """What a guest finds in the first eight blocks of an image."""

    def read(path: Path) -> list[int]:
        raw = tmp_path / "look.raw"
        qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        content = raw.read_bytes()
        raw.unlink()
        found = [set(content[number * BLOCK : (number + 1) * BLOCK]) for number in range(8)]
        assert all(len(values) == 1 for values in found)
        return [values.pop() for values in found]

    return read


def open_pool(
    tmp_path: Path, cache: str = "cache", settings: Settings | None = None
) -> statepool.StatePool:
    return statepool.StatePool(tmp_path / cache, [tmp_path / "pool"], settings=settings)


def cached(tmp_path: Path, state: str, cache: str = "cache") -> Listed:
    (found,) = [
        listed
        for listed in statepool.StatePool(tmp_path / cache).image("vm1/disk").show()
        if listed.manifest.state == state
    ]
    return found


def digest(path: Path) -> Digest:
    return Digest.of(path.read_bytes())


def backing(path: Path) -> str | None:
    name = read_header_file(path.resolve()).backing_name
    return os.fsdecode(name) if name is not None else None


# -- looking ---------------------------------------------------------------------------------------


def test_shown_as_what_they_are(pool: Path, tmp_path: Path) -> None:
    before = photograph(pool)
    shown = {
        (str(listed.manifest.id.kind), listed.manifest.object, listed.manifest.state): listed
        for listed in open_pool(tmp_path).show()
    }
    assert set(shown) == {
        ("image", "vm1/disk", "install"),
        ("image", "vm1/disk", "customize"),
        ("image", "vm1/disk", "connect"),
        ("image", "vm1/disk", "root"),
        ("image", "vm1/data", "install"),
        ("image", "vm2/disk", "install"),
        ("ram", "vm1", "loggedin"),
    }
    assert not any(listed.managed or listed.problem for listed in shown.values())
    tip = shown["image", "vm1/disk", "connect"].manifest
    assert (tip.parent.state if tip.parent else None, tip.digest, tip.virtual_size) == (
        "customize",
        None,
        SIZE,
    )
    assert tip.size == (pool / "vm1/disk/connect.qcow2").stat().st_size
    assert {listed.manifest.object for listed in open_pool(tmp_path).show("vm2")} == {"vm2/disk"}
    assert {listed.manifest.object for listed in open_pool(tmp_path).show("vm1/data")} == {
        "vm1/data"
    }
    assert photograph(pool) == before


def test_on_the_command_line(pool: Path, tmp_path: Path, run_statepool: Run) -> None:
    before = photograph(pool)
    words = ("--cache", "cache", "--source", "pool")
    tree = run_statepool(*words, "tree", "vm1/disk").out
    assert tree.index("install") < tree.index("customize") < tree.index("connect")
    assert "unmanaged" in tree
    assert ".lock" not in tree + run_statepool(*words, "show").out
    run_statepool(*words, "check", "vm1/disk", "connect")
    run_statepool(*words, "check", "vm1/disk", "nothing", code=3)
    run_statepool(*words, "get", "vm1/disk", "connect", "--to", "work.qcow2")
    assert (
        "nothing is known to check it against"
        in run_statepool(*words, "get", "vm1/data", "install").out
    )
    assert "statepool init" in run_statepool(*words, "adopt", "pool", code=7).err
    assert photograph(pool) == before


def test_read_again_by_verify(pool: Path, tmp_path: Path) -> None:
    (pool / "vm1/disk/install.qcow2").unlink()
    found = {checked.state: checked.problem for checked in open_pool(tmp_path).verify("vm1/disk")}
    assert "missing-parent" in (found["connect"] or "")
    assert "missing-parent" in (found["customize"] or "")
    assert found["root"] is None


# -- getting ---------------------------------------------------------------------------------------


def test_fetched_and_made_relocatable(pool: Path, tmp_path: Path, blocks: Blocks) -> None:
    before = photograph(pool)
    work = tmp_path / "work.qcow2"
    got = open_pool(tmp_path).image("vm1/disk").get("connect", to=work)
    assert (got.chain, got.verified, got.source) == (
        ("connect", "customize", "install"),
        Verified.UNMANAGED,
        str(Location("file", str(pool))),
    )
    assert blocks(work) == [0, 1, 2, 3, 0, 0, 0, 0]
    for state, parent in (
        ("connect", "customize.qcow2"),
        ("customize", "install.qcow2"),
        ("install", None),
    ):
        assert backing(tmp_path / f"cache/vm1/disk/{state}.qcow2") == parent
        manifest = cached(tmp_path, state).manifest
        assert manifest.digest == digest(tmp_path / f"cache/vm1/disk/{state}.qcow2")
        assert (manifest.origin or manifest.digest) == digest(pool / f"vm1/disk/{state}.qcow2")
        assert (manifest.origin is None) == (parent is None)
    assert photograph(pool) == before


def test_got_again(pool: Path, tmp_path: Path) -> None:
    open_pool(tmp_path).image("vm1/disk").get("connect")
    for settings in (Settings(), NO_MEMORY, Settings(offline=True)):
        got = open_pool(tmp_path, settings=settings).image("vm1/disk").get("connect")
        assert (got.verified, got.source, got.bytes) == (Verified.TRUSTED, None, 0)


def test_the_root_image(pool: Path, tmp_path: Path, blocks: Blocks) -> None:
    disk = open_pool(tmp_path).image("vm1/disk")
    assert disk.check("root")
    disk.get("root", to=tmp_path / "work.qcow2")
    assert blocks(tmp_path / "work.qcow2")[0] == 9
    assert not open_pool(tmp_path).image("vm2/disk").check("root")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_replaced_file_is_noticed(
    pool: Path,
    tmp_path: Path,
    make_image: Make,
    write_to_image: Write,
    blocks: Blocks,
    in_place: bool,
) -> None:
    disk = open_pool(tmp_path, settings=NO_MEMORY).image("vm1/disk")
    old = tmp_path / "old.qcow2"
    disk.get("install", to=old)
    path = pool / "vm1/disk/install.qcow2"
    if in_place:
        write_to_image(path, [(5 * BLOCK, BLOCK, 55)])
    else:
        make_image(tmp_path / "new.qcow2", SIZE, writes=[(5 * BLOCK, BLOCK, 55)]).rename(path)
    # within a minute the pool is not asked
    assert open_pool(tmp_path).image("vm1/disk").get("install").verified is Verified.TRUSTED
    disk.get("install", to=tmp_path / "work.qcow2")
    assert blocks(tmp_path / "work.qcow2")[5] == 55
    assert blocks(old)[5] == 0  # what stands on the old one keeps it


def test_a_replaced_parent_is_noticed(
    pool: Path, tmp_path: Path, write_to_image: Write, blocks: Blocks
) -> None:
    """The bytes of the child are the same as before."""
    disk = open_pool(tmp_path, settings=NO_MEMORY).image("vm1/disk")
    disk.get("customize")
    write_to_image(pool / "vm1/disk/install.qcow2", [(5 * BLOCK, BLOCK, 55)])
    disk.get("customize", to=tmp_path / "work.qcow2")
    assert blocks(tmp_path / "work.qcow2") == [0, 1, 2, 0, 0, 55, 0, 0]


def test_a_replaced_parent_under_a_working_image(
    pool: Path, tmp_path: Path, write_to_image: Write, blocks: Blocks
) -> None:
    disk = open_pool(tmp_path, settings=NO_MEMORY).image("vm1/disk")
    old = tmp_path / "old.qcow2"
    disk.get("customize", to=old)
    write_to_image(pool / "vm1/disk/install.qcow2", [(5 * BLOCK, BLOCK, 55)])
    disk.get("customize", to=tmp_path / "new.qcow2")
    assert blocks(old) == [0, 1, 2, 0, 0, 0, 0, 0]
    assert blocks(tmp_path / "new.qcow2") == [0, 1, 2, 0, 0, 55, 0, 0]


def test_a_replaced_parent_under_a_cached_child(
    pool: Path, tmp_path: Path, write_to_image: Write
) -> None:
    disk = open_pool(tmp_path, settings=NO_MEMORY).image("vm1/disk")
    disk.get("connect")
    write_to_image(pool / "vm1/disk/install.qcow2", [(5 * BLOCK, BLOCK, 55)])
    with pytest.raises(HasDependants, match="--cascade"):
        disk.get("connect")
    disk.unset("customize", cascade=True)
    disk.get("connect")


def test_a_removed_file_stays_in_the_cache(pool: Path, tmp_path: Path) -> None:
    disk = open_pool(tmp_path, settings=NO_MEMORY).image("vm1/disk")
    disk.get("connect")
    (pool / "vm1/disk/connect.qcow2").unlink()
    assert disk.get("connect").verified is Verified.TRUSTED


def test_referred_to(pool: Path, tmp_path: Path, blocks: Blocks, write_to_image: Write) -> None:
    """By a link pool: what can be used as it is, is; what has to be rewritten is copied."""
    disk = statepool.StatePool(tmp_path / "cache", [f"link://{pool}"], settings=NO_MEMORY).image(
        "vm1/disk"
    )
    got = disk.get("customize", to=tmp_path / "work.qcow2")
    assert set(got.how.split("+")) >= {"link"}
    assert blocks(tmp_path / "work.qcow2") == [0, 1, 2, 0, 0, 0, 0, 0]
    assert (tmp_path / "cache/vm1/disk/install.qcow2").resolve() == pool / "vm1/disk/install.qcow2"
    assert (tmp_path / "cache") in (tmp_path / "cache/vm1/disk/customize.qcow2").resolve().parents
    write_to_image(pool / "vm1/disk/install.qcow2", [(5 * BLOCK, BLOCK, 55)])
    disk.get("install", to=tmp_path / "again.qcow2")
    assert blocks(tmp_path / "again.qcow2")[5] == 55


def test_a_parent_that_is_missing(pool: Path, tmp_path: Path, run_statepool: Run) -> None:
    (pool / "vm1/disk/install.qcow2").unlink()
    disk = open_pool(tmp_path).image("vm1/disk")
    with pytest.raises(UnsafeImage) as caught:
        disk.get("connect")
    assert caught.value.check == "missing-parent"
    assert not (tmp_path / "cache/vm1").exists()
    problems = {listed.manifest.state: listed.problem for listed in disk.show()}
    assert all("missing-parent" in (problems[state] or "") for state in ("connect", "customize"))
    run_statepool("--cache", "cache", "--source", "pool", "get", "vm1/disk", "connect", code=5)


@pytest.mark.parametrize("relocate", [False, True])
def test_a_parent_of_another_object(
    pool: Path, tmp_path: Path, make_image: Make, run_statepool: Run, relocate: bool
) -> None:
    """It stands on the state of the one object, and a state of the same name is beside it."""
    custom = make_image(
        pool / "vm2/disk/custom.qcow2", None, backing=pool / "vm1/disk/install.qcow2"
    )
    make_image(pool / "vm2/disk/beside.qcow2", None, backing=pool / "vm2/disk/install.qcow2")
    disk = open_pool(tmp_path).image("vm2/disk")
    with pytest.raises(
        UnsafeImage,
        match=r"vm2/disk custom in file://.*pool is refused .*another place of this pool",
    ) as caught:
        disk.get("custom", to=tmp_path / "work.qcow2")
    assert str(pool)[:30] in caught.value.message  # a long name is cut short
    assert caught.value.check == "backing-elsewhere"
    assert (
        "backing-elsewhere"
        in {one.manifest.state: one.problem or "" for one in disk.show()}["custom"]
    )
    assert disk.get("beside").chain == ("beside", "install")
    statepool.init(pool)
    before = custom.read_bytes()
    found = adopted_by_state(pool, relocate=relocate)
    assert "backing-elsewhere" in (found["vm2/disk", "custom"].problem or "")
    assert found["vm2/disk", "beside"].problem is None
    assert custom.read_bytes() == before
    run_statepool("--cache", "cache", "--source", "pool", "get", "vm2/disk", "custom", code=5)


def test_a_child_of_the_root_image(pool: Path, tmp_path: Path) -> None:
    """In a copy of a view: it names the root image as if that was beside it."""
    (pool / "vm1/disk/child.qcow2").write_bytes(evolve(CHILD, backing=b"root.qcow2").build())
    assert open_pool(tmp_path).image("vm1/disk").get("child").chain == ("child", "root")


def test_a_backing_format_that_is_missing(pool: Path, tmp_path: Path) -> None:
    """Of other tools: avocado-i2n says the format."""
    (pool / "vm1/disk/old.qcow2").write_bytes(
        evolve(CHILD, backing=b"/far/away/install.qcow2", formats=()).build()
    )
    with pytest.raises(UnsafeImage, match="qemu-img rebase -u -f qcow2 -F qcow2") as caught:
        open_pool(tmp_path).image("vm1/disk").get("old")
    assert caught.value.check == "backing-format-missing"


# -- writing to such a pool ------------------------------------------------------------------------


def test_it_takes_no_states_before_it_is_a_pool(
    pool: Path, tmp_path: Path, make_image: Make
) -> None:
    before = photograph(pool)
    stored = (
        open_pool(tmp_path)
        .image("vm1/disk")
        .set("new", source=make_image(tmp_path / "new.qcow2", SIZE))
    )
    assert [at.result for at in stored.pools] == [Presence.STORED, Presence.FAILED]
    assert "statepool init" in (stored.pools[1].error or "")
    assert photograph(pool) == before


def test_a_child_of_unmanaged_parents(
    pool: Path, tmp_path: Path, blocks: Blocks, write_to_image: Write
) -> None:
    disk = open_pool(tmp_path).image("vm1/disk")
    work = tmp_path / "work.qcow2"
    disk.get("connect", to=work)
    write_to_image(work, [(4 * BLOCK, BLOCK, 44)])
    statepool.init(pool)
    before = photograph(pool)
    stored = disk.set("more", source=work)
    assert [at.result for at in stored.pools] == [Presence.STORED, Presence.FAILED]
    assert "statepool adopt" in (stored.pools[1].error or "")
    assert photograph(pool) == before

    assert not [
        adopted.problem
        for adopted in statepool.adopt(pool)
        if adopted.problem and adopted.object == "vm1/disk"
    ]
    stored = disk.set("more", source=work)
    assert [at.result for at in stored.pools] == [Presence.PRESENT, Presence.STORED]
    # Its parent there has other bytes than the one in the cache: around the same content, an
    # absolute backing name.
    there = {
        listed.manifest.state: listed.manifest
        for listed in statepool.StatePool(pool).image("vm1/disk").show()
    }
    here = cached(tmp_path, "more").manifest
    assert there["more"].parent is not None
    assert here.parent is not None
    assert (
        there["more"].parent.digest
        == there["connect"].digest
        == digest(pool / "vm1/disk/connect.qcow2")
    )
    assert here.parent.digest != there["more"].parent.digest
    assert disk.set("more", source=work).pools[1].result is Presence.PRESENT

    got = open_pool(tmp_path, "other").image("vm1/disk").get("more", to=tmp_path / "other.qcow2")
    assert (got.chain, got.verified) == (
        ("more", "connect", "customize", "install"),
        Verified.ARRIVED,
    )
    assert blocks(tmp_path / "other.qcow2") == [0, 1, 2, 3, 44, 0, 0, 0]


def test_a_name_that_a_file_of_another_tool_has(
    pool: Path, tmp_path: Path, make_image: Make
) -> None:
    statepool.init(pool)
    with pytest.raises(Conflict, match="statepool adopt"):
        statepool.StatePool(pool).image("vm1/disk").set(
            "install", source=make_image(tmp_path / "new.qcow2", SIZE)
        )


# -- adopting --------------------------------------------------------------------------------------


def adopted_by_state(pool: Path, **options: bool) -> dict[tuple[str, str], statepool.Adopted]:
    return {
        (adopted.object, adopted.state): adopted for adopted in statepool.adopt(pool, **options)
    }


IMAGES = [
    ("vm1/disk", "install"),
    ("vm1/disk", "customize"),
    ("vm1/disk", "connect"),
    ("vm1/data", "install"),
    ("vm2/disk", "install"),
    ("vm1/disk", "root"),
]


def view(pool: Path, object: str, state: str) -> Path:
    return pool / (f"{object}.qcow2" if state == "root" else f"{object}/{state}.qcow2")


def test_adopting_what_is_no_pool_yet(pool: Path) -> None:
    before = photograph(pool)
    with pytest.raises(NotAPool, match="statepool init"):
        statepool.adopt(pool)
    assert photograph(pool) == before


def test_a_dry_run_changes_nothing(pool: Path) -> None:
    statepool.init(pool)
    before = photograph(pool)
    found = adopted_by_state(pool, dry_run=True)
    assert {key for key, adopted in found.items() if adopted.problem is None} == set(IMAGES)
    adopted_by_state(pool, dry_run=True, relocate=True)
    assert photograph(pool) == before


def test_adopted_where_they_are(pool: Path, tmp_path: Path) -> None:
    statepool.init(pool)
    contents = {key: view(pool, *key).read_bytes() for key in IMAGES}
    inodes = {key: view(pool, *key).stat().st_ino for key in IMAGES}
    found = adopted_by_state(pool)
    assert {key for key, adopted in found.items() if adopted.problem is None} == set(IMAGES)
    assert "RAM" in (found["vm1", "loggedin"].problem or "")
    for key in IMAGES:
        path = view(pool, *key)
        assert path.read_bytes() == contents[key]
        assert not path.is_symlink()
        assert path.stat().st_ino == inodes[key] == (pool / layout.data(digest(path))).stat().st_ino
        assert found[key].digest == str(digest(path))
        assert not found[key].relocated
        assert path.stat().st_mode & 0o222 == 0
    shown = {
        (listed.manifest.object, listed.manifest.state): listed
        for listed in open_pool(tmp_path).show()
        if listed.managed
    }
    assert set(shown) == set(IMAGES)
    assert len(list(pool.rglob("*.qcow2.lock"))) == len(IMAGES)
    assert all(
        checked.problem is None
        for checked in statepool.StatePool(pool).verify()
        if checked.state != "loggedin"
    )


def test_adopted_twice(pool: Path) -> None:
    statepool.init(pool)
    adopted_by_state(pool)
    before = photograph(pool)
    assert set(adopted_by_state(pool)) == {("vm1", "loggedin")}
    assert photograph(pool) == before


def test_got_from_an_adopted_pool(pool: Path, tmp_path: Path, blocks: Blocks) -> None:
    statepool.init(pool)
    adopted_by_state(pool)
    got = open_pool(tmp_path).image("vm1/disk").get("connect", to=tmp_path / "work.qcow2")
    assert (got.verified, got.chain) == (Verified.ARRIVED, ("connect", "customize", "install"))
    assert blocks(tmp_path / "work.qcow2") == [0, 1, 2, 3, 0, 0, 0, 0]
    assert backing(tmp_path / "cache/vm1/disk/connect.qcow2") == "customize.qcow2"
    again = open_pool(tmp_path, settings=NO_MEMORY).image("vm1/disk").get("connect")
    assert (again.verified, again.source) == (Verified.TRUSTED, None)


def test_adopted_while_a_cache_has_them(pool: Path, tmp_path: Path) -> None:
    """They are the same states as before: nothing is fetched again."""
    open_pool(tmp_path).image("vm1/disk").get("connect")
    statepool.init(pool)
    adopted_by_state(pool)
    got = open_pool(tmp_path, settings=NO_MEMORY).image("vm1/disk").get("connect")
    assert (got.verified, got.bytes) == (Verified.TRUSTED, 0)


def test_relocated(pool: Path, tmp_path: Path, blocks: Blocks, qemu_img: Tool) -> None:
    statepool.init(pool)
    found = adopted_by_state(pool, relocate=True)
    assert {key for key, adopted in found.items() if adopted.relocated} == {
        ("vm1/disk", "customize"),
        ("vm1/disk", "connect"),
    }
    assert backing(pool / "vm1/disk/connect.qcow2") == "customize.qcow2"
    chain = json.loads(
        qemu_img(
            "info",
            "-U",
            "--backing-chain",
            "-f",
            "qcow2",
            "--output=json",
            pool / "vm1/disk/connect.qcow2",
        )
    )
    assert [os.path.basename(image["filename"]) for image in chain] == [
        "connect.qcow2",
        "customize.qcow2",
        "install.qcow2",
    ]
    assert blocks(pool / "vm1/disk/connect.qcow2") == [0, 1, 2, 3, 0, 0, 0, 0]
    assert found["vm1/disk", "connect"].digest == str(digest(pool / "vm1/disk/connect.qcow2"))
    got = open_pool(tmp_path).image("vm1/disk").get("connect", to=tmp_path / "work.qcow2")
    assert got.verified is Verified.ARRIVED
    assert cached(tmp_path, "connect").manifest.origin is None
    assert blocks(tmp_path / "work.qcow2") == [0, 1, 2, 3, 0, 0, 0, 0]


def test_what_is_in_use_is_not_relocated(pool: Path) -> None:
    statepool.init(pool)
    before = (pool / "vm1/disk/customize.qcow2").read_bytes()
    with open(pool / "vm1/disk/customize.qcow2", "r+b"):
        found = adopted_by_state(pool, relocate=True)
    assert "is open in" in (found["vm1/disk", "customize"].problem or "")
    assert found["vm1/disk", "connect"].problem
    assert found["vm1/disk", "install"].problem is None
    assert (pool / "vm1/disk/customize.qcow2").read_bytes() == before


def test_what_cannot_be_adopted_is_left_alone(pool: Path, run_statepool: Run) -> None:
    statepool.init(pool)
    (pool / "vm1/disk/install.qcow2").unlink()
    (pool / "vm1/disk/raw.qcow2").write_bytes(bytes(SIZE))
    found = adopted_by_state(pool)
    assert {key for key, adopted in found.items() if adopted.problem is None} == {
        ("vm1/data", "install"),
        ("vm2/disk", "install"),
        ("vm1/disk", "root"),
    }
    ran = run_statepool("adopt", "pool", code=5)
    assert "missing-parent" in ran.out
    assert "qemu-img convert" in ran.out


def test_removed_from_an_adopted_pool(pool: Path) -> None:
    statepool.init(pool)
    adopted_by_state(pool)
    disk = statepool.StatePool(pool).image("vm1/disk")
    with pytest.raises(statepool.HasDependants):
        disk.unset("customize")
    disk.unset("customize", cascade=True)
    assert sorted(path.name for path in (pool / "vm1/disk").glob("*.qcow2")) == ["install.qcow2"]
    assert {listed.manifest.state for listed in disk.show()} == {"install", "root"}


def test_new_files_beside_adopted_ones(
    pool: Path, tmp_path: Path, make_image: Make, blocks: Blocks
) -> None:
    """The other tool goes on writing."""
    statepool.init(pool)
    adopted_by_state(pool)
    swarm = tmp_path / "swarm"
    (tmp_path / "not-here").rename(swarm)
    make_image(
        swarm / "vm1/disk/later.qcow2",
        SIZE,
        backing=swarm / "vm1/disk/connect.qcow2",
        writes=[(6 * BLOCK, BLOCK, 66)],
    )
    shutil.copy(swarm / "vm1/disk/later.qcow2", pool / "vm1/disk")
    disk = open_pool(tmp_path).image("vm1/disk")
    got = disk.get("later", to=tmp_path / "work.qcow2")
    assert (got.verified, got.chain) == (
        Verified.UNMANAGED,
        ("later", "connect", "customize", "install"),
    )
    assert blocks(tmp_path / "work.qcow2") == [0, 1, 2, 3, 0, 0, 66, 0]
    assert {key for key, adopted in adopted_by_state(pool).items() if adopted.problem is None} == {
        ("vm1/disk", "later")
    }
