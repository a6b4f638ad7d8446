"""A dictionary with the primitives only, and one that can only be read."""

from __future__ import annotations

from typing import Any

import pytest

from statepool.testing.transports import TransportContract
from statepool.transports.base import Transport
from tests.support.primitives import Shelf, Store


class TestStore(TransportContract):
    renames = symlinks = directories = False
    deaths = 16

    @pytest.fixture
    def transport(self) -> Transport:
        return Store()


class TestReadOnly(TransportContract):
    writes = renames = symlinks = directories = False

    @pytest.fixture
    def transport(self) -> Transport:
        return Shelf({})

    def put(self, transport: Any, path: str, data: bytes) -> None:
        transport.files[path] = data
