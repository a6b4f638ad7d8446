"""
A transport that tries again does what every transport does, also when each call fails at first, or
when nobody hears that it was done.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.errors import MissingFile
from statepool.model.location import Location
from statepool.testing.contracts import only_if
from statepool.testing.faults import Call, Fault, FaultyTransport, Lose, Stop
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.testing.transports import TransportContract
from statepool.transports.base import Transport
from statepool.transports.local import LocalTransport
from statepool.transports.retry import Retrying
from tests.support.primitives import Store


class FirstTime:
    """Matches a call, but not the same call made again."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def __call__(self, call: Call) -> bool:
        new = (call.operation, call.path) not in self._seen
        self._seen.add((call.operation, call.path))
        return new


FAULTS: dict[str, Callable[[], Fault]] = {
    "refused at first": lambda: Stop(matches=FirstTime()),
    "done and not heard of": lambda: Lose(matches=FirstTime()),
    "broken on the way": lambda: Stop(matches=FirstTime(), after=100_000),
}


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> Fault:
    return FAULTS[request.param]()


class RetryingContract(TransportContract):
    """
    Of two things nobody can tell who did them when the answer was lost: so they count as done.
    """

    deaths = 2

    def test_remove_says_whether_it_did(self, transport: Transport) -> None:
        transport.create("a", b"1")
        assert transport.remove("a") is True
        assert transport.stat("a") is None
        assert transport.remove("a") is False

    @only_if("writes", "renames")
    def test_rename_of_what_is_not_there(self, transport: Transport) -> None:
        with pytest.raises(MissingFile):
            transport.rename("nothing", "there")
        assert transport.scan("") == []


class TestAroundMemory(RetryingContract):
    @pytest.fixture
    def transport(self, fault: Fault) -> Transport:
        return Retrying(FaultyTransport(MemoryTransport(MemoryStore()), fault), retries=4, pause=0)


class TestAroundPrimitives(RetryingContract):
    renames = symlinks = directories = False

    @pytest.fixture
    def transport(self, fault: Fault) -> Transport:
        return Retrying(FaultyTransport(Store(), fault), retries=6, pause=0)


class TestAroundLocal(RetryingContract):
    @pytest.fixture
    def transport(self, fault: Fault, tmp_path: Path) -> Transport:
        (tmp_path / "pool").mkdir()
        return Retrying(
            FaultyTransport(LocalTransport(Location("file", str(tmp_path / "pool"))), fault),
            retries=4,
            pause=0,
        )
