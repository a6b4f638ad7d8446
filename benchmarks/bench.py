"""
What all tables share: how large everything is, a directory to work in, and chains of real images.
"""

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
    How large everything is.

    :param root: data in the root of the chain, in bytes
    :param overlay: data in each overlay, in bytes
    :param pairs: how often we and a peer do the same
    :param quick_pairs: the same for what takes milliseconds
    :param states: in the listings
    :param processes: that work at the same time
    :param appends: of each of these processes
    :param tests: in a suite
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
        """Size of the disk, in bytes."""
        return 2 * self.root


FULL = Scale()
TINY = Scale(
    root=2 * MIB, overlay=MIB, pairs=1, quick_pairs=2, states=40, processes=2, appends=3, tests=6
)
"""For the test that all of this runs."""


@define(slots=False)
class Bench:
    """
    A place to measure in.

    :param place: a directory of its own
    :param scale: how large everything is
    """

    place: Path
    scale: Scale = FULL
    _running: list[subprocess.Popen[str]] = field(factory=list, init=False)

    @cached_property
    def pattern(self) -> Path:
        """A file of random bytes, none of them zero, which images are filled from."""
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
        :param root: data in the root, in bytes, if not as the scale has it
        :param virtual: size of the disk, in bytes, if not as the scale has it
        :param depth: states of the chain
        :returns: a new pool with a chain of images that qemu-img and qemu-io have written, under
            their names in the view's places
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
        """:returns: a directory of images, made a pool"""
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
        """:returns: a cache of its own, and one source"""
        return statepool.StatePool(cache=cache, sources=[self.pool if pool is None else pool])

    @contextlib.contextmanager
    def directory(self, below: Path | None = None) -> Iterator[Path]:
        """
        Yield a new directory. At the end, programs that still run in it are ended, and it is
        removed before its writes reach the disk.
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
        For programs in Python: this package and statepool can be imported, and are compiled once,
        as an installation does it.
        """
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONPYCACHEPREFIX": str(self.place / "compiled"),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        return environment

    def python(self, *arguments: str) -> str:
        """:returns: what a program in Python prints"""
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
        :returns: a program in Python, which runs no longer than the directory that was made last is
            there
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
    """Run a program, quietly."""
    subprocess.run(arguments, cwd=cwd, stdout=subprocess.DEVNULL, check=True)


def chain_files(pool: Path, depth: int = len(STATES)) -> list[str]:
    """:returns: the images of a chain, under their names"""
    return [str(pool / IMAGE / f"{state}.qcow2") for state in STATES[:depth]]


def room(path: Path) -> int:
    """
    :returns: what everything below a directory takes on disk, in bytes, each file once: what ``du``
        says
    """
    seen = {}
    for directory, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # what is measured goes on
                found = os.lstat(os.path.join(directory, name))
                seen[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(seen.values())
