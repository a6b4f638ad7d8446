"""Several pools: whom they may be, whether they agree, and what is set and unset in which."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve

import statepool
from statepool.errors import Conflict, NotFound, UsageError
from statepool.model.location import Location
from statepool.model.scope import Scope
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.testing.faults import Fault, Stop, on
from statepool.testing.trees import photograph
from statepool.transports.registry import open_transport

if TYPE_CHECKING:
    from conftest import Site

MIB = 1 << 20
SIZE = 1 * MIB
BLOCK = 64 << 10
CHAIN = ("connect", "customize", "install")


# -- root images -----------------------------------------------------------------------------------


def test_a_root_image_of_another_tool_comes_from_the_next(site: Site) -> None:
    (site.root / "i2n").mkdir()
    site.make(site.root / "i2n/vm1/disk.qcow2", SIZE, writes=[(0, BLOCK, 5)])
    (site.root / "first/vm1").mkdir(parents=True)
    (site.root / "first/vm1/disk.qcow2").write_bytes(b"no image at all")
    assert site.open("first", "i2n").image("vm1/disk").check("root")
    got = site.open("first", "i2n").image("vm1/disk").get("root", to=site.root / "root.qcow2")
    assert (got.state, got.source, got.verified) == ("root", f"file://{site.root}/i2n", "unmanaged")
    assert "first is corrupt" in got.warnings[0]


def test_root_images_in_all_pools(site: Site) -> None:
    site.empty("first")
    failing = site.source("first", Stop(matches=on("store")))
    root = site.make(site.root / "root.qcow2", SIZE, writes=[(0, BLOCK, 5)])
    assert outcome(site.open(failing, "good").image("vm1/disk").set("root", source=root)) == [
        "stored",
        "failed",
        "stored",
    ]
    disk = site.open("first", "good").image("vm1/disk")
    with pytest.raises(UsageError, match="no pool is in this scope"):
        disk.unset("root", scope="cluster")
    assert set(disk.unset("root", scope="all").states) == {
        f"file://{site.root}/good",
        f"file://{site.root}/cache",
    }
    assert not disk.check("root")


# -- sources that do not mean the same -------------------------------------------------------------


def test_sources_that_disagree(site: Site) -> None:
    site.empty("first")
    site.change("first", "connect", 9)
    before = photograph(site.root)
    pool = site.open("first", "good")
    with pytest.raises(Conflict) as caught:
        pool.image("vm1/disk").get("connect", to=site.root / "work-1.qcow2")
    there = {
        listed.pools[0]: str(listed.manifest.digest)
        for listed in pool.show()
        if listed.manifest.state == "connect"
    }
    assert all(f"{place} has {digest}" in caught.value.message for place, digest in there.items())
    assert "--from first or --from good" in str(caught.value.hint)
    assert photograph(site.root) == before
    assert pool.image("vm1/disk").get("connect", mirror="first").chain == ("connect",)
    assert pool.image("vm1/disk").get("connect", mirror="good").chain == CHAIN
    assert pool.image("vm1/disk").get("connect", mirror=f"file://{site.root}/first").chain == (
        "connect",
    )


def test_sources_that_disagree_about_what_is_below(site: Site) -> None:
    site.empty("first")
    site.change("first", "install", 9)
    # An overlay that nobody wrote to has the same bytes on every parent.
    for name in ("first", "good"):
        place = site.open(name, cache=f"twin-{name}").image("vm1/disk")
        place.get("install", to=site.root / f"twin-{name}.qcow2")
        place.set("twin", source=site.root / f"twin-{name}.qcow2")
    pool = site.open("first", "good")
    assert (
        len(
            {
                str(listed.manifest.digest)
                for listed in pool.show()
                if listed.manifest.state == "twin"
            }
        )
        == 1
    )
    with pytest.raises(Conflict, match="disagree about vm1/disk twin, in install below it"):
        pool.image("vm1/disk").get("twin")


def test_one_that_has_not_noticed_a_replacement(site: Site) -> None:
    site.pool("first")
    site.change("good", "connect", 9, on_top_of="customize", replace=True)
    new = next(
        str(listed.manifest.digest)
        for listed in site.open("good").show()
        if listed.manifest.state == "connect"
    )
    good = evolve(site.source("good", Fault()), authority=True)
    for number, order in enumerate((("first", good), (good, "first"))):
        with pytest.raises(Conflict, match="the sources disagree"):
            site.open("first", "good", cache=f"cache-{number}").image("vm1/disk").get("connect")
        got = site.open(*order, cache=f"cache-{number}").image("vm1/disk").get("connect")
        assert (got.digest, got.source) == (new, f"file://{site.root}/good")
        assert (
            f"first has other content of vm1/disk connect than file://{site.root}/good, which is"
            " the authority" in got.warnings[0]
        )
    # One that has the old content already notices, too.
    site.open("first", cache="late").image("vm1/disk").get("connect")
    assert (
        site.open("first", good, cache="late", fresh=0).image("vm1/disk").get("connect").digest
        == new
    )
    shown = {status.name: status.authority for status in site.open("first", good).sources_status()}
    assert shown == {"first": False, "good": True}


def test_a_source_that_is_out_of_reach_is_not_replaced_by_another(site: Site) -> None:
    """
    What is cached is what "good" had. While it does not answer, another source has no right to
    replace that.
    """
    site.empty("first")
    site.change("first", "connect", 9)
    was = site.open("good").image("vm1/disk").get("connect").digest
    gone = site.source("good", Stop())
    for source in (gone, gone):  # the second time it is not even asked
        got = site.open("first", source, fresh=0).image("vm1/disk").get("connect")
        assert got.digest == was
        assert "first has other content" in got.warnings[-1]
        assert "what is cached stays" in got.warnings[-1]
    first = evolve(site.source("first", Fault()), authority=True)
    assert site.open(first, gone, fresh=0).image("vm1/disk").get("connect").digest != was


def test_one_whose_files_nobody_vouches_for(site: Site) -> None:
    (site.root / "first/vm1/disk").mkdir(parents=True)
    for state in CHAIN:
        shutil.copy(site.data("good", state), site.root / f"first/vm1/disk/{state}.qcow2")
    got = site.open("first", "good").image("vm1/disk").get("connect")
    assert (got.source, got.verified) == (f"file://{site.root}/good", "arrived")


# -- scopes ----------------------------------------------------------------------------------------


def test_from_where_it_may_come(site: Site) -> None:
    site.pool("near")
    near, good = (
        site.source("near", Fault(), scope=Scope.SWARM),
        site.source("good", Fault(), scope=Scope.SHARED),
    )
    disk = site.open(good, near).image("vm1/disk")
    assert disk.get("install").source == f"file://{site.root}/near"
    assert disk.get("customize", scope="shared").source == f"file://{site.root}/good"
    asked = len(site.calls(near))
    with pytest.raises(NotFound):
        disk.get("connect", scope="own")
    assert not disk.check("connect", scope="own")
    assert disk.check("connect", scope="own shared")
    assert {listed.manifest.state for listed in disk.show(scope="own")} == {"customize", "install"}
    assert {pool for listed in disk.show(scope="shared") for pool in listed.pools} == {
        f"file://{site.root}/good"
    }
    assert len(site.calls(near)) == asked


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("get", {"state": "install"}),
        ("check", {"state": "install"}),
        ("show", {}),
        ("set", {"state": "new", "source": "work.qcow2"}),
        ("unset", {"state": "install"}),
    ],
)
@pytest.mark.parametrize(
    ("scope", "told"),
    [
        ("cluster", "no pool is in this scope: cluster .good is shared"),
        ("moon", "there is no scope 'moon'"),
        ("", "no scope"),
    ],
)
def test_a_scope_without_pools(
    site: Site, operation: str, arguments: dict[str, Any], scope: str, told: str
) -> None:
    before = photograph(site.root)
    with pytest.raises(UsageError, match=told):
        getattr(site.open("good").image("vm1/disk"), operation)(**arguments, scope=scope)
    assert photograph(site.root) == before


def test_a_source_that_does_not_exist(site: Site) -> None:
    before = photograph(site.root)
    with pytest.raises(UsageError, match="there is no source 'moon'") as caught:
        site.open("good").image("vm1/disk").get("install", mirror="moon")
    assert caught.value.hint == "sources are good"
    assert photograph(site.root) == before


def test_a_source_is_named_as_it_is_called_or_where_it_is(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(site.root)
    disk = site.open("good").image("vm1/disk")
    places = [
        "good",
        "./good",
        str(site.root / "good"),
        site.root / "good",
        f"file://{site.root}/good",
        statepool.Location.parse("good"),
    ]
    for place in places:
        assert disk.get("install", mirror=place, dry_run=True).source == f"file://{site.root}/good"


def test_two_sources_with_one_name(site: Site) -> None:
    site.pool("first")
    other = PoolSource(Pool(open_transport(Location("file", str(site.root / "first")))), "good")
    with pytest.raises(
        UsageError, match=r"two sources are named 'good': file://.*/good and file://.*/first"
    ):
        site.open("good", other)


# -- setting and unsetting -------------------------------------------------------------------------


def outcome(stored: statepool.SetResult) -> list[str]:
    return [str(at.result) for at in stored.pools]


def test_setting_again_completes_the_rest(site: Site) -> None:
    site.empty("first")
    work = site.root / "work.qcow2"
    failing = site.source("first", Stop(matches=on("store")))
    stored = (
        site.open(failing, "good")
        .image("vm1/disk")
        .set("new", source=site.make(site.root / "new.qcow2", SIZE))
    )
    assert outcome(stored) == ["stored", "failed", "stored"]
    again = site.open("first", "good").image("vm1/disk").set("new", source=site.root / "new.qcow2")
    assert outcome(again) == ["present", "stored", "present"]
    assert (
        outcome(
            site.open("first", "good").image("vm1/disk").set("new", source=site.root / "new.qcow2")
        )
        == ["present"] * 3
    )
    assert work.exists()


@pytest.mark.parametrize(
    ("wait_for", "failing", "complete"),
    [
        ("all", (), True),
        ("all", ("first",), False),
        ("any", ("first",), True),
        ("any", ("first", "good"), False),
        ("own", ("first", "good"), True),
    ],
)
def test_what_a_set_waits_for(
    site: Site, wait_for: str, failing: tuple[str, ...], complete: bool
) -> None:
    site.empty("first")
    sources = [
        site.source(name, *([Stop(matches=on("store"))] if name in failing else []))
        for name in ("first", "good")
    ]
    stored = (
        site.open(*sources)
        .image("vm1/disk")
        .set("new", source=site.make(site.root / "new.qcow2", SIZE), wait_for=wait_for)
    )
    assert outcome(stored) == [
        "stored",
        *("failed" if name in failing else "stored" for name in ("first", "good")),
    ]
    assert stored.complete is complete


def test_without_sources_any_is_the_cache(site: Site) -> None:
    new = site.make(site.root / "new.qcow2", SIZE)
    assert site.open().image("vm1/disk").set("new", source=new, wait_for="any").complete
    with pytest.raises(UsageError, match="wait_for cannot be 'some'"):
        site.open().image("vm1/disk").set("new", source=new, wait_for="some")


def test_unsetting_again_completes_the_rest(site: Site) -> None:
    site.pool("first")
    failing = site.source("first", Stop(matches=on("create", path="*/log/*")))
    site.open("good").image("vm1/disk").get("connect")
    removed = site.open(failing, "good").image("vm1/disk").unset("connect", scope="all")
    assert list(removed.states) == [f"file://{site.root}/good"]
    assert list(removed.errors) == [f"file://{site.root}/first"]
    again = site.open("first", "good").image("vm1/disk").unset("connect", scope="all")
    assert set(again.states) == {f"file://{site.root}/first", f"file://{site.root}/cache"}
    assert again.errors == {}
