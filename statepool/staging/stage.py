"""
The stage action: what the peers have comes into the directory of the day.

The day is determined once, at the start: midnight may pass. Peers of this host come first, then
those of other hosts, several at a time. An error of a peer never stops the others. The indicator of
the day is made only if each peer that must succeed has succeeded.
"""

from __future__ import annotations

import datetime as dt
import enum
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from attrs import define, evolve, field, frozen

from statepool.errors import FileExists, NotFound, RefusedError, StatePoolError, TransportError
from statepool.model.settings import Settings
from statepool.staging.day import Day, Staging, become
from statepool.staging.files import Brought, FileStager, Stop, regular
from statepool.staging.ready import NotReady, unreachable
from statepool.staging.settings import WORK, Peer, PeerKind, StageSettings
from statepool.transports.base import FileKind, Transport
from statepool.transports.registry import open_transport


class PeerOutcome(enum.StrEnum):
    """How the staging of a peer ended."""

    STAGED = "staged"
    NOT_READY = "not-ready"
    FAILED = "failed"


@frozen
class PeerResult:
    """
    What happened to a peer.

    :param peer: its name
    :param location: its location
    :param outcome: how it ended
    :param ignored: whether its failure is none, by its ``ignore_failures``
    :param brought: what has come
    :param seconds: how long it took
    :param error: what went wrong
    """

    peer: str
    location: str
    kind: PeerKind
    outcome: PeerOutcome
    ignored: bool = False
    brought: Brought = field(factory=Brought)
    seconds: float = 0.0
    error: StatePoolError | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the day can be complete with it."""
        return self.outcome is PeerOutcome.STAGED or self.ignored

    def form(self) -> dict[str, object]:
        """:returns: it for JSON, as ``docs/staging.rst`` describes it"""
        staged = self.brought.staged
        return {
            "peer": self.peer,
            "location": self.location,
            "kind": str(self.kind),
            "outcome": str(self.outcome),
            "ignored": self.ignored,
            "files": len(staged),
            "bytes": sum(one.size for one in staged),
            "new": self.brought.new,
            "sent": self.brought.sent,
            "seconds": round(self.seconds, 3),
            "error": self.error.message if self.error is not None else None,
            "left_out": list(self.brought.left_out),
            "staged": [
                {"name": one.name, "size": one.size, "digest": one.digest} for one in staged
            ],
        }


@frozen
class Staged:
    """
    The result of the action.

    :param day: the directory of the day
    :param peers: what happened to each peer, in their order
    :param seconds: how long it took
    """

    day: str
    peers: tuple[PeerResult, ...]
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether each peer that must succeed has succeeded."""
        return all(one.succeeded for one in self.peers)

    def form(self) -> dict[str, object]:
        """:returns: it for JSON"""
        return {
            "format": 1,
            "day": self.day,
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
            "peers": [one.form() for one in self.peers],
        }


def _silent(_: PeerResult) -> None:
    """Tell nothing."""


@define(eq=False)
class Stage:
    """
    The action.

    :param settings: its settings
    :param transfers: the settings of connections
    :param full: whether everything is asked for, as at the start of the week
    :param tell: is given the result of each peer, when it is done
    :param now: returns the local time
    """

    settings: StageSettings
    transfers: Settings
    full: bool = False
    tell: Callable[[PeerResult], object] = _silent
    now: Callable[[], dt.datetime] = dt.datetime.now
    _stop: Stop = field(factory=Stop, init=False)

    def run(self) -> Staged:
        """
        :returns: what happened; errors of peers are in it
        :raises StatePoolError: the directory of the day cannot be used
        """
        begun, today = time.monotonic(), self.now()
        if self.settings.ssh_config is not None:
            self.transfers = evolve(self.transfers, ssh_config=self.settings.ssh_config)
        start = self.full or today.weekday() == self.settings.starting_day
        day = Staging(self.settings).day(today.date())
        day.prepare([one.name for one in self.settings.peers])
        with day.locked():
            ordered = self._peers(day, start)
            staged = Staged(str(day), ordered, time.monotonic() - begun)
            day.summarize(staged.form())
            if staged.complete:
                day.indicate(self.settings.indicators.stage)
        return staged

    def _peers(self, day: Day, start: bool) -> tuple[PeerResult, ...]:
        peers = self.settings.peers
        results = self._all(day, [one for one in peers if one.location.is_local], start)
        others = [one for one in peers if not one.location.is_local]
        if others:
            become(self.settings)
            results |= self._all(Day(Staging(self.settings), day.path), others, start)
        return tuple(results[one.name] for one in peers)

    def _all(self, day: Day, peers: Sequence[Peer], start: bool) -> dict[str, PeerResult]:
        # Peers with states take what is the same from each other: so one comes after the other.
        jobs = [[one] for one in peers if one.kind is PeerKind.FILES]
        states = [one for one in peers if one.kind is PeerKind.STATES]
        jobs += [states] if states else []
        with ThreadPoolExecutor(self.settings.jobs, thread_name_prefix="statepool-stage") as pool:
            try:
                done = pool.map(
                    lambda group: [self._one(day, peer, start=start) for peer in group], jobs
                )
                return {result.peer: result for results in done for result in results}
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _one(self, day: Day, peer: Peer, *, start: bool) -> PeerResult:
        result = PeerResult(peer.name, str(peer.location), peer.kind, PeerOutcome.STAGED)
        begun = time.monotonic()
        try:
            result = evolve(result, brought=self._brought(day, peer))
        except NotReady as error:
            ignored = peer.ignore_failures.applies(start=start)
            outcome = PeerOutcome.NOT_READY
            result = evolve(result, outcome=outcome, ignored=ignored, error=error)
        except StatePoolError as error:
            result = evolve(result, outcome=PeerOutcome.FAILED, error=error)
        result = evolve(result, seconds=time.monotonic() - begun)
        self.tell(result)
        return result

    def _brought(self, day: Day, peer: Peer) -> Brought:
        if peer.kind is PeerKind.STATES:
            from statepool.staging.states import stage_states  # it loads much of what pools need

            return stage_states(day, peer, self.transfers, self._stop)
        if peer.copy_command:
            return self._by_command(day, peer)
        transport = open_transport(peer.location, self.transfers)
        try:
            files, others = self._ready(peer, transport)
            brought = FileStager(day, peer.name, transport, self._stop).run(files)
            if self.settings.indicators.stage not in files:
                _mark(transport, self.settings.indicators.stage)
        finally:
            transport.close()
        return evolve(brought, left_out=others)

    def _ready(self, peer: Peer, transport: Transport) -> tuple[list[str], tuple[str, ...]]:
        """
        :returns: the files of a peer, and names that are left out
        :raises NotReady: it has no indicator, or cannot be reached
        """
        name = self.settings.indicators.collect
        try:
            entries = transport.scan("")
        except TransportError as error:
            raise unreachable(peer, error) from error
        files, others = regular((entry.name, entry.kind) for entry in entries)
        if name not in files:
            raise _not_ready(peer, name)
        return files, others

    def _by_command(self, day: Day, peer: Peer) -> Brought:
        from statepool.staging.copy_command import CopyCommand

        command, names = CopyCommand(peer, self._stop), self.settings.indicators
        if not command.has(names.collect):
            raise _not_ready(peer, names.collect)
        work = day.below(WORK, peer.name)
        day.staging.tree.remove_all(work)  # what a run that was killed has left
        day.staging.make(work)
        with command.fetched(f"{day.staging.tree.root}/{work}") as copies:
            entries = copies.scan("")
            files, others = regular((entry.name, entry.kind) for entry in entries)
            if not files:
                raise NotFound(
                    f"the peer {peer.name} has nothing to copy in {peer.location}",
                    hint="look at its collect directory",
                )
            brought = FileStager(day, peer.name, copies, self._stop, compare=True).run(files)
        command.mark(names.stage)
        return evolve(brought, left_out=others)


def _not_ready(peer: Peer, name: str) -> NotReady:
    return NotReady(
        f"the peer {peer.name} is not ready: there is no {name} in {peer.location}",
        hint="its collect has not ended, or failed",
        pool=str(peer.location),
    )


def _mark(transport: Transport, name: str) -> None:
    """
    Make the indicator in the directory of a peer.

    :raises RefusedError: something else has its name
    """
    try:
        transport.create(name, b"")
    except FileExists as error:
        found = transport.stat(name)
        if found is None or found.kind is not FileKind.FILE:
            raise RefusedError(
                f"{name} cannot be made in {transport.location}: something else has this name",
                hint="find out what put it there, and remove it",
            ) from error
