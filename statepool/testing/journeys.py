"""
The life of a pool on a transport: states are set, got, unset and collected, and a process that is
killed on the way leaves nothing that the next one could not end.

Part of :class:`~statepool.testing.transports.TransportContract`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve

from statepool.api import StatePool
from statepool.pools import collect, layout
from statepool.pools.pool import Pool
from statepool.pools.writer import Writer
from statepool.qcow2.tool import QemuImg
from statepool.sources.pool_source import PoolSource
from statepool.testing.contracts import Contract, only_if
from statepool.testing.faults import Call, FaultyTransport, Stop
from statepool.transports.base import Transport

Command = Callable[[StatePool], None]
"""What a process does."""

DISK = "vm1/disk"
STATE = "install"


class Killed(BaseException):
    """Ends a process, as ``kill -9`` would: no answer comes any more, whatever it asks for."""


class Lab:
    """
    Hosts that have one pool in common.

    :param directory: for caches and images
    :param transport: leads to the pool
    """

    def __init__(self, directory: Path, transport: Transport) -> None:
        self._directory = directory
        self._transport = transport
        raw, image = directory / "disk.raw", directory / "disk.qcow2"
        with raw.open("wb") as file:
            file.truncate(1 << 20)
            file.write(os.urandom(64 << 10))
        QemuImg().convert(raw, image, source_format="raw")
        self.host("builder").image(DISK).set(STATE, source=image)

    def host(self, name: str, transport: Transport | None = None) -> StatePool:
        """
        :param name: of the host
        :param transport: by which it reaches the pool
        """
        pool = Pool(transport or self._transport)
        sources = [PoolSource(pool, "common")] if transport is not None or pool.is_managed else []
        return StatePool(self._directory / name, sources)

    @property
    def pool(self) -> Pool:
        """The pool, as a process sees it that has just begun."""
        return Pool(self._transport)

    def is_stored(self) -> bool:
        """Whether the pool has the state. Then another host can get its bytes."""
        if not self.pool.fold("vm1").states:
            return False
        with self.host("reader") as states:
            states.image(DISK).get(STATE)
            states.image(DISK).unset(STATE)
            states.gc()
        return True

    def leftovers(self) -> list[str]:
        """:returns: what is in the pool without a state that needs it"""
        paths = (layout.DATA, layout.INCOMING, layout.TRASH)
        return [f"{path}/{entry.name}" for path in paths for entry in self._transport.scan(path)]


def store(states: StatePool) -> None:
    """Set the state in the pool."""
    stored = states.image(DISK).store(STATE, to="common")
    assert stored.complete, stored.pools


def unset(states: StatePool) -> None:
    """Remove the state from the pool, and its bytes."""
    states.image(DISK).unset(STATE, scope="shared")


def sweep(states: StatePool) -> None:
    """Take away what nobody needs."""
    states.gc(everywhere=True)


class JourneyContract(Contract):
    """The tests. They need the fixture ``transport``."""

    writes = True

    deaths = 8
    """How many moments of each command are tried in which it is killed; None for all of them."""

    @pytest.fixture
    def lab(self, transport: Transport, tmp_path: Path) -> Lab:
        """Two hosts and an empty pool."""
        directory = tmp_path / "journey"
        directory.mkdir()
        found = Lab(directory, transport)
        found.pool.create()
        return found

    @only_if("writes")
    def test_a_state_comes_and_goes(self, lab: Lab) -> None:
        with lab.host("builder") as builder:
            store(builder)
            assert lab.is_stored()
            unset(builder)
            assert not lab.is_stored()
            assert lab.leftovers() == []
            store(builder)
            assert lab.is_stored()

    @only_if("writes")
    @pytest.mark.parametrize("command", [store, unset, sweep])
    def test_a_process_is_killed(self, lab: Lab, command: Command) -> None:
        with lab.host("builder") as builder:
            deaths = []
            for moment in self._moments(lab, builder, command):
                self._prepare(lab, builder, command)
                deaths.append(self._kill(lab, command, moment))
                was = lab.is_stored()
                # What the pool says after a death holds, also when the leftovers are taken away.
                sweep(builder)
                assert lab.is_stored() == was
                # Nothing keeps others from doing it again.
                store(builder)
                assert lab.is_stored()
                unset(builder)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(collect, "PASSING", -1)  # an hour later
                    sweep(builder)
                assert lab.leftovers() == []
            # The pool's log grows, and is shortened: a later one may be done in fewer calls.
            assert all(deaths[: len(deaths) // 2])

    def _moments(self, lab: Lab, builder: StatePool, command: Command) -> list[int]:
        """:returns: the numbers of calls before which a process is killed"""
        self._prepare(lab, builder, command)
        counting = FaultyTransport(lab.pool.transport)
        with lab.host("builder", counting) as states:
            command(states)
        calls = len(counting.calls)
        if lab.is_stored():
            unset(builder)
        wanted = min(self.deaths or calls, calls)
        return sorted({1 + index * (calls - 1) // max(wanted - 1, 1) for index in range(wanted)})

    @staticmethod
    def _prepare(lab: Lab, builder: StatePool, command: Command) -> None:
        if command is store:
            return
        store(builder)
        if command is sweep:  # so that it has something to do
            lab.pool.remove(next(iter(lab.pool.fold("vm1").states)))

    @staticmethod
    def _kill(lab: Lab, command: Command, moment: int) -> bool:
        """:returns: whether the command was not done before"""

        def killed(call: Call) -> BaseException:
            return Killed(call)

        here = Writer.current()
        gone = evolve(here, start=here.start - 1)
        dying = FaultyTransport(lab.pool.transport, Stop(first=moment, error=killed))
        with pytest.MonkeyPatch.context() as patch, lab.host("builder", dying) as states:
            # Another process of this host, which the next one can see to be dead.
            patch.setattr(Writer, "current", classmethod(lambda cls: gone))
            try:
                command(states)
            except Killed:
                return True
        return False
