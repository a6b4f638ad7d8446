"""A running machine in one file: it goes on where that is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from statepool.api import StatePool
from statepool.backends.ramfile import RamfileBackend
from statepool.model.objects import Machine
from statepool.testing.guest import talking_to
from tests.support.machines import IMAGES, Lab

if TYPE_CHECKING:
    from conftest import World

MACHINE = Machine("vm1", tuple(IMAGES))


@pytest.mark.parametrize("compress", ["zstd", "none"])
def test_a_machine_goes_on_elsewhere(world: World, guests: Lab, compress: str) -> None:
    with guests.running(world.images("install")) as guest:
        for disk in ("vda", "vdb"):
            guest.console.write("before", disk=disk)
        backend = RamfileBackend(world.context, guest.machine)
        assert backend.set(world.target(dict(guest.images)), "loggedin").complete
        then = guest.console.tick()
    bundle = world.place / "loggedin.statepool"
    exported = world.states.machine(MACHINE).export("loggedin", to=bundle, compress=compress)
    assert exported.bytes == bundle.stat().st_size
    other = StatePool(cache=world.place / "other")
    imported = other.import_bundle(bundle)
    assert (imported.object, imported.chain) == ("vm1", ("loggedin", "install"))
    again = world.place / "again.statepool"
    other.machine(MACHINE).export("loggedin", to=again, compress=compress)
    assert again.read_bytes() == bundle.read_bytes()
    (world.place / "elsewhere").mkdir()
    images = {name: world.place / "elsewhere" / f"{name}.qcow2" for name in IMAGES}
    with guests.directory() as directory:
        config = guests.config({}, directory)
        machine = other.machine(MACHINE).start("loggedin", config, to=images)
        with machine, talking_to(directory / "serial") as console:
            assert console.tick() <= then + 10
            assert [console.read(disk=disk) for disk in ("vda", "vdb")] == ["before", "before"]
