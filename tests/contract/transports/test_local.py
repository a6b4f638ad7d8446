"""Files of this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from statepool.model.location import Location
from statepool.testing.transports import TransportContract
from statepool.transports.base import Transport
from statepool.transports.local import LocalTransport
from tests.support.privileges import permissions_count


class TestLocalTransport(TransportContract):
    in_directory = True
    without_privileges = staticmethod(permissions_count)

    @pytest.fixture
    def transport(self, tmp_path: Path) -> Transport:
        (tmp_path / "pool").mkdir()
        return LocalTransport(Location("file", str(tmp_path / "pool")))


class TestWithoutAnonymousFiles(TransportContract):
    """As on file systems that have no ``O_TMPFILE``."""

    in_directory = True
    without_privileges = staticmethod(permissions_count)

    @pytest.fixture
    def transport(self, tmp_path: Path) -> Transport:
        (tmp_path / "pool").mkdir()
        transport = LocalTransport(Location("file", str(tmp_path / "pool")))
        transport._anonymous = False
        return transport
