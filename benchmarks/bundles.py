"""Moving a chain through a pipe from one cache to another, as a bundle; and by tar, as files."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.bench import IMAGE, MIB, TIP, Bench
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, rounds, timed

MEMORY = 64 * MIB
"""The most bytes of resident memory of either command."""


def table(bench: Bench) -> Table:
    """:returns: the cost of moving a chain over a pipe"""
    home = bench.place / "home"
    bench.open(home).image(IMAGE).get(TIP)
    with bench.directory() as place:  # an unmeasured first run: it compiles the imported modules
        _piped(bench, _export(home), _import(place / "cache"))
    pack = ("tar", "-C", str(bench.pool), "-cf", "-", ".statepool", "vm1")

    def ours() -> float:
        with bench.directory() as place:
            return timed(lambda: _piped(bench, _export(home), _import(place / "cache")))

    def tar(*afterwards: str) -> float:
        with bench.directory() as place:
            done = timed(lambda: _piped(bench, pack, ("tar", "-C", str(place), "-xf", "-")))
            if afterwards:
                done += timed(lambda: subprocess.run(afterwards, cwd=place, check=True))
            return done

    def flushed() -> float:
        return tar("sync", "-f", ".")

    carried, packed, synced = rounds([ours, tar, flushed], bench.scale.pairs)
    what = "export | import of a chain of five, not compressed"
    return Table(
        "bundles: a chain over a pipe into an empty cache",
        [
            Figure(
                what,
                "tar | tar of the same files, and sync -f",
                carried,
                synced,
                Limit(Unit.RATIO, 1.15),
            ),
            Figure(what, "tar | tar of the same files", carried, packed),
        ],
        _memory(bench, home),
        notes=[
            "An import is durable when it ends, and has hashed every byte; so has the export.",
        ],
    )


def _export(cache: Path, *how: str) -> tuple[str, ...]:
    return (*_statepool(cache), "export", IMAGE, TIP, "--compress", "none", *how)


def _import(cache: Path, file: str = "-") -> tuple[str, ...]:
    return (*_statepool(cache), "import", "-q", file)


def _statepool(cache: Path) -> tuple[str, ...]:
    return sys.executable, "-m", "statepool", "--cache", str(cache)


def _piped(bench: Bench, *commands: tuple[str, ...]) -> None:
    line = " | ".join(map(shlex.join, commands))
    subprocess.run(["bash", "-o", "pipefail", "-c", line], env=bench.environment, check=True)


def _memory(bench: Bench, home: Path) -> list[Fact]:
    """Return the peak memory of each command."""
    with bench.directory() as place:
        bundle = str(place / "bundle")
        commands = {
            "export": _export(home, "-q", "-o", bundle),
            "import": _import(place / "cache", bundle),
        }
        peaks = {name: _peak(bench, command) for name, command in commands.items()}
    return [
        Fact(
            f"memory of {name} at most, in MiB",
            f"{peak / MIB:.0f}",
            f"at most {MEMORY // MIB}",
            peak <= MEMORY,
        )
        for name, peak in peaks.items()
    ]


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""
Run by a small process, since the peak memory of a program starts with that of its parent process.
"""


def _peak(bench: Bench, command: tuple[str, ...]) -> int:
    return int(bench.python("-c", PEAK, *command)) << 10
