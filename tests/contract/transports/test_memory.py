"""Files in memory, and the same with a wrapper around them that spoils nothing."""

from __future__ import annotations

import pytest

from statepool.testing.faults import FaultyTransport, Flip, on
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.testing.transports import TransportContract
from statepool.transports.base import Transport


class TestMemoryTransport(TransportContract):
    @pytest.fixture
    def transport(self) -> Transport:
        return MemoryTransport(MemoryStore())


class TestFaultyTransport(TransportContract):
    @pytest.fixture
    def transport(self) -> Transport:
        return FaultyTransport(
            MemoryTransport(MemoryStore()), Flip(matches=on("fetch", path="elsewhere"), offset=1)
        )
