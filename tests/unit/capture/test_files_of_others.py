"""
Images that belong to another account, as libvirt gives them to that of QEMU: we may write to them,
and may not close them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve

from statepool.cache.cache import Cache
from statepool.capture import capture, capture_journal
from statepool.capture.capture import Capture, files_of
from statepool.errors import AccessDenied, Conflict
from statepool.model.manifest import Kind, StateId
from statepool.pools.staging import Marker
from statepool.qcow2.header import read_header_file
from statepool.testing.trees import photograph
from tests.support.images import CHILD
from tests.support.privileges import permissions_count

if TYPE_CHECKING:
    from tests.support.lab import Lab

STRANGER = 65534
BASE = StateId("vm1/disk", "base")
MINE = StateId("vm1/disk", "mine")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give files to somebody else"
)

MACHINE = StateId("vm1", "mine", Kind.MACHINE)


@pytest.fixture
def cache(lab: Lab) -> Cache:
    cache = lab.cache()
    lab.put(cache.pool, "base")
    return cache


@pytest.fixture
def work(lab: Lab, cache: Cache) -> Path:
    backing = os.fsencode(cache.chains.prepare(cache.pool.chain(BASE)))
    path = lab.root / "work.qcow2"
    path.write_bytes(evolve(CHILD, backing=backing).build())
    path.chmod(0o640)
    return path


@pytest.fixture(params=["image", "machine"])
def take(request: pytest.FixtureRequest, cache: Cache, work: Path) -> Callable[[], object]:
    """
    Takes the image, by itself or as the only one of its machine, for an account that owns nothing
    but what it made.
    """
    return (
        Capture(cache, MINE, {MINE: work}).run
        if request.param == "image"
        else Capture(cache, MACHINE, files_of(MACHINE, {"disk": work})).run
    )


def give_away(path: Path, mode: int = 0o664) -> None:
    path.chmod(mode)
    os.chown(path, STRANGER, os.getegid())


def test_it_is_refused(lab: Lab, work: Path, take: Callable[[], object]) -> None:
    """The image that takes its place could not be its owner's, who could not go on."""
    give_away(work)
    before = photograph(lab.root)
    with (
        permissions_count(owners_too=True),
        pytest.raises(AccessDenied, match="may not make another file in its place") as refused,
    ):
        take()
    assert "copy" in (refused.value.hint or "")
    assert photograph(lab.root) == before


def test_root_takes_it_and_its_owner_goes_on(
    lab: Lab, cache: Cache, work: Path, take: Callable[[], object]
) -> None:
    """The state is not the stranger's any more, who could write to it; the new image is."""
    give_away(work)
    take()
    state = cache.pool.find(MINE)
    assert state is not None
    assert state.digest is not None
    data, now = cache.data(state.digest).stat(), work.stat()
    assert (data.st_uid, data.st_mode & 0o777, data.st_nlink) == (0, 0o444, 1)
    assert (now.st_uid, now.st_gid, now.st_mode & 0o777) == (STRANGER, os.getegid(), 0o664)
    assert read_header_file(work).backing_name == os.fsencode(
        cache.chains.path(cache.pool.chain(MINE))
    )
    assert lab.leftovers(cache.pool) == []


def test_one_that_we_may_not_replace_is_refused(
    lab: Lab, cache: Cache, work: Path, take: Callable[[], object]
) -> None:
    """As in /tmp: there would be a state, and no way to go on with the image."""
    work.parent.chmod(0o1777)
    os.chown(work.parent, STRANGER, STRANGER)
    give_away(work)
    before = photograph(lab.root)
    with (
        permissions_count(owners_too=True),
        pytest.raises(AccessDenied, match="only that may replace it"),
    ):
        take()
    assert photograph(lab.root) == before


def test_one_that_is_given_away_meanwhile_is_given_back(
    lab: Lab, cache: Cache, work: Path, take: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*names: Any, **options: Any) -> bool:
        work.chmod(0o444)
        # a process of root's, that may do all which this one may not now
        subprocess.run(["chown", str(STRANGER), work], check=True)
        raise Conflict("somebody else was faster")

    content = work.read_bytes()
    monkeypatch.setattr(cache.pool, "publish", late)
    with permissions_count(owners_too=True), pytest.raises(Conflict, match="was faster"):
        take()
    assert (work.read_bytes(), work.stat().st_nlink, lab.leftovers(cache.pool)) == (content, 1, [])


def test_one_that_was_given_away_after_a_crash_is_given_back(
    lab: Lab, cache: Cache, work: Path, take: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot become a state any more, whose bytes nobody may change."""

    def die(cache: Cache, marker: Marker, *rest: object) -> None:
        capture_journal.keep_for_later(marker)

    def fail(*names: Any, **options: Any) -> bool:
        raise Conflict("this is the end")

    content = work.read_bytes()
    with monkeypatch.context() as crash:
        crash.setattr(capture, "give_back", die)
        crash.setattr(cache.pool, "publish", fail)
        with pytest.raises(Conflict, match="the end"):
            take()
    assert work.read_bytes() != content
    give_away(work)
    with permissions_count(owners_too=True):
        capture_journal.recover(cache)
    assert (work.read_bytes(), work.stat().st_nlink, lab.leftovers(cache.pool)) == (content, 1, [])
    assert cache.pool.find(MINE) is None
