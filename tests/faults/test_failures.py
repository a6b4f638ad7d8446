"""
What goes wrong inside a process that goes on living, and bytes that are not what they should be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import statepool
from statepool.cache import working
from statepool.errors import NoSpace, TransportError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.pools.view import View
from statepool.sources.pool_source import PoolSource
from statepool.testing.faults import FaultyTransport, Flip, Full, Slow, Stop, Truncate, on
from statepool.transports.registry import open_transport

if TYPE_CHECKING:
    from conftest import Lab

MEMBERS = ["install", "customize", "leaf"]


def leftovers(root: Path) -> list[Path]:
    return [
        path
        for directory in (layout.INCOMING, layout.TRASH)
        for path in (root / directory).glob("*")
    ]


# -- a source that is not what it says -------------------------------------------------------------


@pytest.fixture(params=MEMBERS)
def spoilt(request: pytest.FixtureRequest, lab: Lab) -> Path:
    """The bytes of one state in the pool: of the root, of the middle or of the tip."""
    digest = Digest.parse(lab.digests("pool")[request.param])
    path = lab.root / "pool" / layout.data(digest)
    path.chmod(0o600)
    return path


def names_known(lab: Lab) -> set[str]:
    return set(lab.digests("other"))


def test_flipped_byte(lab: Lab, spoilt: Path) -> None:
    expected = Digest.from_file_name(spoilt.name)
    data = bytearray(spoilt.read_bytes())
    data[len(data) // 2] ^= 1
    spoilt.write_bytes(data)
    with pytest.raises(statepool.DigestMismatch) as caught:
        lab.handle("other").get("leaf", to=lab.root / "far.qcow2")
    assert caught.value.exit_code == 5
    assert (caught.value.expected, caught.value.actual) == (
        str(expected),
        str(Digest.of(bytes(data))),
    )
    assert str(expected) in str(caught.value)
    assert str(Digest.of(bytes(data))) in str(caught.value)
    require_nothing_of(lab, str(expected))


def test_cut_file(lab: Lab, spoilt: Path) -> None:
    expected = Digest.from_file_name(spoilt.name)
    os.truncate(spoilt, spoilt.stat().st_size - 1)
    with pytest.raises(statepool.IntegrityError) as caught:
        lab.handle("other").get("leaf", to=lab.root / "far.qcow2")
    assert caught.value.exit_code == 5
    require_nothing_of(lab, str(expected))


def require_nothing_of(lab: Lab, digest: str) -> None:
    """What came before it, root first, is there; it is not, and nothing of it."""
    known = lab.digests("other")
    bad = next(
        name for name, known_digest in lab.digests("cache").items() if known_digest == digest
    )
    assert set(known) == set(MEMBERS[: MEMBERS.index(bad)])
    assert {path.name for path in (lab.root / "other" / layout.DATA).iterdir()} == {
        Digest.parse(one).file_name for one in known.values()
    }
    assert not leftovers(lab.root / "other")
    assert not (lab.root / "far.qcow2").exists()


def test_other_source_is_whole(lab: Lab, spoilt: Path) -> None:
    """What a spoilt source has put there is not in the way of a good one."""
    spoilt.write_bytes(b"\0" * spoilt.stat().st_size)
    with pytest.raises(statepool.IntegrityError):
        lab.handle("other").get("leaf")
    good = statepool.StatePool(cache=lab.root / "other", sources=[lab.root / "cache"]).image(
        "vm1/disk"
    )
    good.get("leaf", to=lab.root / "far.qcow2")
    lab.require_usable("far.qcow2", "leaf")


# -- a connection that is not what it should be ----------------------------------------------------


def through(lab: Lab, *faults: Any) -> statepool.ImageHandle:
    transport = FaultyTransport(open_transport(Location("file", str(lab.root / "pool"))), *faults)
    source = PoolSource(Pool(transport), "far away")
    return statepool.StatePool(cache=lab.root / "other", sources=[source]).image("vm1/disk")


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda first: Stop(matches=on("fetch"), first=first, times=1), TransportError),
        (
            lambda first: Stop(matches=on("fetch"), first=first, times=1, after=64 << 10),
            TransportError,
        ),
        (
            lambda first: Truncate(matches=on("fetch"), first=first, times=1, keep=100_000),
            statepool.IntegrityError,
        ),
        (
            lambda first: Flip(matches=on("fetch"), first=first, times=1, offset=300_000),
            statepool.DigestMismatch,
        ),
        (lambda first: Full(matches=on("fetch"), first=first, times=1, after=64 << 10), NoSpace),
    ],
    ids=["stopped", "stopped in the middle", "cut", "flipped", "full"],
)
def test_broken_fetch(
    lab: Lab, number: int, fault: Any, error: type[statepool.StatePoolError]
) -> None:
    disk = through(lab, fault(number))
    with pytest.raises(error):
        disk.get("leaf", to=lab.root / "far.qcow2")
    assert names_known(lab) == set(MEMBERS[: number - 1])
    assert not leftovers(lab.root / "other")
    assert not (lab.root / "far.qcow2").exists()
    lab.require_whole()
    # it was a passing fault: the rest comes, and only that
    got = disk.get("leaf", to=lab.root / "far.qcow2")
    whole = sum(
        (lab.root / "pool" / layout.data(Digest.parse(lab.digests("pool")[name]))).stat().st_size
        for name in MEMBERS[number - 1 :]
    )
    assert 0 < got.bytes <= whole
    lab.require_usable("far.qcow2", "leaf")


def test_slow_fetch(lab: Lab) -> None:
    waited: list[float] = []
    got = through(lab, Slow(matches=on("fetch"), rate=1e6, sleep=waited.append)).get(
        "leaf", to=lab.root / "far.qcow2"
    )
    assert got.bytes
    assert sum(waited) > 0
    lab.require_usable("far.qcow2", "leaf")


@pytest.mark.parametrize("operation", ["store", "create", "link", "flush", "symlink"])
def test_source_that_fails_in_a_set(lab: Lab, operation: str) -> None:
    """
    The state is in the cache, the outcome says what it is at the source, and the same again ends
    it.
    """
    transport = FaultyTransport(
        open_transport(Location("file", str(lab.root / "pool"))),
        Stop(matches=on(operation), times=1),
    )
    disk = statepool.StatePool(
        cache=lab.root / "cache", sources=[PoolSource(Pool(transport), "pool")]
    ).image("vm1/disk")
    stored = disk.set("connect", source=lab.root / "work.qcow2")
    assert [at.result for at in stored.pools] == [
        statepool.Presence.STORED,
        statepool.Presence.FAILED,
    ]
    assert not stored.complete
    assert stored.pools[1].error
    lab.require_whole()
    lab.require_usable("work.qcow2", "work")
    again = disk.set("connect", source=lab.root / "work.qcow2")
    assert again.complete
    assert lab.digests("pool")["connect"] == stored.digest
    lab.require_clean()


# -- a set that fails in a process that goes on ----------------------------------------------------


class Broken(Exception):
    """Of nobody's kind: an interruption, or a fault of ours."""


@pytest.fixture(params=["work", "linked"])
def image(request: pytest.FixtureRequest) -> Iterator[str]:
    """One that is linked, and one that is copied."""
    return request.param


@pytest.mark.parametrize(
    "error", [Broken(), KeyboardInterrupt(), OSError(5, "Input/output error")], ids=repr
)
def test_failure_before_the_state_is_published(
    lab: Lab, image: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **rest: Any) -> None:
        raise error

    monkeypatch.setattr(Pool, "append", fail)
    before = lab.digests("cache")
    mode = (lab.root / f"{image}.qcow2").stat().st_mode
    with pytest.raises((type(error), statepool.StatePoolError)):
        lab.handle("cache").set("connect", source=lab.root / f"{image}.qcow2")
    monkeypatch.undo()
    assert lab.digests("cache") == before
    lab.require_usable(f"{image}.qcow2", image)
    assert (lab.root / f"{image}.qcow2").stat().st_mode == mode
    assert not leftovers(lab.root / "cache")
    lab.require_whole()
    assert lab.handle("cache").set("connect", source=lab.root / f"{image}.qcow2").complete
    lab.require_usable(f"{image}.qcow2", image)
    lab.require_clean()


def test_failure_after_the_state_is_published(
    lab: Lab, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **rest: Any) -> None:
        raise Broken

    monkeypatch.setattr(working, "_settle", fail)
    with pytest.raises(Broken):
        lab.handle("cache").set("connect", source=lab.root / f"{image}.qcow2")
    monkeypatch.undo()
    assert lab.handle("cache").set("connect", source=lab.root / f"{image}.qcow2").complete
    lab.require_usable(f"{image}.qcow2", image)
    lab.require_clean()
    lab.require_whole()


def test_state_without_its_place_in_the_view(
    lab: Lab, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The state is published, and the disk is full at once: the working image is what it should be all
    the same, without another command.
    """

    def fail(*arguments: Any, **rest: Any) -> None:
        raise statepool.NoSpace("in a test")

    monkeypatch.setattr(View, "update", fail)
    with pytest.raises(statepool.NoSpace):
        lab.handle("cache").set("connect", source=lab.root / f"{image}.qcow2")
    monkeypatch.undo()
    assert "connect" in lab.digests("cache")
    lab.require_usable(f"{image}.qcow2", image)
    assert not leftovers(lab.root / "cache")
    lab.require_whole()
    assert lab.handle("cache").set("connect", source=lab.root / f"{image}.qcow2").complete
    lab.require_clean()


@pytest.mark.parametrize("damage", ["header", "cut", "gone"])
def test_no_cache_is_made_for_what_is_refused(lab: Lab, damage: str) -> None:
    digest = Digest.parse(lab.digests("pool")["customize"])
    path = lab.root / "pool" / layout.data(digest)
    path.chmod(0o644)
    if damage == "gone":
        path.unlink()
    else:
        with open(path, "r+b") as file:
            file.write(b"\0" * 16) if damage == "header" else file.truncate(100)
    with pytest.raises((statepool.IntegrityError, statepool.MissingFile)) as caught:
        statepool.StatePool(cache=lab.root / "new", sources=[lab.root / "pool"]).image(
            "vm1/disk"
        ).get("leaf")
    assert isinstance(caught.value, statepool.DigestMismatch) == (damage == "header")
    assert not (lab.root / "new").exists()
