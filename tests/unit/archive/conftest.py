"""Where pools are archived and restored."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.pool_archives import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A pool with a chain, a machine state, and a large state with holes of another machine."""
    store = Store(tmp_path)
    store.put("install", b"install" * 5000)
    store.put("customize", b"customize" * 3000, on="install")
    store.put_machine("loggedin", b"logged in" * 500)
    holes = bytes(6 << 20) + b"behind a hole" * 1000
    store.put("install", holes, object="vm2/disk", extents=[((6 << 20) - 100, 13100)])
    return store
