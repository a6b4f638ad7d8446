"""Tests that start from a state, compared with the same tests without a state."""

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
from tests.support.sshd import run_sshd, sshd_program

MANY = 4
"""The factor between the numbers of tests of the longer and the shorter run."""

CHAIN = STATES[:3]
OVERHEAD = Limit(Unit.SURPLUS, 0.010)
"""The most seconds that a cached state may add to a test."""

COUNTED = """
import json
from pytest_statepool.tally import TALLY

def pytest_terminal_summary(config):
    with open("tally.json", "w") as file:
        json.dump(config.stash[TALLY].to_worker_output()["rows"], file)
"""


def table(bench: Bench) -> Table:
    """:returns: the cost of the plugin for pytest"""
    pool = bench.make_pool(bench.place / "pytest-pool", root=bench.scale.overlay, depth=len(CHAIN))
    figures = _overhead(bench, pool)
    facts = _cold(bench, pool) if sshd_program() is not None else []
    notes = [
        (
            "Tests that do nothing, in whole processes: what is imported, found and cleared once"
            " in a run is part of the first figure."
        )
    ]
    if not facts:
        notes.append("Nothing was counted: sshd is not installed.")
    return Table("pytest: tests that start from a state", figures, facts, notes=notes)


def _overhead(bench: Bench, pool: Path) -> list[Figure]:
    count, more = bench.scale.tests, (MANY - 1) * bench.scale.tests
    with bench.directory() as place:
        few, many = [
            (
                _suite(place / f"with-{number}", [str(pool)], count=number),
                _plain(place / f"without-{number}", number),
            )
            for number in (count, count + more)
        ]
        for suite in (*few, *many):
            _run(bench, suite)  # fills caches, and compiles all modules
        ours, theirs, ours_many, theirs_many = rounds(
            [partial(_timed, bench, suite) for suite in (*few, *many)], bench.scale.pairs
        )
    peer = "the same without states"
    each = [[time / count for time in some] for some in (ours, theirs)]
    one_more = [
        [(long - short) / more for short, long in zip(*pair, strict=True)]
        for pair in ((ours, ours_many), (theirs, theirs_many))
    ]
    return [
        Figure(
            f"a run of {count} tests on three states in the cache, for each test",
            peer,
            *each,
            OVERHEAD,
        ),
        Figure(f"one test more, as a run of {count + more} shows it", peer, *one_more, OVERHEAD),
    ]


def _timed(bench: Bench, suite: Path) -> float:
    return timed(lambda: _run(bench, suite))


def _cold(bench: Bench, pool: Path) -> list[Fact]:
    """Count what four workers fetch from a pool on another host into an empty cache."""
    sizes = {
        one.manifest.state: one.manifest.size
        for one in statepool.StatePool(pool).image(IMAGE).show(scope="own")
    }
    with bench.directory() as place, run_sshd() as server:
        lines = [
            f'ssh-config = "{server.ssh_config}"',
            f'known-hosts = "{server.known_hosts}"',
            'compress = "off"',
        ]
        suite = _suite(place / "cold", [str(server.location(pool))], lines, count=bench.scale.tests)
        _run(bench, suite, "-n", "4")
        rows = json.loads((suite / "tally.json").read_text()).values()
        log = statepool.StatePool(suite / "cache").log(IMAGE)
    moved, there = sum(row["bytes"] for row in rows), sum(sizes.values())
    stored = sum(len(one.changes) for one in log)
    what = (
        f"pytest -n 4, {bench.scale.tests} tests on three states, empty cache, pool on another"
        " host: "
    )
    return [
        Fact(
            what + "bytes fetched, to those in the pool",
            f"{moved / there:.2f}",
            "at most 1",
            moved <= there,
        ),
        Fact(
            what + "states stored in the cache", str(stored), str(len(CHAIN)), stored == len(CHAIN)
        ),
    ]


def _plain(place: Path, count: int) -> Path:
    return _written(place, "".join(f"def test_{number}(): pass\n" for number in range(count)))


def _suite(place: Path, sources: Sequence[str], lines: Sequence[str] = (), *, count: int) -> Path:
    tests = [
        f'@pytest.mark.vm_state("{IMAGE}", "{CHAIN[number % len(CHAIN)]}")\ndef'
        f" test_{number}(vm_state): pass\n"
        for number in range(count)
    ]
    told = ", ".join(json.dumps(source) for source in sources)
    _written(place, "import pytest\n" + "".join(tests))
    (place / "statepool.toml").write_text(
        "\n".join(['cache = "cache"', f"sources = [{told}]", *lines, ""])
    )
    (place / "conftest.py").write_text(COUNTED)
    return place


def _written(place: Path, tests: str) -> Path:
    """
    :returns: a directory with a suite of tests and its own configuration: otherwise pytest would
        find the configuration of this project above it
    """
    place.mkdir()
    (place / "pytest.ini").write_text("[pytest]\n")
    (place / "test_all.py").write_text(tests)
    return place


def _run(bench: Bench, suite: Path, *arguments: str) -> None:
    environment = {**bench.environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins")])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "xdist",
        "-p",
        "pytest_statepool",
        "-p",
        "no:cacheprovider",
        "--rootdir=.",
        *arguments,
    ]
    subprocess.run(
        [*command, "."], cwd=suite, env=environment, stdout=subprocess.DEVNULL, check=True
    )
