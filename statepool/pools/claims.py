"""
Claims: leases on work, where the place of a pool has no locks of a kernel. They only save work: if
two processes hold the same one, both do the work.

A process takes a claim by creating a file exclusively, ``locks/NAME.7``: of all that try, one
succeeds. The number is the *epoch*; the next holder creates epoch 8, and no epoch is used twice.
The holder proves that it is alive by a *beat*, a file whose name it changes; when it is done, it
renames the claim to one that has ended. No process removes the claim of another one to create it
anew: that would let two in at once.

A waiter sees by one listing of the directory whether anything has changed. If nothing did for a
while, by the waiter's own clock since its first look, it creates the next epoch. Clocks of two
hosts are not compared. A holder that was only paused then works beside its successor, and what both
publish is created exclusively.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from attrs import frozen

from statepool.errors import (
    AccessDenied,
    BadRecord,
    FileExists,
    LockTimeout,
    MissingFile,
    NoSpace,
    TransportError,
)
from statepool.pools import layout
from statepool.pools.log import random_nonce
from statepool.pools.talks import VAIN
from statepool.pools.writer import Writer
from statepool.transports.base import Transport

BEAT = 2.0
"""Seconds between two signs of life of a holder."""

STALE = 20.0
"""
Seconds without any sign of life after which a waiter takes the work over: ten beats, since
connections stall, and are made anew.
"""

FIRST_LOOK = 0.05
"""
Seconds until a waiter looks again for the first time; each pause is half as long again as the one
before.
"""

LAST_LOOK = 1.0
"""Seconds between two looks at most."""

KEPT = 2
"""
Epochs of one name that stay: the newest, and the one before, so that a listing made while the
newest appears shows one of them.
"""

REMEMBERED = 64
"""
Claims of other names that may lie there after they have ended. If there are more, the next one to
make a claim clears them away.
"""

ENDED = "end"

_CLAIM = re.compile(
    r"(?P<name>[a-z]+-[0-9A-Za-z][0-9A-Za-z_+-]*)\.(?P<epoch>[1-9][0-9]{0,18})(?:\.(?P<sign>[1-9][0-9]{0,18}|end))?\Z"
)


@frozen
class Epoch:
    """
    One claim, as a listing shows it.

    :param number: its place in the order
    :param files: what there is of it
    :param beats: its holder's signs of life
    :param ended: whether the holder is done
    """

    number: int
    files: tuple[str, ...] = ()
    beats: frozenset[str] = frozenset()
    ended: bool = False


def is_claim(name: str) -> bool:
    """:returns: whether a file in ``locks/`` belongs to a claim"""
    return _CLAIM.match(name) is not None


def has_ended(path: str) -> bool:
    """:returns: whether the file of a claim says that its holder is done"""
    return path.endswith(f".{ENDED}")


def epochs(names: Iterable[str]) -> dict[str, list[Epoch]]:
    """
    :param names: of files in ``locks/``
    :returns: the claims among them by their names, the oldest first
    """
    found: dict[str, dict[int, dict[str, str]]] = {}
    for file in names:
        if (match := _CLAIM.match(file)) is not None:
            found.setdefault(match["name"], {}).setdefault(int(match["epoch"]), {})[file] = (
                match["sign"] or ""
            )
    return {
        name: [_epoch(number, files) for number, files in sorted(numbers.items())]
        for name, numbers in found.items()
    }


def _epoch(number: int, files: dict[str, str]) -> Epoch:
    return Epoch(
        number, tuple(files), frozenset(files.values()) - {"", ENDED}, ENDED in files.values()
    )


class Claims:
    """
    Locks for a place without locks. They save work, as all locks here, and nothing depends on them.

    :param transport: reaches the pool
    :param beat: seconds between two signs of life
    :param stale: seconds without one after which a waiter goes on
    :param monotonic: this process's clock, in seconds
    :param sleep: waits for some seconds
    """

    def __init__(
        self,
        transport: Transport,
        *,
        beat: float = BEAT,
        stale: float = STALE,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._transport = transport
        self._beat = beat
        self._stale = stale
        self._monotonic = monotonic
        self._sleep = sleep

    @contextlib.contextmanager
    def hold(self, name: str, timeout: float) -> Iterator[None]:
        """
        Have a piece of work for as long as the block lasts.

        :param name: of the work: a word, a dash, and letters, digits or dashes
        :param timeout: how long to wait for a holder that is alive, in seconds
        :raises LockTimeout: it did not finish
        """
        if not is_claim(f"{name}.1"):
            raise ValueError(f"not a name of a claim: {name!r}")
        try:
            path = self._take(name, timeout)
        except MissingFile:
            # There is no directory for it, as in a pool that another tool has made: everybody does
            # the work.
            yield
            return
        holder = _Holder(self._transport, path, self._beat)
        holder.start()
        try:
            yield
        except TransportError as error:
            if self._transport.is_transient(error):
                # The pool cannot be told, and whoever waits for the error has waited for long
                # enough. Others see that nothing moves any more.
                holder.leave()
            else:
                holder.end()
            raise
        except BaseException:
            holder.end()
            raise
        holder.end()

    # -- waiting -----------------------------------------------------------------------------------

    def _take(self, name: str, timeout: float) -> str:
        """:returns: the file of a new claim, which is ours"""
        begin = since = self._monotonic()
        seen: Epoch | None = None
        holder: Writer | None = None
        pause, vain = FIRST_LOOK, 0
        while True:
            newest = self._newest(name)
            now = self._monotonic()
            if (
                newest is not None
                and not newest.ended
                and (seen is None or newest.number != seen.number)
            ):
                holder = self._writer(name, newest)
            if newest != seen:
                seen, since = newest, now
            # A process of this host that is no more shows no beat: nobody has to wait for it to
            # stay away.
            if (
                newest is None
                or newest.ended
                or now - since >= self._stale
                or self._is_left(name, newest)
                or (holder is not None and holder.is_dead)
            ):
                path = self._claim(name, newest.number + 1 if newest is not None else 1)
                if path is not None:
                    return path
                if (vain := vain + 1) <= VAIN:
                    continue  # somebody was faster, and is judged by what is seen from now on
            if now - begin >= timeout or vain > VAIN:
                raise self._timeout(name, newest, holder, timeout)
            self._sleep(min(pause, max(begin + timeout - now, 0.001)))
            pause = min(pause * 1.5, LAST_LOOK)

    def _look(self) -> dict[str, list[Epoch]]:
        return epochs(entry.name for entry in self._transport.scan(layout.LOCKS))

    def _newest(self, name: str) -> Epoch | None:
        found = self._look().get(name)
        return found[-1] if found else None

    def _is_left(self, name: str, epoch: Epoch) -> bool:
        return (str(self._transport.location), f"{layout.LOCKS}/{name}.{epoch.number}") in _left

    def _claim(self, name: str, number: int) -> str | None:
        """:returns: the file of the claim, or None if the epoch is not to be had"""
        path = f"{layout.LOCKS}/{name}.{number}"
        # The nonce makes it another file than that of any other worker: whoever lost the answer to
        # its creation can tell that it is its own.
        claim = {
            "format": layout.FORMAT,
            "nonce": random_nonce(),
            "writer": Writer.current().to_json(),
        }
        content = json.dumps(claim).encode() + b"\n"
        try:
            self._transport.create(path, content, flush=False)
        except FileExists:
            return None
        _left.discard((str(self._transport.location), path))
        there = self._look()
        # Old epochs are cleared away, and one of them can be created again by whoever was slow. It
        # is void if the work has gone on from there.
        if any(
            epoch.number > number or (epoch.number == number and epoch.ended)
            for epoch in there.get(name, ())
        ):
            self._transport.remove(path)
            return None
        self._clear(name, number, there)
        return path

    def _clear(self, name: str, number: int, there: dict[str, list[Epoch]]) -> None:
        old = [
            file
            for epoch in there.get(name, ())
            if epoch.number <= number - KEPT
            for file in epoch.files
        ]
        ended = [
            file
            for other, claims in there.items()
            if other != name and claims[-1].ended
            for epoch in claims
            for file in epoch.files
        ]
        for file in old + (ended if len(ended) > REMEMBERED else []):
            try:
                self._transport.remove(f"{layout.LOCKS}/{file}")
            except AccessDenied:
                continue  # it belongs to another account, which clears it away itself

    # -- what is known of a holder -----------------------------------------------------------------

    def _writer(self, name: str, epoch: Epoch) -> Writer | None:
        try:
            content = self._transport.read(f"{layout.LOCKS}/{name}.{epoch.number}", 0, 1 << 16)
            return Writer.from_json(json.loads(content)["writer"])
        except (MissingFile, BadRecord, ValueError, KeyError, TypeError):
            return None  # it has ended, or says nothing that we understand: its beat must do

    def _timeout(
        self, name: str, epoch: Epoch | None, holder: Writer | None, timeout: float
    ) -> LockTimeout:
        who = str(holder) if holder is not None else "another worker"
        return LockTimeout(
            f"{who} has {name} in {self._transport.location}, is alive, and was not done after"
            f" {timeout:g} s",
            seconds=timeout,
            pool=str(self._transport.location),
            path=f"{layout.LOCKS}/{name}.{epoch.number if epoch is not None else 1}",
            hint="wait for it, or raise lock-timeout",
        )


class _Holder:
    """
    Shows that a claim is alive, from a thread of its own, until it ends.

    :param transport: reaches the pool
    :param path: the claim
    :param interval: seconds between two signs of life
    """

    def __init__(self, transport: Transport, path: str, interval: float) -> None:
        self._transport = transport
        self._path = path
        self._interval = interval
        self._last: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="statepool-claim", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self) -> None:
        """Say that the work is done."""
        self._done.set()
        self._thread.join()
        try:
            if self._transport.capabilities.renames:
                self._transport.rename(self._path, f"{self._path}.{ENDED}")
            else:
                self._transport.create(f"{self._path}.{ENDED}", b"", flush=False)
                self._transport.remove(self._path)
            if self._last is not None:
                self._transport.remove(self._last)
        except (TransportError, NoSpace):
            # the work is done all the same; whoever waits sees that nothing moves any more, or has
            # gone on already
            pass

    def leave(self) -> None:
        """
        The work has ended, and the pool is out of reach: nothing is said there, and nobody is
        waited for.
        """
        _left.add((str(self._transport.location), self._path))
        self._done.set()

    def _run(self) -> None:
        beat = 0
        while not self._done.wait(self._interval):
            beat += 1
            try:
                self._transport.create(f"{self._path}.{beat}", b"", flush=False)
                self._transport.remove(f"{self._path}.{beat - 1}")
            except (TransportError, NoSpace):
                continue  # the work itself meets the same trouble, and says so
        if beat:
            self._last = f"{self._path}.{beat}"


_left: set[tuple[str, str]] = set()
"""
Claims of this process, by location and path, that it does not have any more, though nothing in the
pool says so.
"""
