"""The service is killed, stopped, or started while its database is away; and what comes of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.carts import LIMIT, CartServer, FakeInterface, until
from tests.support.postgres import Postgres, missing
from tests.unit.carts.conftest import FILES
from tests.unit.carts.test_cartd import BAR, FOO, content, entry

import statepool
from statepool.carts.auth import Identity
from statepool.carts.bundle import Target
from statepool.carts.carts import find_cart, make_cart
from statepool.carts.database import Cart, DatabaseAway, File
from statepool.carts.lists import parse_request
from statepool.carts.runner import Runner
from statepool.carts.service import open_service
from statepool.carts.settings import from_layers


def far(interface: FakeInterface) -> str:
    return f'archives.far = {{ type = "interface", url = "{interface.url}" }}\n'


@pytest.mark.parametrize("bundle", [True, False])
def test_killed_in_the_middle(
    serve: Callable[..., CartServer], interface: FakeInterface, bundle: bool
) -> None:
    server = serve(settings=far(interface) + "workers = 1\n")
    files = [entry(name, f"x/{name}", archive="far") for name in sorted(FILES)]
    interface.gate.clear()
    server.post("one", *files, bundle=bundle)
    server.post("two", FOO)
    until(lambda: [asked for asked in interface.asked if asked.startswith("GET ")])
    server.stop(signal.SIGKILL)
    interface.gate.set()
    interface.asked.clear()
    server.start()
    for uid in ("one", "two"):
        assert server.settled(uid)["status"] == "ready"
    expected = {f"one/x/{name}": FILES[name] for name in FILES}
    assert content(server.download("one")) == expected


@pytest.mark.parametrize("bundle", [True, False])
def test_what_is_here_is_not_fetched_once_more(
    serve: Callable[..., CartServer], interface: FakeInterface, bundle: bool
) -> None:
    server = serve(settings=far(interface) + "tries = 1\n")
    files = [entry("foo.txt", "a", archive="far"), entry("baz.ini", "b", archive="far")]
    interface.broken.add("baz.ini")
    server.post("one", *files, bundle=bundle)
    assert "answered 503 for baz.ini" in server.settled("one")["error"]
    server.stop()
    interface.broken.clear()
    interface.asked.clear()
    server.start()
    server.post("one", *files, bundle=bundle)
    until(lambda: server.status("one")["status"] == "ready")
    expected = {"one/a": FILES["foo.txt"], "one/b": FILES["baz.ini"]}
    assert content(server.download("one")) == expected
    assert interface.asked == ["POST baz.ini", "HEAD baz.ini", "GET baz.ini"]


@pytest.mark.parametrize("bundle", [True, False])
def test_a_size_that_was_wrong_moves_no_other_file(
    serve: Callable[..., CartServer], interface: FakeInterface, bundle: bool
) -> None:
    server = serve(settings=far(interface))
    names = ("baz.ini", "data/bar.csv", "foo.txt")
    files = [entry(name, name, archive="far") for name in names]
    interface.sizes["baz.ini"] = str(10**6)
    server.post("one", *files, bundle=bundle)
    assert "not 1000000 as its archive said" in server.settled("one")["error"]
    interface.sizes.clear()
    server.post("one", *files, bundle=bundle)
    until(lambda: server.status("one")["status"] == "ready")
    expected = {f"one/{name}": FILES[name] for name in names}
    assert content(server.download("one")) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped(serve: Callable[..., CartServer], number: int) -> None:
    server = serve()
    server.post("one", FOO, BAR)
    server.settled("one")
    before = server.download("one")
    assert server.stop(number) == 0
    assert server.said().rstrip().endswith("statepool: stopping")
    server.start()
    assert server.download("one") == before


def test_stopped_while_files_come(
    serve: Callable[..., CartServer], interface: FakeInterface
) -> None:
    interface.far.add("foo.txt")
    server = serve(settings=far(interface))
    server.post("one", entry("foo.txt", "a", archive="far"))
    until(lambda: "HEAD foo.txt" in interface.asked)
    assert server.stop() == 0
    interface.far.clear()
    server.start()
    assert server.settled("one")["status"] == "ready"


def test_a_cart_that_could_not_be_queued_is_queued_later(tmp_path: Path) -> None:
    """The database is away between the making of a cart and the note that it is queued."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a").write_bytes(b"a")
    own = {"directory": str(tmp_path), "sweep": 0.1, "archive": "here"}
    here = {"type": "directory", "path": str(tmp_path / "files")}
    settings = from_layers([("", {**own, "archives": {"here": here}})])
    service = open_service(settings, statepool.Config(cache=str(tmp_path / "cache")))
    runner, database = Runner(service), tmp_path / "carts.sqlite"
    body = b'{"fileids": [{"id": "a", "path": "a"}]}'
    wanted = parse_request(body, settings, service.archives, "*")
    number = make_cart(service, "one", wanted, Identity(""))
    database.rename(tmp_path / "elsewhere")
    database.mkdir()
    with pytest.raises(DatabaseAway):
        runner.submit(number)
    database.rmdir()
    (tmp_path / "elsewhere").rename(database)
    runner.start()
    try:
        until(lambda: find_cart(service, "one", Identity("")).status == "ready")
    finally:
        runner.stop(LIMIT)


def test_what_a_crash_left_linked_is_not_written_to(tmp_path: Path) -> None:
    """The crash was between the link to bytes of the cache and the rename to the file's place."""
    service = open_service(
        from_layers([("", {"directory": str(tmp_path / "carts")})]),
        statepool.Config(cache=str(tmp_path / "cache")),
    )
    (tmp_path / "bytes of the cache").write_bytes(b"kept")
    with service.database.session(write=True):
        cart = Cart.create(cart_uid="one", status="staging")
        file = File.create(cart=cart, file_name="a", bundle_path="a", size=3, status="staging")
    with Target(service, cart).opened() as target:
        left = service.volume.arriving(cart, file.id)
        left.hardlink_to(tmp_path / "bytes of the cache")
        with target.sink(file, lambda count: None) as sink:
            sink.write(b"new")
    assert (service.volume.tree(cart) / "a").read_bytes() == b"new"
    assert (tmp_path / "bytes of the cache").read_bytes() == b"kept"


# -- PostgreSQL ------------------------------------------------------------------------------------


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if reason := missing():
        pytest.skip(reason)
    server = Postgres()
    try:
        yield server
    finally:
        server.remove()


def test_postgresql(serve: Callable[..., CartServer], postgres: Postgres) -> None:
    """The service waits for it, goes on when it comes back, and says what is missing meanwhile."""
    settings = f'database = "{postgres.url}"\nconnect-wait = 0.2\nconnect-attempts = 500\n'
    postgres.start()
    try:
        server = serve(settings=settings)
        server.post("one", FOO, BAR, bundle=True)
        assert server.settled("one")["status"] == "ready"
        before = server.download("one")
        [listed] = server.curl(path="/carts").json["carts"]
        assert listed == {name: server.status("one")[name] for name in listed}
        assert listed["bundle"] is True
        server.stop(signal.SIGKILL)
    finally:
        postgres.stop()
    waiting = CartServer(server.directory, {}, ())
    waiting.launch()
    until(lambda: "waiting 0.2 s (attempt 1 of 500)" in waiting.said())
    postgres.start()
    try:
        waiting.listen()
        assert waiting.download("one") == before
        postgres.stop()
        away = waiting.curl(path="/one")
        assert away.status == 503
        assert "cannot be used" in away.json["message"]
        assert waiting.curl(path="/readyz").status == 503
        assert waiting.curl(path="/healthz").status == 200
        postgres.start()
        assert waiting.download("one") == before
    finally:
        waiting.stop()
        postgres.stop()


def test_a_database_that_never_comes(
    serve: Callable[..., CartServer], run_statepool: Callable[..., object], tmp_path: Path
) -> None:
    settings = 'database = "postgresql://x@127.0.0.1:9/x"\nconnect-wait = 0\nconnect-attempts = 2\n'
    (tmp_path / "statepool.toml").write_text(f'[serve]\ndirectory = "carts"\n{settings}')
    ran = run_statepool("serve", "--port", "0", code=7)
    assert "waiting 0 s (attempt 1 of 2)" in ran.err  # type: ignore[attr-defined]
    assert "cannot be used" in ran.err.splitlines()[-1]  # type: ignore[attr-defined]
