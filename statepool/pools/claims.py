"""
Claims: leases on work, for a pool that has no kernel locks. They only save work: if two processes
hold the same claim, both do the work.

A process takes a claim by exclusive creation of a file, ``locks/NAME.7``: of all processes that
try, one succeeds. The number is the *epoch*. The next holder creates epoch 8, and no epoch is used
twice. The holder proves that it is alive by a *beat*, a file whose name it changes. When it is
done, it renames the claim to one that has ended. No process removes the claim of another process to
create it anew: then two processes could hold it at once.

A waiting process sees by one listing of the directory whether anything has changed. If nothing has
changed for a while, by its own clock since its first look, it creates the next epoch. Clocks of two
hosts are not compared. If the holder was only paused, it then works beside its successor. That is
safe: what both publish is created exclusively.
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
"""Seconds between two beats of a holder."""

STALE = 20.0
"""
Seconds without a beat after which a waiting process takes over the work: ten beats, since
connections stall and are made anew.
"""

FIRST_LOOK = 0.05
"""
Seconds before a waiting process looks for the second time; each further pause is longer by half.
"""

LAST_LOOK = 1.0
"""Longest pause between two looks, in seconds."""

KEPT = 2
"""
Epochs of one name that are kept: the newest and the one before, so that a listing made while the
newest appears shows one of them.
"""

REMEMBERED = 64
"""
Files of ended claims of other names that may stay. If there are more, the next process that makes a
claim removes them.
"""

ENDED = "end"

_CLAIM = re.compile(
    r"(?P<name>[a-z]+-[0-9A-Za-z][0-9A-Za-z_+-]*)\.(?P<epoch>[1-9][0-9]{0,18})(?:\.(?P<sign>[1-9][0-9]{0,18}|end))?\Z"
)


@frozen
class Epoch:
    """
    One claim, as a listing shows it.

    :param number: the epoch
    :param files: its files
    :param beats: the beats of its holder
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
    :param names: names of files in ``locks/``
    :returns: the claims among them, by name, the oldest first
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
    Locks for a place without kernel locks. Like all locks of this package, they only save work, and
    nothing depends on them.

    :param transport: reaches the pool
    :param beat: seconds between two beats
    :param stale: seconds without a beat after which a waiting process takes over
    :param monotonic: the clock of this process, in seconds
    :param sleep: waits for a number of seconds
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
        Hold the claim on some work for the duration of the block.

        :param name: of the work: a word, a dash, and letters, digits or dashes
        :param timeout: how long to wait for a holder that is alive, in seconds
        :raises LockTimeout: the holder did not finish
        """
        if not is_claim(f"{name}.1"):
            raise ValueError(f"not a name of a claim: {name!r}")
        try:
            path = self._take(name, timeout)
        except MissingFile:
            # There is no directory for claims, as in a pool that another tool has made: every
            # process does the work.
            yield
            return
        holder = _Holder(self._transport, path, self._beat)
        holder.start()
        try:
            yield
        except TransportError as error:
            if self._transport.is_transient(error):
                # The end cannot be noted in the pool, and the caller that gets the error has waited
                # long enough. Waiting processes see that the beat has stopped.
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
        """:returns: the file of a new claim of this process"""
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
            # A process of this host that has ended is known to be dead, so there is no need to wait
            # until its claim is stale.
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
                    continue  # another process was faster; it is judged by its beats from now on
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
        """:returns: the file of the claim, or None if the epoch is taken or void"""
        path = f"{layout.LOCKS}/{name}.{number}"
        # The nonce makes the file different from that of any other process: a process that lost the
        # answer to its creation can tell that the file is its own.
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
        # Old epochs are removed, and a slow process can create one of them again. That claim is
        # void if there is a later epoch, or if this epoch has ended.
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
                continue  # the file belongs to another account, which removes it itself

    # -- what is known of a holder -----------------------------------------------------------------

    def _writer(self, name: str, epoch: Epoch) -> Writer | None:
        try:
            content = self._transport.read(f"{layout.LOCKS}/{name}.{epoch.number}", 0, 1 << 16)
            return Writer.from_json(json.loads(content)["writer"])
        except (MissingFile, BadRecord, ValueError, KeyError, TypeError):
            return None  # the claim has ended, or is unreadable: only its beat counts then

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
    The beat of a claim: a thread that shows that the holder is alive, until the claim ends.

    :param transport: reaches the pool
    :param path: the file of the claim
    :param interval: seconds between two beats
    """

    def __init__(self, transport: Transport, path: str, interval: float) -> None:
        self._transport = transport
        self._path = path
        self._interval = interval
        self._last: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="statepool-claim", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """Stop the thread, and note in the pool that the work is done."""
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
            # the work is done all the same; a waiting process sees that the beat has stopped, or
            # has already taken over
            pass

    def leave(self) -> None:
        """
        Stop the thread without a note in the pool, which cannot be reached, and without waiting.
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
                continue  # the work itself meets the same error, and reports it
        if beat:
            self._last = f"{self._path}.{beat}"


_left: set[tuple[str, str]] = set()
"""
Claims that this process has given up, by location and path, although the pool does not show it.
"""
