"""States of disks while the machine on them goes on, and snapshots inside of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from statepool.backends.base import Options
from statepool.backends.live import LiveImageBackend, QCOW2VTBackend
from statepool.errors import Conflict, InUse, MachineError, NotFound, RefusedError, UsageError
from statepool.model.manifest import StateId
from statepool.qcow2.tool import QemuImg
from tests.support.machines import Lab

if TYPE_CHECKING:
    from conftest import World


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_a_disk_is_set_while_the_machine_goes_on(world: World, guests: Lab) -> None:
    images = world.images("install")
    with guests.running(images) as guest:
        console = guest.console
        console.write("first")
        backend = LiveImageBackend(world.context, guest.machine)
        inode = images["disk"].stat().st_ino
        stored = backend.set(world.disk(images), "one")
        assert stored.complete
        # not copied
        assert (
            world.cache.data(world.cache.pool.find(backend.own_state(world.disk(), "one")).digest)
            .stat()
            .st_ino
            == inode
        )
        before = console.tick()
        console.write("second")
        assert console.tick() > before
        backend.set(world.disk(images), "two")
        console.write("third")
        assert guest.machine.status() == "running"
        assert [p.name for p in images["disk"].parent.iterdir() if p.suffix == ".below"] == []
    chain = world.cache.pool.chain(backend.own_state(world.disk(), "two"))
    assert [manifest.state for manifest in chain] == ["two", "one", "install"]
    # What the machine wrote since is under the name that it always had, and can be set as that of
    # any machine that was stopped.
    world.states.image("vm1/disk").set("three", source=images["disk"])
    assert names(images["disk"].parent) == ["data.qcow2", "disk.qcow2"]
    for state, marker in (("one", b"first"), ("two", b"second"), ("three", b"third")):
        copy = world.place / f"{state}.qcow2"
        world.states.image("vm1/disk").get(state, to=copy)
        raw = world.place / f"{state}.raw"
        QemuImg().convert(copy, raw, target_format="raw")
        assert raw.read_bytes().startswith(marker)
        assert QemuImg().check(copy).get("corruptions", 0) == 0


def test_a_set_that_fails_leaves_the_machine_where_it_was(
    world: World, guests: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = world.images("install")
    with guests.running(images) as guest:
        guest.console.write("first")
        inode = images["disk"].stat().st_ino
        backend = LiveImageBackend(world.context, guest.machine)

        def full(*_: object, **__: object) -> None:
            guest.console.write("second")
            raise Conflict("somebody was faster")

        with monkeypatch.context() as patched:
            patched.setattr("statepool.capture.capture.Capture.run", full)
            with pytest.raises(Conflict, match="somebody was faster"):
                backend.set(world.disk(images), "one")
        assert guest.machine.status() == "running"
        assert names(images["disk"].parent) == ["data.qcow2", "disk.qcow2"]
        assert images["disk"].stat().st_ino == inode
        assert guest.console.read() == "second"
        guest.console.write("third")
        backend.set(world.disk(images), "one")
    copy = world.place / "copy.qcow2"
    world.states.image("vm1/disk").get("one", to=copy)
    QemuImg().convert(copy, world.place / "raw", target_format="raw")
    assert (world.place / "raw").read_bytes().startswith(b"third")


def test_a_machine_that_is_not_ours(world: World, guests: Lab) -> None:
    images = world.images("install")
    with guests.foreign(images) as guest:
        guest.machine.close()
        guest.console.write("first")
        LiveImageBackend(world.context).set(world.disk(images, guest.monitor), "one")
        QCOW2VTBackend(world.context).set(world.target(monitor=guest.monitor), "inside")
        guest.console.write("second")
        QCOW2VTBackend(world.context).get(world.target(monitor=guest.monitor), "inside")
        assert guest.console.read() == "first"


DRIVES = {
    "drive": ("-drive", "file={path},format=qcow2,if=virtio"),
    "libvirt": (
        "-blockdev",
        "driver=file,node-name={name}-file,filename={path},auto-read-only=on",
        "-blockdev",
        "driver=qcow2,node-name={name}-format,file={name}-file",
        "-device",
        "virtio-blk-pci,drive={name}-format",
    ),
}


@pytest.mark.parametrize("how", DRIVES)
def test_machines_that_others_start_have_disks_of_all_kinds(
    world: World, guests: Lab, how: str
) -> None:
    images = world.images("install")
    arguments = [
        word.format(name=name, path=path) for name, path in images.items() for word in DRIVES[how]
    ]
    with guests.foreign({}, arguments=arguments) as guest:
        machine = world.states.machine("vm1")
        for number in range(2):
            guest.console.write(f"marker-{number}")
            machine.set_running(f"ram-{number}", guest.machine, images=images)
            machine.set_running_image(
                "disk", f"disk-{number}", guest.machine, source=images["disk"]
            )
        guest.console.write("last")
    assert [
        manifest.state for manifest in world.cache.pool.chain(StateId("vm1/disk", "disk-1"))
    ] == ["disk-1", "ram-1", "disk-0", "ram-0", "install"]


def test_an_image_that_qemu_keeps_open_for_writing(world: World, guests: Lab) -> None:
    images = world.images("install")
    arguments = [
        word.format(name=name, path=path)
        for name, path in images.items()
        for word in DRIVES["libvirt"]
    ]
    with guests.foreign(
        {}, arguments=[word.removesuffix(",auto-read-only=on") for word in arguments]
    ) as guest:
        guest.console.write("before")
        with pytest.raises(RefusedError, match="open for writing below an overlay"):
            world.states.machine("vm1").set_running("ram", guest.machine, images=images)
        assert guest.machine.status() == "running"
        guest.console.write("after")
        assert names(images["disk"].parent) == ["data.qcow2", "disk.qcow2"]


def test_what_is_refused_while_a_machine_runs(world: World, guests: Lab) -> None:
    images = world.images("install")
    with guests.running(images) as guest:
        backend = LiveImageBackend(world.context, guest.machine)
        with pytest.raises(RefusedError, match="its disk cannot become another one"):
            backend.get(world.disk(images), "install")
        with pytest.raises(InUse, match="stop the machine"):
            world.states.image("vm1/disk").get("install", to=images["disk"], overwrite=True)
        with pytest.raises(InUse, match="is open in"):
            world.states.image("vm1/disk").set("one", source=images["disk"])
        with pytest.raises(Conflict, match="vm1/disk install exists in"):
            backend.set(world.disk(images), "install")
        with pytest.raises(NotFound, match="does not run on"):
            backend.set(
                evolve(world.disk(images), working={"disk": world.place / "first/disk.qcow2"}),
                "one",
            )
        with pytest.raises(UsageError, match="no running machine is named"):
            LiveImageBackend(world.context).set(world.disk(images), "one")
        assert backend.set(world.disk(images), "one", Options(dry_run=True)).complete
        assert not backend.check(world.disk(), "one")
        assert guest.machine.status() == "running"
        assert names(images["disk"].parent) == ["data.qcow2", "disk.qcow2"]


def test_snapshots_by_their_backend(world: World, guests: Lab) -> None:
    images = world.images("install")
    target = world.target()
    with guests.running(images) as guest:
        backend = QCOW2VTBackend(world.context, guest.machine)
        guest.console.write("one")
        guest.console.write("one", disk="vdb")
        backend.set(target, "inside")
        then = guest.console.tick()
        guest.console.write("two")
        guest.console.write("two", disk="vdb")
        assert [listed.manifest.state for listed in backend.show(target)] == ["inside"]
        assert backend.check(target, "inside")
        assert not backend.check(target, "nope")
        with pytest.raises(Conflict):
            backend.set(target, "inside")
        backend.get(target, "inside")
        assert guest.console.tick() <= then + 20
        assert guest.console.read() == guest.console.read(disk="vdb") == "one"
        guest.console.write("three")
        backend.set(target, "inside", Options(replace=True))
        guest.console.write("four")
        backend.get(target, "inside")
        assert guest.console.read() == "three"
        assert [listed.manifest.state for listed in backend.show(target)] == ["inside"]
        with pytest.raises(NotFound):
            backend.get(target, "nope")
        backend.get(target, "inside", Options(dry_run=True))
        backend.unset(target, "inside", Options(dry_run=True))
        backend.unset(target, "inside")
        with pytest.raises(NotFound):
            backend.unset(target, "inside")
        assert backend.show(target) == []
        assert backend.check(target, "root")
        assert guest.machine.status() == "running"
        with pytest.raises(UsageError):
            backend.set(target, "root")
        with pytest.raises(UsageError, match="keeps states of machines"):
            backend.set(world.disk(images), "x")


def test_file_systems_are_consistent_where_an_agent_answers(world: World, guests: Lab) -> None:
    images = world.images("install")
    with guests.running(images) as guest:
        guest.console.ask("format vda", "done format")
        guest.console.ask("save file written", "done written")
        backend = LiveImageBackend(world.context, guest.machine, agent=guest.agent)
        backend.set(world.disk(images), "clean")
        guest.console.ask("save file later", "done later")
        world_without = LiveImageBackend(
            world.context, guest.machine, agent=guest.directory / "nobody"
        )
        with pytest.raises((MachineError, NotFound)):
            world_without.set(world.disk(images), "other")
        assert guest.machine.status() == "running"
        guest.console.ask("save file last", "done last")
    copy, raw = world.place / "copy.qcow2", world.place / "raw"
    world.states.image("vm1/disk").get("clean", to=copy)
    QemuImg().convert(copy, raw, target_format="raw")
    done = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    assert (done.returncode, "recovering journal" in done.stdout) == (0, False), done.stdout
    dumped = subprocess.run(
        ["debugfs", "-R", "cat file", raw], capture_output=True, text=True, check=True
    )
    assert dumped.stdout == "written\n"
