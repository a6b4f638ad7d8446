"""The common part of all tables: sizes, a directory to work in, and chains of real images."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from attrs import define, field, frozen

import statepool

MIB = 1 << 20
IMAGE = "vm1/disk"
TIP = "s4"
STATES = ("s0", "s1", "s2", "s3", TIP)
"""The chain of five: a root and four overlays."""

ROOT = Path(__file__).resolve().parents[1]


@frozen
class Scale:
    """
    The sizes of the benchmarks.

    :param root: data in the root of the chain, in bytes
    :param overlay: data in each overlay, in bytes
    :param pairs: the number of pairs of runs of this library and a peer
    :param quick_pairs: the same for work that takes milliseconds
    :param states: number of states in the listings
    :param processes: number of processes that work at the same time
    :param appends: number of appends of each of these processes
    :param tests: number of tests in a suite
    """

    root: int = 1024 * MIB
    overlay: int = 64 * MIB
    pairs: int = 9
    quick_pairs: int = 25
    states: int = 10_000
    processes: int = 16
    appends: int = 25
    tests: int = 40

    @property
    def virtual(self) -> int:
        """The size of the disk, in bytes."""
        return 2 * self.root


FULL = Scale()
TINY = Scale(
    root=2 * MIB, overlay=MIB, pairs=1, quick_pairs=2, states=40, processes=2, appends=3, tests=6
)
"""The scale for the test that the benchmarks run at all."""


@define(slots=False)
class Bench:
    """
    A place to measure in.

    :param place: its own directory
    :param scale: how large everything is
    """

    place: Path
    scale: Scale = FULL
    _running: list[subprocess.Popen[str]] = field(factory=list, init=False)

    @cached_property
    def pattern(self) -> Path:
        """A file of random bytes, none of them zero, with which images are filled."""
        path = self.place / "pattern"
        path.write_bytes(os.urandom(min(16 * MIB, self.scale.overlay)).replace(b"\0", b"\1"))
        return path

    @cached_property
    def pool(self) -> Path:
        """A pool with the chain of five."""
        return self.make_pool(self.place / "pool")

    def make_pool(
        self,
        pool: Path,
        *,
        root: int | None = None,
        virtual: int | None = None,
        depth: int = len(STATES),
    ) -> Path:
        """
        :param root: data in the root, in bytes, if not from the scale
        :param virtual: size of the disk, in bytes, if not from the scale
        :param depth: number of states of the chain
        :returns: a new pool with a chain of images, written by qemu-img and qemu-io under the names
            of the pool's view
        """
        directory = pool / IMAGE
        directory.mkdir(parents=True)
        size = self.scale.virtual if virtual is None else virtual
        for number, state in enumerate(STATES[:depth]):
            backing = ("-b", f"{STATES[number - 1]}.qcow2", "-F", "qcow2") if number else ()
            run(
                "qemu-img",
                "create",
                "-q",
                "-f",
                "qcow2",
                *backing,
                f"{state}.qcow2",
                str(size),
                cwd=directory,
            )
            data = (
                (self.scale.root if root is None else root) if number == 0 else self.scale.overlay
            )
            self.write(directory / f"{state}.qcow2", max(0, number - 1) * self.scale.overlay, data)
        return self.adopt(pool, depth)

    def adopt(self, pool: Path, depth: int) -> Path:
        """:returns: the directory of images, turned into a pool"""
        statepool.init(pool)
        adopted = statepool.adopt(pool)
        if len(adopted) != depth or any(one.problem for one in adopted):
            raise RuntimeError(f"the pool could not be made: {adopted}")
        os.sync()
        return pool

    def write(self, image: Path, offset: int, length: int) -> None:
        """Write random data into an image, as a machine would."""
        step = self.pattern.stat().st_size
        commands = [
            f"write -q -s {self.pattern} {offset + done} {min(step, length - done)}"
            for done in range(0, length, step)
        ]
        run(
            "qemu-io",
            "-f",
            "qcow2",
            *(word for command in commands for word in ("-c", command)),
            str(image),
        )

    def open(self, cache: Path, pool: Path | None = None) -> statepool.StatePool:
        """:returns: a state pool with its own cache and at most one source"""
        return statepool.StatePool(cache=cache, sources=[self.pool if pool is None else pool])

    @contextlib.contextmanager
    def directory(self, below: Path | None = None) -> Iterator[Path]:
        """
        Yield a new directory. At the end, programs that still run in it are ended, and it is
        removed before its data is written to the disk.
        """
        path = Path(tempfile.mkdtemp(dir=below or self.place))
        try:
            yield path
        finally:
            while self._running:
                with self._running.pop() as program:
                    program.kill()
            shutil.rmtree(path)

    @cached_property
    def environment(self) -> dict[str, str]:
        """
        Return the environment for Python programs: they can import this package and statepool,
        which are compiled once, as by an installation.
        """
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONPYCACHEPREFIX": str(self.place / "compiled"),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return environment

    def python(self, *arguments: str) -> str:
        """:returns: the output of a Python program"""
        done = subprocess.run(
            [sys.executable, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return done.stdout

    def start_python(self, *arguments: str) -> subprocess.Popen[str]:
        """
        :returns: a running Python program, which is ended when the directory that was made last is
            removed
        """
        program = subprocess.Popen(
            [sys.executable, *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._running.append(program)
        return program


def run(*arguments: str, cwd: Path | None = None) -> None:
    """Run a program, and discard its output."""
    subprocess.run(arguments, cwd=cwd, stdout=subprocess.DEVNULL, check=True)


def chain_files(pool: Path, depth: int = len(STATES)) -> list[str]:
    """:returns: the paths of the images of a chain"""
    return [str(pool / IMAGE / f"{state}.qcow2") for state in STATES[:depth]]


def room(path: Path) -> int:
    """
    :returns: the disk usage of everything below a directory, in bytes, each file counted once, as
        by ``du``
    """
    seen = {}
    for directory, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # the measured work goes on meanwhile
                found = os.lstat(os.path.join(directory, name))
                seen[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(seen.values())
