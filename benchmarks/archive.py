"""
Archives of a directory: beside GNU tar with the same compression, beside Python's tarfile, by two
threads beside one, and beside AutoArchive.
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks.autoarchive import VERSION, AutoArchive, install_autoarchive
from benchmarks.bench import Bench
from benchmarks.environments import Unavailable
from benchmarks.measure import Figure, Limit, Table, Unit, Work, rounds, timed
from statepool.archive.compress import compressing
from statepool.archive.definition import BackupDefinition, BackupType
from statepool.archive.registry import archiver_class

EXTERNAL = Limit(Unit.RATIO, 1.05)
INTERNAL = Limit(Unit.RATIO, 1.1)
TWO = Limit(Unit.RATIO, 1 / 1.6)
"""The promised time of two threads, as a ratio to that of one."""

EVEN = Limit(Unit.RATIO, 1.0)

SMALL = 4096
"""Bytes of a small file: a quarter of the tree is in such files."""

_STREAM = """
import os, sys
from statepool.archive.compress import compressing
from statepool.archive.definition import BackupType

with compressing(BackupType(sys.argv[1]), sys.stdout.buffer.write) as write:
    while chunk := os.read(0, 1 << 20):
        write(chunk)
sys.stdout.buffer.flush()
os.fsync(1)
"""
"""The same compression as a program of its own, for a pipe."""


def table(bench: Bench) -> Table:
    """:returns: the cost of archives"""
    with bench.directory() as place:
        root = place / "root"
        _fill(root, bench.scale.root // 4)
        figures = [_external(bench, place, root, kind) for kind in ("tar.gz", "tar.zst")]
        figures += [_internal(bench, place, root), _threads(bench)]
        notes = ["Each archive is flushed, and every member hashed; those of GNU tar are flushed."]
        try:
            figures.append(_autoarchive(bench, place, root))
        except Unavailable as error:
            notes.append(f"AutoArchive was not measured: {error}.")
        return Table("archive: a directory, as level 0", figures, notes=notes)


def _fill(root: Path, size: int) -> None:
    """Make a tree whose content can be compressed to about a half."""
    chance = random.Random(0)
    words = [chance.randbytes(8) for _ in range(1 << 12)]
    block = b"".join(chance.choices(words, k=1 << 17))
    root.mkdir()
    for number in range(max(1, size // 4 // SMALL)):
        above = root / f"d{number // 200}"
        above.mkdir(exist_ok=True)
        start = chance.randrange(len(block) - SMALL)
        (above / f"f{number}").write_bytes(block[start : start + SMALL])
    for number in range(4):
        with (root / f"large{number}").open("wb") as file:
            for _ in range(max(1, size * 3 // 16 // len(block))):
                file.write(block)


def _ours(place: Path, root: Path, archiver: str, kind: str) -> Work:
    def work() -> float:
        maker = archiver_class(archiver)(place / "work")
        (place / "ours").mkdir(exist_ok=True)
        definition = BackupDefinition("one", kind, place / "ours", root)
        if archiver == "external":
            return timed(lambda: maker.backup_files_incrementally(definition, level=0))
        return timed(lambda: maker.backup_files(definition))

    return work


def _external(bench: Bench, place: Path, root: Path, kind: str) -> Figure:
    snapshot, target = place / "theirs.snar", place / f"theirs.{kind}"
    tar = ["tar", "--create", "--format=posix", f"--listed-incremental={snapshot}"]
    tar += [f"--directory={root}", "."]
    pack = [sys.executable, "-c", _STREAM, kind]
    line = f"{shlex.join(tar)} | {shlex.join(pack)} > {shlex.quote(str(target))}"

    def theirs() -> float:
        snapshot.unlink(missing_ok=True)
        command = ["bash", "-o", "pipefail", "-c", line]
        return timed(lambda: subprocess.run(command, env=bench.environment, check=True))

    ours, peers = rounds([_ours(place, root, "external", kind), theirs], bench.scale.pairs)
    return Figure(
        f"external, {kind}",
        "tar --listed-incremental | the same compression",
        ours,
        peers,
        EXTERNAL,
    )


def _internal(bench: Bench, place: Path, root: Path) -> Figure:
    def theirs() -> float:
        def work() -> None:
            with (place / "theirs.tar").open("wb") as file:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    tar.add(root, ".")
                file.flush()
                os.fsync(file.fileno())

        return timed(work)

    ours, peers = rounds([_ours(place, root, "internal", "tar"), theirs], bench.scale.pairs)
    return Figure("internal, tar", "Python's tarfile", ours, peers, INTERNAL)


def _threads(bench: Bench) -> Figure:
    chance = random.Random(1)
    words = [chance.randbytes(8) for _ in range(1 << 12)]
    block = b"".join(chance.choices(words, k=1 << 17))

    def by(threads: int) -> Work:
        def work() -> None:
            with compressing(BackupType.TAR_GZ, len, threads=threads) as write:
                for _ in range(max(2, bench.scale.root // 4 // len(block))):
                    write(block)

        return lambda: timed(work)

    ours, peers = rounds([by(2), by(1)], bench.scale.pairs)
    return Figure("gz by two threads", "gz by one thread", ours, peers, TWO)


def _autoarchive(bench: Bench, place: Path, root: Path) -> Figure:
    peer = AutoArchive(install_autoarchive(), place / "autoarchive", root, place / "by-peer")
    command = [sys.executable, "-m", "statepool", "-q", "archive", "create", "one", str(root)]
    command += ["--to", str(place / "ours"), "--level", "0", f"--work-dir={place / 'work'}"]

    def ours() -> float:
        return timed(lambda: subprocess.run(command, env=bench.environment, check=True))

    def theirs() -> float:
        return timed(lambda: peer.create("--incremental", "--level=0"))

    mine, other = rounds([ours, theirs], bench.scale.pairs)
    return Figure("the command, tar.gz", f"AutoArchive {VERSION}", mine, other, EVEN)
