"""
States of running machines with their RAM: time goes back, from this cache and from another one, and
what does not fit is refused.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from statepool.api import StatePool
from statepool.backends.base import Options
from statepool.backends.ramfile import INCOMING, RamfileBackend
from statepool.errors import Conflict, Incompatible, IntegrityError, NoSpace, NotFound, RefusedError
from statepool.machine.running import RunningMachine
from statepool.model.manifest import Kind, StateId
from statepool.model.objects import Machine
from statepool.testing.guest import talking_to
from tests.support.machines import IMAGES, Lab, Talking
from tests.support.sshd import Sshd

if TYPE_CHECKING:
    from conftest import World

MACHINE = Machine("vm1", tuple(IMAGES))
RAM = StateId("vm1", "loggedin", Kind.RAM)


def save(world: World, guest: Talking, state: str = "loggedin", *, compress: bool = False) -> int:
    """:returns: a tick before which the state was saved"""
    guest.console.write("before")
    guest.console.write("before", disk="vdb")
    stored = RamfileBackend(world.context, guest.machine, compress=compress).set(
        world.target(dict(guest.images)), state
    )
    assert stored.complete
    then = guest.console.tick()
    guest.console.write("after")
    guest.console.write("after", disk="vdb")
    while guest.console.tick() <= then + 10:
        continue
    return then


def check_back(guest_console: object, then: int) -> None:
    console = guest_console
    assert console.tick() <= then + 10  # type: ignore[attr-defined]
    assert console.read() == console.read(disk="vdb") == "before"  # type: ignore[attr-defined]


@pytest.fixture
def saved(world: World, guests: Lab) -> int:
    images = world.images("install")
    with guests.running(images) as guest:
        then = save(world, guest)
        assert guest.machine.status() == "running"
        assert guest.console.read() == "after"
    return then


@pytest.mark.parametrize("compress", [False, True])
def test_time_goes_back_here_and_elsewhere(world: World, guests: Lab, compress: bool) -> None:
    with guests.running(world.images("install")) as guest:
        then = save(world, guest, compress=compress)
        # The same machine is started again.
        backend = RamfileBackend(world.context)
        guest.console.close()
        backend.reload(guest.machine, world.target(), "loggedin")
        with talking_to(guest.directory / "serial") as console:
            check_back(console, then)
            assert guest.machine.status() == "running"
    ram = world.cache.pool.find(RAM)
    assert ram is not None
    assert ram.fingerprint["machine"].startswith("pc-q35-")
    assert ram.fingerprint.get("compression") == ("zstd" if compress else None)
    # Another cache fetches it from the pool.
    shutil.rmtree(world.cache.root)
    other = StatePool(cache=world.place / "other", sources=[world.place / "pool"])
    (world.place / "elsewhere").mkdir()
    images = {name: world.place / "elsewhere" / f"{name}.qcow2" for name in IMAGES}
    with guests.directory() as directory:
        got, machine = RamfileBackend(other._context).start(
            world.target(images), "loggedin", guests.config({}, directory)
        )
        with machine, talking_to(directory / "serial") as console:
            assert got.bytes > 0
            check_back(console, then)
            # Its images are ordinary working images: a disk state of them is set as ever.
            console.write("later")
            machine.pause()
        other.image("vm1/disk").set("later", source=images["disk"])
    assert [
        manifest.state for manifest in other._cache.pool.chain(StateId("vm1/disk", "later"))
    ] == ["later", "loggedin", "install"]


def test_ram_comes_from_another_host(world: World, guests: Lab, sshd: Sshd, saved: int) -> None:
    other = StatePool(
        cache=world.place / "other",
        sources=[sshd.location(world.place / "pool")],
        settings=sshd.settings(),
    )
    (world.place / "elsewhere").mkdir()
    images = {name: world.place / "elsewhere" / f"{name}.qcow2" for name in IMAGES}
    with guests.directory() as directory:
        machine = other.machine(MACHINE).start("loggedin", guests.config({}, directory), to=images)
        with machine, talking_to(directory / "serial") as console:
            check_back(console, saved)
    other.close()


def test_a_machine_of_somebody_else_is_saved_and_loaded(world: World, guests: Lab) -> None:
    with guests.foreign(world.images("install")) as guest:
        guest.machine.close()
        guest.console.write("before")
        guest.console.write("before", disk="vdb")
        RamfileBackend(world.context).set(
            world.target(dict(guest.images), guest.monitor), "loggedin"
        )
        then = guest.console.tick()
        with RunningMachine.connect(guest.monitor) as machine:
            assert machine.status() == "running"
    images = world.images("loggedin", to="next")
    with guests.directory() as directory:
        socket = directory / "monitor"
        config = guests.config(images, directory)
        with RunningMachine.start(
            config, arguments=("-qmp", f"unix:{socket},server=on,wait=off", *INCOMING)
        ) as machine:
            RamfileBackend(world.context).get(world.target(monitor=socket), "loggedin")
            assert machine.status() == "running"
            with talking_to(directory / "serial") as console:
                check_back(console, then)


def test_what_stands_still_stays_so(world: World, guests: Lab) -> None:
    with guests.running(world.images("install")) as guest:
        guest.machine.pause()
        RamfileBackend(world.context, guest.machine).set(
            world.target(dict(guest.images)), "loggedin"
        )
        assert guest.machine.status() == "paused"
        guest.machine.resume()
        guest.console.write("goes-on")


def test_what_is_refused(world: World, guests: Lab, saved: int) -> None:
    images = world.images("loggedin", to="again")
    backend = RamfileBackend(world.context)
    with guests.directory() as directory:
        with pytest.raises(NotFound, match="install has no RAM"):
            backend.start(
                world.target({name: world.place / f"{name}.x" for name in IMAGES}),
                "install",
                guests.config({}, directory),
            )
        with guests.running(world.images("install", to="third")) as guest:
            live = RamfileBackend(world.context, guest.machine)
            with pytest.raises(Conflict, match="exists in"):
                live.set(world.target(dict(guest.images)), "loggedin")
            with pytest.raises(RefusedError, match="cannot become others"):
                live.get(world.target(dict(guest.images)), "loggedin")
            with pytest.raises(RefusedError, match="no unwritten working image"):
                live.get(world.target(), "loggedin")
            with pytest.raises(RefusedError, match="also writes to"):
                RamfileBackend(world.context, guest.machine).set(
                    evolve(world.target({"disk": guest.images["disk"]}), object=Machine("vm1")),
                    "new",
                )
            with pytest.raises(RefusedError, match="also writes to"):
                live.set(world.target({**guest.images, "data": images["data"]}), "new")
            assert guest.machine.status() == "running"
            assert live.set(world.target(dict(guest.images)), "new", Options(dry_run=True)).complete
            assert sorted(os.listdir(world.place / "third")) == ["data.qcow2", "disk.qcow2"]
    assert world.cache.pool.find(StateId("vm1", "new", Kind.MACHINE)) is None


def test_what_runs_inside_of_a_pool_is_not_started_again(
    world: World, guests: Lab, saved: int
) -> None:
    """New working images cannot be made there, which is known before the machine is ended."""
    names = {name: path.name for name, path in world.images("install", to="third").items()}
    inside = (world.place / "third").rename(world.place / "pool" / "third")
    with guests.running({name: inside / file for name, file in names.items()}) as guest:
        with pytest.raises(RefusedError, match="inside the pool"):
            RamfileBackend(world.context).reload(guest.machine, world.target(), "loggedin")
        assert guest.machine.status() == "running"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"memory": 256 << 20}, "the RAM in bytes is 268435456, not 134217728"),
        ({"machine": "pc"}, "the machine type is pc-i440fx"),
        ({"cpu": "Nehalem"}, "the CPU is Nehalem"),
        ({"processors": 2}, "the number of processors is 2, not 1"),
        (
            {"extra": ("-device", "virtio-rng-pci")},
            r"there is the device PCI 00:0\d.0 1af4:1005 besides",
        ),
    ],
)
def test_another_machine_than_the_one_that_was_saved(
    world: World, guests: Lab, saved: int, change: dict[str, object], told: str
) -> None:
    with guests.directory() as directory:
        config = guests.config({}, directory)
        extra = change.get("extra", ())
        assert isinstance(extra, tuple)
        other = evolve(
            config,
            arguments=[*config.arguments, *extra],
            **{name: value for name, value in change.items() if name != "extra"},
        )
        (world.place / "next").mkdir()
        images = {name: world.place / "next" / f"{name}.qcow2" for name in IMAGES}
        with pytest.raises(Incompatible, match=told) as caught:
            RamfileBackend(world.context).start(world.target(images), "loggedin", other)
        assert caught.value.differences
        if "memory" in change or "machine" in change:
            # QEMU itself refuses these, whatever one says.
            with pytest.raises(IntegrityError, match="could not be loaded"):
                RamfileBackend(world.context, force=True).start(
                    world.target(images), "loggedin", other, Options(overwrite=True)
                )
        if "extra" in change:
            _, machine = RamfileBackend(world.context, force=True).start(
                world.target(images), "loggedin", other, Options(overwrite=True)
            )
            machine.close()


def test_a_missing_device(world: World, guests: Lab) -> None:
    with guests.running(world.images("install")) as guest:
        save(world, guest)
    manifest = world.cache.pool.find(RAM)
    assert manifest is not None
    with guests.directory() as directory:
        config = guests.config({}, directory)
        (world.place / "next").mkdir()
        images = {name: world.place / "next" / f"{name}.qcow2" for name in IMAGES}
        world.states.machine("vm1").get("loggedin", to=images)
        with RunningMachine.start(
            config.with_images({"disk": images["disk"]}), arguments=INCOMING
        ) as machine:
            with pytest.raises(Incompatible, match=r"the device PCI 00:02.0 1af4:1001 is missing"):
                RamfileBackend(world.context, machine).get(world.target(), "loggedin")
            assert machine.status() == "inmigrate"


def test_damaged_ram_is_not_loaded(world: World, guests: Lab, saved: int) -> None:
    """It is found before QEMU sees it, and fetched anew; where nobody has it, that is said."""
    manifest = world.cache.pool.find(RAM)
    assert manifest is not None
    assert manifest.digest is not None
    path = world.cache.data(manifest.digest)
    path.chmod(0o600)
    os.truncate(path, 1 << 20)
    with guests.directory() as directory:
        (world.place / "next").mkdir()
        images = {name: world.place / "next" / f"{name}.qcow2" for name in IMAGES}
        alone = StatePool(cache=world.cache.root)
        with pytest.raises(IntegrityError):
            RamfileBackend(alone._context).start(
                world.target(images), "loggedin", guests.config({}, directory)
            )
        got, machine = RamfileBackend(world.context).start(
            world.target(images), "loggedin", guests.config({}, directory)
        )
        with machine, talking_to(directory / "serial") as console:
            assert got.bytes >= manifest.size // 2
            check_back(console, saved)


def test_no_room_for_ram(world: World, guests: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine goes on, on the images that it was on, and nothing is left."""
    images = world.images("install")
    with guests.running(images) as guest:
        inodes = {name: path.stat().st_ino for name, path in images.items()}
        with monkeypatch.context() as patched, open("/dev/full", "wb") as full:
            patched.setattr("statepool.backends.ramfile.open", lambda *_: full, raising=False)
            with pytest.raises(NoSpace, match="no room for the RAM"):
                RamfileBackend(world.context, guest.machine).set(world.target(images), "loggedin")
        assert guest.machine.status() == "running"
        assert {name: path.stat().st_ino for name, path in images.items()} == inodes
        assert sorted(os.listdir(images["disk"].parent)) == ["data.qcow2", "disk.qcow2"]
        assert list((world.cache.root / ".statepool/incoming").iterdir()) == []
        save(world, guest)


def test_a_state_with_ram_is_like_others(world: World, guests: Lab, saved: int) -> None:
    machine = world.states.machine("vm1")
    assert machine.check("loggedin")
    kinds = sorted(
        str(one.manifest.kind) for one in machine.show() if one.manifest.state == "loggedin"
    )
    assert kinds == ["image", "image", "machine", "ram"]
    assert all(one.problem is None for one in world.states.verify("vm1"))
    machine.unset("loggedin", scope="all")
    assert not machine.check("loggedin")
    assert world.cache.pool.find(RAM) is None
    assert not Path(world.place / "pool/vm1/loggedin.state").exists()
