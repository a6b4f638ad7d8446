"""Tests that start from a state, beside the same tests without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import statepool
from benchmarks.bench import IMAGE, ROOT, STATES, Bench
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, rounds, timed
from statepool.testing.sshd import run_sshd, sshd_program

TESTS = 40
MANY = 4 * TESTS
CHAIN = STATES[:3]
OVERHEAD = Limit(Unit.SURPLUS, 0.010)
"""What a state may cost a test whose state is in the cache, in seconds."""

COUNTED = """
import json
from pytest_statepool.tally import TALLY

def pytest_terminal_summary(config):
    with open("tally.json", "w") as file:
        json.dump(config.stash[TALLY].to_worker_output()["rows"], file)
"""


def table(bench: Bench) -> Table:
    """:returns: what the plugin for pytest costs"""
    pool = bench.make_pool(bench.place / "pytest-pool", root=bench.scale.overlay, depth=len(CHAIN))
    figures = _overhead(bench, pool)
    facts = _cold(bench, pool) if sshd_program() is not None else []
    notes = ["Tests that do nothing, in whole processes: what is imported, found and cleared once in a run is part of the first figure."]
    if not facts:
        notes.append("Nothing was counted: sshd is not installed.")
    return Table("pytest: tests that start from a state", figures, facts, notes=notes)


def _overhead(bench: Bench, pool: Path) -> list[Figure]:
    with bench.directory() as place:
        few, many = [
            (_suite(place / f"with-{count}", [str(pool)], count=count), _plain(place / f"without-{count}", count)) for count in (TESTS, MANY)
        ]
        for suite in (*few, *many):
            _run(bench, suite)  # caches are filled, and all modules are compiled
        ours, theirs, ours_many, theirs_many = rounds([partial(_timed, bench, suite) for suite in (*few, *many)], bench.scale.pairs)
    peer = "the same without states"
    more = [[(long - short) / (MANY - TESTS) for short, long in zip(*pair, strict=True)] for pair in ((ours, ours_many), (theirs, theirs_many))]
    return [
        Figure(f"a run of {TESTS} tests on three states in the cache, for each test", peer, *_each(ours, theirs), OVERHEAD),
        Figure(f"one test more, as a run of {MANY} shows it", peer, *more, OVERHEAD),
    ]


def _each(*times: Sequence[float]) -> list[list[float]]:
    return [[time / TESTS for time in some] for some in times]


def _timed(bench: Bench, suite: Path) -> float:
    return timed(lambda: _run(bench, suite))


def _cold(bench: Bench, pool: Path) -> list[Fact]:
    """What four workers fetch from a pool on another host into an empty cache."""
    sizes = {one.manifest.state: one.manifest.size for one in statepool.StatePool(pool).image(IMAGE).show(scope="own")}
    with bench.directory() as place, run_sshd() as server:
        lines = [f'ssh-config = "{server.ssh_config}"', f'known-hosts = "{server.known_hosts}"', 'compress = "off"']
        suite = _suite(place / "cold", [str(server.location(pool))], lines)
        _run(bench, suite, "-n", "4")
        rows = json.loads((suite / "tally.json").read_text()).values()
        log = statepool.StatePool(suite / "cache").log(IMAGE)
    moved, there = sum(row["bytes"] for row in rows), sum(sizes.values())
    stored = sum(len(one.changes) for one in log)
    what = f"pytest -n 4, {TESTS} tests on three states, empty cache, pool on another host: "
    return [
        Fact(what + "bytes fetched, to those in the pool", f"{moved / there:.2f}", "at most 1", moved <= there),
        Fact(what + "states stored in the cache", str(stored), str(len(CHAIN)), stored == len(CHAIN)),
    ]


def _plain(place: Path, count: int) -> Path:
    place.mkdir()
    (place / "test_all.py").write_text("".join(f"def test_{number}(): pass\n" for number in range(count)))
    return place


def _suite(place: Path, sources: Sequence[str], lines: Sequence[str] = (), *, count: int = TESTS) -> Path:
    place.mkdir()
    told = ", ".join(json.dumps(source) for source in sources)
    (place / "statepool.toml").write_text("\n".join(['cache = "cache"', f"sources = [{told}]", *lines, ""]))
    (place / "conftest.py").write_text(COUNTED)
    tests = [f'@pytest.mark.vm_state("{IMAGE}", "{CHAIN[number % len(CHAIN)]}")\ndef test_{number}(vm_state): pass\n' for number in range(count)]
    (place / "test_all.py").write_text("import pytest\n" + "".join(tests))
    return place


def _run(bench: Bench, suite: Path, *arguments: str) -> None:
    environment = {**bench.environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-p", "pytest_statepool", "-p", "no:cacheprovider", "--rootdir=.", *arguments]
    subprocess.run([*command, "."], cwd=suite, env=environment, stdout=subprocess.DEVNULL, check=True)
