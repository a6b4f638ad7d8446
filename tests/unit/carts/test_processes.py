"""Several processes with one directory; the service in another server's process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.carts import CartServer, until
from tests.unit.carts.conftest import FILES
from tests.unit.carts.test_cartd import BAR, FOO, content

from statepool.carts.auth import add_token
from statepool.carts.database import Database


def test_two_processes_share_the_work(serve: Callable[..., CartServer]) -> None:
    one = serve(settings="workers = 2\n")
    two = CartServer(one.directory, {}, ()).start()
    try:
        for number in range(8):
            (one, two)[number % 2].post(f"c{number}", FOO, BAR, bundle=number % 3 == 0)
        for number in range(8):
            assert (two, one)[number % 2].settled(f"c{number}")["status"] == "ready"
        assert one.download("c1") == two.download("c1")
        two.post("same", FOO)
        assert one.post("same", FOO).status == 201
        assert one.post("same", BAR).status == 409
        assert one.settled("same")["status"] == "ready"
    finally:
        two.stop()


def test_under_gunicorn(serve: Callable[..., CartServer], tmp_path: Path) -> None:
    pytest.importorskip("gunicorn", reason="gunicorn is not installed")
    server = serve()
    server.post("one", FOO)
    server.settled("one")
    server.stop()
    token = add_token(
        Database(f"sqlite:///{tmp_path}/carts/carts.sqlite"), "anna", write=True, objects="*"
    )
    other = CartServer(tmp_path, {}, ())
    options = ("--bind", "127.0.0.1:0", "--workers", "2", "--threads", "4")
    other.launch(sys.executable, "-m", "gunicorn", *options, "statepool.carts.wsgi")
    try:
        other.listen()
        assert other.curl(path="/carts").status == 401
        allowed = ("-H", f"Authorization: Bearer {token}")
        assert other.curl(*allowed, path="/carts").json == {"carts": []}
        body = '{"fileids": [{"id": "foo.txt", "path": "a"}]}'
        assert other.curl(*allowed, "-d", body, path="/two").status == 201
        until(lambda: other.curl(*allowed, path="/two").status == 200)
        assert content(other.curl(*allowed, path="/two").body) == {"two/a": FILES["foo.txt"]}
        assert other.curl(*allowed, "-r", "0-4", path="/two").body == b"two/a"
        body = '{"fileids": [{"id": "none", "path": "a"}]}'
        assert other.curl(*allowed, "-d", body, path="/three").status == 201
        until(lambda: "WARNING cart three is in error" in other.said())
    finally:
        assert other.stop() == 0
