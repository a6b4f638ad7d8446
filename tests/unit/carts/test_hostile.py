"""What is wrong is refused before anything is done, and says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.carts import CartServer
from tests.unit.carts.test_cartd import FOO, entry


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"fileids": [{"id": ' + b"9" * 5000 + b"}]}", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "'fileids' of the list must be a list"),
        (b'{"fileids": {}}', "'fileids' of the list must be a list"),
        (b'{"fileids": [], "bundle": 1}', "'bundle' of the list must be true or false"),
        (b'{"fileids": [7]}', "fileids[0]: the entry is not a JSON object"),
    ],
)
def test_lists_of_wrong_types(server: CartServer, uid: str, body: bytes, message: str) -> None:
    answer = server.post_raw(uid, body)
    assert answer.status == 400
    assert message in answer.json["message"]
    assert server.curl(path=f"/{uid}").status == 404


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"id": None}, "'id' of the entry must be a text"),
        ({"id": True}, "'id' of the entry must be a text"),
        ({"id": ["x"]}, "'id' of the entry must be a text"),
        ({"path": 7}, "'path' of the entry must be a text"),
        ({"hashtype": 7}, "'hashtype' of the entry must be a text"),
        ({"chain": "yes"}, "'chain' of the entry must be true or false"),
        ({"archive": "none"}, "there is no archive 'none'"),
        ({"id": ""}, "the id '' cannot be used: it is empty"),
        ({"id": "../secret"}, "a part that is empty, . or .."),
        ({"id": "a/../../secret"}, "a part that is empty, . or .."),
        ({"id": "/etc/passwd"}, "it is absolute"),
        ({"id": "foo.txt\0"}, "characters that cannot be printed"),
        ({"id": "\ud800"}, "characters that cannot be printed"),
        ({"id": "x" * 201}, "more than 1024 bytes, or a part of more than 200"),
        ({"path": ".."}, "a part that is empty, . or .."),
        ({"path": "a/../../b"}, "a part that is empty, . or .."),
        ({"path": "a//b"}, "a part that is empty, . or .."),
        ({"path": "a\nb"}, "characters that cannot be printed"),
        ({"path": "a/" * 600 + "b"}, "more than 1024 bytes"),
        ({"path": "/"}, "it is empty"),
        ({"hashtype": "md6", "hashsum": "00"}, "unknown hashtype 'md6'"),
        ({"hashtype": "md5", "hashsum": "00"}, "hashsum '00' is not one of type md5"),
        ({"hashtype": "md5", "hashsum": "z" * 32}, "is not one of type md5"),
        ({"hashtype": "\0", "hashsum": ""}, "cannot be used"),
        ({"hashtype": "x" * 201, "hashsum": ""}, "cannot be used"),
        ({"hashtype": "shake_128", "hashsum": "0" * 202}, "cannot be used"),
        ({"archive": "pools", "id": "vm1"}, "is not the id of a state"),
        ({"archive": "pools", "id": "vm1/disk/../x"}, "is not the id of a state"),
        ({"archive": "pools", "id": "vm1/../x"}, "not a valid name"),
    ],
)
def test_entries_that_are_wrong(
    server: CartServer, uid: str, wrong: dict[str, object], message: str
) -> None:
    answer = server.post(uid, FOO, {**entry("baz.ini", "baz.ini"), **wrong})
    assert answer.status == 400
    assert answer.json["message"].startswith("fileids[1]: ")
    assert message in answer.json["message"]
    assert server.curl(path=f"/{uid}").status == 404


def test_a_leading_slash_of_a_path_is_ignored_as_by_cartd(server: CartServer, uid: str) -> None:
    server.post(uid, entry("foo.txt", "/1/foo.txt"))
    assert server.settled(uid)["files"][0]["path"] == "1/foo.txt"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (entry("foo.txt", "x"), "foo.txt and foo.txt would both be at x"),
        (entry("baz.ini", "x"), "foo.txt and baz.ini would both be at x"),
        (entry("baz.ini", "x/y"), "x would be the file foo.txt, and a directory with baz.ini"),
    ],
)
def test_paths_that_collide(
    server: CartServer, uid: str, other: dict[str, object], message: str
) -> None:
    answer = server.post(uid, entry("foo.txt", "x"), other)
    assert answer.status == 400
    assert message in answer.json["message"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/..", 400),
        ("/%2e%2e", 400),
        ("/a%2fb", 400),
        ("/a/b", 404),
        ("//etc/passwd", 400),
        ("/a%00b", 400),
        ("/a%0d%0ab", 400),
        ("/carts", 400),
        ("/metrics", 400),
        (f"/{'x' * 129}", 400),
    ],
)
def test_uids_that_cannot_be(server: CartServer, path: str, status: int) -> None:
    before = [cart["uid"] for cart in server.curl(path="/carts").json["carts"]]
    body = server.directory / "list.json"
    body.write_text(json.dumps({"fileids": [FOO]}))
    answer = server.curl("--data-binary", f"@{body}", path=path)
    assert answer.status == status
    assert answer.body
    assert [cart["uid"] for cart in server.curl(path="/carts").json["carts"]] == before


def test_messages_in_headers_are_one_line(server: CartServer) -> None:
    head = server.curl("-I", "-X", "HEAD", path="/a%0d%0aSet-Cookie:%20x")
    assert head.status == 404
    assert "set-cookie" not in head.headers


def test_log_lines_cannot_be_forged(server: CartServer) -> None:
    server.curl(path="/a%0a2026-01-01%20INFO%20127.0.0.1%20-%20DELETE%20/x%20200")
    assert not [line for line in server.said().splitlines() if line.startswith("2026-01-01 INFO")]
    assert r"/a\n2026-01-01 INFO" in server.said()


def test_links_do_not_lead_out_of_an_archive(server: CartServer, uid: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (server.directory / "files/link").symlink_to(secret)
    (server.directory / "files/dir").symlink_to(tmp_path)
    for number, name in enumerate(("link", "dir/secret", "data")):
        server.post(f"{uid}-{number}", entry(name, "x"))
        status = server.settled(f"{uid}-{number}")
        assert status["status"] == "error"
        assert f"there is no file {name} in" in status["error"]


def test_sums_are_checked(server: CartServer, uid: str) -> None:
    right = entry("foo.txt", "a", hashtype="MD5", hashsum="B1946AC92492D2347C6235B4D2611184")
    shake = entry("foo.txt", "c", hashtype="shake_128", hashsum="aabb")
    wrong = entry("foo.txt", "b/x", hashtype="sha256", hashsum="0" * 64)
    server.post(uid, right, wrong, shake)
    status = server.settled(uid)
    assert status["status"] == "error"
    assert [file["status"] for file in status["files"]] == ["staged", "error", "error"]
    actual = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    said = f"b/x (foo.txt): the sha256 is {actual}, not {'0' * 64} as the list says"
    assert said in status["error"]
    assert said in status["files"][1]["error"]
    head = server.curl("-I", "-X", "HEAD", path=f"/{uid}")
    assert (head.status, head.headers["x-pacifica-status"]) == (500, "error")
    assert said in head.headers["x-pacifica-message"]
    assert server.curl(path=f"/{uid}").status == 500


def test_an_empty_sum_is_not_compared_whatever_the_type(server: CartServer, uid: str) -> None:
    server.post(uid, entry("foo.txt", "a", hashtype="none", hashsum=""))
    assert server.settled(uid)["status"] == "ready"


def test_all_that_is_missing_is_named(server: CartServer, uid: str) -> None:
    server.post(uid, entry("no-1", "a"), FOO, entry("no-2", "b"))
    error = server.settled(uid)["error"]
    assert "there is no file no-1 in" in error
    assert "there is no file no-2 in" in error


def test_bodies_have_a_limit(server: CartServer, uid: str) -> None:
    answer = server.post_raw(uid, b" " * (9 << 20))
    assert answer.status == 413
    assert answer.json["status"].startswith("413 ")


def test_answers_have_headers_of_security(server: CartServer) -> None:
    for path in ("/", "/none", "/carts"):
        headers = server.curl(path=path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["server"] == "statepool"
