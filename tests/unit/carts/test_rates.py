"""Clients that take too little of their answers are let go of, and others are not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from tests.support.carts import LIMIT, CartServer, until
from tests.unit.carts.test_cartd import entry

from statepool.carts.rates import SECONDS, Rates
from statepool.carts.wsgi import watched

LARGE = 64 << 20


@pytest.fixture
def ends(stack: ExitStack) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client that takes little at once, and who sends to it, in a way that does not wait."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(LIMIT)
        client.connect(listening.getsockname())
        server, _ = listening.accept()
        with closing(server):
            server.setblocking(False)
            yield client, server


def fill(server: socket.socket) -> None:
    """Send until nothing more fits."""
    try:
        while True:
            server.send(bytes(1 << 16), socket.MSG_DONTWAIT)
    except BlockingIOError:
        pass


def look_for(rates: Rates, seconds: float, begin: float = 0.0) -> float:
    """Look once a second. :returns: the time at the end"""
    for second in range(int(seconds) + 1):
        rates.look(begin + second)
    return begin + seconds


def is_open(server: socket.socket) -> bool:
    try:
        server.send(b"x", socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except BrokenPipeError:
        return False
    return True


def test_who_takes_nothing_is_let_go_of_after_a_minute(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    _, server = ends
    told: list[str] = []
    rates = Rates(1024, lambda text, *facts: told.append(text % facts))
    fill(server)
    with rates.watching(server, "192.0.2.1"):
        now = look_for(rates, SECONDS - 1)
        assert is_open(server)
        look_for(rates, 2, now)
        assert not is_open(server)
    assert len(told) == 1
    assert told[0].startswith("ended the connection of 192.0.2.1: it took ")
    look_for(rates, 2 * SECONDS, 1000)
    assert len(told) == 1


def test_who_takes_enough_is_kept(ends: tuple[socket.socket, socket.socket]) -> None:
    client, server = ends
    rates = Rates(1024, pytest.fail)
    fill(server)
    with rates.watching(server, "192.0.2.1"):
        for minute in range(3):
            taken = 0
            while taken < 256 << 10:
                taken += len(client.recv(1 << 16))
                fill(server)
            look_for(rates, SECONDS, minute * SECONDS)
        assert is_open(server)


def test_who_has_all_that_there_is_does_not_count_as_slow(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    client, server = ends
    rates = Rates(1024, pytest.fail)
    server.send(b"x")
    assert client.recv(1) == b"x"
    with rates.watching(server, "192.0.2.1"):
        look_for(rates, 5 * SECONDS)
        assert is_open(server)


def test_a_service_that_stood_still_blames_nobody(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    rates = Rates(1024, pytest.fail)
    fill(ends[1])
    with rates.watching(ends[1], "192.0.2.1"):
        rates.look(0)
        rates.look(3600)
        assert is_open(ends[1])


def test_any_rate_will_do_if_none_is_asked_for(ends: tuple[socket.socket, socket.socket]) -> None:
    rates = Rates(0, pytest.fail)
    fill(ends[1])
    with rates.watching(ends[1], "192.0.2.1"):
        look_for(rates, 3 * SECONDS)
        assert is_open(ends[1])


def test_under_gunicorn_an_answer_is_watched_until_it_is_closed(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    _, server = ends
    closed: list[bool] = []

    class Answer(list[bytes]):
        def close(self) -> None:
            closed.append(is_open(server))

    told: list[str] = []
    rates = Rates(1024, lambda text, *facts: told.append(text % facts))
    application = watched(lambda environ, start_response: Answer([b"x"]), rates)
    fill(server)
    environ = {"gunicorn.socket": server, "REMOTE_ADDR": "192.0.2.1"}
    answer = application(environ, print)
    assert list(answer) == [b"x"]
    answer.close()
    look_for(rates, 3 * SECONDS)
    assert closed == [True]
    answer = application(environ, print)
    look_for(rates, SECONDS + 1, 10_000)
    answer.close()
    assert closed == [True, False]
    assert [text[:38] for text in told] == ["ended the connection of 192.0.2.1: it "]


@pytest.mark.slow
def test_a_slow_download_is_ended_and_others_go_on(serve: Callable[..., CartServer]) -> None:
    """Nothing else would end it: it takes something twice a second."""
    server = serve(settings='least-rate = "1 TB"\nrequests = 1\n')
    with (server.directory / "files/large").open("wb") as file:
        file.truncate(LARGE)
    server.post("one", entry("large", "large"))
    server.settled("one")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(LIMIT)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        client.sendall(b"GET /one HTTP/1.1\r\nHost: localhost\r\n\r\n")

        def ended() -> bool:
            time.sleep(0.5)  # a minute goes by with a few megabytes
            try:
                return not client.recv(2048)
            except ConnectionResetError:
                return True

        until(ended)
    assert "ended the connection of 127.0.0.1: it took " in server.said()
    assert server.curl(path="/healthz").status == 200


@pytest.mark.slow
def test_a_download_does_not_keep_a_service_from_stopping(
    serve: Callable[..., CartServer],
) -> None:
    server = serve()
    with (server.directory / "files/large").open("wb") as file:
        file.truncate(LARGE)
    server.post("one", entry("large", "large"))
    server.settled("one")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.settimeout(LIMIT)
        client.sendall(b"GET /one HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 200"
        assert server.stop() == 0
