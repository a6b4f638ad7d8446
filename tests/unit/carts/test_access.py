"""Who may do what: tokens, proxies, owners, pages of other sites; TLS."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.carts import CartServer
from tests.unit.carts.conftest import start
from tests.unit.carts.test_cartd import FOO, entry

from statepool.carts.auth import add_token
from statepool.carts.database import Database


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CartServer]:
    """One that is asked from other hosts, with the address of which this host is asked, too."""
    with ExitStack() as stack:
        directory = tmp_path_factory.mktemp("server")
        settings = 'trust-header = "X-User"\ntrusted-proxies = ["127.0.0.2/32"]\n'
        yield start(stack, directory, "--address", "0.0.0.0", settings=settings)


@pytest.fixture(scope="module")
def tokens(server: CartServer) -> dict[str, str]:
    database = Database(f"sqlite:///{server.directory}/carts/carts.sqlite")
    return {
        "anna": add_token(database, "anna", write=True, objects="*"),
        "bert": add_token(database, "bert", write=True, objects="foo*"),
        "rita": add_token(database, "rita", write=False, objects="*"),
    }


def bearer(token: str) -> tuple[str, str]:
    return "-H", f"Authorization: Bearer {token}"


@pytest.fixture
def local(server: CartServer) -> CartServer:
    server.url = server.url.replace("0.0.0.0", "127.0.0.1")
    return server


def test_nobody_without_a_token(local: CartServer) -> None:
    for path in ("/", "/carts", "/x", "/x/status", "/metrics", "/pools/store/"):
        answer = local.curl(path=path)
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert local.curl("-d", "{}", path="/x").status == 401
    assert local.curl("-X", "DELETE", path="/x").status == 401
    assert local.curl(*bearer("wrong"), path="/carts").status == 401
    assert local.curl(path="/healthz").status == 200
    assert "tokens pass unencrypted" in local.said()


def test_carts_belong_to_who_made_them(local: CartServer, tokens: dict[str, str]) -> None:
    body = '{"fileids": []}'
    anna, bert, rita = (bearer(tokens[name]) for name in ("anna", "bert", "rita"))
    assert local.curl("-d", body, *anna, path="/shared-uid").status == 201
    assert local.curl(*bert, path="/shared-uid").status == 404
    assert local.curl("-X", "DELETE", *bert, path="/shared-uid").status == 404
    assert local.curl(*rita, path="/shared-uid/status").status == 404
    assert local.curl(*bert, path="/carts").json == {"carts": []}
    assert local.curl("-d", body, *bert, path="/shared-uid").status == 201
    assert local.curl("-X", "DELETE", *bert, path="/shared-uid").status == 200
    assert local.curl(*anna, path="/shared-uid/status").json["owner"] == "anna"
    basic = ("-u", f"anna:{tokens['anna']}")
    assert local.curl(*basic, path="/shared-uid/status").status == 200


def test_what_a_token_may(local: CartServer, tokens: dict[str, str]) -> None:
    reads = local.curl("-d", '{"fileids": []}', *bearer(tokens["rita"]), path="/r")
    assert reads.status == 403
    assert reads.json["message"] == "this token may only read"
    assert local.curl("-X", "DELETE", *bearer(tokens["rita"]), path="/r").status == 403
    for name, status in (("foo.txt", 201), ("baz.ini", 403)):
        body = f'{{"fileids": [{{"id": "{name}", "path": "x", "hashtype": "", "hashsum": ""}}]}}'
        answer = local.curl("-d", body, *bearer(tokens["bert"]), path=f"/{name}")
        assert answer.status == status
    assert "baz.ini is not permitted to this token" in answer.json["message"]
    assert local.curl(*bearer(tokens["bert"]), path="/pools/store/").status == 403


def test_only_a_declared_proxy_says_who_the_user_is(local: CartServer) -> None:
    user = ("-H", "X-User: carl")
    assert local.curl(*user, path="/carts").status == 401
    proxy = ("--interface", "127.0.0.2")
    assert local.curl(*proxy, path="/carts").status == 401
    assert local.curl(*proxy, *user, path="/carts").status == 200
    assert local.curl(*proxy, "-H", "X-User: carl\x1b", path="/carts").status == 401


def test_open_only_to_this_host(serve: Callable[..., CartServer]) -> None:
    server = serve()
    port = server.url.rpartition(":")[2]
    for header in (
        "Host: evil.example",
        f"Host: evil.example:{port}",
        "X-Forwarded-For: 192.0.2.1",
        "Origin: http://evil.example",
        "Sec-Fetch-Site: cross-site",
        "Authorization: Bearer wrong",
    ):
        answer = server.curl("-H", header, "-d", '{"fileids": []}', path="/x")
        assert answer.status in (401, 403), header
    assert server.curl("-H", f"Host: localhost:{port}", path="/carts").json == {"carts": []}
    assert server.curl("-H", f"Origin: {server.url}", path="/carts").status == 200


def test_limits(serve: Callable[..., CartServer]) -> None:
    server = serve(settings="max-files = 2\nmax-carts = 2\nheader-timeout = 1\ntimeout = 1\n")
    many = server.post("x", FOO, entry("foo.txt", "b"), entry("foo.txt", "c"))
    assert "3 files are more than a cart can have: 2" in many.json["message"]
    for uid in ("a", "b"):
        assert server.post(uid, FOO).status == 201
    full = server.post("c", FOO)
    assert full.status == 403
    assert "there are 2 carts of yours" in full.json["message"]
    server.settled("a")
    server.curl("-X", "DELETE", path="/a")
    assert server.post("c", FOO).status == 201
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.settimeout(60)
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        answer = b""
        try:
            while True:  # as slowly as it likes: it has a second for all
                client.sendall(b"x")
                answer = client.recv(100)
                break
        except OSError:
            pass
        assert answer == b"" or b"408" in answer
    assert server.curl("-H", f"X: {'x' * 40_000}", path="/").status == 413


def test_the_directory_is_nobody_elses(serve: Callable[..., CartServer], tmp_path: Path) -> None:
    server = serve()
    server.post("one", FOO, bundle=True)
    server.settled("one")
    for path in (tmp_path / "carts").rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o077 == 0 or path.name.startswith("carts.sqlite"), path
    assert (tmp_path / "carts").stat().st_mode & 0o777 == 0o700


def test_tls(serve: Callable[..., CartServer], tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed (Debian: openssl)")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2"
    subprocess.run(
        [*make.split(), "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    server = serve("--certificate", "cert.pem", "--key", "key.pem")
    assert server.url.startswith("https://")
    assert server.curl("--cacert", tmp_path / "cert.pem").status == 200
    server.post_raw("one", b'{"fileids": []}', "--cacert", str(tmp_path / "cert.pem"))
    with pytest.raises(ssl.SSLError):
        ssl.get_server_certificate(
            ("127.0.0.1", int(server.url.rpartition(":")[2])),
            ssl_version=ssl.PROTOCOL_TLS_CLIENT,
            ca_certs="/dev/null",
        )
