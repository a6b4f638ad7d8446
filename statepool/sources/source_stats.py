"""
What a cache knows of its sources, kept across runs: their latency, their throughput, and their
failures.

There is one small file for each source. It is in the cache, since the connection from this host to
the source was measured. Nothing depends on these files: without them, sources are asked in the
order in which they are configured. So the files are not flushed, and a torn file counts as missing.
If two processes write at the same time, the knowledge of one of them is lost.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from attrs import evolve

from statepool.errors import IntegrityError, StatePoolError
from statepool.model.digest import Digest
from statepool.pools.json_files import SOURCE_STATS, Notes
from statepool.sources.ranking import NOTHING, Candidate, Known, Surroundings, resting
from statepool.sources.source import Source

WEIGHT = 0.5
"""The weight of a new measurement against all before it."""

ENOUGH = 16 << 20
"""
Bytes of a transfer that is large enough to measure throughput; in smaller transfers, other work
takes too large a part.
"""

SLOW = 4 << 20
"""
Bytes per second. A source that seems to be slower than this is slow, whatever else was done
meanwhile.
"""

_ROUTES = Path("/proc/net/route")
"""The IPv4 routes of this host: see ``man 5 proc_pid_net``."""


class SourceStats:
    """
    The measurements of sources.

    :param notes: where they are kept
    :param clock: returns the time, in seconds since the epoch
    """

    def __init__(self, notes: Notes, clock: Callable[[], float] = time.time) -> None:
        self._notes = notes
        self._clock = clock
        self._changes: dict[str, Known] = {}
        self._lock = threading.Lock()

    def of(self, source: Source) -> Known:
        """:returns: what is known of a source"""
        with self._lock:
            changed = self._changes.get(str(source))
        return changed if changed is not None else next(self._read([str(source)]))

    @staticmethod
    def _file(source: str) -> str:
        return f"{Digest.of_text(source).hex[:32]}.json"

    def _read(self, sources: list[str]) -> Iterator[Known]:
        return map(self._parse, self._notes.read_all(SOURCE_STATS, map(self._file, sources)))

    @staticmethod
    def _parse(data: Any) -> Known:
        if data is None:
            return NOTHING
        try:
            return Known(
                latency=_number(data["latency"]),
                rate=_number(data["rate"]),
                failures=max(0, int(data["failures"])),
                failed=float(data["failed"]),
                problem=str(data["problem"]) if data["problem"] is not None else None,
                corrupt=data["corrupt"] is True,
            )
        except (ValueError, KeyError, TypeError):
            return NOTHING  # torn, or of another form: the source is measured again

    def candidates(self, sources: Iterable[Source]) -> list[Candidate]:
        """:returns: sources with what is known of them, in their order"""
        sources = list(sources)
        with self._lock:
            changes = dict(self._changes)
        read = self._read([str(source) for source in sources])
        return [
            Candidate(source.name, source.location, source.scope, changes.get(str(source), known))
            for source, known in zip(sources, read, strict=True)
        ]

    def rest(self, source: Source) -> float:
        """:returns: for how many more seconds a source rests"""
        return resting(self.of(source), self._clock())

    def now(self) -> float:
        """:returns: the time, in seconds since the epoch"""
        return self._clock()

    # -- learning ----------------------------------------------------------------------------------

    def answered(self, source: Source, seconds: float) -> None:
        """Note that a source answered a question."""
        known = self.of(source)
        self._change(source, known, evolve(known, latency=_blend(known.latency, seconds)))

    def delivered(self, source: Source, count: int, seconds: float) -> None:
        """
        Note that ``count`` bytes of images came from a source, in so many seconds. Transfers that
        are too small to judge by are ignored.
        """
        known = self.of(source)
        if count > 0 and seconds > 0 and (count >= ENOUGH or count / seconds < SLOW):
            self._change(source, known, evolve(known, rate=_blend(known.rate, count / seconds)))

    def did_well(self, source: Source) -> None:
        """Note that a source worked: its earlier failures do not count any more."""
        known = self.of(source)
        if known.failures:
            self._change(
                source, known, evolve(known, failures=0, failed=0.0, problem=None, corrupt=False)
            )

    def failed(self, source: Source, error: StatePoolError) -> None:
        """Note that a source could not be asked, did not deliver, or delivered wrong data."""
        known = self.of(source)
        corrupt = isinstance(error, IntegrityError)
        changed = evolve(
            known,
            failures=known.failures + 1,
            failed=self._clock(),
            problem=error.message,
            corrupt=corrupt,
        )
        self._change(source, known, changed)

    def _change(self, source: Source, before: Known, after: Known) -> None:
        if _differs(before, after):
            with self._lock:
                self._changes[str(source)] = after

    def save(self) -> None:
        """
        Write the measurements for later processes, if the cache exists. If the cache cannot be
        written, they are not kept.
        """
        with self._lock:
            changes = dict(self._changes)
        for source, known in changes.items():
            if self._write(source, known):
                with self._lock:
                    if self._changes.get(source) == known:
                        del self._changes[source]

    def _write(self, source: str, known: Known) -> bool:
        data: dict[str, Any] = {
            "format": 1,
            "source": source,
            "latency": known.latency,
            "rate": known.rate,
            "failures": known.failures,
            "failed": known.failed,
            "problem": known.problem,
            "corrupt": known.corrupt,
        }
        try:
            return self._notes.write(f"{SOURCE_STATS}/{self._file(source)}", data, make=False)
        except OSError:
            return False  # no cache yet, or a full disk: only this process remembers


def _number(value: object) -> float | None:
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        else None
    )


def _blend(before: float | None, measured: float) -> float:
    return measured if before is None else before * (1 - WEIGHT) + measured * WEIGHT


def _differs(before: Known, after: Known) -> bool:
    """
    Return whether a change is worth writing a file: a small difference of latency or throughput is
    not.
    """
    if evolve(before, latency=None, rate=None) != evolve(after, latency=None, rate=None):
        return True
    return any(
        _far(old, new) for old, new in ((before.latency, after.latency), (before.rate, after.rate))
    )


def _far(old: float | None, new: float | None) -> bool:
    if old is None or new is None:
        return old is not new
    return not old * 0.7 <= new <= old * 1.4


@functools.cache
def surroundings() -> Surroundings:
    """
    :returns: the position of this host in the network, as far as its own kernel knows it; no other
        host is contacted
    """
    name = socket.gethostname()
    return Surroundings(frozenset({name, name.partition(".")[0]}), tuple(_networks()))


def _networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    try:
        lines = _ROUTES.read_text().splitlines()[1:]
    except OSError:
        return []  # no such file on this system: then no address counts as in this network
    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for line in lines:
        fields = line.split()
        if len(fields) > 7 and fields[2] == "00000000" and fields[7] != "00000000":
            address, mask = (
                int.from_bytes(bytes.fromhex(fields[column]), "little") for column in (1, 7)
            )
            found.append(ipaddress.IPv4Network((address, mask.bit_count())))
    return found
