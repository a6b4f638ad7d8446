"""
Several workers that want the same of a pool on another host: one moves the bytes, the others wait,
and find them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.pools import layout
from statepool.pools.claims import is_claim
from statepool.pools.pool import Pool
from statepool.transports.base import Transfer
from statepool.transports.local import LocalTransport
from statepool.transports.ssh import SSHTransport
from tests.support.sshd import Sshd, run_sshd, sshd_program

pytestmark = pytest.mark.skipif(
    sshd_program() is None, reason="sshd is not installed (Debian: openssh-server)"
)

MIB = 1 << 20
SIZE = 12 * MIB

BEGIN = """
import json, os, sys, time
from statepool.model.settings import Settings
cache, source, config, known, how = sys.argv[1:]
settings = Settings(ssh_config=config, known_hosts=known)
print("ready", flush=True)
sys.stdin.readline()
"""

GET = (
    BEGIN
    + """
import statepool
pool = statepool.StatePool(cache=cache, sources=[source], settings=settings)
got = pool.image("vm1/disk").get("customize")
print(json.dumps(got.bytes))
"""
)

STORE = (
    BEGIN
    + """
from statepool.model.location import Location
from statepool.pools.pool import Pool
from statepool.cache.cache import Cache
from statepool.copying.push import Push
from statepool.transports.registry import open_transport

class Progress:
    def begin(self, what, total):
        pass
    def advance(self, count):
        if how == "slow":
            print("sending", flush=True)
            time.sleep(100)
    def end(self):
        pass

here = Cache.open(Pool(open_transport(Location("file", cache))), settings)
there = Pool(open_transport(Location.parse(source), settings), lock_timeout=100)
fold = here.pool.fold("vm1")
chain = (next(iter(fold.states.values())),)
print(json.dumps(Push(here, there, Progress()).run(chain).bytes))
"""
)

Worker = subprocess.Popen[str]


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[bool], Sshd]]:
    """``servers(chrooted)``: one with a shell, or one without."""
    with ExitStack() as stack:
        running: dict[bool, Sshd] = {}

        def start(chrooted: bool) -> Sshd:
            if chrooted and os.geteuid() != 0:
                pytest.skip("only root can make a chroot")
            if chrooted not in running:
                running[chrooted] = stack.enter_context(run_sshd(chrooted=chrooted))
            return running[chrooted]

        yield start


@pytest.fixture(params=[False, True], ids=["shell", "chrooted"])
def sshd(request: pytest.FixtureRequest, servers: Callable[[bool], Sshd]) -> Sshd:
    return servers(request.param)


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """``start(script, cache, sshd, location)``: a process that is ready, and waits for a line."""
    started: list[Worker] = []

    def run(script: str, cache: Path, sshd: Sshd, location: Location, how: str = "quick") -> Worker:
        arguments = [str(cache), str(location), str(sshd.ssh_config), str(sshd.known_hosts), how]
        worker = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(worker)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        return worker

    yield run
    for worker in started:
        worker.kill()
        worker.communicate()


def go(worker: Worker) -> None:
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()


def answer(worker: Worker) -> Any:
    out, _ = worker.communicate(timeout=120)
    assert worker.returncode == 0
    return json.loads(out.splitlines()[-1])


@pytest.fixture
def far(sshd: Sshd, tmp_path: Path) -> Pool:
    """An empty pool there."""
    directory = sshd.directory_for(f"{tmp_path.name} {os.urandom(4).hex()}")
    pool = Pool(SSHTransport(sshd.location(directory), sshd.settings()))
    pool.create()
    return pool


@pytest.mark.parametrize("sshd", [False], ids=["shell"], indirect=True)
def test_eight_processes_of_one_host_fetch_a_chain_once(
    sshd: Sshd,
    far: Pool,
    start: Callable[..., Worker],
    tmp_path: Path,
    make_image: Callable[..., Path],
) -> None:
    source = statepool.StatePool(
        cache=tmp_path / "elsewhere", sources=[str(far.location)], settings=sshd.settings()
    )
    disk = source.image("vm1/disk")
    disk.set(
        "install", source=make_image(tmp_path / "work.qcow2", 16 * MIB, writes=[(0, 6 * MIB, 1)])
    )
    work = tmp_path / "work.qcow2"
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", f"write -P 2 {2 * MIB} {MIB}", work],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    disk.set("customize", source=work)
    size = sum(manifest.data_size for manifest in far.fold("vm1").states.values())

    workers = [start(GET, tmp_path / "cache", sshd, far.location) for _ in range(8)]
    for worker in workers:
        go(worker)
    assert sum(answer(worker) for worker in workers) == size


@pytest.fixture
def cache(tmp_path: Path) -> tuple[Path, Manifest]:
    """A cache with one state, whose bytes are enough to be met while they are sent."""
    root = tmp_path / "cache"
    root.mkdir()
    pool = Pool(LocalTransport(Location("file", str(root))))
    pool.create()
    data = os.urandom(SIZE)
    manifest = Manifest("vm1/disk", "install", size=SIZE, digest=Digest.of(data))
    assert manifest.digest is not None
    staging = pool.stage([manifest.digest])
    path = root / staging.path(manifest.digest)
    path.write_bytes(data)
    path.chmod(0o444)
    pool.publish([manifest], staging)
    staging.end()
    return root, manifest


def whole(pool: Pool, manifest: Manifest) -> bool:
    """Whether the state is there, its bytes are what they should be, and nothing else is."""
    assert manifest.digest is not None
    assert pool.find(manifest.id) is not None
    assert pool.transport.scan(layout.INCOMING) == []
    return pool.transport.digest(layout.data(manifest.digest), Transfer(SIZE)) == manifest.digest


def test_workers_that_store_the_same_send_it_once(
    sshd: Sshd, far: Pool, cache: tuple[Path, Manifest], start: Callable[..., Worker]
) -> None:
    root, manifest = cache
    workers = [start(STORE, root, sshd, far.location) for _ in range(3)]
    for worker in workers:
        go(worker)
    assert sum(answer(worker) for worker in workers) == SIZE
    assert whole(far, manifest)
    names = [entry.name for entry in far.transport.scan(layout.LOCKS)]
    assert names
    assert all(is_claim(name) for name in names) == (sshd.user == "nobody"), (
        "claims are made where there is no shell, and only there"
    )


def test_one_that_is_killed_while_it_sends_is_succeeded(
    sshd: Sshd, far: Pool, cache: tuple[Path, Manifest], start: Callable[..., Worker]
) -> None:
    root, manifest = cache
    slow, other = (
        start(STORE, root, sshd, far.location, "slow"),
        start(STORE, root, sshd, far.location),
    )
    go(slow)
    assert slow.stdout is not None
    assert slow.stdout.readline() == "sending\n"
    go(other)
    slow.kill()
    assert answer(other) <= SIZE
    assert far.find(manifest.id) is not None
    assert manifest.digest is not None
    assert far.transport.digest(layout.data(manifest.digest), Transfer(SIZE)) == manifest.digest
