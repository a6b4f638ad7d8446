"""What is beyond Cartd: downloads in part, one cart for one list, and how far a cart is."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.carts import CartServer, FakeInterface, until
from tests.unit.carts.conftest import FILES
from tests.unit.carts.test_cartd import BAR, FOO, content, entry


@pytest.fixture(params=[True, False], ids=["bundled", "streamed"])
def ready(server: CartServer, uid: str, request: pytest.FixtureRequest) -> str:
    server.post(uid, FOO, BAR, bundle=request.param)
    assert server.settled(uid)["status"] == "ready"
    return uid


def test_downloads_in_part(server: CartServer, ready: str) -> None:
    whole = server.curl(path=f"/{ready}")
    assert whole.headers["accept-ranges"] == "bytes"
    assert int(whole.headers["content-length"]) == len(whole.body)
    for start, stop in ((0, 1), (500, 3000), (1000, len(whole.body)), (len(whole.body) - 1, 10**9)):
        part = server.curl("-r", f"{start}-{stop - 1}", path=f"/{ready}")
        last = min(stop, len(whole.body)) - 1
        assert part.status == 206
        assert part.headers["content-range"] == f"bytes {start}-{last}/{len(whole.body)}"
        assert part.body == whole.body[start:stop]
    assert server.curl("-r", "-100", path=f"/{ready}").body == whole.body[-100:]


@pytest.mark.parametrize("wanted", ["999999999-", "5-2", "x"])
def test_parts_that_are_not_there(server: CartServer, ready: str, wanted: str) -> None:
    answer = server.curl("-H", f"Range: bytes={wanted}", path=f"/{ready}")
    assert answer.status in (200, 416)
    if answer.status == 416:
        assert answer.headers["content-range"].startswith("bytes */")
        assert answer.body == b""


def test_several_parts_are_sent_as_the_whole(server: CartServer, ready: str) -> None:
    assert server.curl("-H", "Range: bytes=0-1,5-6", path=f"/{ready}").status == 200


def test_interrupted_downloads_go_on(server: CartServer, ready: str, tmp_path: Path) -> None:
    whole = server.download(ready)
    (tmp_path / "x.tar").write_bytes(whole[:5000])
    again = ["curl", "-sS", "-C", "-", "-o", "x.tar", f"{server.url}/{ready}"]
    subprocess.run(again, cwd=tmp_path, check=True)
    assert (tmp_path / "x.tar").read_bytes() == whole


def test_what_a_client_has_is_not_sent_again(server: CartServer, ready: str) -> None:
    whole = server.curl(path=f"/{ready}")
    etag = whole.headers["etag"]
    assert etag == f'"{server.status(ready)["digest"]}"'
    assert server.curl("-I", "-X", "HEAD", path=f"/{ready}").headers["etag"] == etag
    same = server.curl("-H", f"If-None-Match: {etag}", path=f"/{ready}")
    assert (same.status, same.body) == (304, b"")
    part = ("-r", "0-9", "-H")
    assert server.curl(*part, f"If-Range: {etag}", path=f"/{ready}").status == 206
    assert server.curl(*part, 'If-Range: "other"', path=f"/{ready}").status == 200


def test_the_same_list_is_the_same_cart(server: CartServer, uid: str) -> None:
    server.post(uid, FOO, BAR)
    server.settled(uid)
    created = server.status(uid)["created"]
    assert server.post(uid, BAR, FOO).status == 201
    assert server.status(uid)["created"] == created
    conflict = server.post(uid, FOO)
    assert conflict.status == 409
    assert f"there is a cart {uid} of another list" in conflict.json["message"]
    assert server.post(uid, FOO, BAR, bundle=True).status == 409
    assert len([one for one in server.curl(path="/carts").json["carts"] if one["uid"] == uid]) == 1


def test_a_cart_in_error_is_begun_again_by_its_list(server: CartServer, uid: str) -> None:
    name = f"late-{uid}"
    server.post(uid, entry(name, "a"), FOO)
    assert server.settled(uid)["status"] == "error"
    (server.directory / "files" / name).write_bytes(b"late")
    server.post(uid, entry(name, "a"), FOO)
    until(lambda: server.status(uid)["status"] == "ready")
    assert content(server.download(uid))[f"{uid}/a"] == b"late"


def test_how_far_a_cart_is(
    serve: Callable[..., CartServer], interface: FakeInterface, tmp_path: Path
) -> None:
    settings = f'archives.far = {{ type = "interface", url = "{interface.url}" }}\n'
    server = serve(settings=f"{settings}transfer-size = 4096\n")
    interface.gate.clear()
    server.post("one", FOO, {**BAR, "archive": "far"})
    until(lambda: "GET data/bar.csv" in interface.asked)
    status = until(lambda: (found := server.status("one"))["rate"] and found)
    assert status["status"] == "staging"
    assert status["bytes_needed"] == len(FILES["foo.txt"]) + len(FILES["data/bar.csv"])
    assert status["bytes"] < status["bytes_needed"]
    assert status["seconds_left"] > 0
    assert {file["path"]: file["size"] for file in status["files"]} == {
        "1/2/3/foo.txt": len(FILES["foo.txt"]),
        "1/2/3/bar.csv": len(FILES["data/bar.csv"]),
    }
    deleted = server.curl("-X", "DELETE", path="/one")
    assert deleted.status == 200
    interface.gate.set()
    until(lambda: not list(tmp_path.glob("carts/[0-9]*")))
    assert server.curl(path="/one/status").status == 404


def test_carts_are_listed(server: CartServer, ready: str) -> None:
    found = [one for one in server.curl(path="/carts").json["carts"] if one["uid"] == ready]
    assert [one["status"] for one in found] == ["ready"]


def test_health_readiness_and_numbers(server: CartServer, ready: str) -> None:
    server.download(ready)
    assert server.curl(path="/healthz").json == {"status": "ok"}
    assert server.curl(path="/readyz").json == {"status": "ready"}
    numbers = server.curl(path="/metrics").body.decode()
    assert 'statepool_carts{status="ready"}' in numbers
    assert 'statepool_carts_requests_total{method="POST",status="201"}' in numbers
    sent = [line for line in numbers.splitlines() if line.startswith("statepool_carts_sent_bytes_")]
    assert any(float(line.split()[1]) >= 10_240 for line in sent)
