"""The throughput of many processes that write to one machine's log."""

from __future__ import annotations

import os
from pathlib import Path

import statepool
from benchmarks.bench import Bench
from benchmarks.locks import all_at_once
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, rounds, timed
from statepool.pools.pool import Pool
from statepool.transports.registry import open_transport

LIMIT = Limit(Unit.RATIO, 3.0)
"""The limit: at least a third of the peer's rate."""

_APPEND = """
import json, sys, statepool
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.pools.fold import Publish
from statepool.pools.pool import Pool
from statepool.transports.registry import open_transport
path, name, count = sys.argv[1:]
pool = Pool(open_transport(statepool.Location.parse(path)))
def manifest(number):
    digest = Digest.of(f"{name}{number}".encode())
    creator = {"host": "worker"}
    return Manifest("vm1/disk", f"{name}-{number}", size=1 << 30, digest=digest, creator=creator)
publishes = [Publish(manifest(number)) for number in range(int(count))]
pool.fold("vm1")
print("ready", flush=True)
sys.stdin.readline()
for publish in publishes:
    pool.append("vm1", lambda _: [publish])
print(json.dumps(len(publishes)), flush=True)
"""


def table(bench: Bench) -> Table:
    """:returns: the cost of a change while many processes make changes"""
    counts: list[int] = []
    total = bench.scale.processes * bench.scale.appends
    size = _record_size(bench)

    def ours() -> float:
        with bench.directory() as place:
            path = place / "pool"
            statepool.init(path)
            workers = [
                bench.start_python("-c", _APPEND, str(path), f"w{one}", str(bench.scale.appends))
                for one in range(bench.scale.processes)
            ]
            took, _ = all_at_once(workers)
            fold = Pool(open_transport(statepool.Location.parse(str(path)))).fold("vm1")
            counts.append(len(fold.states) if fold.number == total else -1)
        return took / total

    def theirs() -> float:
        with bench.directory() as place:
            return timed(lambda: create_files(place, total, size)) / total

    mine, other = rounds([ours, theirs], bench.scale.pairs)
    what = f"a change, {bench.scale.processes} processes, {bench.scale.appends} each"
    figure = Figure(
        what, f"one process: create, write {size} bytes, fsync, link, unlink", mine, other, LIMIT
    )
    found = Fact(
        "changes in the log, in one order",
        ", ".join(map(str, sorted(set(counts)))),
        str(total),
        set(counts) == {total},
    )
    return Table("log: changes of one machine", [figure], [found])


def _record_size(bench: Bench) -> int:
    """:returns: the length of a record, in bytes"""
    with bench.directory() as place:
        statepool.init(place / "pool")
        all_at_once([bench.start_python("-c", _APPEND, str(place / "pool"), "w0", "1")])
        (record,) = (place / "pool/.statepool/log/vm1").iterdir()
        return record.stat().st_size


def create_files(place: Path, count: int, size: int) -> None:
    """
    Do the minimum for each change: create a file that appears whole and flushed, under a new name.
    """
    content = bytes(size)
    for number in range(count):
        temporary = f"{place}/temporary"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, content)
        os.fsync(descriptor)
        os.close(descriptor)
        os.link(temporary, f"{place}/{number:020}.json")
        os.unlink(temporary)
