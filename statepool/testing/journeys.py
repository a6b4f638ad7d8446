"""
The life of a pool on a transport: states are set, got, unset and collected. A process that is
killed at any point leaves nothing that the next process could not complete or remove.

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
"""The work of a process."""

DISK = "vm1/disk"
STATE = "install"


class Killed(BaseException):
    """
    An exception that ends a process, as ``kill -9`` would: none of its further requests is
    answered.
    """


class Lab:
    """
    A laboratory of hosts that share one pool.

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
        :param transport: the transport by which it reaches the pool
        """
        pool = Pool(transport or self._transport)
        sources = [PoolSource(pool, "common")] if transport is not None or pool.is_managed else []
        return StatePool(self._directory / name, sources)

    @property
    def pool(self) -> Pool:
        """Return the pool as a new process sees it."""
        return Pool(self._transport)

    def is_stored(self) -> bool:
        """
        Return whether the pool has the state. If it does, check that another host can get its
        bytes.
        """
        if not self.pool.fold("vm1").states:
            return False
        with self.host("reader") as states:
            states.image(DISK).get(STATE)
            states.image(DISK).unset(STATE)
            states.gc()
        return True

    def leftovers(self) -> list[str]:
        """:returns: files in the pool that no state needs"""
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
    """Collect what no state needs."""
    states.gc(everywhere=True)


class JourneyContract(Contract):
    """The contract tests of the life of a pool. They need the fixture ``transport``."""

    writes = True

    deaths = 8
    """At how many moments each command is killed; None for all moments."""

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
                # What the pool reports after the crash still holds after the leftovers are
                # collected.
                sweep(builder)
                assert lab.is_stored() == was
                # No leftover prevents another process from repeating the command.
                store(builder)
                assert lab.is_stored()
                unset(builder)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(collect, "PASSING", -1)  # an hour later
                    sweep(builder)
                assert lab.leftovers() == []
            # The pool's log grows, and is truncated: a later run may need fewer calls.
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
        if command is sweep:  # so that there is something to collect
            lab.pool.remove(next(iter(lab.pool.fold("vm1").states)))

    @staticmethod
    def _kill(lab: Lab, command: Command, moment: int) -> bool:
        """:returns: whether the command was killed before it was done"""

        def killed(call: Call) -> BaseException:
            return Killed(call)

        here = Writer.current()
        gone = evolve(here, start=here.start - 1)
        dying = FaultyTransport(lab.pool.transport, Stop(first=moment, error=killed))
        with pytest.MonkeyPatch.context() as patch, lab.host("builder", dying) as states:
            # A different process of this host, which the next process can see to be dead.
            patch.setattr(Writer, "current", classmethod(lambda cls: gone))
            try:
                command(states)
            except Killed:
                return True
        return False
