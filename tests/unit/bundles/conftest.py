"""Where states are exported and imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bundles import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One for all tests of a module, which change nothing in its caches."""
    return World(tmp_path_factory.mktemp("bundles"))
