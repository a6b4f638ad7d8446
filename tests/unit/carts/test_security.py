"""
Every route of the service under every attack, as a table: which statuses come, and nothing else.

The routes are those of the application itself, so that a new one is attacked, too. The table is
printed with ``-s``; ``docs/security.rst`` has a short form of it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field, frozen
from tests.support.carts import LIMIT, CartServer, until
from tests.unit.carts.conftest import start

pytest.importorskip("flask", reason="the service is not installed: pip install statepool[serve]")

from flask import Flask

import statepool
from statepool.carts.auth import add_token
from statepool.carts.database import Database
from statepool.carts.runner import Runner
from statepool.carts.server import make_application
from statepool.carts.service import open_service
from statepool.carts.settings import from_layers

SECRET = b"a secret of this host"

PUBLIC = frozenset({"/healthz", "/readyz", "/page/login", "/page/<any(...):name>"})
"""Routes that answer without a token."""

FORMS = frozenset({"/page/login", "/page/logout"})
"""Routes that take a form of a client without a token; without its key it is refused."""


@frozen
class Route:
    """A rule of the application, with one of its methods."""

    method: str
    rule: str

    def path(self, *values: str) -> str:
        """:returns: the path with these values as its arguments, the last one for further ones"""
        given = list(values)
        return re.sub(r"<[^>]*>", lambda _: given.pop(0) if len(given) > 1 else given[0], self.rule)

    @property
    def arguments(self) -> int:
        return self.rule.count("<")

    @property
    def changes(self) -> bool:
        return self.method not in ("GET", "HEAD")

    def __str__(self) -> str:
        return f"{self.method} {self.rule}"


@frozen
class Site:
    server: CartServer
    routes: Sequence[Route]
    tokens: dict[str, str]

    @property
    def port(self) -> int:
        return int(self.server.url.rpartition(":")[2])

    def ask(
        self,
        method: str,
        path: str,
        token: str | None = None,
        headers: dict[str, str] | None = None,
        body: Any = None,
    ) -> tuple[int, bytes, str]:
        """:returns: the status, the body, and the head of an answer"""
        known = dict(headers or {})
        if token is not None:
            known["Authorization"] = f"Bearer {self.tokens[token]}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT)
        try:
            connection.request(method, path, body, known)
            answer = connection.getresponse()
            try:
                data = answer.read()
            except http.client.IncompleteRead as error:  # it was broken off
                data = error.partial
            return answer.status, data, str(answer.headers)
        finally:
            connection.close()

    def raw(self, data: bytes) -> bytes:
        """:returns: all that comes for these bytes until the connection is closed"""
        with socket.create_connection(("127.0.0.1", self.port), LIMIT) as there:
            there.sendall(data)
            with suppress(ConnectionResetError):
                return b"".join(iter(lambda: there.recv(1 << 16), b""))
        return b""


def routes_of(app: Flask) -> list[Route]:
    found = []
    for rule in app.url_map.iter_rules():
        text = re.sub(r"<any\([^)]*\)", "<any(...)", rule.rule)
        found += [Route(method, text) for method in (rule.methods or set()) - {"OPTIONS"}]
    return sorted(set(found), key=str)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service that wants tokens, with a cart of anna's that is ready, and what lies around it."""
    directory = tmp_path_factory.mktemp("server")
    (directory / "secret").write_bytes(SECRET)
    statepool.init(directory / "pool")
    (directory / "pool/link").symlink_to(directory / "secret")
    (directory / "pool/up").symlink_to(directory)
    (directory / "pool/.statepool/data/link").symlink_to(directory / "secret")
    settings = (
        'trust-header = "X-User"\ntrusted-proxies = ["127.0.0.2/32"]\n'
        f'pools = {{ store = "{directory}/pool" }}\nheader-timeout = 1\nrequests = 64\n'
    )
    other = from_layers([("", {"directory": str(directory / "other")})])
    service = open_service(other, statepool.Config(cache=str(directory / "none")))
    app = make_application(service, Runner(service), open_here=True)
    assert isinstance(app, Flask)
    with ExitStack() as stack:
        server = start(stack, directory, settings=settings)
        database = Database(f"sqlite:///{directory}/carts/carts.sqlite")
        rights = {"anna": (True, "*"), "bert": (True, "vm9/*"), "rita": (False, "*")}
        tokens = {
            name: add_token(database, name, write=write, objects=objects)
            for name, (write, objects) in rights.items()
        }
        site = Site(server, routes_of(app), tokens)
        for uid in ("mine", "spare"):
            body = json.dumps({"fileids": [{"id": "foo.txt", "path": "d/foo.txt"}]})
            assert site.ask("POST", f"/{uid}", "anna", body=body)[0] == 201
            until(lambda uid=uid: site.ask("GET", f"/{uid}", "anna")[0] == 200)
        yield site


# -- attacks ---------------------------------------------------------------------------------------

Attack = Callable[[Site, Route], Iterator[tuple[int, bytes, str]]]
"""Yields the answers to an attack on a route; none where it has no place to attack."""

REFUSED = frozenset({400, 401, 403, 404, 405, 413, 415, 431, 501})

CLIMBING = (
    "..",
    "%2e%2e",
    "%252e%252e",
    "../../secret",
    "..%2f..%2fsecret",
    "..%252f..%252fsecret",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "//etc/passwd",
    "a%00b",
    "a%0d%0aX-Evil:%20x",
    "%ff%fe",
    "..%5c..%5csecret",
    "%c0%ae%c0%ae",
    "x" * 5000,
    ".statepool/../../secret",
)

PLANTED = ("link", "up/secret", ".statepool/data/link", "link/", "up/")
"""Links in the pool that is served, which lead out of it."""


def climbing(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    if "any(" in route.rule or not route.arguments:
        return
    for text in CLIMBING:
        yield site.ask(route.method, route.path(text), "anna", body=_body(route))
        if route.arguments > 1:
            yield site.ask(route.method, route.path("store", text), "anna", body=_body(route))
    if route.rule.startswith("/pools/") and route.arguments > 1:
        for text in PLANTED:
            yield site.ask(route.method, route.path("store", text), "anna")


def _body(route: Route) -> bytes | None:
    if route.method != "POST":
        return None
    return b'{"fileids": [{"id": "foo.txt", "path": "x"}]}'


def no_token(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    yield site.ask(route.method, _plain(route), body=_body(route))


def unknown_token(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    for value in ("Bearer x", "Bearer ", "Basic eDp4", "Basic !", "Digest x", "x", "Bearer " * 999):
        headers = {"Authorization": value}
        yield site.ask(route.method, _plain(route), headers=headers, body=_body(route))
    for value in ("x", "\u00e9", ""):
        cookies = {"Cookie": f"statepool-token={value}; statepool-form={value}"}
        yield site.ask(route.method, _plain(route), headers=cookies, body=_body(route))


def forged_headers(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    for name, value in (
        ("X-User", "anna"),
        ("X-Forwarded-For", "127.0.0.2"),
        ("X-Forwarded-Host", "localhost"),
        ("X-Real-IP", "127.0.0.2"),
        ("Forwarded", "for=127.0.0.2"),
        ("X-Original-URL", "/healthz"),
        ("X-Rewrite-URL", "/healthz"),
        ("Host", "evil.example"),
        ("Host", "["),
        ("Origin", "http://["),
        ("Origin", "null"),
        ("Referer", "http://127.0.0.1/"),
    ):
        headers = {"X-User": "anna", name: value}
        yield site.ask(route.method, _plain(route), headers=headers, body=_body(route))


def read_only_token(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    if route.changes:
        yield site.ask(route.method, route.path("rita-1"), "rita", body=_body(route))


def cart_of_another(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    # A cart of the same uid is one of their own: POST makes it.
    if "<uid>" in route.rule and route != Route("POST", "/<uid>"):
        yield site.ask(route.method, route.path("mine"), "bert", body=_body(route))


def other_objects(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    if route.rule.startswith("/pools/"):
        yield site.ask(route.method, route.path("store", "pool.json"), "bert")
    if route.rule.startswith("/page/state/"):
        yield site.ask(route.method, route.path("vm1/disk/install"), "bert")
    if route == Route("POST", "/<uid>"):
        yield site.ask(route.method, "/berts", "bert", body=_body(route))


def forms_of_others(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    if route.rule.startswith("/page/") and route.changes:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        for more in ({}, {"Origin": "http://evil.example"}, {"Origin": "http://["}):
            cookies = {"Cookie": f"statepool-token={site.tokens['anna']}", **headers, **more}
            body = b"state=vm1/disk/install&key=0"
            yield site.ask(route.method, route.path("mine"), headers=cookies, body=body)


def other_method(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    for method in ("PUT", "PATCH", "TRACE", "CONNECT", "BREW", "get"):
        if Route(method, route.rule) not in site.routes:
            yield site.ask(method, _plain(route), "anna", body=_body(route))


def body_of_a_gibibyte(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    """Only as much is sent as is taken; a service that reads it all would be sent all of it."""
    if route.method != "POST":
        return
    in_chunks = "Transfer-Encoding: chunked"
    for head, first, before, after in (
        ("Content-Length: 1073741824", b"", b"", b""),
        (in_chunks, b"", b"100000\r\n", b"\r\n"),
        (in_chunks, b"40000000\r\n", b"", b""),
    ):
        chunk = before + bytes(1 << 20) + after
        with socket.create_connection(("127.0.0.1", site.port), LIMIT) as there:
            there.sendall(_head(site, route, head) + first)
            sent = 0
            with suppress(ConnectionError):
                while sent < 1 << 30 and not _answers(there):
                    there.sendall(chunk)
                    sent += len(chunk)
            data = b""
            with suppress(ConnectionError):
                data = b"".join(iter(lambda: there.recv(1 << 16), b""))
        assert sent < 64 << 20, f"{route}: {sent} bytes were taken"
        yield _parsed(data)


def _head(site: Site, route: Route, *more: str) -> bytes:
    form = route.rule.startswith("/page/")
    kind = "application/x-www-form-urlencoded" if form else "application/json"
    lines = [
        f"{route.method} {route.path('rest')} HTTP/1.1",
        f"Host: 127.0.0.1:{site.port}",
        f"Authorization: Bearer {site.tokens['anna']}",
        f"Content-Type: {kind}",
        "Connection: close",
        *more,
        "",
        "",
    ]
    return "\r\n".join(lines).encode()


def _answers(there: socket.socket) -> bool:
    there.setblocking(False)
    try:
        return bool(there.recv(1, socket.MSG_PEEK)) or True
    except BlockingIOError:
        return False
    finally:
        there.settimeout(LIMIT)


def _parsed(data: bytes) -> tuple[int, bytes, str]:
    if not data:
        return 0, b"", ""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body, head.decode("latin-1")


def a_hundred_thousand_files(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    if route.method != "POST":
        return
    if route.rule.startswith("/page/"):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        body = b"&".join(b"state=vm1/disk/s%d" % number for number in range(10**5))
        yield site.ask("POST", route.path("many"), "anna", headers, body)
    else:
        entries = [{"id": "foo.txt", "path": f"{number}"} for number in range(10**5)]
        body = json.dumps({"fileids": entries}).encode()
        yield site.ask("POST", route.path("many"), "anna", body=body)


def slow(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    """The head comes byte by byte, and does not end; of a POST, its body as well."""
    heads = [_head(site, route)[:-2] + b"X-Slow: "]
    if route.method == "POST":
        heads.append(_head(site, route, "Content-Length: 1000"))
    for head in heads:
        with socket.create_connection(("127.0.0.1", site.port), LIMIT) as there:
            there.sendall(head)
            over = threading.Event()

            def trickle(there: socket.socket = there, over: threading.Event = over) -> None:
                with suppress(OSError):
                    while not over.wait(0.2):
                        there.sendall(b"x")

            thread = threading.Thread(target=trickle)
            thread.start()
            data = b""
            with suppress(ConnectionError):
                data = b"".join(iter(lambda: there.recv(1 << 16), b""))
            over.set()
            thread.join()
        yield _parsed(data)


def injected(site: Site, route: Route) -> Iterator[tuple[int, bytes, str]]:
    """Lines for the log and for headers, in each place that is told there; and broken heads."""
    evil = "a%0d%0aX-Evil:%20x%0d%0a%0d%0a2026-01-01%20INFO%20forged"
    for query in ("filename", "q", "from", "carts"):
        status, data, head = site.ask("GET", f"{_plain(route)}?{query}={evil}", "anna")
        assert status not in (500, 502), (route, query)
        yield (400 if status in (200, 202, 405) else status), data, head  # it may be answered
    start = f"{route.method} {_plain(route)} HTTP/1.1\r\nHost: x\r\n".encode()
    for bad in (b"X\r\n Y: z\r\n\r\n", b"X Y: z\r\n\r\n", b"Content-Length: -1\r\n\r\n"):
        yield _parsed(site.raw(start + b"Connection: close\r\n" + bad))
    both = b"Connection: close\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    yield _parsed(site.raw(start + both))


def _plain(route: Route) -> str:
    return route.path("style.css") if "any(" in route.rule else route.path("mine", "x")


NOTHING = frozenset({0})
"""The connection is closed without an answer."""


@frozen
class Case:
    run: Attack
    allowed: frozenset[int]
    public: frozenset[int] = frozenset()
    """What routes that need no token may answer besides."""


CASES = {
    "no token": Case(no_token, frozenset({401}), frozenset({200, 403})),
    "unknown token": Case(unknown_token, frozenset({401}), frozenset({200, 403})),
    "forged headers": Case(forged_headers, frozenset({401}), frozenset({200, 403})),
    "read-only token": Case(read_only_token, frozenset({403})),
    "cart of another": Case(cart_of_another, frozenset({403, 404})),
    "other objects": Case(other_objects, frozenset({403, 404})),
    "form without key": Case(forms_of_others, frozenset({403})),
    "climbing": Case(climbing, frozenset({400, 403, 404, 405})),
    "other method": Case(other_method, frozenset({400, 401, 405, 501})),
    "1 GiB body": Case(body_of_a_gibibyte, NOTHING | {400, 403, 413}),
    "10^5 files": Case(a_hundred_thousand_files, frozenset({400, 403, 413})),
    "slow client": Case(slow, NOTHING | {400, 408}),
    "injection": Case(injected, NOTHING | REFUSED, frozenset({200, 403})),
}


@define
class Seen:
    rows: dict[str, dict[str, set[int]]] = field(factory=dict)


@pytest.fixture(scope="module")
def seen() -> Iterator[Seen]:
    """The statuses by route and attack, which are printed at the end."""
    seen = Seen()
    yield seen
    lines = [
        f"{route:40} {attack:20} {' '.join(str(one or 'closed') for one in sorted(statuses))}"
        for attack, rows in seen.rows.items()
        for route, statuses in rows.items()
    ]
    sys.stdout.write("\n".join(["", *lines, ""]))


@pytest.mark.parametrize("attack", CASES)
def test_every_route(site: Site, seen: Seen, attack: str) -> None:
    case, before = CASES[attack], _everything(site)
    rows = seen.rows.setdefault(attack, {})
    with ThreadPoolExecutor(len(site.routes)) as threads:  # most of them wait for a timeout
        answers = list(threads.map(lambda route: list(case.run(site, route)), site.routes))
    for route, came in zip(site.routes, answers, strict=True):
        allowed = case.allowed | (case.public if _is_public(route) else frozenset())
        for status, data, head in came:
            rows.setdefault(str(route), set()).add(status)
            assert status in allowed, (str(route), status, data[:300])
            assert SECRET not in data, str(route)
            assert "\nx-evil" not in head.lower(), str(route)
            assert "Traceback" not in data.decode(errors="replace"), str(route)
    assert rows, "nothing was attacked"
    assert _everything(site) == before
    said = site.server.said()
    assert "Traceback" not in said, said
    assert not [line for line in said.splitlines() if line.startswith("2026-01-01 INFO")]


def _is_public(route: Route) -> bool:
    return route.rule in PUBLIC | FORMS


def _everything(site: Site) -> object:
    """:returns: all carts, and all that lies around them, with its content"""
    carts = [site.ask("GET", "/carts", name)[1] for name in ("anna", "bert", "rita")]
    files = {}
    for name in ("secret", "pool", "files"):
        for path in sorted((site.server.directory / name).rglob("*")):
            files[str(path)] = path.read_bytes() if path.is_file() else os.stat(path).st_mode
    bare = [[{**cart, "used": ""} for cart in json.loads(one)["carts"]] for one in carts]
    return bare, files


@pytest.mark.parametrize("how", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_list_that_is_cut_off_makes_no_cart(site: Site, how: str) -> None:
    before = _everything(site)
    body = b'{"fileids": []}'
    data = b"f\r\n" + body + b"\r\n" if "chunked" in how else body
    with socket.create_connection(("127.0.0.1", site.port), LIMIT) as there:
        there.sendall(_head(site, Route("POST", "/<uid>"), how) + data)
        there.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: there.recv(1 << 16), b""))
    assert _parsed(answer)[0] == 400
    assert _everything(site) == before


def test_a_list_in_chunks_is_not_cut_at_the_limit(site: Site) -> None:
    head = _head(site, Route("POST", "/<uid>"), "Transfer-Encoding: chunked")
    rest = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    status, data, _ = _parsed(site.raw(head + b'f\r\n{"fileids": []}\r\n' + rest * 8))
    assert (status, json.loads(data)["status"]) == (413, "413 Request Entity Too Large")


def test_a_method_is_what_it_says(site: Site) -> None:
    for headers in (
        {"X-HTTP-Method-Override": "DELETE"},
        {"X-HTTP-Method": "DELETE"},
        {"X-Method-Override": "DELETE"},
    ):
        for path in ("/spare", "/spare?_method=DELETE"):
            assert site.ask("GET", path, "anna", headers)[0] == 200
            assert site.ask("POST", path, "anna", headers, b"_method=DELETE")[0] == 400
    assert site.ask("GET", "/spare", "anna")[0] == 200


@pytest.mark.parametrize(
    ("what", "bundle"), [("file", True), ("file", False), ("directory", False)]
)
def test_links_in_the_volume_are_not_followed(site: Site, what: str, bundle: bool) -> None:
    uid = f"link-{what}-{bundle}"
    entries = [{"id": "foo.txt", "path": "d/foo.txt"}]
    body = json.dumps({"fileids": entries, "bundle": bundle})
    assert site.ask("POST", f"/{uid}", "anna", body=body)[0] == 201
    until(lambda: site.ask("GET", f"/{uid}", "anna")[0] == 200)
    link = (site.server.directory / "carts/cartuids" / uid).resolve()
    target = site.server.directory / "planted"
    target.mkdir(exist_ok=True)
    place = link if bundle else link / "d/foo.txt" if what == "file" else link / "d"
    (target / "foo.txt").write_bytes(SECRET[: len("hello\n")])
    aside = Path(f"{target}/aside-{uid}")
    if bundle:
        aside.write_bytes((SECRET * 1000)[: place.stat().st_size])
    place.rename(f"{aside}.old")
    place.symlink_to(aside if bundle else target / "foo.txt" if what == "file" else target)
    status, data, _ = site.ask("GET", f"/{uid}", "anna")
    assert status == 404 if bundle else status in (200, 404)
    assert SECRET[:6] not in data
    assert site.ask("DELETE", f"/{uid}", "anna")[0] == 200
    assert (target / "foo.txt").exists()
