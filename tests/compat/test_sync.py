"""Chains from one pool to another, without a cache between them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.copying.sync import Sync
from statepool.errors import TransportError
from statepool.model.location import Location
from statepool.pools.pool import Pool
from statepool.testing.faults import FaultyTransport, Flip, Stop, on
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.testing.trees import photograph
from statepool.transports.local import LocalTransport

Make = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path, make_image: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool ``a`` with a chain of three and another machine, an empty pool ``b``, and a cache."""
    monkeypatch.chdir(tmp_path)
    statepool.init("a")
    statepool.init("b")
    pool = statepool.StatePool("cache", ["a"])
    pool.image("vm1/disk").set(
        "install", source=make_image(Path("base.qcow2"), 4 << 20, writes=[(0, 65536, 1)])
    )
    for parent, child in [("install", "customize"), ("customize", "connect")]:
        pool.image("vm1/disk").get(parent, to=f"{child}.qcow2")
        pool.image("vm1/disk").set(child, source=f"{child}.qcow2")
    pool.image("vm2/disk").set(
        "install", source=make_image(Path("other.qcow2"), 4 << 20, writes=[(0, 65536, 2)])
    )
    return tmp_path


def actions(synced: statepool.Synced) -> Mapping[tuple[str, str], str]:
    return {(state.object, state.state): str(state.action) for state in synced.states}


def digests(place: str | Path) -> dict[tuple[str, str], str]:
    return {
        (listed.manifest.object, listed.manifest.state): str(listed.manifest.digest)
        for listed in statepool.StatePool("none", [place]).show()
    }


def test_everything_is_copied_once(root: Path) -> None:
    first = statepool.sync("a", "b")
    assert set(actions(first).values()) == {"copied"}
    assert first.bytes > 0
    assert digests("a") == digests("b")
    assert len(digests("b")) == 4
    assert all(checked.problem is None for checked in statepool.StatePool("none", ["b"]).verify())
    again = statepool.sync("a", "b")
    assert set(actions(again).values()) == {"present"}
    assert again.bytes == 0


def test_only_what_was_named(root: Path) -> None:
    assert {name for name, _ in actions(statepool.sync("a", "b", "vm2"))} == {"vm2/disk"}
    assert {name for name, _ in digests("b")} == {"vm2/disk"}


def test_a_dry_run_says_it_all_and_changes_nothing(root: Path) -> None:
    before = photograph(root / "b")
    assert set(actions(statepool.sync("a", "b", dry_run=True)).values()) == {"copied"}
    assert photograph(root / "b") == before


def test_what_the_origin_does_not_have_goes_if_asked(root: Path) -> None:
    statepool.sync("a", "b")
    statepool.StatePool("cache", ["a"]).image("vm1/disk").unset(
        "customize", cascade=True, scope="all"
    )
    assert "removed" not in actions(statepool.sync("a", "b")).values()
    synced = statepool.sync("a", "b", "vm1", delete=True)
    assert actions(synced) == {
        ("vm1/disk", "install"): "present",
        ("vm1/disk", "connect"): "removed",
        ("vm1/disk", "customize"): "removed",
    }
    assert digests("a") == digests("b")
    assert len(list((root / "b/.statepool/data").iterdir())) == 2


def test_other_content_is_a_conflict_unless_it_may_be_replaced(
    root: Path, make_image: Make
) -> None:
    statepool.StatePool("cache2", ["b"]).image("vm2/disk").set(
        "install", source=make_image(root / "x.qcow2", 4 << 20, writes=[(0, 65536, 9)])
    )
    synced = statepool.sync("a", "b")
    assert actions(synced)["vm2/disk", "install"] == "failed"
    assert actions(synced)["vm1/disk", "connect"] == "copied"
    assert not synced.complete
    assert "other content" in str([state.error for state in synced.states])
    assert statepool.sync("a", "b", replace=True).complete
    assert digests("a") == digests("b")


def test_a_dry_run_says_what_the_sync_does(root: Path, make_image: Make) -> None:
    """Also of what stands on a state that cannot be copied."""
    statepool.StatePool("cache2", ["b"]).image("vm1/disk").set(
        "install", source=make_image(root / "x.qcow2", 4 << 20, writes=[(0, 65536, 9)])
    )
    planned, done = statepool.sync("a", "b", dry_run=True), statepool.sync("a", "b")
    assert actions(planned) == actions(done)
    assert actions(done)["vm1/disk", "customize"] == "failed"


def test_files_of_another_tool_are_named(root: Path) -> None:
    shutil.copy("a/vm2/disk/install.qcow2", "a/vm2/disk/theirs.qcow2")
    synced = statepool.sync("a", "b")
    (state,) = [state for state in synced.states if state.state == "theirs"]
    assert (str(state.action), "statepool adopt" in str(state.error)) == ("failed", True)


def pool_of(transport: Any) -> Pool:
    return Pool(transport)


def local(path: str) -> LocalTransport:
    return LocalTransport(Location.parse(path))


def test_between_two_pools_that_are_both_elsewhere(root: Path) -> None:
    far = pool_of(MemoryTransport(MemoryStore(), Location("memory", "/far")))
    far.create()
    assert Sync(pool_of(local("a")), far).run().complete
    farther = pool_of(MemoryTransport(MemoryStore(), Location("memory", "/farther")))
    farther.create()
    assert Sync(far, farther).run().complete
    back = pool_of(local("b"))
    assert Sync(farther, back).run().complete
    assert digests("a") == digests("b")


def test_an_interrupted_run_is_gone_on_with(root: Path) -> None:
    faulty = pool_of(FaultyTransport(local("b"), Stop(matches=on("store"), after=1000, times=1)))
    first = Sync(pool_of(local("a")), faulty).run("vm1")
    # The root failed, and so those on it: no state is there without its parent.
    assert set(actions(first).values()) == {"failed"}
    assert digests("b") == {}
    assert statepool.sync("a", "b").complete
    assert digests("a") == digests("b")


def test_wrong_bytes_do_not_become_visible(root: Path) -> None:
    far = MemoryTransport(MemoryStore(), Location("memory", "/far"))
    pool_of(far).create()
    Sync(pool_of(local("a")), pool_of(far)).run()
    rotten = pool_of(FaultyTransport(far, Flip(matches=on("fetch"), offset=70_000)))
    synced = Sync(rotten, pool_of(local("b"))).run("vm2")
    (state,) = synced.states
    assert "memory:///far" in str(state.error)
    assert digests("b") == {}


def test_a_damaged_image_is_called_damaged(root: Path) -> None:
    (path,) = [
        path
        for path in (root / "a/.statepool/data").iterdir()
        if path.samefile(root / "a/vm2/disk/install.qcow2")
    ]
    path.chmod(0o644)
    path.write_bytes(b"XXXX" + path.read_bytes()[4:])
    (state,) = statepool.sync("a", "b", "vm2").states
    assert "the bytes of vm2/disk install from" in str(state.error)
    assert digests("b") == {}


@pytest.mark.parametrize(
    ("origin", "target", "code"),
    [("a", "a", 2), ("a", "none", 7), ("none", "a", 7), ("a", "b/../a", 2)],
)
def test_pools_that_cannot_be_synchronised(
    root: Path, run_statepool: Any, origin: str, target: str, code: int
) -> None:
    before = photograph(root / "a")
    (root / "none").mkdir()
    run_statepool("sync", origin, target, code=code)
    assert photograph(root / "a") == before


def test_at_a_shell(root: Path, run_statepool: Any) -> None:
    (root / "statepool.toml").write_text('[[sources]]\nname = "main"\nlocation = "a"\n')
    assert "would copy vm1/disk connect" in run_statepool("sync", "main", "b", "--dry-run").out
    out = run_statepool("sync", "main", "b").out
    assert out.splitlines()[-1] == "4 copied"
    assert run_statepool("sync", "main", "b").out == "4 present\n"
    form = run_statepool("sync", "main", "b", "vm2/disk", "--json").json["synced"]
    assert [(state["object"], state["action"]) for state in form["states"]] == [
        ("vm2/disk", "present")
    ]
    assert run_statepool("sync", "main", "b", "vm9", code=3).err
    shutil.copy("a/vm2/disk/install.qcow2", "a/vm2/disk/theirs.qcow2")
    assert "adopt" in run_statepool("sync", "main", "b", code=TransportError.exit_code).err
