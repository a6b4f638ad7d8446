"""
The same chain with tools that users have: the first get, a repeated get, and storing a new state on
top of it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.bench import IMAGE, TIP, Bench, chain_files, run
from benchmarks.environments import Unavailable
from benchmarks.i2n import I2N, VERSION
from benchmarks.measure import Table, rounds, seconds, timed

NEW = "s5"
"""The state that is stored, on top of the chain."""

OPERATIONS = ("cold get", "repeated get", "set")


class Peer(ABC):
    """
    A way to fetch a chain from a pool into a cache, and to store a new state in both.

    :param bench: the sizes, and the chain
    :param place: a directory of its own
    """

    name = ""
    verified = ""
    """What is verified about the bytes afterwards."""

    def __init__(self, bench: Bench, place: Path) -> None:
        self.bench = bench
        self.place = place
        self.cache = place / "cache"
        self.pool = place / "pool"
        self.prepare()

    def prepare(self) -> None:
        """Make a pool for the peer: hard links to the same files."""
        directory = self.pool / IMAGE
        directory.mkdir(parents=True)
        for path in chain_files(self.bench.pool):
            os.link(path, directory / Path(path).name)

    @property
    def files(self) -> list[str]:
        """Return the files of the chain in its pool."""
        return chain_files(self.pool)

    @property
    def working(self) -> Path:
        """The working image from which a state is set."""
        return self.place / "vm1/disk.qcow2"

    def cold(self) -> float:
        """:returns: the seconds of a get into an empty cache"""
        self.empty()
        return timed(self.get)

    def empty(self) -> None:
        """Remove the cache, and wait until that is done."""
        shutil.rmtree(self.cache, ignore_errors=True)
        os.sync()

    def repeated(self) -> float:
        """:returns: the seconds of a get of a cached chain"""
        return timed(self.get)

    def set(self) -> float:
        """:returns: the seconds of storing a working image in the cache and in the pool"""
        self.working.parent.mkdir(exist_ok=True)
        self.make_working()
        self.bench.write(self.working, 0, self.bench.scale.overlay)
        os.sync()
        try:
            return timed(self.store)
        finally:
            self.forget()

    def make_working(self) -> None:
        """Make an empty working image on the cached tip."""
        backing = self.cache / IMAGE / f"{TIP}.qcow2"
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            "-b",
            str(backing),
            str(self.working),
        )

    def forget(self) -> None:
        """Remove the new state everywhere."""
        for path in (
            self.working,
            self.cache / IMAGE / f"{NEW}.qcow2",
            self.pool / IMAGE / f"{NEW}.qcow2",
        ):
            path.unlink(missing_ok=True)

    @abstractmethod
    def get(self) -> None:
        """Fetch the chain."""

    @abstractmethod
    def store(self) -> None:
        """Store the working image in the cache and in the pool."""

    def close(self) -> None:
        """End all processes of the peer."""


class Ours(Peer):
    """The peer that is this library."""

    name = "statepool"
    verified = (
        "every byte of the copies, by BLAKE3; repeated: that no file has changed since; set: every"
        " byte, and flushed"
    )

    def prepare(self) -> None:
        """Make a pool of this library."""
        super().prepare()
        self.bench.adopt(self.pool, len(self.files))
        self._disk = self.bench.open(self.cache, self.pool).image(IMAGE)

    def get(self) -> None:
        """
        Get the chain. This also asks the pool's log for news, unless it was asked a moment ago.
        """
        self._disk = self.bench.open(self.cache, self.pool).image(IMAGE)
        self._disk.get(TIP)

    def make_working(self) -> None:
        self._disk.get(TIP, to=self.working)

    def store(self) -> None:
        stored = self._disk.set(NEW, source=self.working)
        if not stored.complete:
            raise RuntimeError(f"the state could not be stored: {stored}")

    def forget(self) -> None:
        self.working.unlink()
        self._disk.unset(NEW, scope="all")


class Cp(Peer):
    """The peer that copies files."""

    name = "cp --sparse=auto"
    verified = "nothing"

    def get(self) -> None:
        """Copy all files each time."""
        (self.cache / IMAGE).mkdir(parents=True, exist_ok=True)
        run("cp", "--sparse=auto", *self.files, str(self.cache / IMAGE))

    def store(self) -> None:
        """Copy the working image twice."""
        for target in (self.cache, self.pool):
            run("cp", "--sparse=auto", str(self.working), str(target / IMAGE / f"{NEW}.qcow2"))


class Convert(Peer):
    """The peer that copies what a guest sees."""

    name = "qemu-img convert"
    verified = "nothing; one flat image instead of a chain"

    def get(self) -> None:
        """Convert the whole chain to one image."""
        (self.cache / IMAGE).mkdir(parents=True, exist_ok=True)
        run(
            "qemu-img",
            "convert",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            self.files[-1],
            str(self.cache / IMAGE / f"{TIP}.qcow2"),
        )

    def store(self) -> None:
        """Store the difference from the parent in both places."""
        for target in (self.cache, self.pool):
            parent = str(target / IMAGE / f"{TIP}.qcow2")
            new = str(target / IMAGE / f"{NEW}.qcow2")
            run(
                "qemu-img",
                "convert",
                "-f",
                "qcow2",
                "-O",
                "qcow2",
                "-B",
                parent,
                "-F",
                "qcow2",
                str(self.working),
                new,
            )


class Rsync(Peer):
    """The peer that copies changed files."""

    name = "rsync --archive"
    verified = "its own stream, by a checksum of each file; repeated: size and time only"

    def get(self) -> None:
        """Copy all files whose size or time differs."""
        (self.cache / IMAGE).mkdir(parents=True, exist_ok=True)
        run("rsync", "--archive", *self.files, str(self.cache / IMAGE))

    def store(self) -> None:
        """Copy the working image twice."""
        for target in (self.cache, self.pool):
            run("rsync", "--archive", str(self.working), str(target / IMAGE / f"{NEW}.qcow2"))


class AvocadoI2N(Peer):
    """The peer avocado-i2n with its pool."""

    name = f"avocado-i2n {VERSION}"
    verified = "nothing when copied; repeated: MD5 of the first MiB of each file"

    def prepare(self) -> None:
        """Start avocado-i2n."""
        super().prepare()
        (self.place / "vm1").mkdir()
        self._process = I2N(self.place, self.place / "log")
        self._seconds = 0.0

    def cold(self) -> float:
        """
        Return the seconds by the worker's own clock, since it is started already, like this
        process.
        """
        self.empty()
        self.get()
        return self._seconds

    def repeated(self) -> float:
        """Return the seconds by the worker's own clock."""
        self.get()
        return self._seconds

    def get(self) -> None:
        """Get the external overlays from its shared pool."""
        self._seconds = self._process.do("get", TIP, pool=self.pool, cache=self.cache)
        if not all((self.cache / IMAGE / Path(path).name).exists() for path in self.files):
            raise RuntimeError("avocado-i2n has not brought the chain")

    def store(self) -> None:
        """Store the state in its cache, and the chain from there in its shared pool."""
        self._process.do("set", NEW, pool=self.pool, cache=self.cache)
        if not (self.pool / IMAGE / f"{NEW}.qcow2").exists():
            raise RuntimeError("avocado-i2n has not stored the state")

    def close(self) -> None:
        """End avocado-i2n."""
        self._process.close()


def table(
    bench: Bench, kinds: Sequence[type[Peer]] = (Ours, Cp, Convert, Rsync, AvocadoI2N)
) -> Table:
    """:returns: a table of all peers side by side"""
    notes: list[str] = []
    with ExitStack() as stack:
        peers: list[Peer] = []
        for kind in kinds:
            try:
                peers.append(kind(bench, stack.enter_context(bench.directory())))
                stack.callback(peers[-1].close)
            except (Unavailable, OSError, subprocess.CalledProcessError) as error:
                notes.append(f"Without {kind.name}: {error}")
        works = [work for peer in peers for work in (peer.cold, peer.repeated, peer.set)]
        # All measurements of a peer run one after the other, each after a sync. The cold one is
        # first: it leaves the cache for the others.
        times = rounds_of_three(works, bench.scale.pairs)
    ours = times[:3]
    lines = [
        _line(peer, times[3 * index : 3 * index + 3], ours) for index, peer in enumerate(peers)
    ]
    head = ["tool", *(f"{name} (ratio to ours, spread)" for name in OPERATIONS), "verified"]
    notes.append(
        "A ratio above 1 means that we are faster. All work on other names of the same cached"
        " files."
    )
    return Table("peers: one chain of five, many tools", grid=[head, *lines], notes=notes)


def rounds_of_three(works: Sequence[object], count: int) -> list[tuple[float, ...]]:
    """
    :returns: as :func:`~benchmarks.measure.rounds`, but three works at a time stay together and in
        order
    """
    triples = [works[start : start + 3] for start in range(0, len(works), 3)]
    found: list[list[float]] = [[] for _ in works]

    def triple(index: int) -> float:
        for offset, work in enumerate(triples[index]):
            os.sync()
            found[3 * index + offset].append(work())  # type: ignore[operator]
        return 0.0

    rounds([lambda index=index: triple(index) for index in range(len(triples))], count)  # type: ignore[misc]
    return [tuple(one) for one in found]


def _line(
    peer: Peer, times: Sequence[tuple[float, ...]], ours: Sequence[tuple[float, ...]]
) -> list[str]:
    return [
        peer.name,
        *(_cell(theirs, mine) for theirs, mine in zip(times, ours, strict=True)),
        peer.verified,
    ]


def _cell(theirs: tuple[float, ...], mine: tuple[float, ...]) -> str:
    ratios = [their / our for their, our in zip(theirs, mine, strict=True)]
    median = seconds(statistics.median(theirs))
    return (
        median
        if theirs is mine
        else f"{median} ({statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f})"
    )
