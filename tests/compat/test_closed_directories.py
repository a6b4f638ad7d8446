"""
Directories of a pool that may not be looked into: what is in the others can be used, and nobody is
told less than there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import statepool
from statepool.errors import AccessDenied
from tests.support.privileges import permissions_count

Make = Callable[..., Path]


@pytest.fixture
def pool(tmp_path: Path, make_image: Make) -> Path:
    """A pool with a state, and a root image that another tool put there."""
    path = tmp_path / "pool"
    statepool.init(path)
    statepool.StatePool(tmp_path / "first", [path]).image("vm1/disk").set(
        "a", source=make_image(tmp_path / "work.qcow2", 1 << 20)
    )
    (path / "vm2").mkdir()
    make_image(path / "vm2/disk.qcow2", 1 << 20)
    return path


@pytest.fixture
def closed(pool: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory of it that is somebody else's."""
    path = pool / str(request.param)
    path.mkdir(parents=True)
    path.chmod(0)
    with permissions_count():
        yield path
    path.chmod(0o700)


def shown(found: statepool.Listing) -> list[tuple[str, str]]:
    return [(one.manifest.object, one.manifest.state) for one in found]


@pytest.mark.parametrize("closed", ["lost+found", "vm1/lost+found"], indirect=True)
def test_what_file_systems_have_for_themselves_is_nothing(
    pool: Path, tmp_path: Path, closed: Path
) -> None:
    """Where a file system is mounted, as pools often are."""
    states = statepool.StatePool(tmp_path / "cache", [pool])
    assert shown(states.show()) == [("vm1/disk", "a"), ("vm2/disk", "root")]
    assert states.show().warnings == ()
    assert [one.problem for one in states.verify()] == [None, None]
    assert [one.level for one in states.doctor() if closed.name in one.what] == []
    assert [one.problem for one in statepool.adopt(pool)] == [None]
    statepool.init(tmp_path / "copy")
    assert [str(one.action) for one in statepool.sync(pool, tmp_path / "copy").states] == [
        "copied",
        "copied",
    ]


@pytest.mark.parametrize("closed", ["private", "vm2/private"], indirect=True)
def test_what_is_closed_is_left_out_and_said(pool: Path, tmp_path: Path, closed: Path) -> None:
    states = statepool.StatePool(tmp_path / "cache", [pool])
    assert shown(states.show()) == [("vm1/disk", "a"), ("vm2/disk", "root")]
    (warning,) = states.show().warnings
    assert f"cannot list '{closed.relative_to(pool)}' in " in warning
    assert states.show("vm1").warnings == ()
    assert states.image("vm1/disk").get("a").verified == "arrived"
    assert [one.problem is None for one in states.verify() if one.pool.endswith("/pool")].count(
        False
    ) == 1
    assert any("cannot list" in one.what for one in states.doctor() if one.where.endswith("/pool"))
    problems = [one.problem for one in statepool.adopt(pool)]
    assert any("cannot list" in (problem or "") for problem in problems)


@pytest.mark.parametrize("closed", ["vm2/private"], indirect=True)
def test_asked_for_it_says_so(pool: Path, tmp_path: Path, closed: Path) -> None:
    states = statepool.StatePool(tmp_path / "cache", [pool])
    found = states.show("vm2")
    assert shown(found) == [("vm2/disk", "root")]
    assert "cannot list" in found.warnings[0]


def test_a_pool_of_another_tool_that_is_all_closed(tmp_path: Path) -> None:
    """Nobody is told that it is none."""
    private = tmp_path / "others/private"
    private.mkdir(parents=True)
    private.chmod(0)
    with permissions_count(), pytest.raises(AccessDenied, match="cannot list 'private'"):
        statepool.StatePool(tmp_path / "cache", [tmp_path / "others"]).show()
    private.chmod(0o700)
