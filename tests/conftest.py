"""
What all tests share: an environment that is nobody's, the command line as a process, and real
images.

Images are made by the installed qemu-img and qemu-io, never by hand: a test that compares our work
with itself shows nothing.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from attrs import frozen

from statepool.testing.guest import make_guest
from tests.support.machines import Lab
from tests.support.sshd import Sshd, run_sshd, sshd_program

# No deadlines: a slow machine is not a failure. The same examples in every run, unless EXAMPLES
# says how many others are to be tried.
EXAMPLES = int(os.environ.get("EXAMPLES", "0"))
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    derandomize=not EXAMPLES,
    max_examples=EXAMPLES or 100,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("house")

# Who starts the tests may have us ignore signals, as nohup(1) and shells do for what runs in the
# background, and what we start would inherit that. With a handler of ours we are as deaf, and they
# begin as usual.
for _signal in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, lambda number, frame: None)

ROOT = Path(__file__).resolve().parents[1]

# The commands under test flush every file several times, which takes most of the time of a run on a
# disk. What a power cut leaves is not shown here but on file systems that are cut off
# (tests/faults/test_power.py), so temporary files may lie in memory, if there is enough of it.
MEMORY_PLACE = Path("/dev/shm")
MEMORY_ROOM = 8 << 30
"""Bytes that must be free there: a run needs less than a quarter of it at any moment."""

LIMIT = 600
"""Seconds that one command may take in a test; one that takes longer hangs."""

MIB = 1 << 20


def pytest_configure(config: pytest.Config) -> None:
    """
    Once for all workers: choose where temporary files go, and compile what hundreds of processes
    are going to import.
    """
    if hasattr(config, "workerinput"):
        return
    if "TMPDIR" not in os.environ and _free_memory() >= MEMORY_ROOM:
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY_PLACE)
    for package in ("statepool", "plugins"):
        compileall.compile_dir(ROOT / package, quiet=1)


def _free_memory() -> int:
    """
    Return how many bytes of temporary files fit into memory, 0 where there is no place for any.
    """
    if not os.access(MEMORY_PLACE, os.W_OK | os.X_OK):
        return 0
    place = os.statvfs(MEMORY_PLACE)
    available = re.search(
        r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE
    )
    return min(place.f_bavail * place.f_frsize, int(available[1]) << 10 if available else 0)


@pytest.fixture(autouse=True)
def nobodys_environment(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """
    No configuration of the person who runs the tests reaches them, and nothing of theirs is
    written. :returns: the home directory
    """
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith(("STATEPOOL_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(home / "no-system-configuration"))
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("NO_COLOR", "1")
    # which takes a pytest that a test starts a second to load
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "plugins")]))
    return home


@frozen
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run_statepool(tmp_path: Path) -> Callable[..., Ran]:
    """
    The command line as a user has it: a process of its own, in ``tmp_path``.

    ``run_statepool("get", "vm1/disk", "install", code=0)`` fails the test unless the exit code is
    the one given; with ``code=None`` any will do. An error must be one line on standard error,
    never a traceback.
    """

    def run(
        *arguments: str | Path,
        code: int | None = 0,
        cwd: Path = tmp_path,
        env: Mapping[str, str] = {},
        stdin: str = "",
    ) -> Ran:
        command = [sys.executable, "-m", "statepool", *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **env},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        ran = Ran(done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in ran.err, f"{command} ended in a bare traceback:\n{ran.err}"
        assert code is None or ran.code == code, (
            f"{command} ended with {ran.code}, not {code}:\n{ran.out}{ran.err}"
        )
        return ran

    return run


def tool(*command: str | Path, cwd: Path | None = None) -> str:
    """:returns: what a program of QEMU prints. The test fails if the program does."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    )
    return done.stdout


@pytest.fixture
def qemu_img() -> Callable[..., str]:
    """``qemu_img("info", path)``: what the installed qemu-img says."""
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed (Debian: qemu-utils)")

    def run(*arguments: str | Path, cwd: Path | None = None) -> str:
        return tool("qemu-img", *arguments, cwd=cwd)

    return run


@pytest.fixture
def make_image(qemu_img: Callable[..., str]) -> Callable[..., Path]:
    """
    A real qcow2 image.

    ``make_image(path, 4 << 20, backing="install.qcow2", writes=[(0, 65536, 0xAA)])``: a disk of
    ``size`` bytes (that of the backing image if None), ``backing`` written into the header exactly
    as it is given, and patterns written by qemu-io as (offset, length, byte value). ``options`` are
    those of ``qemu-img create -o``.
    """

    def make(
        path: Path,
        size: int | None = 4 * MIB,
        *,
        backing: str | Path | None = None,
        writes: Iterable[tuple[int, int, int]] = (),
        options: str | None = None,
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        command: list[str | Path] = ["create", "-q", "-f", "qcow2"]
        if options is not None:
            command += ["-o", options]
        if backing is not None:
            command += ["-b", backing, "-F", "qcow2"]
        qemu_img(*command, path, *([] if size is None else [str(size)]))
        write_image(path, writes)
        return path

    return make


def write_image(path: Path, writes: Iterable[tuple[int, int, int]]) -> None:
    commands = [
        argument
        for offset, length, value in writes
        for argument in ("-c", f"write -P {value} {offset} {length}")
    ]
    if commands:
        tool("qemu-io", "-f", "qcow2", *commands, path)


@pytest.fixture(scope="session")
def sshd() -> Iterator[Sshd]:
    """A real sshd on loopback, for an account with a shell."""
    yield from _served()


@pytest.fixture(scope="session")
def chrooted_sshd() -> Iterator[Sshd]:
    """The same for an account that has SFTP in a directory of its own, and nothing else."""
    if os.getuid() != 0:
        pytest.skip("only root can have a chroot")
    yield from _served(chrooted=True)


def _served(**options: Any) -> Iterator[Sshd]:
    if sshd_program() is None:
        pytest.skip("sshd is not installed (Debian: openssh-server)")
    with run_sshd(**options) as server:
        yield server


@pytest.fixture(scope="session")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Where running guests come from: see tests.support.machines."""
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("setpriv", "util-linux")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: {package})")
    fetched = subprocess.run(
        [ROOT / "tools/guest"], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    if fetched.returncode != 0:
        pytest.skip(fetched.stderr.strip() or "tools/guest failed")
    place = tmp_path_factory.mktemp("guest")
    return Lab(make_guest(ROOT / ".guest", place / "initramfs"), place)


@pytest.fixture
def write_to_image(
    qemu_img: Callable[..., str],
) -> Callable[[Path, Iterable[tuple[int, int, int]]], None]:
    """``write_to_image(path, [(offset, length, byte value)])``: what a guest would do."""
    return write_image
