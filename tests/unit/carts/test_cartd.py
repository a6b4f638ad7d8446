"""The interface of Cartd: the commands of its documentation, and what clients rely on."""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.carts import CartServer, FakeInterface, until
from tests.unit.carts.conftest import FILES


def entry(name: str, path: str, **more: object) -> dict[str, object]:
    return {"id": name, "path": path, "hashtype": "md5", "hashsum": "", **more}


FOO = entry("foo.txt", "1/2/3/foo.txt")
BAR = entry("data/bar.csv", "1/2/3/bar.csv")
BAZ = entry("baz.ini", "2/3/4/baz.ini")


def content(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_greeting(server: CartServer) -> None:
    answer = server.curl()
    assert answer.status == 200
    assert answer.json == {"message": "Pacifica Cartd Interface Up and Running"}


@pytest.mark.parametrize("bundle", [True, False])
def test_the_commands_of_its_documentation(
    server: CartServer, uid: str, tmp_path: Path, bundle: bool
) -> None:
    posted = server.post(uid, FOO, BAR, BAZ, bundle=bundle)
    assert posted.status == 201
    assert posted.json == {"message": "Cart Processing has begun"}
    server.settled(uid)
    head = server.curl("-I", "-X", "HEAD", path=f"/{uid}")
    assert head.status == 204
    assert head.headers["x-pacifica-status"] == "ready"
    assert head.headers["x-pacifica-message"] == ""
    save = ["curl", "-sS", "-O", "-J", f"{server.url}/{uid}?filename=my_cart.tar"]
    subprocess.run(save, cwd=tmp_path, check=True)
    subprocess.run(["tar", "xf", "my_cart.tar"], cwd=tmp_path, check=True)
    assert (tmp_path / f"{uid}/1/2/3/foo.txt").read_bytes() == FILES["foo.txt"]
    assert (tmp_path / f"{uid}/1/2/3/bar.csv").read_bytes() == FILES["data/bar.csv"]
    assert (tmp_path / f"{uid}/2/3/4/baz.ini").read_bytes() == FILES["baz.ini"]
    deleted = server.curl("-X", "DELETE", path=f"/{uid}")
    assert deleted.status == 200
    assert deleted.json == {"message": "Cart Deleted Successfully"}
    assert server.curl("-X", "DELETE", path=f"/{uid}").status == 404
    assert server.curl(path=f"/{uid}").status == 404
    assert not list(server.directory.glob(f"carts/*/{uid}*"))


@pytest.mark.parametrize("form", [("-d", "@body.json"), ("-H", "Content-Type: application/json")])
def test_lists_are_taken_whatever_their_type(
    server: CartServer, uid: str, form: tuple[str, str]
) -> None:
    body = b'{"fileids": [{"id": "foo.txt", "path": "foo.txt", "hashtype": "md5", "hashsum": ""}]}'
    if form[0] == "-d":
        (server.directory / "body.json").write_bytes(body)
        assert server.curl(*form, path=f"/{uid}").status == 201
    else:
        assert server.post_raw(uid, body, *form).status == 201
    assert server.settled(uid)["status"] == "ready"


def test_chunked_lists_are_taken(server: CartServer, uid: str) -> None:
    body = '{"fileids": []}'
    program = f"printf '{body}' | curl -sS -i -X POST -T - {server.url}/{uid}"
    done = subprocess.run(["sh", "-c", program], capture_output=True, check=True)
    assert b"201 Created" in done.stdout, done.stdout
    assert server.settled(uid)["status"] == "ready"
    assert content(server.download(uid)) == {}


def test_default_name_is_the_time(server: CartServer, uid: str) -> None:
    server.post(uid, FOO)
    server.settled(uid)
    named = server.curl(path=f"/{uid}").headers["content-disposition"]
    when = "[0-9]{4}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{2}_[0-9]{2}"
    assert re.fullmatch(f'attachment; filename="data_{when}.tar"', named)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("x.tar", 'filename="x.tar"'),
        ("../../etc/passwd", 'filename="passwd"'),
        (".bashrc", 'filename="bashrc"'),
        ("a%22%0d%0aSet-Cookie:%20x", 'filename="a___Set-Cookie: x"'),
        ("%C3%A9.tar", "filename=\"_.tar\"; filename*=UTF-8''%C3%A9.tar"),
    ],
)
def test_names_are_safe(server: CartServer, uid: str, asked: str, named: str) -> None:
    server.post(uid, FOO)
    server.settled(uid)
    answer = server.curl(path=f"/{uid}?filename={asked}")
    assert answer.headers["content-disposition"] == f"attachment; {named}"
    assert "set-cookie" not in answer.headers


def test_absent_carts_are_told_as_cartd_does(server: CartServer, uid: str) -> None:
    head = server.curl("-I", "-X", "HEAD", path="/none")
    assert head.status == 404
    assert head.headers["x-pacifica-status"] == "error"
    assert head.headers["x-pacifica-message"] == "No cart with uid none found"
    body = server.curl(path="/none").json
    assert body["status"] == "404 Not Found"
    assert set(body) == {"status", "message", "traceback", "version"}
    assert server.curl("-X", "PUT", path="/none").json["status"] == "405 Method Not Allowed"


def test_states_are_told_while_files_are_on_tape(
    serve: Callable[..., CartServer], interface: FakeInterface
) -> None:
    interface.far.add("foo.txt")
    archive = f'archives.far = {{ type = "interface", url = "{interface.url}" }}\n'
    server = serve(settings=archive)
    server.post("one", entry("foo.txt", "foo.txt", archive="far"))
    until(lambda: "HEAD foo.txt" in interface.asked)
    head = server.curl("-I", "-X", "HEAD", path="/one")
    assert (head.status, head.headers["x-pacifica-status"]) == (204, "staging")
    waiting = server.curl(path="/one")
    assert waiting.status == 202
    assert waiting.body == b"The cart is not ready for download."
    interface.far.clear()
    assert server.settled("one")["status"] == "ready"
    assert interface.asked.count("POST foo.txt") == 1
    with tarfile.open(fileobj=io.BytesIO(server.download("one"))) as tar:
        assert tar.getmember("one/foo.txt").mtime == 1_500_000_000


def test_bundling_is_told(
    serve: Callable[..., CartServer], interface: FakeInterface, tmp_path: Path
) -> None:
    """A file system that is slow to flush is not to be had: the log of the database will do."""
    server = serve()
    database = tmp_path / "carts/carts.sqlite"
    import sqlite3

    with sqlite3.connect(database) as connection:
        connection.execute("create table seen(status text)")
        connection.execute(
            "create trigger see after update of status on cart begin"
            " insert into seen values (new.status); end"
        )
    for uid, bundle in (("one", True), ("two", False)):
        server.post(uid, FOO, bundle=bundle)
        server.settled(uid)
    with sqlite3.connect(database) as connection:
        seen = [row[0] for row in connection.execute("select status from seen order by rowid")]
    assert [state for state in seen if state != "staging"] == ["bundling", "ready", "ready"]


def test_every_member_is_below_the_uid_and_the_tar_is_reproducible(
    server: CartServer, uid: str
) -> None:
    server.post(uid, FOO, BAR, bundle=True)
    server.settled(uid)
    first = server.download(uid)
    assert set(content(first)) == {f"{uid}/1/2/3/foo.txt", f"{uid}/1/2/3/bar.csv"}
    server.curl("-X", "DELETE", path=f"/{uid}")
    server.post(uid, BAR, FOO, bundle=False)
    server.settled(uid)
    assert server.download(uid) == first
