"""
Setting a state from a working image: it is linked if possible, hashed, and never stored twice on
the disk.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from benchmarks.bench import IMAGE, Bench, room, run
from benchmarks.cold import SURPLUS, hash_files
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, rounds, timed

PERIOD = 0.002
"""Seconds between two measurements of the disk usage."""


def table(bench: Bench) -> Table:
    """:returns: the cost of a set"""
    master = bench.place / "master.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(master), str(bench.scale.virtual))
    bench.write(master, 0, bench.scale.root)

    def hashed() -> float:
        return hash_files([str(master)])

    def copied() -> float:
        with bench.directory() as place:
            return timed(lambda: run("cp", "--sparse=auto", str(master), str(place)))

    ours, hashes, copies = rounds([lambda: _set(bench, master), hashed, copied], bench.scale.pairs)
    what = "set of a flushed working image, one file system"
    return Table(
        "set: a working image of 1 GiB into the cache",
        [
            Figure(what, "hashing the same file", ours, hashes, Limit(Unit.SURPLUS, SURPLUS)),
            Figure(what, "cp --sparse=auto", ours, copies),
        ],
        [_growth(bench, master)],
    )


def _working(place: Path, master: Path) -> Path:
    """:returns: a flushed working image, as after a shutdown of the machine"""
    working = place / "working.qcow2"
    run("cp", "--sparse=auto", str(master), str(working))
    descriptor = os.open(working, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.sync()
    return working


def _set(bench: Bench, master: Path) -> float:
    with bench.directory() as place:
        working = _working(place, master)
        disk = bench.open(place / "cache", bench.pool).image(IMAGE)
        return timed(lambda: disk.set("new", source=working, scope="own"))


def _growth(bench: Bench, master: Path) -> Fact:
    """Return the peak increase of the disk usage."""
    with bench.directory() as place:
        working = _working(place, master)
        before, most, done = room(place), 0, threading.Event()

        def look() -> None:
            nonlocal most
            while not done.wait(PERIOD):
                most = max(most, room(place))

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            bench.open(place / "cache", bench.pool).image(IMAGE).set(
                "new", source=working, scope="own"
            )
        finally:
            done.set()
            watcher.join()
        grown = max(most, room(place)) - before
    return Fact(
        "bytes on disk during the set, beyond those before",
        str(grown),
        "no second copy",
        grown < max(MIB_OF_RECORDS, before // 10),
    )


MIB_OF_RECORDS = 1 << 20
"""The bytes allowed for records, markers and a fresh overlay, which take far less."""
