"""
Contention: many processes want the same state. One works, the others wait, and continue as soon as
it is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import subprocess
import time
from typing import Any

from benchmarks.bench import IMAGE, TIP, Bench, chain_files, room, run
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, rounds, timed
from statepool.beneath import Tree
from statepool.pools.locks import FileLocks

HANDOVER = Limit(Unit.TIME, 0.05)
HELD = 0.02
"""Seconds for which a lock is held, so that the other processes really wait."""

_GET = """
import json, sys, statepool
cache, pool, image, state = sys.argv[1:]
disk = statepool.StatePool(cache=cache, sources=[pool]).image(image)
print("ready", flush=True)
sys.stdin.readline()
got = disk.get(state)
print(json.dumps([got.bytes, got.how]), flush=True)
"""

_TAKE = """
import fcntl, sys, time
from pathlib import Path
from statepool.beneath import Tree
from statepool.pools.locks import FileLocks
how, directory = sys.argv[1:]
locks = FileLocks(Tree(directory), "")
file = open(Path(directory) / "flock", "w")
with locks.hold(how, 60):
    print("ready", flush=True)
for line in sys.stdin:
    if how == "ours":
        with locks.hold("handover", 60):
            taken = time.monotonic()
    else:
        fcntl.flock(file, fcntl.LOCK_EX)
        taken = time.monotonic()
        fcntl.flock(file, fcntl.LOCK_UN)
    print(taken, flush=True)
"""


def table(bench: Bench) -> Table:
    """:returns: the cost of waiting"""
    together, facts = _together(bench)
    return Table("locks: processes that want the same", [together, _handover(bench)], facts)


def _together(bench: Bench) -> tuple[Figure, list[Fact]]:
    copies: list[int] = []
    files = chain_files(bench.pool)
    size = sum(os.stat(path).st_blocks * 512 for path in files)

    def ours() -> float:
        with bench.directory() as place:
            workers = [
                bench.start_python("-c", _GET, str(place / "cache"), str(bench.pool), IMAGE, TIP)
                for _ in range(bench.scale.processes)
            ]
            took, answers = all_at_once(workers)
            copies.append(sum(moved for moved, _ in answers))
            if abs(room(place / "cache/.statepool/data") / size - 1) > 0.01:
                raise RuntimeError("more than one copy is in the cache")
        return took

    def theirs() -> float:
        with bench.directory() as place:
            return timed(lambda: run("cp", "--sparse=auto", *files, str(place)))

    mine, other = rounds([ours, theirs], min(3, bench.scale.pairs))
    what = f"{bench.scale.processes} processes get the same chain into one cache"
    moved = statistics.median(copies) / size
    note = Fact(
        f"copies of the chain that these {bench.scale.processes} made",
        f"{moved:.2f}",
        "1",
        0.99 <= moved <= 1.01,
    )
    return Figure(what, "one cp --sparse=auto", mine, other), [note]


def all_at_once(workers: list[subprocess.Popen[str]]) -> tuple[float, list[Any]]:
    """
    :param workers: programs that print that they are ready, wait for a line, and end with one line
        of JSON
    :returns: seconds from the start of all until the last one is done, and their output
    """
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.readline()
    begin = time.perf_counter()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    answers = []
    for worker in workers:
        assert worker.stdout is not None
        answers.append(json.loads(worker.stdout.readline()))
    took = time.perf_counter() - begin
    for worker in workers:
        worker.communicate()
        if worker.returncode:
            raise subprocess.CalledProcessError(worker.returncode, worker.args)
    return took, answers


def _handover(bench: Bench) -> Figure:
    with bench.directory() as place:
        locks = FileLocks(Tree(place), "")
        waiting = {
            how: bench.start_python("-c", _TAKE, how, str(place)) for how in ("ours", "flock")
        }
        for worker in waiting.values():
            assert worker.stdout is not None
            worker.stdout.readline()
        with open(place / "flock", "w") as file:

            def ours() -> float:
                with locks.hold("handover", 60):
                    ask(waiting["ours"])
                    freed = time.monotonic()
                return _taken(waiting["ours"]) - freed

            def theirs() -> float:
                fcntl.flock(file, fcntl.LOCK_EX)
                ask(waiting["flock"])
                freed = time.monotonic()
                fcntl.flock(file, fcntl.LOCK_UN)
                return _taken(waiting["flock"]) - freed

            mine, other = rounds([ours, theirs], bench.scale.quick_pairs)
        for worker in waiting.values():
            worker.communicate()
    worst = max(mine)
    return Figure(
        f"a lock freed is taken (at worst after {worst * 1e3:.3g} ms)",
        "flock(2), blocking",
        mine,
        other,
        HANDOVER,
    )


def ask(worker: subprocess.Popen[str]) -> None:
    """Let a program wait for the lock for a moment."""
    assert worker.stdin is not None
    worker.stdin.write("take\n")
    worker.stdin.flush()
    time.sleep(HELD)


def _taken(worker: subprocess.Popen[str]) -> float:
    assert worker.stdout is not None
    return float(worker.stdout.readline())
