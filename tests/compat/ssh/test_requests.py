"""
How much is asked of another host: nothing where nothing need be, and no more in turn for many
states than for few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import statepool
from statepool.model.settings import Settings
from tests.support.proxy import Proxy
from tests.support.sshd import Sshd

KIB = 1 << 10


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    statepool.init(tmp_path / "pool")
    return tmp_path / "pool"


@pytest.fixture
def fill(
    directory: Path, tmp_path: Path, make_image: Callable[..., Path]
) -> Callable[[str, int], None]:
    """``fill(machine, count)``: so many states of it, in one chain."""

    def make(machine: str, count: int) -> None:
        work = make_image(tmp_path / f"{machine}.qcow2", 1024 * KIB)
        image = statepool.StatePool(cache=tmp_path / "filler", sources=[directory]).image(
            f"{machine}/disk"
        )
        for number in range(count):
            image.set(f"state{number}", source=work)

    return make


@pytest.fixture
def opened(
    sshd: Sshd, directory: Path, tmp_path: Path, proxy: Proxy
) -> Iterator[Callable[..., statepool.StatePool]]:
    """
    ``opened(fresh=...)``: the pool as another process would have it, without a connection, by way
    of the proxy.
    """
    made: list[Settings] = []

    def make(**knobs: float) -> statepool.StatePool:
        # what differs in this does not share a connection
        made.append(sshd.settings(connect_timeout=20 + len(made), **knobs))
        return statepool.StatePool(
            cache=tmp_path / "cache",
            sources=[sshd.location(directory, proxy.port)],
            settings=made[-1],
        )

    yield make
    from statepool.transports.ssh.connection import connection_to

    for settings in made:
        connection_to(sshd.location(directory, proxy.port), settings).close()


def test_a_trusted_get_opens_no_connection_while_it_is_fresh(
    opened, fill, proxy: Proxy, tmp_path: Path
) -> None:
    fill("vm1", 2)
    opened().image("vm1/disk").get("state1")
    assert proxy.connections == 1
    opened().image("vm1/disk").get("state1", to=tmp_path / "work.qcow2")
    assert proxy.connections == 1


def test_a_trusted_get_asks_one_small_thing_after_that(
    opened, fill, proxy: Proxy, tmp_path: Path
) -> None:
    fill("vm1", 2)
    states = opened(fresh=0)
    states.image("vm1/disk").get("state1")
    proxy.delay = 0.1
    before, turns = dict(proxy.moved), proxy.turns
    states.image("vm1/disk").get("state1", to=tmp_path / "work.qcow2")
    assert proxy.moved["up"] - before["up"] < 4 * KIB
    assert proxy.moved["down"] - before["down"] < 4 * KIB
    # is there a next record, and is the last one still there: each opened, read and closed
    assert 1 <= proxy.turns - turns <= 5
    assert proxy.connections == 1


def asked_in_turn(states: statepool.StatePool, proxy: Proxy, expected: int) -> int:
    """:returns: how many questions waited for an answer, when there is a connection already"""
    states.show()
    before = proxy.turns
    assert len(states.show()) == expected
    return proxy.turns - before


@pytest.mark.slow
def test_show_does_not_ask_more_in_turn_for_more_states(opened, fill, proxy: Proxy) -> None:
    fill("vm1", 1)
    proxy.delay = 0.1
    few = asked_in_turn(opened(), proxy, 1)
    proxy.delay = 0
    fill("vm1", 6)
    for machine in ("vm2", "vm3"):
        fill(machine, 3)
    proxy.delay = 0.1
    many = asked_in_turn(opened(), proxy, 12)
    assert few > 0
    assert many <= few + 2
