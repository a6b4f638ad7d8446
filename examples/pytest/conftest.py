"""The machine that the tests run, and how its states are made."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from pytest_statepool import vm_state_builder
from statepool import MachineConfig, RunningMachine
from statepool.testing.guest import MEMORY, make_guest, talking_to

GUEST = Path(__file__).parent / "guest"


def describe(directory, images=()):
    """The machine, with its serial line at a socket in a directory."""
    guest = make_guest(GUEST, directory / "initramfs")
    serial = f"socket,id=serial,path={directory / 'serial'},server=on,wait=off"
    return MachineConfig(
        dict(images),
        memory=MEMORY,
        arguments=["-chardev", serial, "-serial", "chardev:serial", *guest.arguments],
    )


@contextmanager
def booted(images):
    """The machine after it has booted, and its serial line."""
    with (
        tempfile.TemporaryDirectory() as name,
        RunningMachine.start(describe(Path(name), images)) as machine,
        talking_to(Path(name) / "serial") as console,
    ):
        console.wait_for(r"tick \d+", timeout=240)
        yield machine, console


@vm_state_builder("vm1/disk", "customize", parent="install")
def customize(image):
    """Build a state that no pool has yet."""
    with booted({"disk": image}) as (_, console):
        console.write("customized")


@pytest.fixture
def vm_config(tmp_path):
    return describe(tmp_path)


@pytest.fixture
def console(vm, tmp_path):
    assert vm.is_running
    with talking_to(tmp_path / "serial") as console:
        console.wait_for(r"tick \d+", timeout=240)
        yield console
