"""
What a cache knows of its sources, kept across runs: how fast they answered, how fast bytes came
from them, and how they failed.

One small file for each source, in the cache, since it is the way from this host to them that was
measured. Nothing depends on these files: without them sources are asked in the order in which they
are configured. So they are not flushed, and one that is torn counts as none; two processes that
write at the same time leave what one of them knew.
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
"""How much one more measurement counts against all before it."""

ENOUGH = 16 << 20
"""
A transfer of so many bytes tells how fast a source is; in smaller ones other work counts too much.
"""

SLOW = 4 << 20
"""
Bytes in a second. A source that seems to be slower than this is slow, whatever else was done
meanwhile.
"""

_ROUTES = Path("/proc/net/route")
"""The IPv4 routes of this host: see ``man 5 proc_pid_net``."""


class SourceStats:
    """
    Remembers sources.

    :param notes: where
    :param clock: tells the time, in seconds since the epoch
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
            return NOTHING  # torn, or of another form: measuring again settles it

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
        """:returns: for how many seconds more a source is left alone"""
        return resting(self.of(source), self._clock())

    def now(self) -> float:
        """:returns: the time, in seconds since the epoch"""
        return self._clock()

    # -- learning ----------------------------------------------------------------------------------

    def answered(self, source: Source, seconds: float) -> None:
        """A source answered a question."""
        known = self.of(source)
        self._change(source, known, evolve(known, latency=_blend(known.latency, seconds)))

    def delivered(self, source: Source, count: int, seconds: float) -> None:
        """
        Bytes of images came from a source, in so many seconds. What was too little to judge by is
        forgotten.
        """
        known = self.of(source)
        if count > 0 and seconds > 0 and (count >= ENOUGH or count / seconds < SLOW):
            self._change(source, known, evolve(known, rate=_blend(known.rate, count / seconds)))

    def did_well(self, source: Source) -> None:
        """A source did what it was asked for: what it did before is forgiven."""
        known = self.of(source)
        if known.failures:
            self._change(
                source, known, evolve(known, failures=0, failed=0.0, problem=None, corrupt=False)
            )

    def failed(self, source: Source, error: StatePoolError) -> None:
        """A source could not be asked, did not deliver, or delivered something that was wrong."""
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
        Keep what was learnt for those who come later, if the cache has been made; a cache that
        cannot be written does without.
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
            return False  # no cache yet, or full: this process remembers


def _number(value: object) -> float | None:
    return (
        float(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
        else None
    )


def _blend(before: float | None, measured: float) -> float:
    return measured if before is None else before * (1 - WEIGHT) + measured * WEIGHT


def _differs(before: Known, after: Known) -> bool:
    """Whether a change is worth a file: a latency or rate that is a little different is not."""
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
    """:returns: where this host is, as far as its own kernel knows; nobody is asked"""
    name = socket.gethostname()
    return Surroundings(frozenset({name, name.partition(".")[0]}), tuple(_networks()))


def _networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    try:
        lines = _ROUTES.read_text().splitlines()[1:]
    except OSError:
        return []  # no such file on this system: addresses then say nothing of the network
    found: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
    for line in lines:
        fields = line.split()
        if len(fields) > 7 and fields[2] == "00000000" and fields[7] != "00000000":
            address, mask = (
                int.from_bytes(bytes.fromhex(fields[column]), "little") for column in (1, 7)
            )
            found.append(ipaddress.IPv4Network((address, mask.bit_count())))
    return found
