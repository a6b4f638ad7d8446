"""
Copies of a pool whose links were followed, as ``scp -r`` and ``rsync -L`` do, and every copy to a
place without links: the view is files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.errors import Conflict, HasDependants
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.pool import Pool
from statepool.transports.base import Capabilities
from statepool.transports.local import LocalTransport

State = Callable[..., Manifest]
Put = Callable[..., bool]


@pytest.fixture
def copy(local_pool: Pool, state: State, put: Put) -> Pool:
    """With ``install``, and ``customize`` on it."""
    install = state("install")
    put(local_pool, install)
    put(local_pool, state("customize", parent=install))
    root = local_pool.transport.local_path("")
    assert root is not None
    shutil.copytree(root, root.parent / "copy", symlinks=False)
    copy = Pool(LocalTransport(Location("file", str(root.parent / "copy"))))
    assert not view(copy, "customize").is_symlink()
    return copy


def view(pool: Pool, name: str) -> Path:
    path = pool.transport.local_path(f"vm1/disk/{name}.qcow2")
    assert path is not None
    return path


def names(pool: Pool) -> list[str]:
    return sorted(state.state for state in pool.fold("vm1").states)


def test_removed_states_do_not_come_back(copy: Pool, state: State) -> None:
    copy.remove(state("customize").id)
    assert not os.path.lexists(view(copy, "customize"))
    assert copy.unmanaged("vm1") == []
    assert names(copy) == ["install"]
    copy.remove(state("install").id)
    assert os.listdir(view(copy, "install").parents[2]) == [".statepool"]


def test_removed_states_do_not_come_back_where_there_are_no_links(
    copy: Pool, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        LocalTransport, "capabilities", Capabilities(symlinks=False, durable=True, local=True)
    )
    copy.remove(state("install").id, cascade=True)
    assert copy.unmanaged("vm1") == []
    assert names(copy) == []


def test_replaced_states_are_shown(copy: Pool, state: State, put: Put) -> None:
    put(copy, state("customize", "new", parent=state("install")), data=b"new", replace=True)
    assert view(copy, "customize").read_bytes() == b"new"
    assert view(copy, "customize").is_symlink()


def test_a_file_of_another_tool_is_left_alone(copy: Pool, state: State, put: Put) -> None:
    """Whatever its length."""
    view(copy, "customize").write_bytes(b"CUSTOMIZE")
    with pytest.raises(Conflict, match="another tool"):
        put(copy, state("customize", "new", parent=state("install")), data=b"new", replace=True)
    copy.remove(state("customize").id)
    assert view(copy, "customize").read_bytes() == b"CUSTOMIZE"
    assert [found.id.state for found in copy.unmanaged("vm1")] == ["customize"]


def test_the_only_bytes_are_left_alone(copy: Pool, state: State) -> None:
    manifest = copy.find(state("customize").id)
    assert manifest is not None
    assert manifest.digest is not None
    copy.transport.remove(layout.data(manifest.digest))
    Collector(copy).sweep()
    copy.remove(state("customize").id)
    assert view(copy, "customize").read_bytes() == b"customize"


def test_what_may_not_be_removed_keeps_its_name(copy: Pool, state: State) -> None:
    with pytest.raises(HasDependants):
        copy.remove(state("install").id)

    def forbid(digests: object) -> None:
        raise Conflict("they must stay")

    with pytest.raises(Conflict):
        copy.remove(state("customize").id, allowed=forbid)
    assert view(copy, "install").read_bytes() == b"install"
    assert view(copy, "customize").read_bytes() == b"customize"


def test_collecting_makes_links_again(copy: Pool) -> None:
    """And gives back the room that the copies take."""
    Collector(copy).sweep()
    for name in ("install", "customize"):
        assert view(copy, name).is_symlink()
        assert view(copy, name).read_bytes() == name.encode()
