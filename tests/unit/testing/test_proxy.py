"""The proxy does to a link what its knobs say, and nothing else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.proxy import Proxy


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """Before a server that gives back what it is told."""
    listener = socket.create_server(("127.0.0.1", 0))

    def echo(link: socket.socket) -> None:
        with link:
            while data := link.recv(1 << 16):
                link.sendall(data)

    def serve() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=lambda link=link: quietly(echo, link), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    with Proxy(listener.getsockname()[1]) as found:
        yield found
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def quietly(work, link: socket.socket) -> None:
    try:
        work(link)
    except OSError:
        pass  # it was cut


def dialled(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=20)


def all_of(link: socket.socket, count: int) -> bytes:
    """:returns: so many bytes, or what came before the end"""
    data = b""
    try:
        while len(data) < count and (more := link.recv(count - len(data))):
            data += more
    except ConnectionError:
        pass  # a cut may also be seen so
    return data


def test_bytes_go_there_and_back(proxy: Proxy) -> None:
    with dialled(proxy) as link:
        link.sendall(b"hello" * 1000)
        assert all_of(link, 5000) == b"hello" * 1000
    assert (proxy.connections, proxy.moved) == (1, {"up": 5000, "down": 5000})


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_comes_after_so_many_bytes(proxy: Proxy, direction: str) -> None:
    proxy.cut_after(**{direction: 700})
    with dialled(proxy) as link:
        link.sendall(bytes(1000))
        assert len(all_of(link, 1000)) <= 700
    assert proxy.moved[direction] == 700
    with dialled(proxy) as link:
        link.sendall(bytes(1000))
        assert len(all_of(link, 1000)) == 1000


def test_what_is_kept_in_silence_comes_later(proxy: Proxy) -> None:
    proxy.fall_silent_after(down=300)
    with dialled(proxy) as link:
        link.sendall(bytes(1000))
        assert len(all_of(link, 300)) == 300
        link.settimeout(0.2)
        with pytest.raises(TimeoutError):
            link.recv(1)
        proxy.speak()
        link.settimeout(20)
        assert len(all_of(link, 700)) == 700


def test_a_delay_is_in_both_directions_and_does_not_add_up(proxy: Proxy) -> None:
    proxy.delay = 0.2
    with dialled(proxy) as link:
        begin = time.monotonic()
        for _ in range(50):
            link.sendall(bytes(100))
        assert len(all_of(link, 5000)) == 5000
        assert 0.4 <= time.monotonic() - begin < 50 * 0.4


def test_a_rate_takes_its_time(proxy: Proxy) -> None:
    proxy.rate = 100_000
    with dialled(proxy) as link:
        begin = time.monotonic()
        link.sendall(bytes(20_000))
        assert len(all_of(link, 20_000)) == 20_000
        assert time.monotonic() - begin >= 0.2


def test_refusing(proxy: Proxy) -> None:
    proxy.refusing = True
    with dialled(proxy) as link:
        assert all_of(link, 1) == b""
    proxy.refusing = False
    with dialled(proxy) as link:
        link.sendall(b"x")
        assert all_of(link, 1) == b"x"
