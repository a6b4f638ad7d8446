"""Archives of a pool with many states, beside tar on the same files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.cold import hash_files
from benchmarks.measure import Fact, Limit, Table, Unit, Work, against, timed
from statepool.archive.definition import BackupDefinition, BackupType
from statepool.archive.pool_archiver import PoolArchiver
from statepool.archive.pool_reader import restore_pool
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.sources.pool_source import open_pool

OBJECT = "vm1/disk"
NEW = 10
"""States that are new in each level."""

LEVELS = 3
"""Levels above level 0 that are restored."""

TOGETHER = 500
"""States that are published in one record."""


def table(bench: Bench) -> Table:
    """:returns: the cost of archives of a pool, and of a restore"""
    made = _Made(bench)
    level_0 = against(
        f"level 0 of {bench.scale.states} states, {made.length >> 20} MiB, half of it holes",
        made.level_0(),
        "tar -S of the same files, and sync -f",
        made.tar(),
        bench.scale.pairs,
        Limit(Unit.RATIO, 1.15),
    )
    made.begin()
    made.add(1)
    level_1 = against(
        f"level 1 after {NEW} new states",
        made.level(1),
        "tar --listed-incremental of the same files, and sync -f",
        made.listed(),
        bench.scale.pairs,
        Limit(Unit.TIME, 1.0),
    )
    for level in range(1, LEVELS + 1):
        made.archive(made.shelf, level)
        made.add(level + 1)
    restored = against(
        f"restore of level 0 and {LEVELS} levels",
        made.restore(),
        "tar -x of the same archives, sync -f, and hashing the files",
        made.unpacked(),
        bench.scale.pairs,
        Limit(Unit.RATIO, 1.3),
    )
    return Table(
        "archives of a pool",
        [level_0, level_1, restored],
        [made.right()],
        notes=["An archive and a restored pool are durable, and every byte has been hashed."],
    )


class _Made:
    """A pool of states with different bytes, and places for its archives."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._pool_path = bench.place / "many"
        self.shelf = bench.place / "shelf"
        self.shelf.mkdir()
        self._size = 10 * bench.scale.root // bench.scale.states
        self._count = bench.scale.states
        self._pool_path.mkdir()
        self._pool: Pool = open_pool(self._pool_path, Settings())
        self._pool.create()
        self._content = os.urandom(self._size // 2).replace(b"\0", b"\1")
        for first in range(0, self._count, TOGETHER):
            self._publish("s", range(first, min(first + TOGETHER, self._count)))
        os.sync()

    @property
    def length(self) -> int:
        """Bytes of all states, holes included."""
        return self._size * self._count

    def _publish(self, name: str, numbers: range) -> None:
        """Publish states, whose files are a hole and then data."""
        half = self._size // 2
        manifests = []
        for number in numbers:
            mark = f"{name}{number}".encode().ljust(16, b".")
            content = mark + self._content[16:]
            digest = Digest.of(bytes(self._size - half) + content)
            with open(self._pool_path / layout.data(digest), "wb") as file:
                file.seek(self._size - half)
                file.write(content)
                os.fchmod(file.fileno(), layout.READ_ONLY)
            extents = ((self._size - half, half),)
            manifests.append(
                Manifest(OBJECT, f"{name}{number}", Kind.IMAGE, self._size, digest, extents=extents)
            )
        staging = self._pool.stage({one.digest for one in manifests if one.digest is not None})
        self._pool.publish(manifests, staging, durable=False)
        staging.end()

    def add(self, level: int) -> None:
        """Publish what a level is to have."""
        self._publish(f"new{level}-", range(NEW))

    # -- ours --------------------------------------------------------------------------------------

    def archive(self, place: Path, level: int) -> None:
        """Make a level."""
        definition = BackupDefinition("many", BackupType.TAR, place, str(self._pool_path))
        PoolArchiver(place / "work").backup_files_incrementally(definition, level=level)

    def level_0(self) -> Work:
        def work() -> float:
            with self._bench.directory() as place:
                return timed(lambda: self.archive(place, 0))

        return work

    def begin(self) -> None:
        """Make the level 0 that the others stand on, and tar's."""
        self.archive(self.shelf, 0)
        self._listed(self.shelf / "tar.0", self.shelf / "tar.0.snar")

    def level(self, level: int) -> Work:
        return lambda: timed(lambda: self.archive(self.shelf, level))

    @property
    def _archives(self) -> list[Path]:
        names = ["many.tar", *(f"many.{level}.tar" for level in range(1, LEVELS + 1))]
        return [self.shelf / name for name in names]

    def restore(self) -> Work:
        def work() -> float:
            with self._bench.directory() as place:
                return timed(lambda: restore_pool(self._archives, place / "back"))

        return work

    def right(self) -> Fact:
        """:returns: how many states have the right bytes after a restore"""
        with self._bench.directory() as place:
            restore_pool(self._archives, place / "back")
            pool = open_pool(place / "back", Settings())
            states = pool.fold("vm1").states.values()
            right = 0
            for one in states:
                assert one.digest is not None
                content = (place / "back" / layout.data(one.digest)).read_bytes()
                right += Digest.of(content) == one.digest
        expected = self._count + LEVELS * NEW
        return Fact(
            "states that are right after a restore", str(right), str(expected), right == expected
        )

    # -- the peer's --------------------------------------------------------------------------------

    def tar(self) -> Work:
        def work() -> float:
            with self._bench.directory() as place:
                command = ("tar", "-S", "-C", str(self._pool_path), "-cf", "archive.tar", ".")
                return timed(lambda: _flushed(place, *command))

        return work

    def listed(self) -> Work:
        def work() -> float:
            with self._bench.directory() as place:
                (place / "snar").write_bytes((self.shelf / "tar.0.snar").read_bytes())
                return timed(lambda: self._listed(place / "tar.1", place / "snar"))

        return work

    def _listed(self, archive: Path, snapshot: Path) -> None:
        command = ("tar", "-S", "-C", str(self._pool_path), "--listed-incremental", str(snapshot))
        _flushed(archive.parent, *command, "-cf", str(archive), ".")

    def unpacked(self) -> Work:
        def work() -> float:
            with self._bench.directory() as place:
                return timed(lambda: self._unpack(place))

        return work

    def _unpack(self, place: Path) -> None:
        for archive in self._archives:
            subprocess.run(("tar", "-xf", str(archive)), cwd=place, check=True)
        subprocess.run(("sync", "-f", "."), cwd=place, check=True)
        data = place / layout.DATA
        hash_files([str(path) for path in data.iterdir()])


def _flushed(place: Path, *command: str) -> None:
    subprocess.run(command, cwd=place, check=True)
    subprocess.run(("sync", "-f", "."), cwd=place, check=True)
