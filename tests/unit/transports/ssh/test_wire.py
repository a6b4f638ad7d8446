"""The watch over a link: who waits, for how long, and what ends it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from statepool.transports.ssh.wire import LinkSilent, WatchedSocket, dial, tune


@pytest.fixture
def pair() -> Iterator[tuple[WatchedSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    watched = WatchedSocket(ours, 0.2)
    watched.settimeout(0.01)
    yield watched, theirs
    watched.close()
    theirs.close()


def receive(watched: WatchedSocket) -> bytes:
    """As paramiko does: a timeout is a reason to look again."""
    while True:
        try:
            return watched.recv(100)
        except TimeoutError:
            continue


def test_bytes_are_counted(pair) -> None:
    watched, theirs = pair
    theirs.sendall(b"hello")
    assert receive(watched) == b"hello"
    assert watched.send(b"hi") == 2
    assert (watched.received, watched.sent) == (5, 2)


def test_what_came_together_is_handed_out_as_it_is_asked_for(pair) -> None:
    watched, theirs = pair
    theirs.sendall(b"hello")
    theirs.close()
    assert [watched.recv(2), watched.recv(2), watched.recv(2), watched.recv(2)] == [
        b"he",
        b"ll",
        b"o",
        b"",
    ]
    assert watched.received == 5


def test_nobody_waits(pair) -> None:
    watched, theirs = pair
    threading.Timer(0.5, theirs.sendall, [b"late"]).start()
    assert receive(watched) == b"late"


def test_somebody_waits(pair) -> None:
    watched, _ = pair
    with pytest.raises(LinkSilent) as caught, watched.expecting(0.1):
        receive(watched)
    assert watched.failure is caught.value
    assert caught.value.seconds == 0.1
    assert not isinstance(caught.value, TimeoutError)


def test_who_hears_something_goes_on_waiting(pair) -> None:
    watched, theirs = pair
    with watched.expecting(1.5):
        for number in range(4):
            threading.Timer(0.6 * number, theirs.sendall, [b"."]).start()
        assert b"".join(receive(watched) for _ in range(4)) == b"...."


def test_a_hard_limit_is_not_put_off(pair) -> None:
    watched, theirs = pair
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.001):
            theirs.send(b".")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        with pytest.raises(LinkSilent), watched.expecting(0.2, hard=True):
            while True:
                receive(watched)
    finally:
        stop.set()
        dripping.join()


def test_a_write_that_makes_no_progress(pair) -> None:
    watched, _ = pair
    with pytest.raises(LinkSilent):
        while True:
            try:
                watched.send(bytes(1 << 16))
            except TimeoutError:
                continue


def test_a_link_that_was_abandoned_takes_nothing(pair) -> None:
    watched, theirs = pair
    watched.abandon()
    with pytest.raises(OSError, match="Bad file"):
        watched.send(b"x")
    theirs.settimeout(5)
    assert theirs.recv(1) == b""


def test_dialling() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = dial("127.0.0.1", server.getsockname()[1], 5)
        tune(link, 3)
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000
        link.close()


def test_dialling_a_name_that_cannot_be_one() -> None:
    with pytest.raises(socket.gaierror, match="cannot be the name"):
        dial("x" * 64 + ".invalid", 22, 5)


def test_a_resolver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **more: stop.wait(20) and [])
    with pytest.raises(socket.gaierror, match="does not answer"):
        dial("store", 22, 0.1)
    stop.set()
