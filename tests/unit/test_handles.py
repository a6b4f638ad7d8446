"""
A machine with two disks, as a caller uses it: its images are got, set and removed as one, or not at
all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import statepool
from statepool.pools import layout
from tests.support.privileges import permissions_count

MIB = 1 << 20
Make = Callable[..., Path]
Write = Callable[..., None]


class World:
    """A pool, two caches, and a machine with two disks."""

    def __init__(self, root: Path, make: Make, write: Write) -> None:
        self.root = root
        self.write = write
        statepool.init(root / "pool")
        (root / "vm").mkdir()
        for name in ("disk", "data"):
            make(
                root / "vm" / f"{name}.qcow2", MIB, writes=[(0, 65536, 1 if name == "disk" else 2)]
            )

    def pool(self, cache: str = "cache") -> statepool.StatePool:
        return statepool.StatePool(self.root / cache, [self.root / "pool"])

    def machine(
        self, cache: str = "cache", images: tuple[str, ...] = ("disk", "data")
    ) -> statepool.MachineHandle:
        return self.pool(cache).machine("vm1", images)

    @property
    def working(self) -> dict[str, Path]:
        return {name: self.root / "vm" / f"{name}.qcow2" for name in ("disk", "data")}

    def names(self, place: str = "cache") -> list[str]:
        """:returns: the states that a pool has, those of the machine itself as ``vm1 NAME``"""
        listed = statepool.StatePool(self.root / place).show()
        return sorted(str(one.manifest.id) for one in listed)

    def photograph(self) -> dict[str, bytes]:
        """:returns: all files, besides those that are only about what others do, as locks"""
        passing = ("locks", "fresh", "known")
        found = [
            path
            for path in self.root.rglob("*")
            if path.is_file() and not set(passing) & set(path.parts)
        ]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}

    def records(self, place: str) -> int:
        return len(list((self.root / place / layout.log("vm1")).glob("0*.json")))

    def leftovers(self) -> list[str]:
        hidden = [str(path) for path in self.root.rglob(".statepool-*")]
        return hidden + [
            str(path)
            for place in ("cache", "pool")
            for path in (self.root / place / layout.INCOMING).glob("*")
        ]


@pytest.fixture
def world(tmp_path: Path, make_image: Make, write_to_image: Write) -> World:
    return World(tmp_path, make_image, write_to_image)


def test_set_get_and_unset(world: World, qemu_img: Callable[..., str]) -> None:
    stored = world.machine().set("install", source=world.root / "vm")
    assert stored.complete
    assert stored.object == "vm1"
    assert stored.digest == ""
    assert world.records("cache") == world.records("pool") == 1
    assert (
        world.names()
        == world.names("pool")
        == ["vm1 install", "vm1/data install", "vm1/disk install"]
    )
    # The machine goes on in fresh overlays, and the next state stands on this one.
    for path in world.working.values():
        qemu_img("check", "-q", "-f", "qcow2", path)
    world.write(world.working["disk"], [(131072, 65536, 3)])
    world.write(world.working["data"], [(131072, 65536, 4)])
    assert world.machine().set("customize", source=world.working).complete

    other = world.machine("other")
    assert other.check("customize")
    assert not other.check("nothing")
    got = other.get("customize", to=world.root / "run")
    assert got.images == {name: world.root / "run" / f"{name}.qcow2" for name in ("disk", "data")}
    assert got.working == world.root / "run"
    assert got.source is not None
    assert got.bytes > 0
    for name, path in world.working.items():
        qemu_img(
            "compare", "-f", "qcow2", "-F", "qcow2", path, world.root / "run" / f"{name}.qcow2"
        )
    assert other.get("customize").source is None
    both = ["vm1/data customize", "vm1/data install", "vm1/disk customize", "vm1/disk install"]
    # what backs its images, and not the machine state that these belong to as well
    assert world.names("other") == ["vm1 customize", *both]

    assert set(world.machine().unset("customize", scope="all").states.values()) == {("customize",)}
    assert (
        world.names()
        == world.names("pool")
        == ["vm1 install", "vm1/data install", "vm1/disk install"]
    )
    assert not world.leftovers()


def test_set_again_completes_what_a_pool_lacks(world: World) -> None:
    (world.root / "pool").rename(world.root / "away")
    stored = world.machine().set("install", source=world.working)
    assert [at.result for at in stored.pools] == ["stored", "failed"]
    (world.root / "away").rename(world.root / "pool")
    again = world.machine().set("install", source=world.working)
    assert [at.result for at in again.pools] == ["present", "stored"]
    assert [at.result for at in world.machine().set("install", source=world.working).pools] == [
        "present",
        "present",
    ]


def test_two_empty_disks_are_the_same_bytes(world: World, make_image: Make) -> None:
    for path in world.working.values():
        path.unlink()
        make_image(path, MIB)
    world.machine().set("empty", source=world.working)
    got = world.machine("other").get("empty", to=world.root / "run")
    assert len(list((world.root / "other" / layout.DATA).iterdir())) == 1
    assert all(Path(path).is_file() for path in got.images.values())
    world.write(world.working["data"], [(0, 65536, 9)])
    world.write(world.working["disk"], [(0, 65536, 8)])
    assert world.machine().set("more", source=world.working).complete


def test_one_bad_image_changes_nothing(world: World) -> None:
    world.working["data"].write_bytes(b"no image")
    before = world.photograph()
    with pytest.raises(statepool.UnsafeImage, match=r"data\.qcow2"):
        world.machine().set("install", source=world.working)
    assert world.photograph() == before


@pytest.mark.parametrize("missing", ["disk", "data"])
def test_a_working_image_that_is_not_named_or_not_there(world: World, missing: str) -> None:
    before = world.photograph()
    named = {name: path for name, path in world.working.items() if name != missing}
    with pytest.raises(statepool.UsageError, match=f"vm1/{missing}"):
        world.machine().set("install", source=named)
    with pytest.raises(statepool.UsageError, match="no image extra"):
        world.machine().set("install", source={**world.working, "extra": world.root / "x"})
    with pytest.raises(statepool.UsageError, match="one file"):
        world.machine().set(
            "install", source={"disk": world.working["disk"], "data": world.working["disk"]}
        )
    assert world.photograph() == before
    world.machine().set("install", source=world.working)
    before = world.photograph()
    # Nobody said which images there are, but what it stands on has both.
    with pytest.raises(statepool.UsageError, match=f"has the images {missing} too"):
        world.machine(images=()).set("customize", source=named)
    with pytest.raises(statepool.NotFound, match=r"gone\.qcow2"):
        world.machine().set(
            "customize", source={**world.working, missing: world.root / "gone.qcow2"}
        )
    assert world.photograph() == before


def test_a_name_that_one_image_has_already(world: World) -> None:
    world.pool().image("vm1/data").set("install", source=world.working["data"])
    before = world.photograph()
    with pytest.raises(statepool.UsageError, match="vm1/disk"):
        world.machine().set("other", source={"data": world.working["data"]})
    for do in (
        lambda: world.machine().get("install", to=world.root / "run"),
        lambda: world.machine().unset("install"),
    ):
        with pytest.raises(
            statepool.NotFound, match="vm1/data has a state of that name, and vm1/disk not"
        ):
            do()
    assert not world.machine().check("install")
    world.write(world.working["data"], [(0, 65536, 9)])
    changed = world.photograph()
    with pytest.raises(statepool.Conflict, match=r"vm1/data.*install"):
        world.machine().set("install", source=world.working)
    assert world.photograph() == changed != before
    assert not (world.root / "run").exists()


def test_an_image_that_somebody_has_open(world: World) -> None:
    before = world.photograph()
    with open(world.working["data"], "rb"), pytest.raises(statepool.InUse, match=r"data\.qcow2"):
        world.machine().set("install", source=world.working)
    assert world.photograph() == before


def test_get_makes_all_images_or_none(world: World) -> None:
    world.machine().set("install", source=world.working)
    (world.root / "run").mkdir()
    (world.root / "run" / "disk.qcow2").write_bytes(b"precious")
    with pytest.raises(statepool.FileInTheWay, match=r"disk\.qcow2"):
        world.machine().get("install", to=world.root / "run")
    assert [path.name for path in (world.root / "run").iterdir()] == ["disk.qcow2"]
    assert (world.root / "run" / "disk.qcow2").read_bytes() == b"precious"
    with pytest.raises(
        statepool.UsageError, match="it has data, for which none is named; it does not have dvd"
    ):
        world.machine(images=()).get(
            "install", to={"disk": world.root / "a.qcow2", "dvd": world.root / "b.qcow2"}
        )
    with pytest.raises(statepool.UsageError, match="one file"):
        world.machine().get(
            "install", to={"disk": world.root / "a.qcow2", "data": world.root / "a.qcow2"}
        )
    world.machine().get("install", to=world.root / "run", overwrite=True)
    assert sorted(path.name for path in (world.root / "run").iterdir()) == [
        "data.qcow2",
        "disk.qcow2",
    ]
    assert not world.leftovers()


@pytest.mark.parametrize(
    "place", ["cache/run", "pool/run", "pool", "other", "other/.statepool/data"]
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_working_images_inside_of_a_pool(world: World, place: str, dry_run: bool) -> None:
    """A directory that is not there yet is not made, nor is the cache."""
    world.machine().set("install", source=world.working)
    before = world.photograph()
    machine = world.machine("other" if place.startswith("other") else "cache")
    for to in (
        world.root / place,
        {name: world.root / place / f"{name}.qcow2" for name in ("disk", "data")},
    ):
        with pytest.raises(statepool.RefusedError, match=r"inside the (cache|pool)"):
            machine.get("install", to=to, dry_run=dry_run)
    with pytest.raises(statepool.RefusedError, match=r"inside the (cache|pool)"):
        machine.get("root", to=world.root / place, dry_run=dry_run)
    assert world.photograph() == before
    assert not (world.root / "other").exists()
    assert not (world.root / "pool" / "run").exists()


def test_dry_runs_change_nothing(world: World) -> None:
    before = world.photograph()
    would = world.machine().set("install", source=world.working, dry_run=True)
    assert {at.result for at in would.pools} == {"stored"}
    assert world.photograph() == before
    world.machine().set("install", source=world.working)
    before = world.photograph()
    other = world.machine("other")
    would_get = other.get("install", to=world.root / "run", dry_run=True)
    assert would_get.bytes > 0
    assert set(would_get.images) == {"disk", "data"}
    assert {*world.machine().unset("install", scope="all", dry_run=True).states.values()} == {
        ("install",)
    }
    assert world.photograph() == before
    assert not (world.root / "other").exists()
    assert not (world.root / "run").exists()


def test_what_stands_on_an_image_of_it_keeps_it(world: World) -> None:
    world.machine().set("install", source=world.working)
    world.pool().image("vm1/data").set("more", source=world.working["data"])
    with pytest.raises(statepool.HasDependants, match="vm1/data more"):
        world.machine().unset("install")
    with pytest.raises(statepool.HasDependants, match="vm1 install"):
        world.pool().image("vm1/disk").unset("install")
    assert world.names() == ["vm1 install", "vm1/data install", "vm1/data more", "vm1/disk install"]
    world.machine().unset("install", cascade=True)
    assert world.names() == []


def test_replaced_as_a_whole(world: World, make_image: Make) -> None:
    world.machine().set("install", source=world.working)
    world.machine("other").get("install")
    for number, path in enumerate(world.working.values()):
        path.unlink()
        make_image(path, MIB, writes=[(0, 65536, 7 + number)])
    with pytest.raises(statepool.Conflict):
        world.machine().set("install", source=world.working)
    assert world.machine().set("install", source=world.working, replace=True).complete
    settings = statepool.Settings(fresh=0)
    other = statepool.StatePool(world.root / "other", [world.root / "pool"], settings=settings)
    assert other.machine("vm1").get("install").source is not None
    # The old bytes are gone everywhere.
    for place in ("cache", "pool", "other"):
        assert len(list((world.root / place / layout.DATA).iterdir())) == 2
    # An image of it alone is not replaced under the machine state.
    with pytest.raises(statepool.RefusedError):
        world.pool().image("vm1/disk").set(
            "install",
            source=make_image(world.root / "new.qcow2", MIB, writes=[(0, 65536, 99)]),
            replace=True,
        )


@pytest.mark.parametrize(
    ("keep", "fails", "kept"),
    [("never", 0, 0), ("failed", 1, 2), ("always", 0, 2), ("never", 1, 0)],
)
def test_working_images_for_as_long_as_they_are_needed(
    world: World, keep: str, fails: int, kept: int
) -> None:
    world.machine().set("install", source=world.working)
    machine = world.machine("other", images=())
    with contextlib.suppress(ZeroDivisionError), machine.working("install", keep=keep) as images:
        assert sorted(images) == ["data", "disk"]
        assert all(
            path.is_file() and world.root / "other" in path.parents for path in images.values()
        )
        assert 1 // (1 - fails)
    assert [path.exists() for path in images.values()].count(True) == kept
    assert len(list((world.root / "other").rglob(".uses/*.json"))) == kept
    with pytest.raises(statepool.NotFound), machine.working("nothing", keep="always"):
        pytest.fail("the block was entered")
    assert len(list((world.root / "other").rglob("passing-*"))) == bool(kept)


def test_removed_from_where_the_caller_says(world: World) -> None:
    machine = world.machine()
    machine.set("install", source=world.working)
    with pytest.raises(statepool.UsageError):
        machine.unset("install", scope=None)  # type: ignore[arg-type]  # what it means must be said
    assert list(machine.unset("install").states) == [f"file://{world.root}/cache"]
    assert list(machine.unset("install", scope=[statepool.Scope.SHARED]).states) == [
        f"file://{world.root}/pool"
    ]


def test_a_part_of_a_listing_has_its_warnings(world: World) -> None:
    world.machine().set("install", source=world.working)
    (world.root / "gone").mkdir()
    listed = statepool.StatePool(
        world.root / "cache", [world.root / "pool", world.root / "gone"]
    ).show()
    assert len(listed) > 1
    assert listed.warnings
    assert listed[:1].warnings == listed.warnings
    assert list(listed[:1]) == [listed[0]]


def test_root_images(world: World) -> None:
    machine = world.machine()
    assert not machine.check("root")
    machine.set("root", source=world.working)
    assert machine.check("root")
    assert world.machine("other").check("root")
    got = world.machine("other").get("root", to=world.root / "run")
    assert all(Path(path).is_file() for path in got.images.values())
    assert len(got.images) == 2
    assert machine.unset("root", scope="all").states
    assert not machine.check("root")
    with pytest.raises(statepool.NotFound):
        world.machine(images=()).get("root")


def test_many_at_once_and_one_wins(world: World, make_image: Make) -> None:
    """
    Each with images of its own: one of them becomes the state, as a whole, and the images of the
    others stay what they are.
    """
    mine: list[dict[str, Path]] = []
    for number in range(4):
        (world.root / str(number)).mkdir()
        paths = {name: world.root / str(number) / f"{name}.qcow2" for name in ("disk", "data")}
        for path in paths.values():
            make_image(path, MIB, writes=[(0, 65536, number + 1)])
        mine.append(paths)
    before = [{name: path.read_bytes() for name, path in paths.items()} for paths in mine]

    def attempt(number: int) -> bool:
        try:
            world.machine().set("install", source=mine[number])
        except statepool.Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(attempt, range(4)))
    assert won.count(True) == 1
    for paths, content, is_state in zip(mine, before, won, strict=True):
        assert ({name: path.read_bytes() for name, path in paths.items()} == content) != is_state
    assert world.records("cache") == 1
    assert world.names() == ["vm1 install", "vm1/data install", "vm1/disk install"]
    assert not world.leftovers()


def test_a_directory_for_working_images_that_cannot_be_made(world: World) -> None:
    world.machine().set("on", source=world.working)
    closed = world.root / "closed"
    closed.mkdir(mode=0o000)
    with permissions_count(), pytest.raises(statepool.AccessDenied, match="closed"):
        world.machine().get("on", to=closed / "m")
