"""Files of this host that a cache refers to."""

from __future__ import annotations

from pathlib import Path

import pytest

from statepool.model.location import Location
from statepool.testing.transports import TransportContract
from statepool.transports.base import Transport
from statepool.transports.registry import open_transport
from tests.support.privileges import permissions_count


class TestLinkTransport(TransportContract):
    in_directory = True
    without_privileges = staticmethod(permissions_count)

    @pytest.fixture
    def transport(self, tmp_path: Path) -> Transport:
        (tmp_path / "pool").mkdir()
        transport = open_transport(Location("link", str(tmp_path / "pool")))
        assert transport.capabilities.refers
        return transport
