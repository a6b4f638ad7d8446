"""Making files of another tool managed where they lie."""

from __future__ import annotations

import os
from typing import Any

import pytest

from statepool.care.gc import gc_pool
from statepool.copying.adopt import Adoption
from statepool.errors import NoSpace
from statepool.model.digest import Digest
from statepool.model.manifest import StateId
from statepool.model.progress import NoProgress
from statepool.pools import layout
from statepool.sources import pool_source
from statepool.sources.unmanaged import Looked
from statepool.testing.faults import FaultyTransport, Stop, on
from statepool.testing.trees import photograph
from tests.support.privileges import permissions_count


def test_what_a_record_says_then(lab: Any) -> None:
    lab.unmanaged("pool", "install")
    path = lab.unmanaged("pool", "customize", "install")
    pool = lab.pool()
    assert [(adopted.state, adopted.problem) for adopted in Adoption(pool).run()] == [
        ("install", None),
        ("customize", None),
    ]
    tip, root = pool.chain(StateId("vm1/disk", "customize"))
    assert tip.digest == Digest.of(path.read_bytes())
    assert tip.size == path.stat().st_size
    assert (tip.virtual_size, tip.cluster_size) == (1 << 20, 1 << 12)
    assert tip.parent is not None
    assert (tip.parent.state, tip.parent.digest) == ("install", root.digest)
    assert tip.creator["adopted"] == "yes"
    assert lab.leftovers(pool) == []
    assert pool.unmanaged("vm1") == []


def test_parents_first_whatever_they_are_called(lab: Any) -> None:
    lab.unmanaged("pool", "z")
    lab.unmanaged("pool", "m", "z")
    lab.unmanaged("pool", "a", "m")
    assert [adopted.state for adopted in Adoption(lab.pool()).run()] == ["z", "m", "a"]


def test_on_a_parent_that_the_log_knows(lab: Any) -> None:
    pool = lab.pool()
    (install,) = lab.chain(pool, "install")
    lab.unmanaged("pool", "customize", "install")
    (adopted,) = Adoption(pool).run()
    assert (adopted.state, adopted.problem) == ("customize", None)
    tip, _ = pool.chain(StateId("vm1/disk", "customize"))
    assert tip.parent is not None
    assert tip.parent.digest == install.digest


def test_two_files_with_the_same_bytes(lab: Any) -> None:
    lab.unmanaged("pool", "one", tag="same")
    lab.unmanaged("pool", "two", tag="same")
    pool = lab.pool()
    assert [adopted.problem for adopted in Adoption(pool).run()] == [None, None]
    assert len(lab.data(pool)) == 1
    assert {state.state for state in pool.fold("vm1").states} == {"one", "two"}


def test_what_is_linked_elsewhere_stays_linked(lab: Any) -> None:
    path = lab.unmanaged("pool", "install")
    os.link(path, lab.root / "second")
    pool = lab.pool()
    Adoption(pool).run()
    assert path.samefile(lab.root / "second")
    assert path.samefile(lab.root / "pool" / layout.data(Digest.of(path.read_bytes())))


@pytest.mark.parametrize("operation", ["link", "flush"])
def test_what_stops_on_the_way_leaves_the_file(lab: Any, operation: str) -> None:
    path = lab.unmanaged("pool", "install")
    content = path.read_bytes()
    pool = lab.pool()
    before = photograph(lab.root)

    def full(call: Any) -> BaseException:
        return NoSpace("the disk is full")

    broken = lab.pool(
        transport=FaultyTransport(pool.transport, Stop(matches=on(operation), times=1, error=full))
    )
    (adopted,) = Adoption(broken).run()
    assert adopted.problem == "the disk is full"
    assert path.read_bytes() == content
    assert photograph(lab.root) == before
    assert [found.problem for found in Adoption(lab.pool()).run()] == [None]


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_somebody_writes_to_is_left_alone(lab: Any, dry_run: bool) -> None:
    lab.unmanaged("pool", "customize", "install")
    path = lab.unmanaged("pool", "install")
    lab.unmanaged("pool", "other")
    pool = lab.pool()
    before = photograph(lab.root)
    with open(path, "r+b"):
        adopted = {each.state: each.problem for each in Adoption(pool).run(dry_run=dry_run)}
    assert f"{path} is open in" in adopted["install"]
    assert adopted["other"] is None
    if dry_run:
        assert photograph(lab.root) == before
    else:
        assert adopted["customize"] is not None
        assert path.stat().st_mode & 0o200
        assert [(each.state, each.problem) for each in Adoption(pool).run()] == [
            ("install", None),
            ("customize", None),
        ]
        assert not path.stat().st_mode & 0o222


def test_what_somebody_reads_is_adopted(lab: Any) -> None:
    with open(lab.unmanaged("pool", "install"), "rb"):
        assert [each.problem for each in Adoption(lab.pool()).run()] == [None]


def test_what_somebody_is_about_to_write_to_is_left_alone(lab: Any) -> None:
    """It may write, and waits for us to be done."""
    path = lab.unmanaged("pool", "install")
    pool = lab.pool()
    before = photograph(lab.root)

    class Impatient(NoProgress):
        def begin(self, what: str, total: int) -> None:
            with pytest.raises(BlockingIOError):
                os.open(path, os.O_RDWR | os.O_NONBLOCK)

    (adopted,) = Adoption(pool, progress=Impatient()).run()
    assert (
        adopted.problem
        == f"another process wants to write to {path} (adopt it when nobody writes to it)"
    )
    assert photograph(lab.root) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to somebody else")
def test_what_is_not_ours_to_close_is_left_alone(lab: Any) -> None:
    """Its owner could go on writing to it."""
    lab.unmanaged("pool", "a")
    path = lab.unmanaged("pool", "b")
    lab.unmanaged("pool", "c")
    path.chmod(0o664)
    os.chown(path, 65534, os.getegid())
    pool = lab.pool()
    with permissions_count(owners_too=True):
        adopted = {each.state: each.problem for each in Adoption(pool).run()}
    assert adopted.pop("b") is not None
    assert adopted == {"a": None, "c": None}
    assert (path.stat().st_mode & 0o777, path.stat().st_nlink, lab.leftovers(pool)) == (
        0o664,
        1,
        [],
    )
    assert [each.problem for each in Adoption(pool).run()] == [None]


def test_an_adoption_that_was_killed(lab: Any) -> None:
    """
    The file has its name among the bytes, but no record says so: it is neither lost nor hidden for
    good.
    """
    path = lab.unmanaged("pool", "install")
    content, digest = path.read_bytes(), Digest.of(path.read_bytes())
    pool = lab.pool()
    os.link(path, lab.root / "pool" / layout.data(digest))
    gc_pool(pool)
    assert path.read_bytes() == content
    os.link(path, lab.root / "pool" / layout.data(digest))
    assert [(adopted.state, adopted.problem) for adopted in Adoption(lab.pool()).run()] == [
        ("install", None)
    ]
    assert path.read_bytes() == content
    assert {state.state for state in lab.pool().fold("vm1").states} == {"install"}


def test_what_a_working_image_stands_on_survives_an_adoption(lab: Any) -> None:
    """The cache is adopted, where a state was removed under a working image."""
    cache = lab.cache()
    chain = lab.chain(cache.pool, "gone")
    cache.chains.use(chain, lab.root / "work.qcow2")
    cache.pool.remove(StateId("vm1/disk", "gone"))
    lab.unmanaged("cache", "install")
    assert [adopted.problem for adopted in Adoption(lab.cache().pool).run()] == [None]
    assert cache.data(chain[0].digest).exists()


@pytest.mark.parametrize("what", ["adopted", "removed"])
def test_what_is_not_there_to_adopt_any_more_is_passed_over(lab: Any, what: str) -> None:
    """Another adoption, or the other tool, gets between what was found and its turn."""
    lab.unmanaged("pool", "a")
    path = lab.unmanaged("pool", "b")

    class Meanwhile(NoProgress):
        done = False

        def begin(self, title: str, total: int | None) -> None:
            if not self.done:
                self.done = True
                path.unlink() if what == "removed" else Adoption(lab.pool()).run()

    assert "b" not in [one.state for one in Adoption(lab.pool(), progress=Meanwhile()).run()]
    assert (lab.pool().find(StateId("vm1/disk", "b")) is not None) == (what == "adopted")
    assert lab.pool().find(StateId("vm1/disk", "a")) is not None
    assert lab.leftovers(lab.pool()) == []


def test_what_is_removed_while_it_is_listed_is_a_problem_of_its_own(lab: Any) -> None:
    path = lab.unmanaged("pool", "b")
    pool = lab.pool()
    (unmanaged,) = pool.unmanaged("vm1")
    path.unlink()
    fold = pool.fold("vm1")
    listed = pool_source._listed_unmanaged(pool, unmanaged, fold, Looked(pool, {"vm1": fold}))
    assert "was removed meanwhile" in str(listed.problem)
