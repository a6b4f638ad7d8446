"""What a source has to offer."""

from __future__ import annotations

import os
from typing import Any

import pytest

from statepool.errors import NotAPool, UnsafeImage
from statepool.model.manifest import StateId
from statepool.pools import layout
from statepool.sources.pool_source import PoolSource, listing
from statepool.sources.source import with_parents

INSTALL = StateId("vm1/disk", "install")
CUSTOMIZE = StateId("vm1/disk", "customize")


def test_a_managed_chain(lab: Any) -> None:
    pool = lab.pool()
    chain = lab.chain(pool, "install", "customize")
    offer = lab.offer(pool, "customize")
    assert offer.managed
    assert tuple(member.manifest for member in offer.members) == chain
    assert [member.path for member in offer.members] == [
        layout.data(manifest.digest) for manifest in chain
    ]


def test_a_chain_of_another_tool(lab: Any) -> None:
    lab.unmanaged("pool", "install")
    lab.unmanaged("pool", "customize", "install")
    offer = lab.offer(lab.pool(create=False), "customize")
    assert not offer.managed
    assert [
        (member.manifest.state, member.manifest.digest, member.path) for member in offer.members
    ] == [
        ("customize", None, "vm1/disk/customize.qcow2"),
        ("install", None, "vm1/disk/install.qcow2"),
    ]
    tip, root = with_parents(offer.members)
    assert tip.parent is not None
    assert (tip.parent.state, root.parent) == ("install", None)


def test_a_file_of_another_tool_on_a_managed_parent(lab: Any) -> None:
    pool = lab.pool()
    (install,) = lab.chain(pool, "install")
    lab.unmanaged("pool", "customize", "install")
    offer = lab.offer(pool, "customize")
    assert not offer.managed
    assert [member.manifest.digest for member in offer.members] == [None, install.digest]
    assert offer.members[1].path == layout.data(install.digest)


def test_nothing(lab: Any) -> None:
    pool = lab.pool()
    source = PoolSource(pool, "source")
    assert source.resolve(INSTALL) is None
    lab.chain(pool, "install")
    assert source.resolve(CUSTOMIZE) is None
    assert source.resolve(StateId("vm2/disk", "install")) is None


def test_a_link_that_outlived_its_state_is_nothing(lab: Any) -> None:
    """A crash came between the record of a removal and the view."""
    pool = lab.pool()
    lab.chain(pool, "install")
    link = lab.root / "pool/vm1/disk/install.qcow2"
    target = os.readlink(link)
    pool.remove(INSTALL)
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    assert PoolSource(pool, "source").resolve(INSTALL) is None
    assert listing(pool, "vm1") == []


def test_what_is_no_pool(lab: Any) -> None:
    (lab.root / "pool").mkdir()
    with pytest.raises(NotAPool):
        PoolSource(lab.pool(create=False), "source").resolve(INSTALL)


def test_a_token_holds_until_something_changes(lab: Any) -> None:
    pool = lab.pool()
    lab.chain(pool, "install")
    source = PoolSource(lab.pool(), "source")
    token = lab.offer(pool, "install").token
    assert source.is_unchanged(INSTALL, token)
    assert PoolSource(lab.pool(), "again").is_unchanged(INSTALL, token)
    lab.chain(pool, "other")
    assert not source.is_unchanged(INSTALL, token)
    assert not PoolSource(lab.pool(), "again").is_unchanged(INSTALL, token)


def test_a_log_that_was_begun_anew_is_a_change(lab: Any) -> None:
    """Somebody removed the pool, and filled another one with as many records."""
    lab.chain(lab.pool("one"), "install")
    lab.chain(lab.pool("two"), "install")
    token = lab.offer(lab.pool("one"), "install").token
    assert not PoolSource(lab.pool("two"), "two").is_unchanged(INSTALL, token)


def test_a_token_of_files_of_another_tool(lab: Any) -> None:
    lab.unmanaged("pool", "install")
    lab.unmanaged("pool", "customize", "install")
    source = PoolSource(lab.pool(create=False), "source")
    token = lab.offer(lab.pool(create=False), "customize").token
    assert source.is_unchanged(CUSTOMIZE, token)
    lab.unmanaged("pool", "other")
    assert source.is_unchanged(CUSTOMIZE, token)
    path = lab.unmanaged("pool", "install", tag="new content")
    os.utime(path, (1, 1))
    assert not source.is_unchanged(CUSTOMIZE, token)
    (lab.root / "pool/vm1/disk/customize.qcow2").unlink()
    assert not source.is_unchanged(CUSTOMIZE, token)


def test_a_listing_says_what_is_wrong(lab: Any) -> None:
    pool = lab.pool()
    lab.chain(pool, "install")
    lab.unmanaged("pool", "good", "install")
    lab.unmanaged("pool", "orphan", "nothing")
    lab.unmanaged("pool", "raw").write_bytes(bytes(4096))
    (lab.root / "pool/vm1/disk/good.qcow2.lock").touch()
    (lab.root / "pool/vm1/disk/.hidden.qcow2").touch()
    (lab.root / "pool/vm1/disk/root.qcow2").touch()
    found = {listed.manifest.state: listed for listed in listing(pool, "vm1")}
    assert set(found) == {"install", "good", "orphan", "raw"}
    assert found["install"].managed
    assert (found["good"].managed, found["good"].problem) == (False, None)
    assert found["good"].manifest.parent is not None
    assert "missing-parent" in (found["orphan"].problem or "")
    assert "magic" in (found["raw"].problem or "")
    with pytest.raises(UnsafeImage):
        PoolSource(pool, "source").resolve(StateId("vm1/disk", "orphan"))
