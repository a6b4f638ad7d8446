"""
Several sources of one state: the cost of a first source with a fault, and the cost of many sources.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import statepool
from benchmarks.bench import IMAGE, MIB, STATES, TIP, Bench
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, against, timed
from benchmarks.trusted import fill
from statepool.model.manifest import StateId
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.sources.pool_source import PoolSource
from statepool.testing.faults import Call, Fault, FaultyTransport, Slow, on
from statepool.transports.registry import open_transport

DEADLINE = statepool.Settings().probe_timeout
EXTRA = Limit(Unit.SURPLUS, DEADLINE)
CHOICE = Limit(Unit.TIME, 0.005)
SHOW = Limit(Unit.TIME, 1.0)

_SOURCES = 100
_SHOWN = 5
_STATES = 2_000


class Silent(Fault):
    """A fault: the call never returns."""

    def before(self, call: Call) -> None:
        """Wait for longer than any other process waits."""
        threading.Event().wait(600)


def table(bench: Bench) -> Table:
    """:returns: the cost of several sources"""
    with bench.directory() as place:
        overlay = min(64 * MIB, bench.scale.root)
        good = bench.make_pool(
            place / "good", root=overlay, virtual=16 * max(overlay, bench.scale.overlay)
        )
        figures, facts = _failing(bench, place, good)
    with bench.directory() as place:
        more, counted = _many(bench, place)
    return Table("mirrors: several sources", [*figures, *more], [*facts, *counted])


# -- the first one is not what it should be --------------------------------------------------------


def _failing(bench: Bench, place: Path, good: Path) -> tuple[list[Figure], list[Fact]]:
    figures, facts = [], []
    for what, make in _BAD.items():
        source = make(place / what.replace(" ", "-"), good)
        outcomes: list[statepool.GetResult] = []

        def cold(*sources: PoolSource, outcomes: list[statepool.GetResult] = outcomes) -> float:
            with bench.directory(place) as there:
                pool = statepool.StatePool(there / "cache", sources)
                return timed(lambda: outcomes.append(pool.image(IMAGE).get(TIP)))

        def ours(source: PoolSource = source) -> float:
            return cold(source, _source(good))

        def theirs() -> float:
            return cold(_source(good))

        figures.append(
            against(
                f"cold get, first source {what}",
                ours,
                "get from the good source alone",
                theirs,
                bench.scale.pairs,
                EXTRA,
            )
        )
        whole = sum(
            got.chain == tuple(reversed(STATES)) and got.source == f"file://{good}"
            for got in outcomes
        )
        facts.append(
            Fact(
                f"whole from the good source, first one {what}",
                str(whole),
                str(len(outcomes)),
                whole == len(outcomes),
            )
        )
        told = sum(any(str(source) in text for text in got.warnings) for got in outcomes)
        expected = len(outcomes) // 2 if what in _TOLD else 0
        facts.append(
            Fact(
                f"warnings that name the first one, {what}",
                str(told),
                str(expected),
                told == expected,
            )
        )
        if source.pool.transport.local_path("") is not None:
            shutil.rmtree(source.location.path)
    return figures, facts


def _source(path: Path, *faults: Fault, name: str | None = None) -> PoolSource:
    transport = open_transport(statepool.Location.parse(str(path)))
    return PoolSource(
        Pool(FaultyTransport(transport, *faults) if faults else transport), name or path.name
    )


def _copy(path: Path, good: Path) -> Path:
    return Path(shutil.copytree(good, path, symlinks=True))


def _empty(path: Path, _good: Path) -> PoolSource:
    statepool.init(path)
    return _source(path)


def _corrupt(path: Path, good: Path) -> PoolSource:
    data = _bytes(_copy(path, good), STATES[len(STATES) // 2])
    data.chmod(0o600)
    with data.open("r+b") as file:
        file.seek(data.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return _source(path)


def _rootless(path: Path, good: Path) -> PoolSource:
    _bytes(_copy(path, good), STATES[0]).unlink()
    return _source(path)


def _bytes(pool: Path, state: str) -> Path:
    """:returns: the path of the bytes of a state"""
    manifest = _source(pool).pool.chain(StateId(IMAGE, state))[0]
    assert manifest.digest is not None
    return pool / layout.data(manifest.digest)


_BAD: dict[str, Callable[[Path, Path], PoolSource]] = {
    "dead": lambda path, good: _source(_copy(path, good), Silent()),
    "slow": lambda path, good: _source(
        _copy(path, good), Slow(matches=on("read", "fetch", path="*/data/*"), rate=MIB)
    ),
    "empty": _empty,
    "corrupt": _corrupt,
    "without its root": _rootless,
}

_TOLD = {"dead", "corrupt", "without its root"}


# -- many of them ----------------------------------------------------------------------------------


def _many(bench: Bench, place: Path) -> tuple[list[Figure], list[Fact]]:
    asked: list[Call] = []

    def note(call: Call) -> bool:
        asked.append(call)
        return False

    sources = [
        _source(place / f"source-{number}", Fault(matches=note)) for number in range(_SOURCES)
    ]
    pool = statepool.StatePool(place / "cache", sources)
    pool._cache.prepare()
    for number, source in enumerate(sources):
        pool._context.stats.answered(source, 0.001 * (number % 7 + 1))
        pool._context.stats.delivered(source, 64 * MIB, 0.1 * (number % 5 + 1))
    pool._context.stats.save()
    known = place / "cache/.statepool/known"

    def choice() -> float:
        # as in another process: nothing of it is cached in memory
        new = statepool.StatePool(place / "cache", sources)
        return timed(new.sources_status)

    def reading() -> float:
        return timed(lambda: [json.loads(path.read_bytes()) for path in known.glob("*.json")])

    figures = [
        against(
            f"choice among {_SOURCES} sources",
            choice,
            "reading the same notes by pathlib and json",
            reading,
            bench.scale.quick_pairs,
            CHOICE,
        ),
        _show(bench, place),
    ]
    return figures, [
        Fact(f"calls to {_SOURCES} sources while one is chosen", str(len(asked)), "0", not asked)
    ]


def _show(bench: Bench, place: Path) -> Figure:
    states = min(_STATES, bench.scale.states)
    paths = [place / f"pool-{number}" for number in range(_SHOWN)]
    fill(paths[0], states // 10, 10, each=False)
    for path in paths[1:]:
        shutil.copytree(paths[0], path, symlinks=True)

    def ours() -> float:
        found: list[statepool.Listed] = []
        seconds = timed(lambda: found.extend(statepool.StatePool(place / "none", paths).show()))
        if len(found) != states or any(len(one.pools) != _SHOWN for one in found):
            raise RuntimeError(
                f"{len(found)} states are listed, not {states} in {_SHOWN} pools each"
            )
        return seconds

    def theirs() -> float:
        return timed(
            lambda: [
                json.loads(file.read_bytes())
                for path in paths
                for file in (path / ".statepool/log").glob("*/*.json")
            ]
        )

    return against(
        f"show over {_SHOWN} sources of {states:,} states",
        ours,
        "reading the same logs by pathlib and json",
        theirs,
        bench.scale.pairs,
        SHOW,
    )
