"""
kill -9 at every system call of a get, a set and an unset of a machine with two disks that changes a
file: both disks, or none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

import statepool
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.pools import layout
from statepool.pools.fold import member_ids
from statepool.pools.pool import Pool
from statepool.transports.copying import hash_file
from statepool.transports.registry import open_transport
from tests.support.crash import EVERY, changing_calls, kill_at

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.usefixtures("strace", "alone"),
]

IMAGES = ("disk", "data")
MIB = 1 << 20
LIMIT = 600

ESSENTIAL = {
    "get": {"link", "mkdir", "rename", "symlink", "unlink", "write"},
    "get-over": {"link", "rename", "unlink", "write"},
    "set": {"fchmod", "link", "pwrite64", "rename", "symlink", "unlink", "write"},
    "set-copied": {"fchmod", "link", "pwrite64", "rename", "symlink", "unlink", "write"},
    "set-ram": {"fchmod", "link", "pwrite64", "rename", "symlink", "unlink", "write"},
    "unset": {"link", "rename", "unlink", "write"},
}
"""
What a step is known to do: a trace without these would show nothing, and all tests would pass.
"""

STRIDE = {"get": 4, "get-over": 6, "set-copied": 6, "set-ram": 6, "unset": 4}
"""
A test takes every so many-th call of a step, beginning with its own number. With EVERY=1 in the
environment, the two tests of a set take all of its calls.
"""

WORKING = {"set": "vm", "set-copied": "linked", "set-ram": "vm"}


def run(*command: str | Path) -> int:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode in (0, 1), f"{command} ended with {done.returncode}: {done.stderr}"
    return done.returncode


def write(image: Path, value: int, offset: int) -> None:
    assert run("qemu-io", "-f", "qcow2", "-c", f"write -P {value} {offset} 65536", image) == 0


@frozen
class MachineLab:
    """
    A directory with a pool, a cache with states of a machine, and directories with working images
    of it: ``vm``, ``linked`` and ``spare``.
    """

    root: Path
    template: Path
    expected: Path

    def reset(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        assert run("cp", "-a", self.template, self.root) == 0

    def step(self, name: str) -> list[str]:
        return [sys.executable, "-B", str(Path(__file__).with_name("machine_step.py")), name]

    def state_pool(self, cache: str) -> statepool.StatePool:
        return statepool.StatePool(cache=self.root / cache, sources=[self.root / "pool"])

    def machine(self, cache: str = "cache") -> statepool.MachineHandle:
        return self.state_pool(cache).machine("vm1", IMAGES)

    def pools(self) -> list[Pool]:
        names = [
            name
            for name in ("pool", "cache", "other")
            if (self.root / name / layout.POOL_FILE).exists()
        ]
        return [Pool(open_transport(Location("file", str(self.root / name)))) for name in names]

    def require_whole(self) -> None:
        """
        What is visible is whole, and each state of the machine is one of all its images, or of
        none. Changes nothing.
        """
        for pool in self.pools():
            data = Path(pool.location.path, layout.DATA)
            for path in data.iterdir():
                digest = Digest.from_file_name(path.name)
                assert digest_of(path) == digest, f"{path} is torn"
            fold = pool.fold("vm1")
            trashed = {
                layout.trashed(path.name)
                for path in Path(pool.location.path, layout.TRASH).iterdir()
            }
            for manifest in fold.manifests:
                assert (
                    manifest.digest is None
                    or (data / manifest.digest.file_name).exists()
                    or manifest.digest in trashed
                ), f"{manifest.id} is empty"
            listed = {
                member for manifest in fold.states.values() for member in member_ids(manifest)
            }
            tips = {
                state for state in fold.states if state.state != "install" and "/" in state.object
            }
            assert tips <= listed, f"{tips - listed} in {pool} are there without the other images"

    def require_like(self, directory: str, content: str) -> None:
        """All images in a directory are there, and a guest sees in them what it should see."""
        for image in IMAGES:
            path = self.root / directory / f"{image}.qcow2"
            assert path.is_file(), f"{path} is gone"
            assert (
                run(
                    "qemu-img",
                    "compare",
                    "-q",
                    "-f",
                    "qcow2",
                    "-F",
                    "raw",
                    path,
                    self.expected / f"{content}-{image}.raw",
                )
                == 0
            ), f"{path} differs"

    def require_clean(self) -> None:
        for path in self.root.glob(f"*/{layout.OURS}/**/*tmp*"):
            os.utime(path, (0, 0), follow_symlinks=False)
        self.state_pool("cache").gc(everywhere=True)
        if (self.root / "other" / layout.POOL_FILE).exists():
            self.state_pool("other").gc()
        for pool in self.pools():
            left = [
                str(path)
                for name in (layout.INCOMING, layout.TRASH)
                for path in Path(pool.location.path, name).iterdir()
            ]
            assert not left, f"left over: {left}"
        assert not list(self.root.rglob(".statepool-*")), "half a working image is left over"


def digest_of(path: Path) -> Digest:
    with open(path, "rb") as file:
        return hash_file(file.fileno(), os.fstat(file.fileno()).st_size)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> MachineLab:
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        pytest.skip("qemu-img is not installed (Debian: qemu-utils)")
    base = tmp_path_factory.mktemp("machine")
    lab = MachineLab(base / "lab", base / "template", base / "expected")
    lab.root.mkdir()
    lab.expected.mkdir()
    statepool.init(lab.root / "pool")
    vm = lab.machine()

    def remember(name: str, directory: str) -> None:
        for image in IMAGES:
            assert (
                run(
                    "qemu-img",
                    "convert",
                    "-O",
                    "raw",
                    lab.root / directory / f"{image}.qcow2",
                    lab.expected / f"{name}-{image}.raw",
                )
                == 0
            )

    (lab.root / "vm").mkdir()
    for number, image in enumerate(IMAGES):
        assert (
            run("qemu-img", "create", "-q", "-f", "qcow2", lab.root / "vm" / f"{image}.qcow2", "1M")
            == 0
        )
        write(lab.root / "vm" / f"{image}.qcow2", 1 + number, 0)
    vm.set("install", source=lab.root / "vm")
    remember("install", "vm")
    vm.get("install", to=lab.root / "leaf")
    for number, image in enumerate(IMAGES):
        write(lab.root / "leaf" / f"{image}.qcow2", 3 + number, 65536)
    vm.set("leaf", source=lab.root / "leaf")
    remember("leaf", "leaf")
    shutil.move(lab.root / "leaf", lab.root / "spare")
    for directory, value in (("vm", 5), ("linked", 7)):
        if directory != "vm":
            vm.get("install", to=lab.root / directory)
        for number, image in enumerate(IMAGES):
            write(lab.root / directory / f"{image}.qcow2", value + number, 131072)
        remember(directory, directory)
    # With a second name, a file is not linked into the cache but copied; the other one is linked,
    # as always.
    os.link(lab.root / "linked" / "data.qcow2", lab.root / "data-too.qcow2")
    (lab.root / "ram.bin").write_bytes(b"what QEMU writes" * 1000)
    lab.root.rename(lab.template)
    return lab


@pytest.fixture
def lab(built: MachineLab) -> Iterator[MachineLab]:
    built.reset()
    return built


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("step", list(ESSENTIAL))
def test_killed_at_every_call(lab: MachineLab, step: str, part: int) -> None:
    calls = changing_calls(lab.step(step), cwd=lab.root)
    assert {call.kind for call in calls} >= ESSENTIAL[step]
    failures = []
    # What is flushed or not only shows after a power cut.
    for number, call in enumerate(
        [call for call in calls if call.name not in ("fsync", "fdatasync")][
            part :: STRIDE.get(step, 2) * EVERY
        ]
    ):
        lab.reset()
        kill_at(lab.step(step), call, cwd=lab.root)
        try:
            check_after(lab, step, by_another=bool(number % 2))
        except (AssertionError, statepool.StatePoolError) as error:
            failures.append(f"after {step} was killed at {call}: {type(error).__name__}: {error}")
    assert not failures, "\n\n".join(failures)


def check_after(lab: MachineLab, step: str, *, by_another: bool) -> None:
    """
    :param by_another: whether the next command is another one, and not the same again
    """
    lab.require_whole()
    if by_another:
        lab.machine("other" if step == "get" else "cache").get("install")
        if step in WORKING:
            lab.require_like(WORKING[step], WORKING[step])
        if step == "get":
            assert len(list((lab.root / "run").glob("*.qcow2"))) in (0, 2), (
                "one image is there, and not the other"
            )
        if step == "get-over":
            states = [
                run(
                    "qemu-img",
                    "compare",
                    "-q",
                    "-F",
                    "raw",
                    lab.root / "spare" / f"{i}.qcow2",
                    lab.expected / f"leaf-{i}.raw",
                )
                for i in IMAGES
            ]
            assert states in ([0, 0], [1, 1]), "one image was replaced, and not the other"
    AGAIN[step](lab)
    lab.require_clean()
    lab.require_whole()
    for directory in ("vm", "linked"):
        lab.require_like(directory, directory)
    lab.require_like("spare", "install" if step == "get-over" else "leaf")


def get_again(lab: MachineLab) -> None:
    try:
        lab.machine("other").get("install", to=lab.root / "run")
    except statepool.FileInTheWay:
        pass  # they were made before the end came
    lab.require_like("run", "install")


def get_over_again(lab: MachineLab) -> None:
    lab.machine().get("install", to=lab.root / "spare", overwrite=True)


def set_again(lab: MachineLab, directory: str) -> None:
    assert lab.machine().set("customize", source=lab.root / directory).complete
    for pool in lab.pools():
        assert {str(state) for state in pool.fold("vm1").states} >= {
            "vm1 customize",
            "vm1/disk customize",
            "vm1/data customize",
        }


def set_ram_again(lab: MachineLab) -> None:
    done = subprocess.run(
        lab.step("set-ram"),
        cwd=lab.root,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    (cache,) = (pool for pool in lab.pools() if pool.location.path.endswith("cache"))
    states = {str(state) for state in cache.fold("vm1").states}
    assert states >= {
        "vm1 loggedin",
        "vm1 loggedin (RAM)",
        "vm1/disk loggedin",
        "vm1/data loggedin",
    }, done.stderr
    assert not (lab.root / "ram.bin").exists()


def unset_again(lab: MachineLab) -> None:
    try:
        lab.machine().unset("leaf", scope="all")
    except statepool.NotFound:
        pass  # it was done before the end came
    for pool in lab.pools():
        assert {state.state for state in pool.fold("vm1").states} == {"install"}


AGAIN = {
    "get": get_again,
    "get-over": get_over_again,
    "set": lambda lab: set_again(lab, "vm"),
    "set-copied": lambda lab: set_again(lab, "linked"),
    "set-ram": set_ram_again,
    "unset": unset_again,
}
