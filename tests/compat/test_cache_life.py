"""
The life of a cache: what it throws away for room and what never, pools it refers to instead of
copying, and states replaced elsewhere.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import frozen

import statepool
from statepool.cache.space import SLACK
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import StateId
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.transports.local import LocalTransport
from statepool.transports.registry import open_transport

MIB, KIB = 1 << 20, 1 << 10
OBJECT = "vm1/disk"
PIECE = 256 * KIB

Write = tuple[int, int, int]
MakeImage = Callable[..., Path]


@frozen
class Site:
    """Some caches and pools in one directory."""

    root: Path
    make_image: MakeImage
    qemu_img: Callable[..., str]

    def image(self, cache: str, *sources: str, **settings: object) -> statepool.ImageHandle:
        """
        :returns: the image, as a new process with these sources sees it; each get asks them, unless
            the settings say otherwise
        """
        places = [self.place(source) for source in sources]
        chosen = statepool.Settings(**{"fresh": 0.0, **settings})  # type: ignore[arg-type]
        return statepool.StatePool(cache=self.root / cache, sources=places, settings=chosen).image(
            OBJECT
        )

    def place(self, source: str) -> str:
        """:returns: the location of ``pool`` or ``link://pool``"""
        scheme, separator, name = source.rpartition("://")
        return f"{scheme}{separator}{self.root / name}"

    def new(self, cache: str, source: str, state: str, *values: int, replace: bool = False) -> str:
        """Set a state of its own, with one byte value in each piece. :returns: its digest"""
        work = self.make_image(self.root / f"new-{state}.qcow2", 2 * MIB, writes=pieces(0, *values))
        stored = self.image(cache, source).set(state, source=work, replace=replace)
        assert stored.complete
        work.unlink()
        return stored.digest

    def child(
        self, cache: str, source: str, parent: str, state: str, first: int, *values: int
    ) -> str:
        """Set a state that stands on another one."""
        disk, work = self.image(cache, source), self.root / f"new-{state}.qcow2"
        disk.get(parent, to=work)
        write(work, pieces(first, *values))
        stored = disk.set(state, source=work)
        assert stored.complete
        work.unlink()
        return stored.digest

    def file(self, pool: str, digest: str) -> Path:
        return self.root / pool / layout.data(Digest.parse(digest))

    def states(self, pool: str) -> set[str]:
        return {state.state for state in self.pool(pool).fold("vm1").states}

    def pool(self, name: str) -> Pool:
        return Pool(open_transport(Location("file", str(self.root / name))))

    def digest(self, pool: str, state: str) -> str:
        manifest = self.pool(pool).find(StateId(OBJECT, state))
        assert manifest is not None
        return str(manifest.digest)

    def require(self, image: str, *values: int) -> None:
        """A guest sees these byte values in an image, piece by piece."""
        raw = self.root / "seen.raw"
        self.qemu_img("convert", "-f", "qcow2", "-O", "raw", self.root / image, raw)
        with open(raw, "rb") as file:
            assert [set(file.read(PIECE)) for _ in values] == [{value} for value in values]
        self.qemu_img("check", "-q", "-f", "qcow2", self.root / image)


def pieces(first: int, *values: int) -> list[Write]:
    return [((first + number) * PIECE, PIECE, value) for number, value in enumerate(values)]


def write(image: Path, writes: list[Write]) -> None:
    commands = [
        argument
        for offset, length, value in writes
        for argument in ("-c", f"write -P {value} {offset} {length}")
    ]
    subprocess.run(
        ["qemu-io", "-f", "qcow2", *commands, str(image)],
        check=True,
        capture_output=True,
        timeout=60,
    )


@pytest.fixture
def site(tmp_path: Path, make_image: MakeImage, qemu_img: Callable[..., str]) -> Site:
    statepool.init(tmp_path / "pool")
    return Site(tmp_path, make_image, qemu_img)


# -- room ------------------------------------------------------------------------------------------


MIN_FREE = 4 * MIB


@pytest.fixture
def room(site: Site, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """``room(3.5)``: the disk of the cache holds so many states, besides what must stay free."""
    for number, state in enumerate("abcde"):
        site.new("maker", "pool", state, number + 1)
    one = blocks(site.file("pool", site.digest("pool", "a")))
    size = 1 << 40

    def free(transport: LocalTransport) -> int:
        data = Path(transport.location.path, layout.DATA)
        return size - sum(blocks(path) for path in (data.iterdir() if data.exists() else ()))

    def limit(states: float) -> None:
        nonlocal size
        size = SLACK + MIN_FREE + int(states * one)

    monkeypatch.setattr(LocalTransport, "free_space", free)
    return limit


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


def age(site: Site, *states: str) -> None:
    """They were used last in this order, the first one longest ago."""
    for number, state in enumerate(states):
        note = (
            site.root
            / "cache"
            / layout.OURS
            / "trust"
            / f"{Digest.parse(site.digest('cache', state)).file_name}.json"
        )
        os.utime(note, (1_000_000 + number, 1_000_000 + number))


def small(site: Site) -> statepool.ImageHandle:
    return site.image("cache", "pool", min_free=MIN_FREE)


def test_least_recently_used_goes_first(site: Site, room: Callable[[float], None]) -> None:
    room(3.5)
    for state in "abc":
        small(site).get(state)
    age(site, "b", "c", "a")
    old = site.digest("cache", "b")
    small(site).get("d")
    assert site.states("cache") == {"a", "c", "d"}
    assert not site.file("cache", old).exists(), "its bytes go with it"
    small(site).get("c")  # used again, so that "a" is the oldest one now
    small(site).get("e", to=site.root / "work.qcow2")
    assert site.states("cache") == {"c", "d", "e"}
    site.require("work.qcow2", 5)
    assert site.states("pool") == set("abcde")
    small(site).get("b")
    assert site.states("cache") == {"c", "e", "b"} or site.states("cache") == {"d", "e", "b"}


def test_no_more_goes_than_must(site: Site, room: Callable[[float], None]) -> None:
    room(4.5)
    for state in "abcd":
        small(site).get(state)
    assert site.states("cache") == set("abcd")


def test_never_what_a_working_image_stands_on(site: Site, room: Callable[[float], None]) -> None:
    room(3.5)
    small(site).get("a", to=site.root / "work.qcow2")
    for state in "bc":
        small(site).get(state)
    age(site, "a", "b", "c")
    small(site).get("d")
    assert site.states("cache") == {"a", "c", "d"}
    site.require("work.qcow2", 1)


def test_never_what_a_process_has_open(site: Site, room: Callable[[float], None]) -> None:
    room(3.5)
    for state in "abc":
        small(site).get(state)
    age(site, "a", "b", "c")
    with open(site.root / "cache/vm1/disk/a.qcow2", "rb"):
        small(site).get("d")
    assert site.states("cache") == {"a", "c", "d"}


def test_never_what_no_source_has(site: Site, room: Callable[[float], None]) -> None:
    room(3.5)
    work = site.make_image(site.root / "own.qcow2", 2 * MIB, writes=pieces(0, 9))
    site.image("cache").set("own", source=work)
    work.unlink()
    for state in "ab":
        small(site).get(state)
    age(site, "own", "a", "b")
    small(site).get("c")
    assert site.states("cache") == {"own", "b", "c"}


def test_never_part_of_what_is_fetched(site: Site, room: Callable[[float], None]) -> None:
    site.child("maker", "pool", "a", "tip", 4, 7)
    room(3.2)
    for state in "abc":
        small(site).get(state)
    age(site, "a", "b", "c")
    small(site).get("tip", to=site.root / "work.qcow2")
    assert {"a", "tip"} <= site.states("cache")
    assert "b" not in site.states("cache")
    site.require("work.qcow2", 1, 0, 0, 0, 7)


def test_children_go_before_their_parents(site: Site, room: Callable[[float], None]) -> None:
    site.child("maker", "pool", "a", "tip", 4, 7)
    room(3.6)
    small(site).get("tip")
    small(site).get("b")
    age(site, "a", "tip", "b")
    small(site).get("c")
    fold = site.pool("cache").fold("vm1")
    assert all(
        fold.parent_of(manifest) is not None
        for manifest in fold.states.values()
        if manifest.parent is not None
    )
    assert {"b", "c"} <= {state.state for state in fold.states}
    assert "tip" not in {state.state for state in fold.states}


def test_nothing_that_may_go(site: Site, room: Callable[[float], None]) -> None:
    room(2.5)
    for state in "ab":
        small(site).get(state, to=site.root / f"{state}.qcow2")
    with pytest.raises(statepool.NoSpace) as caught:
        small(site).get("c")
    assert caught.value.exit_code == 8
    assert caught.value.needed > caught.value.available
    assert site.states("cache") == {"a", "b"}
    for state, value in (("a", 1), ("b", 2)):
        site.require(f"{state}.qcow2", value)


# -- pools that are referred to --------------------------------------------------------------------


@pytest.fixture
def chain(site: Site) -> list[str]:
    """install <- customize in the pool. :returns: their digests"""
    return [
        site.new("maker", "pool", "install", 1, 2),
        site.child("maker", "pool", "install", "customize", 1, 3),
    ]


def test_every_member_is_a_link(site: Site, chain: list[str]) -> None:
    got = site.image("cache", "link://pool").get("customize", to=site.root / "work.qcow2")
    assert (got.how, got.bytes) == ("link", 0)
    for digest in chain:
        path = site.file("cache", digest)
        assert path.is_symlink()
        assert os.path.samefile(path, site.file("pool", digest))
    site.require("work.qcow2", 1, 3)
    site.require("cache/vm1/disk/customize.qcow2", 1, 3)
    again = site.image("cache", "link://pool").get("customize")
    assert again.how == "none"


def test_data_is_never_replaced_by_a_link(site: Site, chain: list[str]) -> None:
    site.image("cache", "pool").get("install")
    site.image("cache", "link://pool").get("customize", to=site.root / "work.qcow2")
    assert not site.file("cache", chain[0]).is_symlink()
    assert site.file("cache", chain[1]).is_symlink()
    site.require("work.qcow2", 1, 3)


@pytest.mark.parametrize("member", [0, 1], ids=["install", "customize"])
def test_dead_link_is_found_and_mended(site: Site, chain: list[str], member: int) -> None:
    site.image("cache", "link://pool").get("customize", to=site.root / "work.qcow2")
    gone = site.file("pool", chain[member])
    gone.rename(site.root / "kept")
    problems = [
        checked
        for checked in statepool.StatePool(cache=site.root / "cache").verify()
        if checked.problem
    ]
    assert [(checked.state, "gone" in str(checked.problem)) for checked in problems] == [
        (("install", "customize")[member], True)
    ]
    with pytest.raises(statepool.StatePoolError) as caught:
        site.image("cache", "link://pool").get("customize")
    assert caught.value.exit_code in (5, 7)
    # Another source has it.
    site.image("cache", "maker").get("customize", to=site.root / "mended.qcow2")
    path = site.file("cache", chain[member])
    assert path.is_file()
    assert not path.is_symlink()
    for image in ("mended.qcow2", "work.qcow2"):
        site.require(image, 1, 3)


def test_dead_link_is_mended_by_the_pool_itself(site: Site, chain: list[str]) -> None:
    site.image("cache", "link://pool").get("customize")
    (site.root / "pool").rename(site.root / "moved")
    site.image("cache", "link://moved").get("customize", to=site.root / "work.qcow2")
    assert os.path.samefile(site.file("cache", chain[0]), site.file("moved", chain[0]))
    site.require("work.qcow2", 1, 3)


def test_what_is_referred_to_is_not_removed(site: Site, chain: list[str]) -> None:
    site.image("cache", "link://pool").get("customize", to=site.root / "work.qcow2")
    for _ in range(2):
        with pytest.raises(statepool.InUse) as caught:
            site.image("maker", "pool").unset("install", cascade=True, scope="all")
        assert caught.value.exit_code == 4
        assert str(site.root / "cache") in str(caught.value)
        assert site.states("pool") == {"install", "customize"}
    statepool.StatePool(cache=site.root / "maker", sources=[site.root / "pool"]).gc(everywhere=True)
    site.require("work.qcow2", 1, 3)
    (site.root / "work.qcow2").unlink()
    site.image("cache").unset("install", cascade=True)
    assert all(site.file("pool", digest).exists() for digest in chain), (
        "a cache removes its links, and not what they lead to"
    )
    forget_uses(site)
    site.image("maker", "pool").unset("install", cascade=True, scope="all")
    assert site.states("pool") == set()
    assert not any(site.file("pool", digest).exists() for digest in chain)


def forget_uses(site: Site) -> None:
    """As if the working images that are gone had been so for longer than a week."""
    for note in (site.root / "cache" / layout.OURS / "chains").glob("*/.uses/*.json"):
        note.unlink()
    statepool.StatePool(cache=site.root / "cache").gc()


def test_replacing_what_is_referred_to(site: Site, chain: list[str]) -> None:
    """The name leads to other bytes then; those that are referred to stay."""
    site.image("cache", "link://pool").get("customize", to=site.root / "work.qcow2")
    work = site.make_image(site.root / "new.qcow2", 2 * MIB, writes=pieces(0, 8))
    site.image("third", "pool").set("customize", source=work, replace=True)
    assert site.file("pool", chain[1]).exists()
    site.require("work.qcow2", 1, 3)
    site.image("cache", "link://pool").get("customize", to=site.root / "newer.qcow2")
    site.require("newer.qcow2", 8)
    site.require("work.qcow2", 1, 3)


# -- states that are replaced elsewhere ------------------------------------------------------------


@pytest.fixture
def replaced(site: Site) -> Callable[[], str]:
    """
    A pool with install; ``replaced()`` gives it other content, as somebody elsewhere does.
    :returns: the new digest
    """
    site.new("maker", "pool", "install", 1)
    return lambda: site.new("maker", "pool", "install", 2, replace=True)


def test_replaced_and_not_in_use(site: Site, replaced: Callable[[], str]) -> None:
    disk = site.image("cache", "pool")
    old = disk.get("install").digest
    new = replaced()
    got = disk.get("install", to=site.root / "work.qcow2")
    assert got.digest == new != old
    assert site.states("cache") == {"install"}
    assert not site.file("cache", old).exists()
    site.require("work.qcow2", 2)


def test_replaced_and_fresh_or_offline(site: Site, replaced: Callable[[], str]) -> None:
    old = site.image("cache", "pool").get("install").digest
    new = replaced()
    assert site.image("cache", "pool", fresh=3600.0).get("install").digest == old
    assert site.image("cache", "pool", offline=True).get("install").digest == old
    assert site.image("cache", "pool").get("install").digest == new


def test_replaced_and_in_use(site: Site, replaced: Callable[[], str]) -> None:
    disk = site.image("cache", "pool")
    old = disk.get("install", to=site.root / "old.qcow2").digest
    new = replaced()
    assert disk.get("install", to=site.root / "new.qcow2").digest == new
    assert site.file("cache", old).exists()
    assert site.file("cache", new).exists()
    site.require("old.qcow2", 1)
    site.require("new.qcow2", 2)
    statepool.StatePool(cache=site.root / "cache", sources=[site.root / "pool"]).gc()
    site.require("old.qcow2", 1)
    # Its parent is no state any more, so it cannot become one either, and says why.
    with pytest.raises(statepool.Conflict):
        disk.set("connect", source=site.root / "old.qcow2")
    site.require("old.qcow2", 1)
    (site.root / "old.qcow2").unlink()
    forget_uses(site)
    assert not site.file("cache", old).exists(), "it goes when nothing uses it"
    site.require("new.qcow2", 2)


def test_replaced_with_a_cached_child(site: Site, replaced: Callable[[], str]) -> None:
    site.child("maker", "pool", "install", "customize", 1, 5)
    disk = site.image("cache", "pool")
    old = disk.get("customize").chain
    assert old == ("customize", "install")
    before = site.digest("cache", "install")
    site.image("maker", "pool").unset("install", cascade=True, scope="all")
    new = site.new("maker", "pool", "install", 2)
    assert disk.get("install", to=site.root / "parent.qcow2").digest == new
    assert site.states("cache") == {"install", "customize"}
    assert site.file("cache", before).exists(), "the child stands on it"
    disk.get("customize", to=site.root / "child.qcow2")
    site.require("child.qcow2", 1, 5)
    site.require("parent.qcow2", 2, 0)
    # With the child goes what only it needed.
    (site.root / "child.qcow2").unlink()
    disk.unset("customize")
    forget_uses(site)
    assert not site.file("cache", before).exists()
    assert site.file("cache", new).exists()


def test_own_state_is_not_lost_to_a_replacement(site: Site) -> None:
    """
    What was set here and is nowhere else does not give way to what others call by the same name.
    """
    work = site.make_image(site.root / "own.qcow2", 2 * MIB, writes=pieces(0, 9))
    site.image("cache").set("install", source=work)
    site.new("maker", "pool", "install", 1)
    with pytest.raises(statepool.Conflict) as caught:
        site.image("cache", "pool").get("install")
    assert caught.value.exit_code == 4
    site.image("cache").get("install", to=site.root / "mine.qcow2")
    site.require("mine.qcow2", 9)
