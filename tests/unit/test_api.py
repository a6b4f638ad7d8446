"""A cache and its sources as one thing to ask."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.errors import (
    Conflict,
    FileInTheWay,
    HasDependants,
    InvalidLocation,
    InvalidName,
    NotAPool,
    NotFound,
    TransportError,
    UsageError,
)
from statepool.model.location import Location
from statepool.model.outcomes import Presence, Verified
from statepool.model.scope import Scope
from statepool.model.settings import Settings
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.testing.faults import Call, Fault, FaultyTransport
from statepool.testing.trees import photograph
from statepool.transports.registry import open_transport

MIB = 1 << 20
SIZE = 1 * MIB
BLOCK = 64 << 10

Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


def open_pool(root: Path, cache: str = "cache", **settings: Any) -> statepool.StatePool:
    return statepool.StatePool(root / cache, [root / "pool"], settings=Settings(**settings))


# -- making one ------------------------------------------------------------------------------------


def test_nothing_is_contacted_or_made_before_it_is_asked_for(tmp_path: Path) -> None:
    pool = statepool.StatePool(
        tmp_path / "cache", [tmp_path / "nowhere", f"link://{tmp_path}/linked"]
    )
    assert str(pool.cache) == f"file://{tmp_path}/cache"
    assert [str(location) for location in pool.sources] == [
        f"file://{tmp_path}/nowhere",
        f"link://{tmp_path}/linked",
    ]
    assert str(pool.image("vm1/disk")) == "vm1/disk"
    assert list(tmp_path.iterdir()) == []


def test_a_pool_can_be_named_in_several_ways(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(filled)
    source = PoolSource(Pool(open_transport(Location.parse("pool"))), "mine", Scope.SWARM)
    for place in (
        "pool",
        filled / "pool",
        f"file://{filled}/pool",
        f":{filled}/pool",
        Location.parse("pool"),
        source,
    ):
        assert statepool.StatePool("cache", [place]).image("vm1/disk").check("customize")


def test_a_cache_must_be_a_directory_of_this_host(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be a directory of this host"):
        statepool.StatePool(f"link://{tmp_path}")
    with pytest.raises(InvalidLocation):
        statepool.StatePool("")
    with pytest.raises(InvalidLocation):
        statepool.StatePool(tmp_path, ["nosuchscheme://host/path"])


def test_each_pool_is_named_once(filled: Path) -> None:
    (filled / "same").symlink_to("pool")
    for sources in (["pool", "pool"], ["pool", "same"], ["pool", f"link://{filled}/pool"]):
        places = [place if "://" in place else filled / place for place in sources]
        with pytest.raises(UsageError, match="name each pool once"):
            statepool.StatePool(filled / "cache", places)
    for cache in ("pool", "same"):
        with pytest.raises(UsageError, match="is the cache itself"):
            statepool.StatePool(filled / cache, [filled / "pool"])


def test_what_they_are_called_in_a_session(tmp_path: Path) -> None:
    pool = statepool.StatePool(tmp_path / "cache", [tmp_path / "pool"])
    assert (
        repr(pool)
        == f"StatePool(cache='file://{tmp_path}/cache', sources=['file://{tmp_path}/pool'])"
    )
    assert repr(pool.image("vm1/disk")) == f"<ImageHandle vm1/disk in file://{tmp_path}/cache>"
    assert repr(pool.machine("vm1")) == f"<MachineHandle vm1 in file://{tmp_path}/cache>"
    assert (
        repr(pool.machine("vm1", ["disk", "data"]))
        == f"<MachineHandle vm1 with disk, data in file://{tmp_path}/cache>"
    )
    assert list(tmp_path.iterdir()) == []


def test_closed_at_the_end_of_a_block(filled: Path) -> None:
    closed: list[str] = []

    class Closing(FaultyTransport):
        def close(self) -> None:
            closed.append("closed")

    source = PoolSource(Pool(Closing(open_transport(Location.parse(str(filled / "pool"))))), "mine")
    with pytest.raises(NotFound), statepool.StatePool(filled / "cache", [source]) as pool:
        assert pool.image("vm1/disk").check("customize")
        assert closed == []
        pool.image("vm1/disk").get("nothing")
    assert closed == ["closed"]


def test_sources_are_a_list(tmp_path: Path) -> None:
    source = PoolSource(Pool(open_transport(Location.parse(str(tmp_path)))), "mine")
    alone: list[Any] = ["ab", b"ab", tmp_path, Location.parse(str(tmp_path)), source]
    for sources in alone:
        with pytest.raises(UsageError, match="not a list"):
            statepool.StatePool(tmp_path / "cache", sources)


def test_a_scope_is_a_text_or_several(filled: Path) -> None:
    pool = open_pool(filled)
    assert pool.show(scope=["own"]) == pool.show(scope={Scope.OWN}) == pool.show(scope="own")
    scopes: list[Any] = [1, b"own", [None]]
    for scope in scopes:
        for ask in (
            pool.show,
            pool.sources_status,
            pool.image("vm1/disk").show,
            pool.machine("vm1").show,
        ):
            with pytest.raises(UsageError, match="not how scopes are written"):
                ask(scope=scope)


def test_what_an_image_is_called(tmp_path: Path) -> None:
    pool = statepool.StatePool(tmp_path / "cache")
    for name in ("vm1", "vm1/", "/disk", "../disk", "vm1/disk/x", ""):
        with pytest.raises(InvalidName):
            pool.image(name)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_file_cannot_be_made_a_pool(tmp_path: Path, dry_run: bool) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TransportError, match="Not a directory"):
        statepool.init(tmp_path / "file", dry_run=dry_run)


def test_made_once(tmp_path: Path) -> None:
    assert str(statepool.init(tmp_path / "pool", dry_run=True)) == f"file://{tmp_path}/pool"
    assert list(tmp_path.iterdir()) == []
    statepool.init(tmp_path / "pool")
    before = photograph(tmp_path)
    statepool.init(tmp_path / "pool")
    assert photograph(tmp_path) == before


def test_from_the_configuration(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (filled / "statepool.toml").write_text(
        'cache = "here"\nsources = [{ location = "pool", name = "lab", scope = "swarm" }]\n'
    )
    monkeypatch.chdir(filled)
    pool = statepool.from_config()
    assert pool.image("vm1/disk").get("install").verified is Verified.ARRIVED
    assert str(pool.cache) == f"file://{filled}/here"


# -- settings --------------------------------------------------------------------------------------


@pytest.fixture
def watched(filled: Path) -> tuple[list[str], PoolSource]:
    """The pool as a source, and what has been asked of it."""
    asked: list[str] = []

    def note(call: Call) -> bool:
        asked.append(f"{call.operation} {call.path}")
        return False

    inner = open_transport(Location("file", str(filled / "pool")))
    return asked, PoolSource(Pool(FaultyTransport(inner, Fault(matches=note))), "watched")


def test_a_trusted_get_within_the_period_asks_nobody(
    filled: Path, watched: tuple[list[str], PoolSource]
) -> None:
    asked, source = watched
    disk = statepool.StatePool(filled / "cache", [source]).image("vm1/disk")
    disk.get("customize")
    assert asked
    asked.clear()
    assert disk.get("customize").verified is Verified.TRUSTED
    disk.get("customize", to=filled / "work.qcow2")
    assert asked == []
    again = statepool.StatePool(filled / "cache", [source]).image("vm1/disk")
    assert again.get("customize").verified is Verified.TRUSTED
    assert asked == []


def test_after_the_period_the_source_is_asked_a_small_question(
    filled: Path, watched: tuple[list[str], PoolSource]
) -> None:
    asked, source = watched
    statepool.StatePool(filled / "cache", [source]).image("vm1/disk").get("customize")
    disk = statepool.StatePool(filled / "cache", [source], settings=Settings(fresh=0)).image(
        "vm1/disk"
    )
    disk.get("customize")
    asked.clear()
    assert disk.get("customize").verified is Verified.TRUSTED
    assert 0 < len(asked) <= 4
    assert all(question.startswith(("stat", "read")) for question in asked)
    assert not any("data/" in question for question in asked)


def test_offline_no_source_is_asked(filled: Path, watched: tuple[list[str], PoolSource]) -> None:
    asked, source = watched
    pool = statepool.StatePool(filled / "cache", [source], settings=Settings(offline=True))
    with pytest.raises(NotFound, match="offline"):
        pool.image("vm1/disk").get("install")
    assert not pool.image("vm1/disk").check("install")
    assert pool.show() == []
    assert pool.image("vm1/disk").show() == []
    assert pool.verify() == []
    assert pool.gc(everywhere=True) == []
    assert asked == []
    statepool.StatePool(filled / "cache", [source]).image("vm1/disk").get("install")
    asked.clear()
    assert pool.image("vm1/disk").get("install").verified is Verified.TRUSTED
    assert asked == []


def test_what_is_done_offline_says_so(
    filled: Path, watched: tuple[list[str], PoolSource], make_image: Callable[..., Path]
) -> None:
    _, source = watched
    statepool.StatePool(filled / "cache", [source]).image("vm1/disk").get("install")
    pool = statepool.StatePool(filled / "cache", [source], settings=Settings(offline=True))
    disk = pool.image("vm1/disk")
    stored = disk.set("new", source=make_image(filled / "new.qcow2"))
    answers = [
        disk.get("install"),
        disk.get("install", dry_run=True),
        stored,
        disk.show(),
        pool.show(),
        pool.machine("vm1").show(),
    ]
    assert [answer.warnings for answer in answers] == [("offline: no source was asked",)] * 6
    # Without sources there is nothing to say.
    alone = statepool.StatePool(filled / "cache", settings=Settings(offline=True))
    assert (alone.show().warnings, alone.image("vm1/disk").get("install").warnings) == ((), ())


def test_the_depth_is_limited(filled: Path, make_image: Make, write_to_image: Write) -> None:
    disk = open_pool(filled, max_depth=2).image("vm1/disk")
    disk.get("customize", to=filled / "work.qcow2")
    write_to_image(filled / "work.qcow2", [(0, BLOCK, 3)])
    with pytest.raises(statepool.UnsafeImage) as caught:
        disk.set("connect", source=filled / "work.qcow2")
    assert caught.value.check == "depth"
    assert (
        open_pool(filled, max_depth=3)
        .image("vm1/disk")
        .set("connect", source=filled / "work.qcow2")
        .complete
    )


# -- getting ---------------------------------------------------------------------------------------

READS = """
import os, sys
import statepool
pool = statepool.StatePool(sys.argv[1], [sys.argv[2]])
disk = pool.image("vm1/disk")
disk.get("big")

def read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])

before = read()
verified = disk.get("big").verified
print(verified, read() - before)
"""


def test_a_trusted_get_reads_no_image_data(tmp_path: Path, make_image: Make) -> None:
    statepool.init(tmp_path / "pool")
    work = make_image(tmp_path / "work.qcow2", 16 * MIB, writes=[(0, 16 * MIB, 7)])
    statepool.StatePool(tmp_path / "seed", [tmp_path / "pool"]).image("vm1/disk").set(
        "big", source=work
    )
    command = [sys.executable, "-c", READS, str(tmp_path / "cache"), str(tmp_path / "pool")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    verified, count = done.stdout.split()
    assert verified == "trusted"
    assert int(count) < 128 << 10


def test_a_dry_run_makes_nothing(filled: Path) -> None:
    before = photograph(filled)
    got = (
        open_pool(filled).image("vm1/disk").get("customize", to=filled / "work.qcow2", dry_run=True)
    )
    assert (got.chain, got.how) == (("customize", "install"), "copy")
    assert got.bytes > 0
    assert photograph(filled) == before


def test_a_configured_pool_that_is_empty_is_an_error(filled: Path) -> None:
    (filled / "mount").mkdir()
    pool = statepool.StatePool(filled / "cache", [filled / "mount"])
    for ask in (
        pool.show,
        pool.verify,
        lambda: pool.gc(everywhere=True),
        lambda: pool.image("vm1/disk").get("install"),
    ):
        with pytest.raises(NotAPool):
            ask()


def test_a_source_that_comes_later(filled: Path) -> None:
    statepool.init(filled / "first")
    pool = statepool.StatePool(filled / "cache", [filled / "first", filled / "pool"])
    got = pool.image("vm1/disk").get("customize")
    assert got.source == str(pool.sources[1])


# -- working images --------------------------------------------------------------------------------


KEEPING = [
    ("never", 0, 0),
    ("never", 1, 0),
    ("failed", 0, 0),
    ("failed", 1, 1),
    ("always", 0, 1),
    ("always", 1, 1),
]


@pytest.mark.parametrize(("keep", "fails", "kept"), KEEPING)
def test_a_working_image_for_as_long_as_it_is_needed(
    filled: Path, keep: str, fails: int, kept: int
) -> None:
    disk = open_pool(filled).image("vm1/disk")
    with contextlib.suppress(ZeroDivisionError), disk.working("customize", keep=keep) as path:
        assert path.is_file()
        assert filled / "cache" in path.parents
        assert 1 // (1 - fails)
    assert path.exists() == bool(kept)
    uses = list((filled / "cache").rglob(".uses/*.json"))
    assert len(uses) == kept


def test_a_working_image_elsewhere(filled: Path) -> None:
    (filled / "run").mkdir()
    disk = open_pool(filled).image("vm1/disk")
    with (
        disk.working("customize", directory=filled / "run") as one,
        disk.working("customize", directory=filled / "run") as two,
    ):
        assert one != two
        assert one.parent == two.parent == filled / "run"
    assert list((filled / "run").iterdir()) == []


def test_a_working_image_that_cannot_be(filled: Path) -> None:
    disk = open_pool(filled).image("vm1/disk")
    with (
        pytest.raises(UsageError, match="never, failed or always"),
        disk.working("customize", keep="sometimes"),
    ):
        pytest.fail("the block was entered")
    with pytest.raises(NotFound), disk.working("nothing"):
        pytest.fail("the block was entered")


def test_a_place_that_is_taken(filled: Path) -> None:
    (filled / "work.qcow2").write_text("mine")
    disk = open_pool(filled).image("vm1/disk")
    with pytest.raises(FileInTheWay):
        disk.get("customize", to=filled / "work.qcow2")
    disk.get("customize", to=filled / "work.qcow2", overwrite=True)
    assert (filled / "work.qcow2").read_bytes()[:4] == b"QFI\xfb"


# -- setting ---------------------------------------------------------------------------------------


def test_one_pool_that_fails_does_not_hide_the_others(filled: Path, make_image: Make) -> None:
    (filled / "mount").mkdir()
    pool = statepool.StatePool(filled / "cache", [filled / "mount", filled / "pool"])
    stored = pool.image("vm1/disk").set("new", source=make_image(filled / "work.qcow2", SIZE))
    assert [at.result for at in stored.pools] == [Presence.STORED, Presence.FAILED, Presence.STORED]
    assert not stored.complete
    assert "is not a pool" in (stored.pools[1].error or "")


def test_what_must_stay_in_one_pool_is_removed_from_none(
    filled: Path, write_to_image: Write
) -> None:
    disk = open_pool(filled).image("vm1/disk")
    disk.get("customize", to=filled / "work.qcow2")
    write_to_image(filled / "work.qcow2", [(2 * BLOCK, BLOCK, 3)])
    disk.set("mine", source=filled / "work.qcow2", scope="own")
    before = photograph(filled / "pool")
    with pytest.raises(HasDependants, match="mine"):
        disk.unset("customize", scope="own swarm cluster shared")
    assert photograph(filled / "pool") == before
    assert disk.check("customize")


@pytest.mark.parametrize(
    "labels",
    [
        {f"k{number}": "v" for number in range(65)},
        {"a": 5},
        {5: "a"},
        {"a": "y" * 4097},
        {"y" * 4097: "a"},
        {"a": "\udcff"},
    ],
    ids=["many", "number", "number as name", "long", "long name", "no Unicode"],
)
def test_labels_that_no_pool_could_keep_are_refused(
    filled: Path, make_image: Make, labels: dict[str, str]
) -> None:
    work = make_image(filled / "work.qcow2", SIZE)
    before = photograph(filled)
    with pytest.raises(UsageError, match="label"):
        open_pool(filled).image("vm1/disk").set("new", source=work, labels=labels)
    assert photograph(filled) == before


def test_labels_are_kept(filled: Path, make_image: Make) -> None:
    labels = {"os": "débian", **{f"k{number}": "v" * 4096 for number in range(63)}}
    open_pool(filled).image("vm1/disk").set(
        "new", source=make_image(filled / "work.qcow2", SIZE), labels=labels
    )
    assert (
        next(
            one for one in open_pool(filled, "other").show() if one.manifest.state == "new"
        ).manifest.labels
        == labels
    )


def test_removed_everywhere(filled: Path) -> None:
    disk = open_pool(filled).image("vm1/disk")
    disk.get("customize")
    removed = disk.unset("install", cascade=True, scope="all")
    assert set(removed.states) == {f"file://{filled}/cache", f"file://{filled}/pool"}
    assert not disk.check("customize")


def test_a_state_of_another_cache(filled: Path, make_image: Make) -> None:
    """Set in the cache only, and asked for when the pool has another of this name."""
    disk = open_pool(filled).image("vm1/disk")
    disk.set(
        "install",
        source=make_image(filled / "other.qcow2", SIZE, writes=[(0, BLOCK, 9)]),
        scope="own",
    )
    with pytest.raises(Conflict, match="is in no source"):
        disk.get("install")


@pytest.fixture
def careful() -> Iterator[None]:
    """A user who lets nobody else see what he makes."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_a_cache_that_a_group_shares_stays_one(
    filled: Path, write_to_image: Write, careful: None
) -> None:
    """
    Whatever the umask of an account: the others have to go on with all of it, but for what each has
    for itself.
    """
    for name in ("cache", "lab"):
        (filled / name).mkdir()
        (filled / name).chmod(0o2775)
    statepool.init(filled / "lab")
    pool = statepool.StatePool(filled / "cache", [filled / "pool", filled / "lab"])
    disk = pool.image("vm1/disk")
    disk.get("customize", to=filled / "work.qcow2")
    write_to_image(filled / "work.qcow2", [(2 * BLOCK, BLOCK, 3)])
    disk.set("mine", source=filled / "work.qcow2")
    with disk.working("install"):
        disk.unset("mine", scope="own swarm cluster shared")
    pool.gc(everywhere=True)
    for root in (filled / "cache", filled / "lab"):
        shared = {path for path in root.rglob("*") if ".statepool/accounts/" not in str(path)}
        assert {
            path for path in shared if path.is_dir() and path.stat().st_mode & 0o2070 != 0o2070
        } == set()
        files = {path for path in shared if path.is_file() and not path.is_symlink()}
        assert {
            path
            for path in files
            if path.parent.name != "data" and path.stat().st_mode & 0o060 != 0o060
        } == set()
        assert {
            path for path in set(root.rglob("*")) - shared if path.stat().st_mode & 0o022
        } == set()


# -- the log ---------------------------------------------------------------------------------------


def test_what_happened(filled: Path) -> None:
    pool = open_pool(filled)
    disk = pool.image("vm1/disk")
    disk.get("customize")
    disk.unset("customize")
    mine = [logged for logged in pool.log("vm1/disk") if logged.pool == f"file://{filled}/cache"]
    assert [change.split(" as ")[0] for logged in mine for change in logged.changes] == [
        "publish vm1/disk install",
        "publish vm1/disk customize",
        "remove vm1/disk customize",
    ]
    assert pool.log("vm2") == []
    assert pool.log("vm1/data") == []
