"""Room for a cart: what gives way, and what never does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.carts import CartServer, FakeInterface, run_interface, until
from tests.unit.carts.conftest import mounted, needs_root, start
from tests.unit.carts.test_cartd import entry

from statepool import ConfigError
from statepool.carts.settings import parse_size

MIB = 1 << 20
BIG = b"x" * (3 * MIB)


@pytest.fixture
def far() -> Iterator[FakeInterface]:
    with run_interface(dict.fromkeys("abcdef", BIG)) as fake:
        yield fake


@pytest.fixture
def serve(tmp_path: Path, stack: ExitStack, far: FakeInterface) -> Callable[..., CartServer]:
    """``serve()``: a server with 8 MiB of room, for two carts."""
    needs_root()
    place = stack.enter_context(mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=8m", "none"))
    place.chmod(0o700)
    own = f'directory = "{place}"\ndatabase = "sqlite:///{tmp_path}/db.sqlite"\n'
    own += f'archives.far = {{ type = "interface", url = "{far.url}" }}\n'

    def run(settings: str = "") -> CartServer:
        return start(stack, tmp_path, settings=own + settings)

    return run


def ask(server: CartServer, name: str) -> dict[str, object]:
    server.post(name, entry(name, "x", archive="far"))
    return server.settled(name)


def there(server: CartServer) -> set[str]:
    return {cart["uid"] for cart in server.curl(path="/carts").json["carts"]}


def test_the_least_recently_used_cart_goes(serve: Callable[..., CartServer]) -> None:
    server = serve()
    for name in "ab":
        assert ask(server, name)["status"] == "ready"
    server.download("a")
    assert ask(server, "c")["status"] == "ready"
    assert there(server) == {"a", "c"}
    assert "removed cart b to make room for c" in server.said()
    assert server.curl(path="/b").status == 404


def test_carts_that_were_used_of_late_stay(serve: Callable[..., CartServer]) -> None:
    server = serve("lru-buffer-time = 3600\n")
    for name in "ab":
        ask(server, name)
    status = ask(server, "c")
    assert status["status"] == "error"
    assert str(status["error"]).startswith("Not enough space to download file: ")
    head = server.curl("-I", "-X", "HEAD", path="/c")
    assert head.headers["x-pacifica-message"].startswith("Not enough space to download file")
    assert there(server) == {"a", "b", "c"}


def test_no_cart_goes_where_that_is_not_wanted(serve: Callable[..., CartServer]) -> None:
    server = serve("lru-purge = false\n")
    for name in "ab":
        ask(server, name)
    assert ask(server, "c")["status"] == "error"
    assert there(server) == {"a", "b", "c"}


def test_no_cart_goes_in_vain(serve: Callable[..., CartServer], far: FakeInterface) -> None:
    server = serve()
    for name in "ab":
        ask(server, name)
    far.sizes["c"] = str(100 * MIB)
    assert ask(server, "c")["status"] == "error"
    assert there(server) == {"a", "b", "c"}
    assert len(server.download("a")) > len(BIG)


def test_carts_that_are_downloaded_stay(serve: Callable[..., CartServer]) -> None:
    import http.client

    server = serve("transfer-size = 4096\n")
    for name in "ab":
        ask(server, name)
    connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]))
    connection.request("GET", "/a")
    response = connection.getresponse()
    assert response.read(512)
    assert ask(server, "c")["status"] == "ready"
    assert "b" not in there(server)
    assert len(response.read()) + 512 == int(response.headers["Content-Length"])
    connection.close()


def test_two_carts_do_not_count_on_the_same_room(
    serve: Callable[..., CartServer], far: FakeInterface
) -> None:
    server = serve()
    far.gate.clear()
    files = [entry(name, name, archive="far") for name in "ab"]
    server.post("two", *files)
    until(lambda: "GET a" in far.asked)
    status = ask(server, "c")
    assert "Not enough space" in str(status["error"])
    far.gate.set()
    until(lambda: server.status("two")["status"] == "ready")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4 Mb", 4 << 20),
        ("4 MB", 4_000_000),
        ("1.5 Kb", 1536),
        ("2KB", 2000),
        ("1 b", 1),
        ("7 B", 7),
        ("1 Tb", 1 << 40),
        ("2 GB", 2_000_000_000),
        (4096, 4096),
    ],
)
def test_sizes_are_those_of_cartd(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "Mb", "-1 b", "4 mb", "4 MiB", "1e3", True, json, "1 2 b"])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)
