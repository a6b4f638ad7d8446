"""A listing takes a number of round trips that does not grow with what is listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, Parent
from statepool.pools.fold import Publish
from statepool.pools.pool import Pool
from statepool.qcow2 import chain
from statepool.sources.pool_source import listings
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.base import Entry, Stat


class CountingTransport(MemoryTransport):
    """
    Counts the questions that have to be answered before the next one can be asked; many that are
    asked together are one.
    """

    trips = 0
    _together = False

    def _ask(self, method: Any, *arguments: Any, together: bool = False, **named: Any) -> Any:
        self.trips += not self._together
        before, self._together = self._together, together or self._together
        try:
            return method(*arguments, **named)
        finally:
            self._together = before

    def scan(self, directory: str) -> list[Entry]:
        return self._ask(super().scan, directory)  # type: ignore[no-any-return]

    def stat(self, path: str) -> Stat | None:
        return self._ask(super().stat, path)  # type: ignore[no-any-return]

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        return self._ask(super().read, path, offset, size)  # type: ignore[no-any-return]

    def scan_many(self, directories: Sequence[str]) -> list[list[Entry]]:
        return self._ask(super().scan_many, directories, together=True)  # type: ignore[no-any-return]

    def stat_many(self, paths: Sequence[str]) -> list[Stat | None]:
        return self._ask(super().stat_many, paths, together=True)  # type: ignore[no-any-return]

    def read_many(self, paths: Sequence[str], size: int) -> list[bytes | None]:
        return self._ask(super().read_many, paths, size, together=True)  # type: ignore[no-any-return]


def fill(store: MemoryStore, machines: int, states: int) -> None:
    pool = Pool(MemoryTransport(store))
    pool.create()
    for machine in range(machines):
        below: Parent | None = None
        for number in range(states):
            digest = Digest.of(b"%d" % number)
            manifest = Manifest(
                f"vm{machine}/disk", f"s{number}", size=1, digest=digest, parent=below
            )
            pool.append(f"vm{machine}", lambda _, manifest=manifest: [Publish(manifest)])  # type: ignore[misc]
            below = Parent(f"s{number}", digest)
        pool.view.update(
            pool.fold(f"vm{machine}").states, lambda machine=machine: pool.fold(f"vm{machine}")
        )  # type: ignore[misc]


def trips(machines: int, states: int) -> tuple[int, int]:
    store = MemoryStore()
    fill(store, machines, states)
    transport = CountingTransport(store)
    pool = Pool(transport)
    counts = []
    for _ in range(2):  # from nothing, and with all folds at hand
        before = transport.trips
        assert len(listings(pool)) == machines * states
        counts.append(transport.trips - before)
    return counts[0], counts[1]


@pytest.mark.parametrize(("machines", "states"), [(1, 40), (12, 3), (12, 12)])
def test_of_managed_states(machines: int, states: int) -> None:
    cold, warm = trips(machines, states)
    assert cold <= 9
    assert warm <= 8


def test_what_others_wrote_meanwhile_is_read_together() -> None:
    store = MemoryStore()
    fill(store, 6, 3)
    transport = CountingTransport(store)
    pool = Pool(transport)
    listings(pool)
    other = Pool(MemoryTransport(store))
    for machine in range(6):
        for number in range(4):
            manifest = Manifest(f"vm{machine}/disk", f"t{number}", size=1, digest=Digest.of(b"t"))
            other.append(f"vm{machine}", lambda _, manifest=manifest: [Publish(manifest)])  # type: ignore[misc]
    before = transport.trips
    assert len(listings(pool)) == 6 * 7
    assert transport.trips - before <= 12


# -- files of other tools --------------------------------------------------------------------------


def unmanaged_trips(lab: Any, depth: int) -> int:
    """
    :returns: what a listing takes of a chain that another tool made, each state of which stands on
        the one before
    """
    store = MemoryStore()
    MemoryTransport(store).make_directory("vm1/disk")
    for number in range(depth):
        content = lab.image(f"s{number}", f"s{number - 1}" if number else None)
        MemoryTransport(store).create(f"vm1/disk/s{number}.qcow2", content)
    transport = CountingTransport(store)
    pool = Pool(transport)
    found = listings(pool)
    assert [listed.problem for listed in found] == [None] * depth
    assert [listed.manifest.parent is not None for listed in found] == [
        listed.manifest.state != "s0" for listed in found
    ]
    return transport.trips


def test_of_files_of_other_tools(lab: Any) -> None:
    assert unmanaged_trips(lab, 40) == unmanaged_trips(lab, 2) <= 12


def test_a_header_is_taken_apart_once(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    check = chain.check_image

    def counted(*arguments: Any, **named: Any) -> Any:
        read.append(arguments[2])
        return check(*arguments, **named)

    monkeypatch.setattr(chain, "check_image", counted)
    unmanaged_trips(lab, 30)
    assert len(read) == len(set(read)) == 30
