"""Import of a disk image; against its conversion by qemu-img, and against hashing it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from benchmarks.bench import IMAGE, MIB, Bench, run
from benchmarks.cold import hash_files, reflinks
from benchmarks.measure import Figure, Limit, Table, Unit, Work, rounds, timed

HOLES = 10
"""How many times as long as its data the raw image is."""

SURPLUS = 0.05
"""Seconds that an import of shared blocks may take besides hashing."""


def table(bench: Bench) -> Table:
    """:returns: the cost of making a state of a disk image"""
    figures, notes = _converted(bench), list[str]()
    for kind in ("btrfs", "xfs"):
        try:
            with reflinks(bench, kind) as place:
                figures.append(_shared(bench, kind, place))
        except (OSError, subprocess.CalledProcessError) as error:
            notes.append(
                f"Without {kind}: a file system in a file could not be made here ({error})."
            )
    notes.append("An import is durable when it ends, and has hashed every byte.")
    return Table("import: a disk image becomes a state", figures, notes=notes)


def _import(bench: Bench, image: Path, below: Path | None = None) -> Work:
    def work() -> float:
        with bench.directory(below) as place:
            disk = bench.open(place / "cache").image(IMAGE)
            return timed(lambda: disk.import_file("install", image, scope="own"))

    return work


def _converted(bench: Bench) -> list[Figure]:
    image = bench.place / "disk.raw"
    step = len(data := bench.pattern.read_bytes())
    with open(image, "wb") as file:
        file.truncate(HOLES * bench.scale.root)
        for offset in range(0, bench.scale.root, step):
            file.seek(HOLES * offset)
            file.write(data)
        file.seek(510)
        file.write(b"\x55\xaa")

    def convert(*afterwards: str) -> float:
        with bench.directory() as place:
            command = ("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(image))
            done = timed(lambda: run(*command, str(place / "disk.qcow2")))
            return done + timed(lambda: run(*afterwards, cwd=place)) if afterwards else done

    def flushed() -> float:
        return convert("sync", "-f", ".")

    ours, plain, synced = rounds([_import(bench, image), convert, flushed], bench.scale.pairs)
    size, length = bench.scale.root // MIB, os.path.getsize(image) // MIB
    what = f"import of a raw image of {length} MiB with {size} MiB of data"
    limit = Limit(Unit.RATIO, 1.1)
    return [
        Figure(what, "qemu-img convert, and sync -f", ours, synced, limit),
        Figure(what, "qemu-img convert", ours, plain),
    ]


def _shared(bench: Bench, kind: str, place: Path) -> Figure:
    image = place / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), str(bench.scale.virtual))
    bench.write(image, 0, bench.scale.root)
    ours, hashed = rounds(
        [_import(bench, image, place), lambda: hash_files([str(image)])], bench.scale.pairs
    )
    return Figure(
        f"import of a qcow2 image on {kind}",
        "hashing it in the page cache",
        ours,
        hashed,
        Limit(Unit.SURPLUS, SURPLUS),
    )
