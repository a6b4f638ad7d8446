"""
The tally of a run: states that were fetched, built and reused. Workers of pytest-xdist send theirs
to their controller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest


@dataclass
class Row:
    """
    The counts for one state.

    :param fetched: how often it was fetched from a pool
    :param built: how often it was built
    :param reused: how often it was reused without fetching or building
    :param bytes: how many bytes were moved
    :param seconds: how long tests waited for it
    """

    fetched: int = 0
    built: int = 0
    reused: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, other: Row) -> None:
        """Add the counts of another row."""
        self.fetched += other.fetched
        self.built += other.built
        self.reused += other.reused
        self.bytes += other.bytes
        self.seconds += other.seconds


@dataclass
class Tally:
    """
    Counts by state, and files.

    :param kept: the working images that were kept
    :param superseded: the old versions of states that were built again, each with the command that
        removes it
    """

    rows: dict[str, Row] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    superseded: list[str] = field(default_factory=list)

    def note(self, state: str, row: Row) -> None:
        """Add the counts of a state."""
        self.rows.setdefault(state, Row()).add(row)

    def to_worker_output(self) -> dict[str, Any]:
        """:returns: the values that a worker sends to its controller"""
        return {
            "rows": {state: asdict(row) for state, row in self.rows.items()},
            "kept": self.kept,
            "superseded": self.superseded,
        }

    def add_worker_output(self, output: dict[str, Any]) -> None:
        """Add the values that a worker has sent."""
        for state, row in output["rows"].items():
            self.note(state, Row(**row))
        self.kept += output["kept"]
        self.superseded += output["superseded"]

    def lines(self) -> Iterator[str]:
        """:returns: the lines of the summary"""
        for state, row in sorted(self.rows.items()):
            parts = [
                f"{count} x {what}"
                for what, count in (
                    ("fetched", row.fetched),
                    ("built", row.built),
                    ("reused", row.reused),
                )
                if count
            ]
            moved = f", {_size(row.bytes)}" if row.bytes else ""
            yield f"{state}: {', '.join(parts)}{moved}, {row.seconds:.2f} s"
        yield from (f"kept: {path}" for path in self.kept)
        yield from (f"superseded, and still there: {told}" for told in self.superseded)


def _size(count: float) -> str:
    units: Iterable[str] = ("bytes", "KiB", "MiB", "GiB")
    for unit in units:
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"


TALLY = pytest.StashKey[Tally]()
"""The key under which the tally of a run is stored."""
