"""A scheme leads to its transport, or to words that say what is missing."""

from __future__ import annotations

import configparser
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from statepool.errors import InvalidLocation
from statepool.model.location import Location
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.link import LinkTransport
from statepool.transports.local import LocalTransport
from statepool.transports.registry import BUILT_IN, GROUP, open_transport

ROOT = Path(__file__).resolve().parents[3]


class Plugged(MemoryTransport):
    def __init__(self, location: Location) -> None:
        super().__init__(MemoryStore(), location)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[metadata.EntryPoint]:
    """What is installed beside us."""
    points: list[metadata.EntryPoint] = []
    monkeypatch.setitem(sys.modules, "a_plugin_for_a_test", sys.modules[__name__])
    monkeypatch.setattr(
        metadata, "entry_points", lambda **wanted: metadata.EntryPoints(points).select(**wanted)
    )
    return points


def test_the_transports_of_this_package() -> None:
    assert type(open_transport(Location("file", "/pool"))) is LocalTransport
    assert type(open_transport(Location("link", "/pool"))) is LinkTransport


def test_those_of_this_package_are_registered_as_any_other() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"][GROUP].strip().splitlines()
    assert dict(line.split(" = ") for line in lines) == BUILT_IN


def test_one_that_is_installed(installed: list[metadata.EntryPoint]) -> None:
    installed.append(metadata.EntryPoint("memory", "a_plugin_for_a_test:Plugged", GROUP))
    transport = open_transport(Location("memory", "/pool"))
    assert isinstance(transport, Plugged)
    assert transport.location == Location("memory", "/pool")


@pytest.mark.parametrize("value", ["no_such_module:Plugged", "a_plugin_for_a_test:Missing"])
def test_one_that_is_broken(installed: list[metadata.EntryPoint], value: str) -> None:
    installed.append(metadata.EntryPoint("memory", value, GROUP))
    with pytest.raises(InvalidLocation, match=value):
        open_transport(Location("memory", "/pool"))


def test_one_that_is_no_transport(installed: list[metadata.EntryPoint]) -> None:
    installed.append(metadata.EntryPoint("memory", "a_plugin_for_a_test:ROOT", GROUP))
    with pytest.raises(InvalidLocation, match="not a transport"):
        open_transport(Location("memory", "/pool"))


@pytest.mark.parametrize(
    ("location", "words"),
    [("oci://registry/pool", "statepool[oci]"), ("s3://bucket/pool", "statepool[s3]")],
)
def test_one_that_has_to_be_installed_says_so(
    installed: list[metadata.EntryPoint], location: str, words: str
) -> None:
    with pytest.raises(InvalidLocation) as caught:
        open_transport(Location.parse(location))
    assert words in str(caught.value)


def test_one_that_nobody_knows(installed: list[metadata.EntryPoint]) -> None:
    installed.append(metadata.EntryPoint("memory", "a_plugin_for_a_test:Plugged", GROUP))
    with pytest.raises(InvalidLocation) as caught:
        open_transport(Location("gopher", "/pool"))
    assert "gopher://" in str(caught.value)
    assert "file://, link://, memory://" in str(caught.value)


def test_what_is_not_used_is_not_loaded() -> None:
    code = """
import sys
from statepool.model.location import Location
from statepool.transports.registry import open_transport
assert "statepool.transports.local" not in sys.modules
open_transport(Location("file", "/pool"))
assert "statepool.transports.link" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
