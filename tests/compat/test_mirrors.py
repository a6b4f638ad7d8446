"""
Several sources of one state, of which some are not what they should be: the state comes whole from
the next one.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from attrs import frozen

import statepool
from statepool.errors import IntegrityError, NoSpace, NotFound, TransportError
from statepool.sources.pool_source import PoolSource
from statepool.testing.faults import Call, Fault, Flip, Slow, Stop, on
from statepool.testing.trees import photograph

if TYPE_CHECKING:
    from conftest import Make, Site

MIB = 1 << 20
VAST = 1 << 42
SIZE = 1 * MIB
BLOCK = 64 << 10
CHAIN = ("connect", "customize", "install")


# -- the first source is not what it should be -----------------------------------------------------


def corrupt(site: Site) -> Any:
    site.pool("first")
    path = site.data("first", "customize")
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 100)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return "first"


def rootless(site: Site) -> Any:
    site.pool("first")
    site.data("first", "install").unlink()
    return "first"


def empty(site: Site) -> Any:
    site.empty("first")
    return "first"


def not_mounted(site: Site) -> Any:
    (site.root / "first").mkdir()
    return "first"


def broken(site: Site) -> Any:
    site.pool("first")
    return site.source("first", Stop(matches=on("fetch"), after=64 << 10))


def gap(site: Site) -> Any:
    site.pool("first")
    (site.root / "first/.statepool/log/vm1/00000000000000000002.json").unlink()
    return "first"


def enlarge(site: Site, size: int) -> None:
    """The first source says that ``connect`` is so long, and has such a file."""
    path = site.data("first", "connect")
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.truncate(size)
    record = max((site.root / "first/.statepool/log/vm1").iterdir())
    said = json.loads(record.read_text())
    (change,) = said["changes"]
    change["publish"] |= {"size": size, "extents": [[0, size]]}
    record.chmod(0o600)
    record.write_text(json.dumps(said))


def vast(site: Site) -> Any:
    site.pool("first")
    enlarge(site, VAST)
    with site.data("first", "connect").open("r+b") as file:
        file.seek(24)  # the size of the disk (docs/interop/qcow2.txt)
        file.write((4 * VAST).to_bytes(8, "big"))
    return "first"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (vast, "do not fit"),
        (corrupt, "is corrupt"),
        (rootless, "does not have the bytes of vm1/disk install"),
        (empty, None),
        (not_mounted, "is not a pool"),
        (broken, "connection broke"),
        (gap, "is corrupt"),
    ],
)
def test_the_state_comes_whole_from_the_next(
    site: Site, spoil: Callable[[Site], Any], told: str | None
) -> None:
    pool = site.open(spoil(site), "good")
    got = pool.image("vm1/disk").get("connect", to=site.root / "work-1.qcow2")
    assert (got.chain, got.source, got.verified) == (CHAIN, f"file://{site.root}/good", "arrived")
    assert len(got.warnings) == (told is not None)
    if told is not None:
        assert f"the source file://{site.root}/first" in got.warnings[0]
        assert told in got.warnings[0]
    site.require_whole()


def test_nothing_is_evicted_for_what_no_disk_can_need(site: Site) -> None:
    """Looked at before room is made: the header of the image says how large the disk is."""
    site.pool("first")
    enlarge(site, VAST)
    pool = site.open("first", "good")
    pool._cache.prepare()
    got = pool.image("vm1/disk").get("connect")
    assert got.source == f"file://{site.root}/good"
    assert "'proportion'" in got.warnings[0]


def test_a_state_that_fits_nowhere(site: Site) -> None:
    """That there is no room is said as it is, if all sources say that so much is needed."""
    site.pool("first")
    enlarge(site, VAST)
    with site.data("first", "connect").open("r+b") as file:
        file.seek(24)
        file.write((4 * VAST).to_bytes(8, "big"))
    with pytest.raises(NoSpace, match="do not fit"):
        site.open("first").image("vm1/disk").get("connect")


def test_what_has_arrived_whole_stays(site: Site) -> None:
    """
    The root from the first source, and from the second what was corrupt in the first, and what
    stands on it.
    """
    pool = site.open(corrupt(site), "good")
    got = pool.image("vm1/disk").get("connect")
    assert (
        0
        < got.bytes
        < statepool.StatePool(site.root / "other", [site.root / "good"])
        .image("vm1/disk")
        .get("connect")
        .bytes
    )


def test_a_corrupt_source_is_named_from_then_on(site: Site) -> None:
    site.open(corrupt(site), "good").image("vm1/disk").get("connect")
    pool = site.open("first", "good")  # as another process would
    good, first = pool.sources_status()
    assert (good.name, good.problem, good.rest) == ("good", None, 0)
    assert (first.name, first.corrupt, first.failures) == ("first", True, 1)
    assert first.rest > 60
    assert "was corrupt" in first.why
    assert str(site.data("first", "customize").name).removeprefix("blake3-") in str(
        first.problem
    ).replace(":", "-")


def test_one_that_failed_is_left_alone(site: Site) -> None:
    first = broken(site)
    site.open(first, "good").image("vm1/disk").get("connect")
    again = site.source("first", Fault())
    got = site.open(again, "good", cache="cache", fresh=0).image("vm1/disk").get("install")
    assert site.calls(again) == []
    assert got.warnings == ()


def test_one_that_is_left_alone_is_asked_if_nobody_else_has_it(site: Site) -> None:
    first = broken(site)
    site.open(first, "good").image("vm1/disk").get("connect")
    site.change("first", "more", 9, on_top_of="connect")
    got = site.open("first", "good").image("vm1/disk").get("more")
    assert got.source == f"file://{site.root}/first"
    # it did well, and is forgiven
    assert [one.rest for one in site.open("first", "good").sources_status()] == [0, 0]


def test_all_of_them_fail(site: Site) -> None:
    corrupt(site)
    shutil.copytree(site.root / "first", site.root / "second", symlinks=True)
    with pytest.raises(IntegrityError) as caught:
        site.open("first", "second").image("vm1/disk").get("connect", to=site.root / "work-1.qcow2")
    assert caught.value.exit_code == 5
    assert all(
        f"file://{site.root}/{name}: " in caught.value.message for name in ("first", "second")
    )
    assert not (site.root / "work-1.qcow2").exists()
    with pytest.raises(TransportError) as other:
        site.open("first", site.source("good", Stop()), cache="another").image("vm1/disk").get(
            "connect"
        )
    assert all(f"file://{site.root}/{name}: " in other.value.message for name in ("first", "good"))


def test_nobody_has_it(site: Site) -> None:
    site.empty("first")
    before = photograph(site.root)
    with pytest.raises(
        NotFound, match=r"there is no state nothing of vm1/disk in .*cache, .*first, .*good"
    ):
        site.open("first", "good").image("vm1/disk").get("nothing")
    (site.root / "gone").mkdir()
    with pytest.raises(TransportError, match=r"gone: .* is not a pool.*; .*good: does not have it"):
        site.open("gone", "good").image("vm1/disk").get("nothing")
    with pytest.raises(TransportError, match="nobody knows whether"):
        site.open("gone", "good").image("vm1/disk").check("nothing")
    assert site.open("gone", "good").image("vm1/disk").check("connect")
    (site.root / "gone").rmdir()
    assert photograph(site.root) == before


def test_a_failure_of_the_cache_is_not_that_of_a_source(site: Site) -> None:
    site.pool("first")
    pool = site.open("first", "good")
    pool._cache.prepare()
    (site.root / "cache/.statepool/incoming").rmdir()
    (site.root / "cache/.statepool/incoming").write_text("in the way")
    with pytest.raises(statepool.StatePoolError) as caught:
        pool.image("vm1/disk").get("connect")
    assert "first" not in str(caught.value)
    assert all(one.failures == 0 for one in pool.sources_status())


# -- one that does not answer, or only slowly ------------------------------------------------------


@frozen(kw_only=True)
class Hang(Fault):
    """The call does not return until it is told to."""

    until: threading.Event

    def before(self, call: Call) -> None:
        self.until.wait(60)


@pytest.fixture
def hanging(site: Site) -> Iterator[PoolSource]:
    """A source that never answers."""
    site.pool("first")
    until = threading.Event()
    yield site.source("first", Hang(until=until))
    until.set()


def test_one_that_does_not_answer_costs_the_deadline_once(site: Site, hanging: PoolSource) -> None:
    pool = site.open(hanging, "good", probe_timeout=0.2, fresh=0)
    got = pool.image("vm1/disk").get("connect")
    assert got.source == f"file://{site.root}/good"
    assert "did not answer within 0.18 s" in got.warnings[0]
    count = len(site.calls(hanging))
    assert pool.image("vm1/disk").get("connect").warnings == ()
    assert site.open(hanging, "good", fresh=0).image("vm1/disk").check("install")
    assert len(site.calls(hanging)) == count
    assert [one.name for one in pool.sources_status()] == ["good", "first"]


def test_listings_do_without_it(site: Site, hanging: PoolSource) -> None:
    pool = site.open(hanging, "good", probe_timeout=0.2)
    for shown in (pool.show(), pool.show("vm1"), pool.image("vm1/disk").show()):
        assert {listed.manifest.state for listed in shown} == set(CHAIN)
        assert {listed.pools for listed in shown} == {(f"file://{site.root}/good",)}
        assert "did not answer" in shown.warnings[0]


def test_a_slow_one_is_noticed_before_much_comes_from_it(site: Site, make_image: Make) -> None:
    work = make_image(site.root / "big.qcow2", 32 * MIB, writes=[(0, 12 * MIB, 7)])
    statepool.StatePool(site.root / "seed", [site.root / "good"]).image("vm1/disk").set(
        "big", source=work
    )
    site.pool("first")
    slept: list[float] = []
    slow = site.source(
        "first",
        Slow(
            rate=MIB,
            sleep=lambda seconds: (
                slept.append(seconds),
                threading.Event().wait(min(seconds, 0.3)),
            ),
        ),
    )
    pool = site.open(slow, "good")
    got = pool.image("vm1/disk").get("big")
    assert got.source == f"file://{site.root}/good"
    assert sum(slept) < 2
    assert [one.name for one in pool.sources_status()] == ["good", "first"]
    assert pool.sources_status()[1].rate < 4 * MIB


def test_one_that_becomes_slow_is_left(site: Site, make_image: Make) -> None:
    """Its speed was measured before, so that only the transfer itself shows it."""
    work = make_image(site.root / "big.qcow2", 32 * MIB, writes=[(0, 12 * MIB, 7)])
    statepool.StatePool(site.root / "seed", [site.root / "good"]).image("vm1/disk").set(
        "big", source=work
    )
    site.pool("first")
    slow = site.source("first", Slow(matches=on("fetch"), rate=2 * MIB))
    pool = site.open(slow, "good")
    pool._context.stats.delivered(slow, 900 * MIB, 1.0)
    got = pool.image("vm1/disk").get("big")
    assert got.source == f"file://{site.root}/good"
    assert "was left for another source" in got.warnings[0]
    assert len([call for call in site.calls(slow) if call.startswith("fetch")]) == 1
    alone = site.open(slow, cache="another").image("vm1/disk")
    assert alone.get("install").source == f"file://{site.root}/first"  # better than nothing


# -- damage in the cache ---------------------------------------------------------------------------


def test_what_is_damaged_here_comes_from_the_next_if_the_first_is_corrupt(site: Site) -> None:
    site.open("good").image("vm1/disk").get("connect")
    damaged = site.data("cache", "customize")
    damaged.chmod(0o600)
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    spoilt = site.pool("first")
    assert spoilt.exists()
    rotten = site.source("first", Flip(matches=on("fetch"), offset=300_000))
    got = site.open(rotten, "good").image("vm1/disk").get("connect")
    assert got.source == f"file://{site.root}/good"
    assert "is corrupt" in got.warnings[0]
    site.require_whole()
