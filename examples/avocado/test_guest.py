"""Tests of the disk of a guest."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

from avocado import Test

from avocado_statepool import working
from statepool import MachineConfig, RunningMachine
from statepool.testing.guest import MEMORY, make_guest, talking_to

GUEST = Path("guest").absolute()


@contextmanager
def booted(image):
    """The serial line of a machine that has booted from an image."""
    with tempfile.TemporaryDirectory() as name:
        serial = Path(name, "serial")
        guest = make_guest(GUEST, Path(name, "initramfs"))
        line = f"socket,id=serial,path={serial},server=on,wait=off"
        arguments = ["-chardev", line, "-serial", "chardev:serial", *guest.arguments]
        config = MachineConfig({"disk": image}, memory=MEMORY, arguments=arguments)
        with RunningMachine.start(config), talking_to(serial) as console:
            console.wait_for(r"tick \d+", timeout=240)
            yield console


class Guest(Test):
    """Tests of a guest that has just been installed."""

    def test_a_disk_can_be_spoilt(self):
        """
        :avocado: dependency={"type": "vm-state", "uri": "vm1/disk/install"}
        """
        with booted(working("vm1/disk")) as console:
            console.write("spoilt")
            assert console.read() == "spoilt"

    def test_every_test_has_a_fresh_disk(self):
        """
        :avocado: dependency={"type": "vm-state", "uri": "vm1/disk/install"}
        """
        with booted(working("vm1/disk")) as console:
            assert console.read() == ""
