"""
Frequent operations: getting a trusted state from the cache, making a working image of it, and
listing states.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import statepool
from benchmarks.bench import IMAGE, STATES, TIP, Bench, run
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, against, timed
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, Parent
from statepool.pools.fold import Publish
from statepool.pools.pool import Pool
from statepool.transports.registry import open_transport

GET = Limit(Unit.TIME, 0.005)
WORKING = Limit(Unit.TIME, 0.002)
SHOW = Limit(Unit.TIME, 0.15)

_SINGLE_RECORDS = 300
"""
The number of records of one state each at the end of a long log: enough for a checkpoint to be due.
"""


def table(bench: Bench) -> Table:
    """:returns: the costs of operations that take milliseconds"""
    figures, facts = _gets(bench)
    figures += [
        _show(bench, "one machine with a checkpoint", machines=1, each=False),
        _show(
            bench,
            "ten for each machine, a record for each chain",
            machines=bench.scale.states // 10,
            each=False,
        ),
        _show(
            bench,
            "ten for each machine, a record for each state",
            machines=bench.scale.states // 10,
            each=True,
        ),
    ]
    return Table("small: what is here already", figures, facts)


def _gets(bench: Bench) -> tuple[list[Figure], list[Fact]]:
    with bench.directory() as place:
        disk = bench.open(place / "cache").image(IMAGE)
        disk.get(TIP)
        tip = str(bench.pool / IMAGE / f"{TIP}.qcow2")
        numbers = itertools.count()

        def info() -> float:
            return timed(lambda: run("qemu-img", "info", "-f", "qcow2", "--backing-chain", tip))

        def opened_get() -> object:
            return bench.open(place / "cache").image(IMAGE).get(TIP)

        def working() -> float:
            path = place / f"ours-{next(numbers)}.qcow2"
            without = timed(lambda: disk.get(TIP))
            return max(0.0, timed(lambda: disk.get(TIP, to=path)) - without)

        def created() -> float:
            path = str(place / f"theirs-{next(numbers)}.qcow2")
            return timed(
                lambda: run(
                    "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", tip, path
                )
            )

        count = bench.scale.quick_pairs
        peer = "qemu-img info --backing-chain"
        figures = [
            against("trusted get", lambda: timed(lambda: disk.get(TIP)), peer, info, count, GET),
            against(
                "trusted get, StatePool made anew",
                lambda: timed(opened_get),
                peer,
                info,
                count,
                GET,
            ),
            against(
                "working image, beyond the get", working, "qemu-img create", created, count, WORKING
            ),
        ]
        before = bytes_read()
        got = disk.get(TIP)
        read = bytes_read() - before - bytes_of_looking()
        smallest = bench.scale.overlay
        facts = [
            Fact(
                "bytes read by a trusted get of the chain",
                str(read),
                "no image data",
                read < min(64 << 10, smallest),
            ),
            Fact(
                "states of the chain that are trusted",
                f"{len(got.chain)}, {got.verified}",
                f"{len(STATES)}, trusted",
                got.verified == "trusted",
            ),
        ]
    return figures, facts


def bytes_read() -> int:
    """
    :returns: how many bytes this process has read so far by system calls (``rchar`` of proc(5))
    """
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])


def bytes_of_looking() -> int:
    """:returns: how many bytes :func:`bytes_read` itself adds"""
    return -bytes_read() + bytes_read()


# -- listings --------------------------------------------------------------------------------------


def _show(bench: Bench, what: str, *, machines: int, each: bool) -> Figure:
    states = bench.scale.states
    with bench.directory() as place:
        pool = place / "pool"
        fill(pool, machines, states // machines, each=each)

        def ours() -> float:
            begun = timed(
                lambda: listed.extend(
                    statepool.StatePool(cache=place / "cache", sources=[pool]).show()
                )
            )
            if len(listed) != states:
                raise RuntimeError(f"{len(listed)} states are listed, not {states}")
            listed.clear()
            return begun

        def theirs() -> float:
            return timed(
                lambda: [
                    json.loads(path.read_bytes())
                    for path in (pool / ".statepool/log").glob("*/*.json")
                ]
            )

        listed: list[statepool.Listed] = []
        return against(
            f"show of {states:,} states: {what}",
            ours,
            "reading the same log by pathlib and json",
            theirs,
            bench.scale.pairs,
            SHOW,
        )


def fill(path: Path, machines: int, states: int, *, each: bool) -> None:
    """
    Make a pool with realistic logs and a view, but without the bytes of states: for measurements
    that only list.

    :param states: of each machine, in chains of ten
    :param each: whether to write one record for each state, as if they had been set one after the
        other; otherwise one record for all
    """
    statepool.init(path)
    pool = Pool(open_transport(statepool.Location.parse(str(path))))
    for number in range(machines):
        machine = f"vm{number}"
        publishes = [Publish(_manifest(f"{machine}/disk", index)) for index in range(states)]
        log = pool.log(machine)
        single = (
            len(publishes) if each else min(_SINGLE_RECORDS, states // 2) if states > 100 else 0
        )
        parts = [publishes[: states - single], *([one] for one in publishes[states - single :])]
        for part in parts:
            if part:
                log.append(lambda _, part=part: part)  # type: ignore[misc]
        log.compact()
        pool.view.update([publish.id for publish in publishes], log.fold)


def _manifest(object: str, index: int) -> Manifest:
    return Manifest(
        object=object,
        state=f"state-{index:05}",
        size=5 << 30,
        digest=_digest(object, index),
        parent=Parent(f"state-{index - 1:05}", _digest(object, index - 1)) if index % 10 else None,
        virtual_size=20 << 30,
        cluster_size=1 << 16,
        extents=((0, 1 << 30), (2 << 30, 1 << 30)),
        created=1.7e9,
        creator={"host": "worker", "statepool": statepool.__version__},
    )


def _digest(object: str, index: int) -> Digest:
    return Digest.of(f"{object} {index}".encode())
