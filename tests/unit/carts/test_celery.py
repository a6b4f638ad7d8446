"""Carts are filled by workers of Celery, with real brokers; which die, stop, or are away."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.brokers import Broker, missing
from tests.support.carts import CartServer, FakeInterface, until
from tests.unit.carts.conftest import FILES
from tests.unit.carts.test_cartd import BAR, FOO, content, entry
from tests.unit.carts.test_restart import far

for _name in ("celery", "redis"):
    pytest.importorskip(_name, reason=f"{_name} is not installed: pip install statepool[celery]")

OURS = ("-m", "statepool", "carts", "worker")
CELERYS = ("-m", "celery", "-A", "statepool.carts.celery", "worker")


@pytest.fixture(scope="session")
def brokers() -> Iterator[Callable[[str], Broker]]:
    """``brokers("redis")``: one that runs, the same for all tests."""
    running: dict[str, Broker] = {}
    with ExitStack() as stack:

        def find(name: str) -> Broker:
            if name not in running:
                running[name] = started(name, stack)
                running[name].start()
            return running[name]

        yield find


def started(name: str, stack: ExitStack) -> Broker:
    if reason := missing(name):
        pytest.skip(reason)
    broker = Broker(name)
    stack.callback(broker.remove)
    return broker


def settings(broker: Broker, more: str = "") -> str:
    lines = ['tasks = "celery"', f'broker = "{broker.url}"', "workers = 1", "sweep = 0.5"]
    return "\n".join([*lines, "connect-wait = 0.2", "connect-attempts = 500", more])


def start_worker(
    stack: ExitStack, server: CartServer, command: tuple[str, ...] = OURS
) -> CartServer:
    worker = CartServer(server.directory, {}, ())
    worker.launch(sys.executable, *command)
    stack.callback(worker.process.wait)
    stack.callback(worker.process.kill)
    return worker


@pytest.mark.parametrize(
    ("name", "command"), [("redis", OURS), ("rabbitmq", OURS), ("redis", CELERYS)]
)
def test_killed_in_the_middle(
    brokers: Callable[[str], Broker],
    serve: Callable[..., CartServer],
    stack: ExitStack,
    interface: FakeInterface,
    name: str,
    command: tuple[str, ...],
) -> None:
    """Of Celery's own command, only the process that fills the cart: the other takes note."""
    results = 'result-backend = "rpc://"\n' if name == "rabbitmq" else ""
    server = serve(settings=settings(brokers(name), far(interface) + results))
    first = start_worker(stack, server, command)
    interface.gate.clear()
    files = [entry(one, one, archive="far") for one in sorted(FILES)]
    server.post("one", *files, bundle=True)
    until(lambda: [asked for asked in interface.asked if asked.startswith("GET ")])
    if command == OURS:
        first.stop(signal.SIGKILL)
        second = start_worker(stack, server)
    else:
        os.kill(children(first.process.pid)[0], signal.SIGKILL)
        second = first
    interface.gate.set()
    assert server.settled("one")["status"] == "ready", second.said()
    expected = {f"one/{one}": FILES[one] for one in FILES}
    assert content(server.download("one")) == expected
    until(lambda: tasks(server) == [])
    assert second.stop() == 0


def children(process: int) -> list[int]:
    return [
        int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def tasks(server: CartServer) -> list[Any]:
    with sqlite3.connect(server.directory / "carts/carts.sqlite") as database:
        return database.execute("select * from carttasks").fetchall()


ENDS_ONCE = """
from celery.worker.consumer import Consumer
from statepool.__main__ import main
start = Consumer.start
def fail(consumer):
    Consumer.start = start
    raise AttributeError("as kombu does if Redis goes away while a connection is closed")
Consumer.start = fail
main()
"""


def test_a_worker_of_celery_that_ends_is_started_anew(
    brokers: Callable[[str], Broker], serve: Callable[..., CartServer], stack: ExitStack
) -> None:
    server = serve(settings=settings(brokers("redis")))
    worker = start_worker(stack, server, ("-c", ENDS_ONCE, "carts", "worker"))
    server.post("one", FOO)
    assert server.settled("one")["status"] == "ready"
    assert "Unrecoverable error" in worker.said()
    assert "is started anew" in worker.said()
    assert worker.stop() == 0


def test_the_broker_is_away(
    serve: Callable[..., CartServer], stack: ExitStack, tmp_path: Path
) -> None:
    broker = started("redis", stack)
    broker.start()
    server = serve(settings=settings(broker))
    worker = start_worker(stack, server)
    server.post("one", FOO, BAR)
    assert server.settled("one")["status"] == "ready"
    broker.stop()
    assert server.post("two", FOO, BAR).status == 201
    away = server.curl(path="/readyz")
    assert away.status == 503
    assert f"the broker {broker.url} cannot be used" in away.json["message"]
    assert server.status("two")["status"] == "waiting"
    broker.start()
    assert server.settled("two")["status"] == "ready"
    for one in (server, worker):
        one.stop(signal.SIGKILL)
    broker.stop()
    starting = CartServer(tmp_path, {}, ())
    starting.launch()
    stack.callback(starting.stop)
    worker = start_worker(stack, server)
    for one in (starting, worker):
        until(lambda one=one: "waiting 0.2 s (attempt 1 of 500)" in one.said())
    broker.start()
    starting.listen()
    starting.post("three", FOO)
    assert starting.settled("three")["status"] == "ready"


def test_stopped_and_deleted_while_files_come(
    brokers: Callable[[str], Broker],
    serve: Callable[..., CartServer],
    stack: ExitStack,
    interface: FakeInterface,
) -> None:
    interface.far.update(["foo.txt", "baz.ini"])
    results = f'result-backend = "{brokers("redis").url}"\n'
    server = serve(settings=settings(brokers("redis"), far(interface) + results))
    worker = start_worker(stack, server)
    server.post("kept", entry("foo.txt", "a", archive="far"))
    server.post("gone", entry("baz.ini", "a", archive="far"))
    until(lambda: {"HEAD foo.txt", "HEAD baz.ini"} <= set(interface.asked))
    assert worker.stop() == 0
    assert server.curl("-X", "DELETE", path="/gone").status == 200
    interface.far.clear()
    start_worker(stack, server)
    assert server.settled("kept")["status"] == "ready"
    until(lambda: tasks(server) == [])
    assert "GET baz.ini" not in interface.asked
    assert [one.name for one in (server.directory / "carts/cartuids").iterdir()] == ["kept"]
