from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, StateId
from statepool.pools import layout
from statepool.pools.fold import Fold
from statepool.pools.pool import Pool
from statepool.testing.memory import MemoryTransport
from statepool.transports.base import Capabilities, Entry, FileKind

State = Callable[..., Manifest]
Put = Callable[..., bool]


def root(pool: Pool) -> Path:
    path = pool.transport.local_path("")
    assert path is not None
    return path


def test_states_are_shown_under_their_names(local_pool: Pool, state: State, put: Put) -> None:
    install = state("install")
    put(local_pool, install)
    put(local_pool, state("customize", parent=install))
    path = root(local_pool) / "vm1/disk/install.qcow2"
    assert path.is_symlink()
    assert path.read_bytes() == b"install"
    assert not os.path.isabs(os.readlink(path))
    assert (root(local_pool) / "vm1/disk/customize.qcow2").read_bytes() == b"customize"


def test_machine_states_are_shown_by_their_ram(
    pool: Pool, state: State, machine_state: Callable[..., list[Manifest]], put: Put
) -> None:
    disk = state("on")
    put(pool, disk, *machine_state("on", disk))
    assert {entry.name for entry in pool.transport.scan("vm1")} == {"disk", "on.state"}


def test_removed_states_vanish_with_their_empty_directories(
    local_pool: Pool, state: State, put: Put
) -> None:
    for name in ("one", "two"):
        put(local_pool, state(name))
    local_pool.remove(state("one").id)
    assert os.listdir(root(local_pool) / "vm1/disk") == ["two.qcow2"]
    local_pool.remove(state("two").id)
    assert os.listdir(root(local_pool)) == [".statepool"]


def test_a_replaced_state_is_shown(local_pool: Pool, state: State, put: Put) -> None:
    put(local_pool, state("install"))
    put(local_pool, state("install", "new"), data=b"new", replace=True)
    assert (root(local_pool) / "vm1/disk/install.qcow2").read_bytes() == b"new"


def test_a_view_that_others_changed_is_made_right(pool: Pool, state: State, put: Put) -> None:
    install = state("install")
    put(pool, install)
    path = layout.view(install.id)
    for change in (
        lambda: pool.transport.remove(path),
        lambda: pool.transport.symlink(layout.view_target(install.id, Digest.of(b"else")), path),
    ):
        change()
        pool.view.update([install.id], lambda: pool.fold("vm1"))
        assert pool.transport.readlink(path) == layout.view_target(install.id, install.digest)  # type: ignore[arg-type]


def test_it_is_brought_up_to_date_until_nothing_changes(pool: Pool, state: State, put: Put) -> None:
    install = state("install")
    put(pool, install)
    folds = [Fold("vm1"), pool.fold("vm1"), pool.fold("vm1"), pool.fold("vm1")]
    pool.view.update([install.id], lambda: folds.pop(0))
    assert pool.transport.stat(layout.view(install.id)) is not None


def test_places_without_symbolic_links_go_without(
    pool: Pool, state: State, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryTransport, "capabilities", Capabilities(symlinks=False, durable=True))
    put(pool, state("install"))
    assert {entry.name for entry in pool.transport.scan("")} == {".statepool"}
    assert state("install").id in pool.fold("vm1").states


# -- files of other tools --------------------------------------------------------------------------


def test_files_of_other_tools_are_unmanaged(pool: Pool, state: State, put: Put) -> None:
    put(pool, state("install"))
    pool.transport.make_directory("vm2")
    for path in ("vm1/disk/customize.qcow2", "vm1/disk.qcow2", "vm1/on.state", "vm2/disk.qcow2"):
        pool.transport.create(path, b"data")
    assert [found.id for found in pool.unmanaged("vm1")] == sorted(
        [
            StateId("vm1/disk", "customize"),
            StateId("vm1/disk", "root"),
            StateId("vm1", "on", Kind.RAM),
        ]
    )
    assert [found.id for found in pool.unmanaged("vm2")] == [StateId("vm2/disk", "root")]
    assert {found.stat.size for found in pool.unmanaged("vm1")} == {4}
    assert pool.machines() == ["vm1", "vm2"]


@pytest.mark.parametrize(
    "name",
    [
        "customize.qcow2.lock",
        "customize.qcow2.part",
        ".customize.qcow2.swp",
        "customize.img",
        "root.qcow2",
        "a b.qcow2",
        ".qcow2",
        "x.qcow2.qcow2",
    ],
)
def test_other_names_are_no_states(pool: Pool, name: str) -> None:
    pool.transport.make_directory("vm1/disk")
    pool.transport.create(f"vm1/disk/{name}", b"data")
    assert pool.unmanaged("vm1") == []
    misnamed = name in ("root.qcow2", "a b.qcow2", ".qcow2", "x.qcow2.qcow2")
    assert [f"{file.state}.qcow2" for file in pool.view.misnamed()] == ([name] if misnamed else [])


def test_images_whose_names_cannot_be_used_are_told_apart(
    local_pool: Pool, state: State, put: Put
) -> None:
    put(local_pool, state("install"))
    for path in (
        "vm1/disk/a b.qcow2",
        "vm1/disk/root.qcow2",
        "vm1/disk/good.qcow2",
        "vm1/a disk.qcow2",
        "vm1/disk.qcow2",
    ):
        (root(local_pool) / path).write_bytes(b"data")
    (root(local_pool) / "vm1/disk/a link.qcow2").symlink_to("good.qcow2")
    assert [(file.object, file.state) for file in local_pool.view.misnamed()] == [
        ("vm1/a disk", "root"),
        ("vm1/disk", "a b"),
        ("vm1/disk", "root"),
    ]
    assert "is reserved" in local_pool.view.misnamed()[-1].error.message


def test_images_in_directories_whose_names_cannot_be_used(local_pool: Pool) -> None:
    others = (".trash/disk/c.qcow2", "lost+found/disk/d.qcow2", "no images/disk/e.txt")
    for path in ("My VM/disk/a.qcow2", "My VM/disk.qcow2", "vm1/dis k/b.qcow2", *others):
        (root(local_pool) / path).parent.mkdir(parents=True, exist_ok=True)
        (root(local_pool) / path).write_bytes(b"data")
    assert [
        (file.object, file.state, file.error.message.partition(" for ")[2][:9])
        for file in local_pool.view.misnamed()
    ] == [
        ("My VM/disk", "root", "a machine"),
        ("My VM/disk", "a", "a machine"),
        ("vm1/dis k", "b", "an image:"),
    ]
    assert local_pool.machines() == ["vm1"]


def test_what_is_left_of_a_removal_is_not_unmanaged(
    local_pool: Pool, state: State, put: Put
) -> None:
    install = state("install")
    put(local_pool, install)
    link = root(local_pool) / layout.view(install.id)
    target = os.readlink(link)
    local_pool.remove(install.id)
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    assert local_pool.unmanaged("vm1") == []
    assert local_pool.view.leftovers("vm1", local_pool.fold("vm1")) == [install.id]
    local_pool.view.update([install.id], lambda: local_pool.fold("vm1"))
    assert not link.is_symlink()


def test_an_adopted_file_is_ours(local_pool: Pool, state: State) -> None:
    install = state("install")
    path = root(local_pool) / layout.view(install.id)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"install")
    assert [found.id for found in local_pool.unmanaged("vm1")] == [install.id]
    assert not local_pool.view.is_free(install.id)
    staging = local_pool.stage([install.digest])  # type: ignore[list-item]
    local_pool.transport.link(layout.view(install.id), staging.path(install.digest))  # type: ignore[arg-type]
    assert local_pool.publish([install], staging, in_place=True)
    staging.end()
    assert local_pool.unmanaged("vm1") == []
    assert path.is_file()
    assert not path.is_symlink()
    local_pool.remove(install.id)
    assert not path.exists()


def test_links_of_others_are_left_alone(local_pool: Pool, state: State, put: Put) -> None:
    link = root(local_pool) / "vm1/disk/install.qcow2"
    link.parent.mkdir(parents=True)
    link.symlink_to("/elsewhere/install.qcow2")
    local_pool.view.update([state("install").id], lambda: Fold("vm1"))
    assert os.readlink(link) == "/elsewhere/install.qcow2"
    assert not local_pool.view.is_free(state("install").id)


def test_only_names_that_can_be_machines_are_listed(pool: Pool) -> None:
    for name in ("vm1", "a b", ".hidden", "x.lock"):
        pool.transport.make_directory(name)
    pool.transport.create("file", b"")
    assert pool.view.machines() == ["vm1"]
    assert Entry("vm1", FileKind.DIRECTORY) in pool.transport.scan("")
