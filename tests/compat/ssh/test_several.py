"""A large state comes from several servers at once, and arrives if one of them is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import statepool
from statepool.model.digest import Digest
from statepool.model.manifest import StateId
from statepool.model.progress import NoProgress
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.sources import mirrors
from statepool.transports.local import LocalTransport
from tests.support.proxy import Proxy
from tests.support.sshd import Sshd, run_sshd, sshd_program

pytestmark = pytest.mark.skipif(
    sshd_program() is None, reason="sshd is not installed (Debian: openssh-server)"
)

MIB = 1 << 20
SIZE = 96 * MIB


@pytest.fixture(scope="module")
def sshd() -> Iterator[Sshd]:
    with run_sshd() as server:
        yield server


@pytest.fixture
def proxies(sshd: Sshd) -> Iterator[list[Proxy]]:
    """Two lines to the server: what goes through them is counted, and can be cut."""
    with Proxy(sshd.port) as one, Proxy(sshd.port) as other:
        yield [one, other]


@pytest.fixture
def digest(tmp_path: Path, make_image: Callable[..., Path]) -> Digest:
    """The digest of a state of 96 MiB that is in two pools."""
    writes = [(number * 4 * MIB, 4 * MIB, number + 1) for number in range(SIZE // (4 * MIB))]
    image = make_image(tmp_path / "work.qcow2", 2 * SIZE, writes=writes)
    statepool.init(tmp_path / "pool0")
    pool = statepool.StatePool(tmp_path / "made", sources=[tmp_path / "pool0"])
    pool.image("vm1/disk").set("install", source=image)
    shutil.copytree(tmp_path / "pool0", tmp_path / "pool1")
    found = Pool(LocalTransport(statepool.Location("file", str(tmp_path / "pool0")))).find(
        StateId("vm1/disk", "install")
    )
    assert found is not None
    assert found.digest is not None
    return found.digest


@pytest.fixture
def states(
    carrier: str,
    sshd: Sshd,
    proxies: list[Proxy],
    digest: Digest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[statepool.StatePool]:
    # On a busy host, two measurements of the same line can differ by any factor.
    monkeypatch.setattr(mirrors, "is_alike", lambda one, other: not one.rest and not other.rest)
    sources = [
        sshd.location(tmp_path / f"pool{number}", proxy.port)
        for number, proxy in enumerate(proxies)
    ]
    with statepool.StatePool(
        tmp_path / "cache",
        sources=sources,
        settings=sshd.settings(compress="off", probe_timeout=600.0),
    ) as pool:
        yield pool


def test_both_deliver(
    states: statepool.StatePool, proxies: list[Proxy], digest: Digest, tmp_path: Path
) -> None:
    for proxy in proxies:
        proxy.rate = 24.0 * MIB
    got = states.image("vm1/disk").get("install")
    assert got.warnings == ()
    assert got.bytes >= SIZE
    path = tmp_path / "cache" / layout.data(digest)
    assert Digest.of(path.read_bytes()) == digest
    assert all(proxy.moved["down"] > 4 * MIB for proxy in proxies)
    assert sum(proxy.moved["down"] for proxy in proxies) < SIZE * 1.2


@pytest.mark.parametrize("lost", [0, 1])
def test_one_is_lost_in_the_middle(
    states: statepool.StatePool, proxies: list[Proxy], digest: Digest, tmp_path: Path, lost: int
) -> None:
    proxies[1 - lost].rate = 2.0 * MIB  # so that it does not deliver all before

    class Cut(NoProgress):
        def advance(self, count: int) -> None:
            if proxies[lost].moved["down"] > 4 * MIB:
                proxies[1 - lost].rate = None
                proxies[lost].refusing = True
                proxies[lost].cut()

    states.progress = Cut()
    got = states.image("vm1/disk").get("install")
    path = tmp_path / "cache" / layout.data(digest)
    assert Digest.of(path.read_bytes()) == digest
    assert proxies[lost].refusing
    assert any(f":{proxies[lost].port}" in warning for warning in got.warnings)


def test_a_damaged_piece_of_the_cache_comes_alone(
    states: statepool.StatePool, proxies: list[Proxy], digest: Digest, tmp_path: Path
) -> None:
    states.image("vm1/disk").get("install")
    path = tmp_path / "cache" / layout.data(digest)
    right = path.read_bytes()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(50 * MIB)
        file.write(b"rot")
    before = sum(proxy.moved["down"] for proxy in proxies)
    got = states.image("vm1/disk").get("install")
    assert path.read_bytes() == right
    assert got.bytes == 4 * MIB
    assert sum(proxy.moved["down"] for proxy in proxies) - before < 8 * MIB
