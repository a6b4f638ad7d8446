"""
kill -9 of the service of carts, of a worker, of its database and of its broker, at random moments
while carts are made and downloaded.

KILLS says how many of each (two if not given); SEED, with which seed: it is printed.
"""

from __future__ import annotations

import collections
import io
import os
import random
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from attrs import define, field

from statepool import StatePoolError
from statepool.carts.client import Cart, CartService
from tests.support import brokers, postgres
from tests.support.carts import LIMIT, CartServer, run_server, until
from tests.support.sshd import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

pytest.importorskip("flask", reason="the service is not installed: pip install statepool[serve]")

KILLS = int(os.environ.get("KILLS", "2"))
SEED = int(os.environ.get("SEED", random.randrange(1 << 30) if "KILLS" in os.environ else 1))

CARTS = 4
"""Carts in a round."""

LONGEST = 0.8
"""Seconds after the first list is posted until the kill, at most."""

FILES = {f"{number}.bin": bytes([number + 1]) * (300_000 << number) for number in range(4)}

SETTINGS = """
[serve]
archive = "lab"
archives.lab = {{ type = "directory", path = "{directory}/files" }}
transfer-size = 4096
sweep = 0.5
connect-wait = 0.2
connect-attempts = 500
workers = 2
"""


@define
class Campaign:
    """
    A service whose parts are killed.

    :param server: the service
    :param kill: kills a part of it, and starts it again
    :param ends: how many carts ended in which way
    """

    server: CartServer
    kill: Callable[[], None]
    random: random.Random
    ends: collections.Counter[str] = field(factory=collections.Counter)
    made: list[str] = field(factory=list)

    def run(self, rounds: int) -> None:
        for number in range(rounds):
            with ThreadPoolExecutor(CARTS) as threads:
                uids = [f"cart-{number}-{one}" for one in range(CARTS)]
                ends = [threads.submit(self._end, uid, self.random.random()) for uid in uids]
                time.sleep(self.random.random() * LONGEST)
                self.kill()
                for uid, end in zip(uids, ends, strict=True):
                    self.ends[end.result(2 * LIMIT)] += 1
                    self.made.append(uid)
        carts = {one["uid"]: one["status"] for one in self.server.curl(path="/carts").json["carts"]}
        assert sorted(carts) == sorted(self.made), "a cart was lost"
        assert set(carts.values()) <= {"ready", "error"}
        counted = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        sys.stdout.write(f"\n{rounds} kills, SEED={SEED}: {counted}\n")

    def _end(self, uid: str, choice: float) -> str:
        """:returns: how a cart ended: whole, or in error with its reason"""
        service = CartService(self.server.url, patience=LIMIT)
        entries = [{"id": name, "path": f"x/{name}"} for name in FILES]
        cart = Cart.new(service, entries, uid=uid, bundle=choice < 0.5)
        tar = self.server.directory / f"{uid}.tar"
        try:
            got = cart.get(tar)
        except StatePoolError as error:
            reason = str(cart.status()["error"])
            assert reason, error
            assert reason in error.message, error
            assert not tar.exists()
            return f"in error ({reason[:60]})"
        data = tar.read_bytes()
        tar.unlink()
        assert len(data) == got.bytes
        with tarfile.open(fileobj=io.BytesIO(data)) as found:
            content = {one.name: found.extractfile(one).read() for one in found}  # type: ignore[union-attr]
        assert content == {f"{uid}/x/{name}": data for name, data in FILES.items()}
        return "whole"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(tmp_path: Path, stack: ExitStack) -> Callable[..., CartServer]:
    (tmp_path / "files").mkdir()
    for name, data in FILES.items():
        (tmp_path / "files" / name).write_bytes(data)

    def run(more: str = "") -> CartServer:
        settings = SETTINGS.format(directory=tmp_path) + more
        port = ("--port", str(free_port()))  # after a restart the same
        return stack.enter_context(run_server(tmp_path, *port, settings=settings))

    return run


def campaign(server: CartServer, kill: Callable[[], None]) -> Campaign:
    return Campaign(server, kill, random.Random(SEED))


def worker(server: CartServer, stack: ExitStack) -> CartServer:
    worker = CartServer(server.directory, {}, ())
    worker.launch(sys.executable, "-m", "statepool", "carts", "worker")
    stack.callback(lambda: worker.stop(signal.SIGKILL))
    return worker


def broker(name: str, stack: ExitStack) -> brokers.Broker:
    pytest.importorskip("celery", reason="Celery is not installed: statepool[celery]")
    if reason := brokers.missing(name):
        pytest.skip(reason)
    found = brokers.Broker(name)
    stack.callback(found.remove)
    found.start()
    return found


def test_the_service(serve: Callable[..., CartServer]) -> None:
    server = serve()

    def kill() -> None:
        server.stop(signal.SIGKILL)
        server.start()

    campaign(server, kill).run(KILLS)


def test_a_worker(serve: Callable[..., CartServer], stack: ExitStack) -> None:
    server = serve(f'tasks = "celery"\nbroker = "{broker("redis", stack).url}"\n')
    workers = [worker(server, stack) for _ in range(2)]
    until(lambda: all("filling carts" in one.said() for one in workers))

    def kill() -> None:
        one = random.Random(len(workers)).choice(workers)
        one.stop(signal.SIGKILL)
        one.launch(sys.executable, "-m", "statepool", "carts", "worker")

    campaign(server, kill).run(KILLS)


def test_the_database(serve: Callable[..., CartServer], stack: ExitStack) -> None:
    if reason := postgres.missing():
        pytest.skip(reason)
    database = postgres.Postgres()
    stack.callback(database.remove)
    database.start()
    stack.callback(database.stop)
    server = serve(f'database = "{database.url}"\n')

    def kill() -> None:
        database.kill()
        database.start()

    campaign(server, kill).run(KILLS)


@pytest.mark.parametrize("name", ["redis", "rabbitmq"])
def test_the_broker(name: str, serve: Callable[..., CartServer], stack: ExitStack) -> None:
    found = broker(name, stack)
    server = serve(f'tasks = "celery"\nbroker = "{found.url}"\n')
    one = worker(server, stack)
    until(lambda: "filling carts" in one.said())

    def kill() -> None:
        found.stop()
        found.start()

    campaign(server, kill).run(KILLS)
