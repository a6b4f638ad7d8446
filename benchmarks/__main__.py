"""``python -m benchmarks``: prints tables; see the package."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import statepool
from benchmarks import (
    appends,
    archive,
    archived_pools,
    bundles,
    carts,
    cold,
    imports,
    locks,
    machines,
    mirrors,
    peers,
    pytest_runs,
    sets,
    shaped,
    ssh,
    staging,
    start,
    trusted,
)
from benchmarks.bench import FULL, TINY, Bench
from benchmarks.measure import Table

TABLES: dict[str, Callable[[Bench], Table]] = {
    "get": cold.table,
    "small": trusted.table,
    "set": sets.table,
    "bundles": bundles.table,
    "import": imports.table,
    "archive": archive.table,
    "archived-pools": archived_pools.table,
    "carts": carts.table,
    "start": start.table,
    "locks": locks.table,
    "log": appends.table,
    "machines": machines.table,
    "mirrors": mirrors.table,
    "peers": peers.table,
    "pytest": pytest_runs.table,
    "ssh": ssh.table,
    "staging": staging.table,
    "shaped": shaped.table,
}

ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""The signals by which a user, or the end of a job, ends a run."""

RESULTS = Path(__file__).with_name("RESULTS.md")


def main(arguments: list[str] | None = None) -> int:
    """:returns: 0; figures that miss their limits are reported, and are no failure"""
    options = _parse(arguments)
    if options.list:
        print("\n".join(TABLES))
        return 0
    missing = [
        program
        for program in ("qemu-img", "qemu-io", "rsync", "cp")
        if shutil.which(program) is None
    ]
    if missing:
        print(f"benchmarks: install {', '.join(missing)}", file=sys.stderr)
        return 2
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as with nohup(1)
            signal.signal(number, _stop)
    print(heading(), flush=True)
    tables = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-", dir=options.place) as place:
        bench = Bench(Path(place).resolve(), TINY if options.tiny else FULL)
        for name in options.tables or TABLES:
            tables.append(TABLES[name](bench))
            print(f"\n{tables[-1]}", flush=True)
    if options.write:
        RESULTS.write_text("\n\n".join([heading(), *map(str, tables)]) + "\n")
    return 0


def _stop(number: int, _: object) -> None:
    """End as by an error, so that all files of the benchmarks are removed."""
    for other in ENDING:
        # several signals can come from a closed terminal, or from an impatient user
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="The same work done by us and by others."
    )
    parser.add_argument(
        "tables",
        nargs="*",
        metavar="TABLE",
        help=f"which tables, all if not given: {', '.join(TABLES)}",
    )
    parser.add_argument("--list", action="store_true", help="only name the tables")
    parser.add_argument(
        "--place",
        type=Path,
        default=Path(),
        help=(
            "where to make a temporary directory: six GiB, for archived-pools thirty; the current"
            " directory if not given"
        ),
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="images of a few MiB: to see that it runs; the figures mean nothing",
    )
    parser.add_argument("--write", action="store_true", help=f"also write {RESULTS.name}")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.tables) - set(TABLES))
    if unknown:
        parser.error(f"there is no table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    return options


def heading() -> str:
    """:returns: what was measured, where and when, and how to repeat it"""
    today = dt.datetime.now(dt.UTC).date()
    return "\n".join(
        [
            "# Benchmarks",
            "",
            (
                f"statepool {statepool.__version__}, {today}, made again by `make bench"
                " ARGS=--write`. How the figures are made is said in"
            ),
            (
                "`benchmarks/__init__.py`: medians of alternating pairs with named peers, and the"
                " spread from the lowest to the highest."
            ),
            "",
            (
                f"Machine: {_processor()}, {os.cpu_count()} processors, {_memory()} of memory;"
                f" Linux {platform.release()},"
            ),
            f"Python {platform.python_version()}; {_first_line('qemu-img', '--version')};",
            f"{_first_line('rsync', '--version')}; {_first_line('cp', '--version')}.",
        ]
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB"


def _first_line(*command: str) -> str:
    return (
        subprocess.run(command, capture_output=True, text=True, check=True)
        .stdout.partition("\n")[0]
        .strip()
    )


if __name__ == "__main__":
    sys.exit(main())
