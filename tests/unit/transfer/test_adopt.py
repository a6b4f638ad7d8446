"""Making files of another tool managed where they lie."""

from __future__ import annotations

import os
from typing import Any

import pytest

from statepool.errors import NoSpace
from statepool.model.digest import Digest
from statepool.model.manifest import StateId
from statepool.pools import layout
from statepool.testing.faults import FaultyTransport, Stop, on
from statepool.testing.trees import photograph
from statepool.transfer.adopt import Adoption
from statepool.transfer.tidy import tidy_pool


def test_what_a_record_says_then(lab: Any) -> None:
    lab.unmanaged("pool", "install")
    path = lab.unmanaged("pool", "customize", "install")
    pool = lab.pool()
    assert [(adopted.state, adopted.problem) for adopted in Adoption(pool).run()] == [("install", None), ("customize", None)]
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


@pytest.mark.parametrize("operation", ["digest", "link", "flush"])
def test_what_stops_on_the_way_leaves_the_file(lab: Any, operation: str) -> None:
    path = lab.unmanaged("pool", "install")
    content = path.read_bytes()
    pool = lab.pool()
    before = photograph(lab.root)

    def full(call: Any) -> BaseException:
        return NoSpace("the disk is full")

    broken = lab.pool(transport=FaultyTransport(pool.transport, Stop(matches=on(operation), times=1, error=full)))
    (adopted,) = Adoption(broken).run()
    assert adopted.problem == "the disk is full"
    assert path.read_bytes() == content
    assert photograph(lab.root) == before
    assert [found.problem for found in Adoption(lab.pool()).run()] == [None]


def test_an_adoption_that_was_killed(lab: Any) -> None:
    """The file has its name among the bytes, but no record says so: it is neither lost nor hidden for good."""
    path = lab.unmanaged("pool", "install")
    content, digest = path.read_bytes(), Digest.of(path.read_bytes())
    pool = lab.pool()
    os.link(path, lab.root / "pool" / layout.data(digest))
    tidy_pool(pool)
    assert path.read_bytes() == content
    os.link(path, lab.root / "pool" / layout.data(digest))
    assert [(adopted.state, adopted.problem) for adopted in Adoption(lab.pool()).run()] == [("install", None)]
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
