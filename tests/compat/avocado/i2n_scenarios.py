"""
Scenarios with the real avocado-i2n, run in an environment that has it: ``python i2n_scenarios.py
SCENARIO [ARGUMENT...]`` in an empty directory.

avocado-i2n's own functions drive our backends, with its own parameters.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from avocado_i2n.states import setup
from virttest.utils_params import Params

import statepool
from avocado_statepool import states
from statepool.testing.guest import MEMORY, Console, make_guest, talking_to

SIZE = "4M"
WORK = Path.cwd()
DISK, DATA = WORK / "run/vm1/disk.qcow2", WORK / "run/vm1/data.qcow2"
IMAGES = {"skip_types": "nets nets/vms"}
MACHINES = {"skip_types": "nets nets/vms/images"}


def params(**more: str) -> Any:
    values = {
        "states_chain": "nets vms images",
        "states_images": "qcow2ext",
        "states_vms": "ramfile",
        "nets": "net1",
        "vms": "vm1",
        "images": "disk data",
        "object_id": "vm1",
        "swarm_pool": f"{WORK}/cache",
        "shared_pool": f"{WORK}/shared",
        "vms_base_dir": f"{WORK}/run",
        "images_base_dir": f"{WORK}/run/vm1",
        "image_name_disk": "disk",
        "image_name_data": "data",
        "image_format": "qcow2",
        "image_size": SIZE,
        "image_raw_device": "no",
        "qemu_img_binary": "qemu-img",
        "nets_host": "host",
        "nets_gateway": "gateway",
        "pool_scope": "own swarm cluster shared",
        "use_env": "no",
        **{f"{do}_location": f":{WORK}/shared" for do in ("show", "get", "set", "unset")},
        **more,
    }
    return Params(values)


def one_image(**more: str) -> Any:
    """:returns: parameters as a backend gets them, for ``vm1/disk``"""
    found = params(
        **{
            "images": "disk",
            "object_type": "nets/vms/images",
            "object_name": "net1/vm1/disk",
            **more,
        }
    )
    return found.object_params("disk")


def io(path: Path, *commands: str) -> None:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *words, path], check=True, capture_output=True, text=True
    )
    assert "verification failed" not in done.stdout, done.stdout


def new_disks() -> None:
    DISK.parent.mkdir(parents=True, exist_ok=True)
    for path in (DISK, DATA):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, SIZE], check=True)
        io(path, "write -P 1 0 64k")


def shown(**more: str) -> list[str]:
    return sorted(set(setup.show_states(params(**{**IMAGES, **more}))))


def refused(kind: type[BaseException], text: str, work: Any) -> None:
    try:
        work()
    except kind as error:
        assert text in f"{error} {getattr(error, 'hint', '')}", error
    else:
        raise AssertionError(f"no {kind.__name__}")


def ours() -> None:
    setup.BACKENDS = {
        "qcow2": states.QCOW2Backend,
        "qcow2ext": states.QCOW2ExtBackend,
        "qcow2vt": states.QCOW2VTBackend,
        "ramfile": states.RamfileBackend,
    }


# -- the scenarios ---------------------------------------------------------------------------------


def images() -> None:
    """Get, set, unset, push and pop on two images, with chains and policies."""
    statepool.init("shared")
    new_disks()
    assert shown() == []
    setup.set_states(params(**IMAGES, set_state="install"))
    io(DISK, "write -P 2 64k 64k")
    setup.set_states(params(**IMAGES, set_state="customize"))
    assert shown() == ["customize", "install"]
    assert setup.check_states(params(**IMAGES, check_state="customize"))
    assert not setup.check_states(params(**IMAGES, check_state="nothing"))
    setup.get_states(params(**IMAGES, get_state="install"))
    io(DISK, "read -P 0 64k 64k")
    # Another host.
    other = {**IMAGES, "swarm_pool": f"{WORK}/other"}
    setup.get_states(params(**other, get_state="customize"))
    io(DISK, "read -P 2 64k 64k", "write -P 3 128k 64k")
    setup.push_states(params(**other, push_state_images="pushed"))
    assert shown() == ["customize", "install", "pushed"]
    io(DISK, "write -P 4 128k 64k")
    setup.pop_states(params(**other, pop_state_images="pushed"))
    io(DISK, "read -P 3 128k 64k")
    assert shown(**other) == ["customize", "install"]
    # Policies are avocado-i2n's.
    from avocado.core.exceptions import TestAbortError

    refused(
        TestAbortError,
        "already exists",
        lambda: setup.set_states(params(**IMAGES, set_state="install", set_mode="af")),
    )
    refused(
        TestAbortError,
        "doesn't exist",
        lambda: setup.get_states(params(**IMAGES, get_state="nothing")),
    )
    # A forced set replaces, without what stands on it losing its parent.
    setup.get_states(params(**IMAGES, get_state="customize"))
    io(DISK, "write -P 5 128k 64k")
    setup.set_states(params(**IMAGES, set_state="customize"))
    setup.get_states(params(**{**other, "swarm_pool": f"{WORK}/third"}, get_state="customize"))
    io(DISK, "read -P 2 64k 64k", "read -P 5 128k 64k")
    refused(
        statepool.HasDependants,
        "customize",
        lambda: setup.unset_states(params(**IMAGES, unset_state="install")),
    )
    # unset follows the scope.
    setup.unset_states(params(**IMAGES, unset_state="customize", pool_scope="own"))
    assert shown(pool_scope="own") == ["install"]
    assert shown() == ["customize", "install"]
    setup.unset_states(params(**IMAGES, unset_state="customize"))
    assert shown() == ["install"]


def registered() -> None:
    """The same, with ours in the places of theirs."""
    setup.BACKENDS = {}
    states.register()
    assert all(
        backend.__module__.startswith("avocado_statepool.") for backend in setup.BACKENDS.values()
    )
    images()


def machines() -> None:
    """The same with a machine that has two images."""
    statepool.init("shared")
    new_disks()
    setup.set_states(params(**MACHINES, set_state_vms="both"))
    assert shown(**MACHINES) == ["both"]
    io(DISK, "write -P 7 0 64k")
    io(DATA, "write -P 7 0 64k")
    other = {**MACHINES, "swarm_pool": f"{WORK}/other"}
    setup.get_states(params(**other, get_state_vms="both"))
    for path in (DISK, DATA):
        io(path, "read -P 1 0 64k", "write -P 2 0 64k")
    setup.push_states(params(**other, push_state_vms="pushed"))
    assert shown(**other) == ["both", "pushed"]
    for path in (DISK, DATA):
        io(path, "write -P 3 0 64k")
    setup.pop_states(params(**other, pop_state_vms="pushed"))
    for path in (DISK, DATA):
        io(path, "read -P 2 0 64k")
    assert shown(**MACHINES) == ["both"]
    setup.unset_states(params(**MACHINES, unset_state_vms="both"))
    assert shown(**MACHINES) == []
    assert shown() == []  # and with it the states of its images


def their_pool() -> None:
    """A pool that avocado-i2n made is read; written to, once it has been made one of ours."""
    from avocado_i2n.states.qcow2 import QCOW2ExtBackend

    new_disks()
    QCOW2ExtBackend.set(one_image(set_state="install", swarm_pool=f"{WORK}/theirs"))
    QCOW2ExtBackend.get(one_image(get_state="install", swarm_pool=f"{WORK}/theirs"))
    io(DISK, "write -P 2 64k 64k")
    QCOW2ExtBackend.set(one_image(set_state="customize", swarm_pool=f"{WORK}/theirs"))
    DISK.unlink()
    # what backs customize is not where its backing name says any more: ours come along all the same
    os.rename("theirs", "elsewhere")
    assert states.QCOW2ExtBackend.show(one_image()) == ["customize", "install"]
    states.QCOW2ExtBackend.get(one_image(get_state="customize"))
    io(DISK, "read -P 1 0 64k", "read -P 2 64k 64k", "write -P 3 128k 64k")
    before = sorted(Path("shared").rglob("*"))
    refused(
        statepool.StatePoolError,
        "statepool init",
        lambda: states.QCOW2ExtBackend.set(one_image(set_state="connect")),
    )
    assert sorted(Path("shared").rglob("*")) == before
    statepool.init("shared")
    statepool.adopt("shared", relocate=True)
    states.QCOW2ExtBackend.get(one_image(get_state="customize"))
    io(DISK, "write -P 3 128k 64k")
    states.QCOW2ExtBackend.unset(one_image(unset_state="connect", pool_scope="own"))
    states.QCOW2ExtBackend.set(one_image(set_state="connect"))
    states.QCOW2ExtBackend.get(one_image(get_state="connect", swarm_pool=f"{WORK}/other"))
    io(DISK, "read -P 1 0 64k", "read -P 2 64k 64k", "read -P 3 128k 64k")


def mirrors() -> None:
    """Two mirrors: a set stores in both, a get asks one after the other."""
    for name in ("shared", "second"):
        statepool.init(name)
    both = {
        f"{do}_location": f":{WORK}/shared :{WORK}/second" for do in ("show", "get", "set", "unset")
    }
    new_disks()
    states.QCOW2ExtBackend.set(one_image(**both, set_state="install"))
    for name in ("shared", "second"):
        assert states.QCOW2ExtBackend.show(
            one_image(show_location=f":{WORK}/{name}", pool_scope="shared")
        ) == ["install"]
    states.QCOW2ExtBackend.unset(
        one_image(unset_location=f":{WORK}/shared", unset_state="install", pool_scope="shared")
    )
    other = {**both, "swarm_pool": f"{WORK}/other"}
    assert states.QCOW2ExtBackend.show(one_image(**other)) == ["install"]
    states.QCOW2ExtBackend.get(one_image(**other, get_state="install"))
    io(DISK, "read -P 1 0 64k")
    # One that cannot be written is an error, and does not keep us from the other.
    gone = {**both, "set_location": f":{WORK}/nowhere :{WORK}/shared"}
    refused(
        statepool.StatePoolError,
        "nowhere",
        lambda: states.QCOW2ExtBackend.set(
            one_image(**gone, set_state="install", pool_scope="shared")
        ),
    )
    assert states.QCOW2ExtBackend.show(
        one_image(show_location=f":{WORK}/shared", pool_scope="shared")
    ) == ["install"]
    # Bytes that are linked, not copied.
    states.QCOW2ExtBackend.get(
        one_image(get_location=f":;{WORK}/shared", get_state="install", swarm_pool=f"{WORK}/linked")
    )
    io(DISK, "read -P 1 0 64k")
    refused(
        statepool.UsageError,
        "pool_scope",
        lambda: states.QCOW2ExtBackend.show(one_image(pool_scope="own everywhere")),
    )


def roots() -> None:
    """Root states, and snapshots inside an image."""
    statepool.init("shared")
    inside = {**IMAGES, "states_images": "qcow2", "images": "disk"}
    assert not states.QCOW2Backend.check_root(one_image())
    assert not setup.check_states(params(**inside, check_state="root", check_mode="rr"))
    # virttest makes the disk
    assert setup.check_states(
        params(**inside, check_state="root", check_mode="rf", pool_scope="own")
    )
    io(DISK, "write -P 1 0 64k")
    setup.set_states(params(**inside, set_state="inside"))
    io(DISK, "write -P 2 0 64k")
    assert shown(**inside) == ["inside"]
    setup.get_states(params(**inside, get_state="inside"))
    io(DISK, "read -P 1 0 64k")
    setup.unset_states(params(**inside, unset_state="inside"))
    assert shown(**inside) == []
    states.QCOW2Backend.set_root(one_image(pool_scope="shared"))
    states.QCOW2Backend.unset_root(one_image(pool_scope="own"))
    assert not DISK.exists()
    assert not states.QCOW2Backend.check_root(one_image(pool_scope="own"))
    assert states.QCOW2Backend.check_root(one_image())
    other = {"swarm_pool": f"{WORK}/other"}
    states.QCOW2Backend.get_root(one_image(**other))
    io(DISK, "read -P 1 0 64k", "write -P 9 0 64k")
    states.QCOW2Backend.get_root(one_image(**other))
    io(DISK, "read -P 9 0 64k")  # what nobody else has is not overwritten
    states.QCOW2Backend.get_root(one_image(**other, pool_scope="shared"))
    io(DISK, "read -P 1 0 64k")
    states.QCOW2Backend.unset_root(one_image(pool_scope="shared"))
    assert not states.QCOW2ImageTransfer.check_root(one_image())
    refused(
        statepool.UsageError,
        "one scope",
        lambda: states.QCOW2Backend.set_root(one_image(pool_scope="own shared")),
    )


def files() -> None:
    """What moves single files and chains, and the lock."""
    statepool.init("shared")
    new_disks()
    ext, transfer, ops = states.QCOW2ExtBackend, states.QCOW2ImageTransfer, states.TransferOps
    ext.set(one_image(set_state="install"))
    io(DISK, "write -P 2 64k 64k")
    ext.set(one_image(set_state="customize", pool_scope="own"))
    cache, pool = f"{WORK}/cache", f":{WORK}/shared"
    assert transfer.get_dependency("customize", one_image()) == "install"
    assert transfer.get_dependency("install", one_image()) == ""
    assert transfer.compare_chain("install", cache, pool, one_image())
    assert not transfer.compare_chain("customize", cache, pool, one_image())
    transfer.transfer_chain("customize", cache, pool, one_image(), down=False)
    assert transfer.compare_chain("customize", cache, pool, one_image())
    assert sorted(ops.list(f"{pool}/vm1/disk", one_image())) == ["customize.qcow2", "install.qcow2"]
    for kind in ("local", "link"):
        assert sorted(getattr(ops, f"list_{kind}")(f"{WORK}/shared/vm1/disk", one_image())) == [
            "customize.qcow2",
            "install.qcow2",
        ]
    assert ops.compare_local(
        f"{cache}/vm1/disk/install.qcow2", f"{WORK}/shared/vm1/disk/install.qcow2", one_image()
    )
    # Two files that are not there are not the same.
    assert not ops.compare(f"{cache}/vm1/disk/no.qcow2", f"{pool}/vm1/disk/no.qcow2", one_image())
    other = one_image(swarm_pool=f"{WORK}/other")
    ops.download(
        f"{WORK}/other/vm1/disk/customize.qcow2", f"{pool}/vm1/disk/customize.qcow2", other
    )
    assert ext.show(one_image(swarm_pool=f"{WORK}/other", pool_scope="own")) == [
        "customize",
        "install",
    ]
    refused(
        statepool.HasDependants,
        "customize",
        lambda: ops.delete(f"{pool}/vm1/disk/install.qcow2", one_image()),
    )
    ops.delete(f"{pool}/vm1/disk/customize.qcow2", one_image())
    assert ops.list(f"{pool}/vm1/disk", one_image()) == ["install.qcow2"]
    refused(
        statepool.NotFound,
        "there is no state no",
        lambda: ops.download("x", f"{pool}/vm1/disk/no.qcow2", other),
    )
    path = f"{WORK}/locks/file"
    with states.image_lock(path, 1) as held:
        assert held is not None
        code = f"from avocado_statepool import states\nwith states.image_lock({path!r}, 0.2): pass"
        second = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert "LockTimeout" in second.stderr
        states.SKIP_LOCKS = True
        with states.image_lock(path) as skipped:
            assert skipped is None


def ssh(pool: str, port: str, user: str) -> None:
    """A pool on another host, as avocado-i2n names it."""
    far = {
        **{f"{do}_location": f"net2:{pool}" for do in ("show", "get", "set", "unset")},
        "nets_host_net2": "other-host",
        "nets_shell_host_net2": "127.0.0.1",
        "nets_shell_port_net2": port,
        "nets_username_net2": user,
    }
    new_disks()
    setup.set_states(params(**IMAGES, **far, set_state="install"))
    assert shown(**far, pool_scope="swarm") == ["install"]
    assert shown(**far, pool_scope="shared") == []
    setup.get_states(params(**IMAGES, **far, get_state="install", swarm_pool=f"{WORK}/other"))
    io(DISK, "read -P 1 0 64k")
    setup.unset_states(params(**IMAGES, **far, unset_state="install", pool_scope="swarm"))
    assert shown(**far, pool_scope="swarm") == []


def listens(path: Path) -> bool:
    """:returns: whether QEMU accepts a connection there: the path exists a moment before that"""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(os.fspath(path)) == 0


class Guest:
    """
    A machine as virttest has it, as far as it is needed: with a real guest, and a monitor that
    nobody else uses.
    """

    def __init__(self, packages: str) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="guest-"))
        self.guest = make_guest(Path(packages), self.place / "initramfs")
        self.statepool_monitor = self.place / "monitor"
        self._sockets = (self.place / "monitor", self.place / "serial")
        self.process: subprocess.Popen[bytes] | None = None

    def create(self, *arguments: str) -> None:
        serial = [
            "-chardev",
            f"socket,id=serial,path={self.place}/serial,server=on,wait=off",
            "-serial",
            "chardev:serial",
        ]
        config = statepool.MachineConfig(
            {"disk": DISK, "data": DATA}, memory=MEMORY, arguments=[*serial, *self.guest.arguments]
        )
        monitor = ["-qmp", f"unix:{self._sockets[0]},server=on,wait=off"]
        self.process = subprocess.Popen(
            [*config.command(), *monitor, *arguments], stdin=subprocess.DEVNULL
        )
        while not all(listens(path) for path in self._sockets):
            assert self.process.poll() is None
            time.sleep(0.01)

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def destroy(self, gracefully: bool = True) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for path in self._sockets:
                path.unlink(missing_ok=True)

    def restore_from_file(self, path: str) -> None:
        self.create("-incoming", f"exec:cat {path}")

    def resume(self, timeout: float) -> None:
        with statepool.RunningMachine.connect(self._sockets[0]) as machine:
            while machine.status() == "inmigrate":
                time.sleep(0.01)
            machine.resume()

    def get_vm(self, name: str) -> Guest:
        """:returns: this one: it is an environment too"""
        return self

    def console(self) -> contextlib.AbstractContextManager[Console]:
        return talking_to(self.place / "serial")


def running(packages: str) -> None:
    """A machine that runs: with its RAM in a file, and with snapshots inside its images."""
    statepool.init("shared")
    on = {**MACHINES, "use_env": "yes"}
    DISK.parent.mkdir(parents=True)
    for path in (DISK, DATA):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    vm = Guest(packages)
    try:
        vm.create()
        with vm.console() as console:
            console.wait_for(r"tick \d+", timeout=200)
            console.write("one")
            before = console.tick()
            setup.set_states(params(**on, set_state_vms="up"), vm)
            assert setup.show_states(params(**on), vm) == ["up"]
            console.write("two")
        setup.get_states(params(**on, get_state_vms="up", swarm_pool=f"{WORK}/other"), vm)
        with vm.console() as console:
            assert console.read() == "one"
            assert before <= console.tick() < before + 100
            inside = {**on, "states_vms": "qcow2vt", "swarm_pool": f"{WORK}/other"}
            setup.set_states(params(**inside, set_state_vms="inside"), vm)
            assert setup.show_states(params(**inside), vm) == ["inside"]
            console.write("three")
            setup.get_states(params(**inside, get_state_vms="inside"), vm)
            assert console.read() == "one"
            setup.unset_states(params(**inside, unset_state_vms="inside"), vm)
            assert setup.show_states(params(**inside), vm) == []
        setup.unset_states(params(**on, unset_state_vms="up"), vm)
        assert setup.show_states(params(**on), vm) == []
        vm.statepool_monitor = None
        refused(
            statepool.UsageError,
            "statepool_monitor",
            lambda: states.RamfileBackend.set(params(**on, set_state="x"), vm),
        )
    finally:
        vm.destroy()
        shutil.rmtree(vm.place)


if __name__ == "__main__":
    ours()
    globals()[sys.argv[1]](*sys.argv[2:])
