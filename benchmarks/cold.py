"""Fetching a chain into an empty cache, with every byte checked."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.bench import IMAGE, STATES, TIP, Bench, chain_files, room, run
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, Work, against, timed
from statepool.model.digest import Digest
from statepool.transports.copying import hash_file

SURPLUS = 0.05
"""Seconds that a get may take in addition to hashing, if no bytes have to be copied."""


def table(bench: Bench) -> Table:
    """:returns: the cost of a first get"""
    figures, facts, notes = (
        [_plain(bench)],
        [_same_room(bench, "the chain", bench.pool, len(STATES))],
        [],
    )
    sparse_figure, sparse_fact = _sparse(bench)
    figures.append(sparse_figure)
    facts.append(sparse_fact)
    for kind in ("btrfs", "xfs"):
        try:
            with reflinks(bench, kind) as place:
                figures += _reflink(bench, kind, place)
        except (OSError, subprocess.CalledProcessError) as error:
            notes.append(
                f"Without {kind}: a file system in a file could not be made here ({error})."
            )
    return Table("get: a chain of five into an empty cache", figures, facts, notes=notes)


def cold_get(bench: Bench, pool: Path, below: Path | None = None, tip: str = TIP) -> Work:
    """:returns: a get into an empty cache"""

    def work() -> float:
        with bench.directory(below) as place:
            return timed(lambda: bench.open(place / "cache", pool).image(IMAGE).get(tip))

    return work


def copy_of(bench: Bench, files: list[str], below: Path | None = None, *how: str) -> Work:
    """:returns: a copy of these files by ``cp``"""

    def work() -> float:
        with bench.directory(below) as place:
            return timed(lambda: run("cp", *(how or ("--sparse=auto",)), *files, str(place)))

    return work


def _plain(bench: Bench) -> Figure:
    files = chain_files(bench.pool)
    return against(
        "cold get",
        cold_get(bench, bench.pool),
        "cp --sparse=auto",
        copy_of(bench, files),
        bench.scale.pairs,
        Limit(Unit.RATIO, 1.1),
    )


def _same_room(bench: Bench, what: str, pool: Path, depth: int) -> Fact:
    source = sum(os.stat(path).st_blocks * 512 for path in chain_files(pool, depth))
    with bench.directory() as place:
        bench.open(place / "cache", pool).image(IMAGE).get(STATES[depth - 1])
        copy = room(place / "cache/.statepool/data")
    return Fact(
        f"room of the copy of {what}, to that of the source",
        f"{copy / source:.4f}",
        "0.99 to 1.01",
        abs(copy / source - 1) <= 0.01,
    )


# -- holes -----------------------------------------------------------------------------------------


def _sparse(bench: Bench) -> tuple[Figure, Fact]:
    pool = _sparse_pool(bench)
    (path,) = chain_files(pool, 1)
    copy = copy_of(bench, [path])
    figure = against(
        "cold get of a root that is nine tenths holes",
        cold_get(bench, pool, tip=STATES[0]),
        "cp --sparse=auto, and hashing its length",
        lambda: copy() + hash_files([path]),
        bench.scale.pairs,
        Limit(Unit.RATIO, 1.0),
    )
    return figure, _same_room(bench, "the root with holes", pool, 1)


def _sparse_pool(bench: Bench) -> Path:
    pool = bench.place / "sparse"
    path = pool / IMAGE / f"{STATES[0]}.qcow2"
    path.parent.mkdir(parents=True)
    # The file gets its full length at once, and has data only where it is written to.
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
        str(path),
        str(bench.scale.root),
    )
    piece = bench.scale.root // 100
    for number in range(10):
        bench.write(path, number * (bench.scale.root // 10), piece)
    return bench.adopt(pool, 1)


def hash_files(paths: list[str]) -> float:
    """:returns: the time to hash the files, in seconds"""
    return timed(lambda: [_hash(path) for path in paths])


def _hash(path: str) -> Digest:
    with open(path, "rb") as file:
        # as other tools do, b3sum for example: every byte, those of holes too
        return hash_file(file.fileno(), os.fstat(file.fileno()).st_size, algorithm="blake3")


# -- file systems that share blocks ----------------------------------------------------------------


@contextlib.contextmanager
def reflinks(bench: Bench, kind: str) -> Iterator[Path]:
    """
    :param kind: ``btrfs`` or ``xfs``
    :returns: the mount point of a file system that shares blocks, whose image is a file
    """
    program = shutil.which(
        f"mkfs.{kind}", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    )
    if program is None:
        raise FileNotFoundError(f"there is no mkfs.{kind}")
    with bench.directory() as place:
        image, mounted = place / "image", place / "mounted"
        mounted.mkdir()
        with open(image, "wb") as file:
            file.truncate(max(512 << 20, 2 * bench.scale.virtual))
        subprocess.run(
            [program, "-q", str(image)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        subprocess.run(
            ["mount", "-o", "loop", str(image), str(mounted)], check=True, stderr=subprocess.PIPE
        )
        try:
            yield mounted
        finally:
            subprocess.run(["umount", str(mounted)], check=True)


def _reflink(bench: Bench, kind: str, place: Path) -> list[Figure]:
    pool = bench.make_pool(place / "pool")
    files = chain_files(pool)
    limit = Limit(Unit.SURPLUS, SURPLUS)
    clones = copy_of(bench, files, place, "--reflink=always")

    def clone_and_hash() -> float:
        with bench.directory(place) as target:
            copied = timed(lambda: run("cp", "--reflink=always", *files, str(target)))
            return copied + hash_files([str(path) for path in target.iterdir()])

    ours = cold_get(bench, pool, place)
    return [
        against(
            f"cold get on {kind}",
            ours,
            "hashing the same files in the page cache",
            lambda: hash_files(files),
            bench.scale.pairs,
            limit,
        ),
        against(
            f"cold get on {kind}",
            ours,
            "cp --reflink=always, and hashing the copies",
            clone_and_hash,
            bench.scale.pairs,
        ),
        against(
            f"cold get on {kind}",
            ours,
            "cp --reflink=always, nothing hashed",
            clones,
            bench.scale.pairs,
        ),
    ]
