"""The page as HTML: what it tells, what its forms do, and for whom."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from tests.support.carts import until
from tests.support.pages import HTML
from tests.unit.carts.conftest import RAM, qemu
from tests.unit.carts.test_cartd import content

pytest.importorskip("flask", reason="the service is not installed: pip install statepool[serve]")

from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from statepool import Config
from statepool.carts.auth import add_token, remove_token
from statepool.carts.database import Cart, File
from statepool.carts.runner import Runner
from statepool.carts.server import make_application
from statepool.carts.service import Service, open_service
from statepool.carts.settings import from_layers

LOAD = 100_000
"""Bytes that the page may have, with all that it is drawn with."""

HTML_ONLY = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}

SETTINGS = """
cache = "{directory}/cache"
sources = ["{pool}"]
[serve]
directory = "{directory}/carts"
pause = 0
tries = 1
"""


@frozen
class Browser:
    """A client that says that it reads HTML, and keeps cookies."""

    client: FlaskClient

    def open(self, path: str, status: int = 200, **more: Any) -> HTML:
        answer = self.client.get(path, headers=HTML_ONLY, **more)
        assert answer.status_code == status, answer.text
        assert answer.mimetype == "text/html"
        return HTML(answer.text)

    def fetch(self, path: str, **headers: str) -> TestResponse:
        """:returns: a file, which is closed by then"""
        with self.client.get(path, headers=headers) as answer:
            answer.get_data()
            return answer

    def send(self, page: HTML, action: str, headers: Any = (), **fields: Any) -> TestResponse:
        """Send a form as it is, but for these fields."""
        form = page.form(action)
        assert form.method == "post"
        given = {**form.fields, **fields}
        return self.client.post(action, data=given, headers={**HTML_ONLY, **dict(headers)})

    def settled(self, uid: str) -> HTML:
        """:returns: the page of a cart once nothing more happens to it"""

        def look() -> HTML | None:
            page = self.open(f"/page/cart/{uid}")
            return page if "refresh" not in page.source else None

        found: HTML = until(look)
        return found


@frozen
class Site:
    """The service in this process."""

    service: Service
    app: Flask

    def browser(self, token: str | None = None) -> Browser:
        """:returns: one that has nothing of others, and has signed in with a token"""
        browser = Browser(self.app.test_client())
        if token is not None:
            page = HTML(browser.client.get("/page/login").text)
            assert browser.send(page, "/page/login", token=token).status_code == 303
        return browser


@contextmanager
def run_site(directory: Path, pool: Path, *, open_here: bool = True) -> Iterator[Site]:
    file = directory / "settings.toml"
    file.write_text(SETTINGS.format(directory=directory, pool=pool))
    config = Config.load(config_file=file)
    service = open_service(from_layers(config.serve), config)
    runner = Runner(service)
    app = make_application(service, runner, open_here=open_here)
    assert isinstance(app, Flask)
    runner.start()
    try:
        yield Site(service, app)
    finally:
        assert runner.stop(60)


@pytest.fixture
def site(tmp_path: Path, pool: Path, stack: ExitStack) -> Site:
    return stack.enter_context(run_site(tmp_path, pool))


@pytest.fixture
def closed(tmp_path: Path, pool: Path, stack: ExitStack) -> Site:
    """One that wants to know who asks."""
    return stack.enter_context(run_site(tmp_path, pool, open_here=False))


@pytest.fixture
def browser(site: Site) -> Browser:
    return site.browser()


@pytest.fixture
def token(closed: Site) -> Callable[..., str]:
    def add(name: str, *, write: bool = True, objects: str = "*") -> str:
        return add_token(closed.service.database, name, write=write, objects=objects)

    return add


# -- looking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accept", [None, "*/*", "application/json", "application/json, text/html;q=0.9"]
)
def test_clients_of_cartd_are_greeted(browser: Browser, accept: str | None) -> None:
    headers = {} if accept is None else {"Accept": accept}
    answer = browser.client.get("/", headers=headers)
    assert answer.json == {"message": "Pacifica Cartd Interface Up and Running"}


def test_states_are_trees(browser: Browser, pool: Path) -> None:
    page = browser.open("/")
    assert page.form("/page/cart").boxes["state"] == [
        "vm1/on",
        "vm1/disk/install",
        "vm1/disk/customize",
        "vm1/disk/on",
    ]
    assert [page.depths[f"vm1/disk/{name}"] for name in ("install", "customize", "on")] == [1, 2, 3]
    assert "3 stand on it" in page.text
    assert "os=debian-12" in page.text
    assert f"file://{pool}" in page.text
    assert "<script>alert" not in page.source


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("CUSTOM", ["customize"]),
        ("debian disk/", ["customize"]),
        ("vm1/disk", ["install", "customize", "on"]),
        ("vm1/disk/on", ["on"]),
        ("debian none", []),
        ("<b>", []),
    ],
)
def test_states_are_searched(browser: Browser, words: str, found: list[str]) -> None:
    page = browser.open("/", query_string={"q": words})
    boxes = page.form("/page/cart").boxes.get("state", [])
    assert boxes == [f"vm1/disk/{name}" for name in found]
    assert f"{len(found)} with" in page.text
    if found == ["on"]:
        assert "on customize" in page.text
    assert "<b>" not in page.source.replace('<b class="', "")


def test_a_state_says_what_it_is_made_from(browser: Browser) -> None:
    page = browser.open("/page/state/vm1/disk/customize")
    assert "Made from vm1/disk/install" in page.text
    assert "Stand on it vm1/disk/on , vm1/on" in page.text
    assert "note=<script>alert(1)</script>" in page.text
    assert [tag for tag, _ in page.tags if tag in ("circle", "path")].count("circle") == 3
    machine = browser.open("/page/state/vm1/on")
    assert "Made from vm1/disk/on" in machine.text
    for name in ("vm1/disk/none", "vm1", "none", "vm1/disk/../on"):
        assert "there is no state" in browser.open(f"/page/state/{name}", 404).text


def test_pools_that_cannot_be_asked_are_told(tmp_path: Path, stack: ExitStack) -> None:
    site = stack.enter_context(run_site(tmp_path, tmp_path / "none"))
    page = site.browser().open("/")
    assert "none is not a pool" in page.text
    assert "There are none." in page.text


def test_room_is_a_bar(browser: Browser) -> None:
    page = browser.open("/")
    bars = [found for tag, found in page.tags if tag == "rect"]
    assert [bar["class"] for bar in bars] == ["other", "kept", "evictable", "free"]
    assert sum(float(bar["width"]) for bar in bars) == pytest.approx(100, abs=0.1)


def test_what_browsers_are_told_to_keep_to(browser: Browser, site: Site) -> None:
    browser.send(browser.open("/"), "/page/cart", state="vm1/disk/none", uid="one")
    browser.settled("one")
    for path in ("/", "/page/live", "/page/cart/one", "/page/state/vm1/on", "/page/login"):
        answer = browser.client.get(path, headers=HTML_ONLY)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers.getlist("X-Content-Type-Options") == ["nosniff"]
        for tag, found in HTML(answer.text).tags:
            assert tag != "style"
            assert tag != "script" or found["src"] == "/page/page.js"
            assert not [name for name in found if name == "style" or name.startswith("on")]
            for place in (found.get("href"), found.get("src"), found.get("action")):
                assert place is None or re.match(r"/(?!/)|[?#]", place), place


def test_files_of_the_package(browser: Browser) -> None:
    for name, kind in (("style.css", "text/css"), ("icon.svg", "image/svg+xml")):
        answer = browser.fetch(f"/page/{name}")
        assert (answer.status_code, answer.mimetype) == (200, kind)
        again = browser.fetch(f"/page/{name}", **{"If-None-Match": answer.headers["ETag"]})
        assert again.status_code == 304
    assert "javascript" in browser.fetch("/page/page.js").mimetype
    for name in ("base.html", "../page.py", "%2e%2e/page.py"):
        assert browser.fetch(f"/page/{name}").status_code == 404


# -- filling, downloading, deleting ----------------------------------------------------------------


def test_a_cart_from_nothing_to_its_end(browser: Browser) -> None:
    sent = browser.send(
        browser.open("/"), "/page/cart", state=["vm1/disk/customize", "vm1/on"], chain="on"
    )
    assert sent.status_code == 303
    uid = sent.headers["Location"].removeprefix("/page/cart/")
    assert re.fullmatch("customize-[0-9a-f]{16}", uid)
    page = browser.settled(uid)
    assert "This cart is ready" in page.text
    place = page.links[f"get-{uid}"]
    answer = browser.fetch(place)
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{uid}.tar"'
    disks = {f"{uid}/vm1/on/disk/{name}.qcow2" for name in ("install", "customize", "on")}
    chain = {f"{uid}/vm1/disk/{name}.qcow2" for name in ("install", "customize")}
    found = content(answer.data)
    assert set(found) == {f"{uid}/vm1/on/on.state", *disks, *chain}
    assert found[f"{uid}/vm1/on/on.state"] == RAM
    home = browser.open("/")
    assert home.links[f"get-{uid}"] == place
    assert browser.send(home, f"/page/cart/{uid}/delete").headers["Location"] == "/"
    assert uid not in browser.open("/").source
    assert f"No cart with uid {uid}" in browser.open(f"/page/cart/{uid}", 404).text


def test_a_cart_without_what_backs_its_states(browser: Browser) -> None:
    browser.send(browser.open("/"), "/page/cart", state="vm1/disk/customize", uid=" mine ")
    page = browser.settled("mine")
    assert "1 of 1 are here" in page.text
    assert list(content(browser.fetch("/mine").data)) == ["mine/vm1/disk/customize.qcow2"]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, 400, "no state is chosen"),
        ({"state": "vm1/disk/on", "uid": "../x"}, 400, "cannot be the uid of a cart"),
        ({"state": "vm1/disk/on", "uid": "page"}, 400, "cannot be the uid of a cart"),
        ({"state": "vm1/disk/../on"}, 400, "is not a valid name"),
        ({"state": "<b>/disk/on"}, 400, "'<b>' is not a valid name"),
        ({"state": ["vm1/disk/on"] * 2}, 400, "would both be at"),
        ({"state": "vm1/disk/on", "uid": "taken"}, 409, "of another list"),
    ],
)
def test_carts_that_cannot_be(
    browser: Browser, fields: dict[str, Any], status: int, message: str
) -> None:
    browser.send(browser.open("/"), "/page/cart", state="vm1/disk/install", uid="taken")
    answer = browser.send(browser.open("/"), "/page/cart", **fields)
    assert answer.status_code == status
    assert message in HTML(answer.text).text
    assert [one["uid"] for one in browser.client.get("/carts").json["carts"]] == ["taken"]  # type: ignore[index]


def test_a_cart_in_error_is_tried_again(browser: Browser, tmp_path: Path, pool: Path) -> None:
    other = shutil.copytree(pool, tmp_path / "copy", symlinks=True)
    with run_site(tmp_path, other) as site:
        mine = site.browser()
        page = mine.open("/")
        other.rename(tmp_path / "gone")
        mine.send(page, "/page/cart", state="vm1/disk/install", uid="one")
        failed = mine.settled("one")
        assert "This cart is error" in failed.text
        assert "get-one" not in failed.links
        (tmp_path / "gone").rename(other)
        assert mine.send(failed, "/page/cart/one/again").status_code == 303
        until(lambda: "This cart is ready" in mine.open("/page/cart/one").text)


def test_progress_is_shown_while_there_is_some(site: Site, browser: Browser) -> None:
    with site.service.database.session(write=True):
        cart = Cart.create(cart_uid="slow", status="staging", attempts=9)
        File.create(
            cart=cart, file_name="a", bundle_path="a", size=4096, done=1024, status="staging"
        )
        File.create(cart=cart, file_name="b", bundle_path="b", size=4096, status="staging")
    held = site.service.volume.hold(cart.id)
    with held:  # as by a process that fills it
        page = browser.open("/page/cart/slow")
        assert "1.0 KiB of 8.0 KiB" in page.text
        assert '<noscript><meta http-equiv="refresh"' in page.source
        bars = [found for tag, found in page.tags if tag == "progress"]
        assert (bars[0]["value"], bars[0]["max"]) == ("1024", "8192")
        live = browser.open("/page/live")
        assert "Transfers under way" in live.text
        assert "1.0 KiB of 4.0 KiB" in live.text
        assert "1 file waited for" in live.text
        assert [found["data-seconds"] for _, found in live.tags if "data-seconds" in found] == ["1"]
        browser.send(live, "/page/cart/slow/delete")
    assert "slow" not in browser.open("/page/live").text


def test_downloads_are_shown_while_they_last(browser: Browser) -> None:
    browser.send(browser.open("/"), "/page/cart", state="vm1/disk/install", uid="one")
    browser.settled("one")
    with browser.client.get("/one", headers={"Range": "bytes=512-"}, buffered=False) as answer:
        next(answer.iter_encoded())
        assert re.search(r"Download of one [0-9.]+ [KM]?i?B of", browser.open("/page/live").text)
        for _ in answer.iter_encoded():
            pass
    assert "Transfers under way" not in browser.open("/page/live").text


# -- who may ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:1"},
        {"Origin": "null"},
    ],
)
def test_forms_of_other_sites(browser: Browser, headers: dict[str, str]) -> None:
    page = browser.open("/")
    answer = browser.send(page, "/page/cart", headers, state="vm1/disk/on")
    assert answer.status_code == 403
    assert browser.client.get("/carts").json == {"carts": []}
    own = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    assert browser.send(page, "/page/cart", own, state="vm1/disk/on").status_code == 303


def test_forms_of_other_sites_with_a_token(closed: Site, token: Callable[..., str]) -> None:
    browser = closed.browser(token("anna"))
    page = browser.open("/")
    for origin in ("http://evil.example", "null", "http://[", "http://localhost:1", "localhost"):
        for more in ({}, {"Host": "["}):
            headers = {"Origin": origin, **more}
            answer = browser.send(page, "/page/cart", headers, state="vm1/disk/install")
            assert answer.status_code == 403, headers
    own = {"Origin": "https://localhost"}  # a proxy may end TLS
    assert browser.send(page, "/page/cart", own, state="vm1/disk/install").status_code == 303


def test_links_of_other_sites_lead_here(browser: Browser) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
    assert browser.client.get("/", headers={**HTML_ONLY, **link}).status_code == 200
    for kind in ("iframe", "empty", "image"):
        asked = {**HTML_ONLY, **link, "Sec-Fetch-Dest": kind}
        assert browser.client.get("/", headers=asked).status_code == 403
    assert browser.client.post("/one", data='{"fileids": []}', headers=link).status_code == 403


def test_forms_without_their_key(site: Site, browser: Browser) -> None:
    other = site.browser().open("/").form("/page/cart").fields["key"]
    page = browser.open("/")
    for key in ("", "x", "\u00e9", other):
        answer = browser.send(page, "/page/cart", state="vm1/disk/on", key=key)
        assert answer.status_code == 403
        assert "load the page once more" in answer.text
    stranger = Browser(site.app.test_client())
    assert stranger.send(page, "/page/cart", state="vm1/disk/on").status_code == 403
    browser.send(page, "/page/cart", state="vm1/disk/on", uid="one")
    for action in ("delete", "again"):
        assert browser.client.post(f"/page/cart/one/{action}").status_code == 403
        assert browser.client.get(f"/page/cart/one/{action}").status_code == 405
    assert len(browser.client.get("/carts").json["carts"]) == 1  # type: ignore[index]


def test_a_token_opens_the_page(closed: Site, token: Callable[..., str]) -> None:
    anna = token("anna")
    browser = closed.browser()
    answer = browser.client.get("/", headers=HTML_ONLY)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    wrong = browser.send(HTML(answer.text), "/page/login", token="wrong")
    assert wrong.status_code == 401
    assert "the token is not known" in wrong.text
    right = browser.send(HTML(wrong.text), "/page/login", token=f" {anna} ")
    cookie = right.headers["Set-Cookie"]
    assert cookie.startswith(f"statepool-token={anna};")
    assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    page = browser.open("/")
    assert "anna" in page.text
    browser.send(page, "/page/cart", state="vm1/disk/install", uid="one")
    browser.settled("one")
    assert browser.fetch("/one").status_code == 200
    assert browser.client.get("/one/status").json["owner"] == "anna"  # type: ignore[index]
    browser.send(page, "/page/logout")
    browser.open("/", 401)
    assert browser.client.get("/one").status_code == 401


def test_the_cookie_is_for_nothing_but_looking_and_forms(
    closed: Site, token: Callable[..., str]
) -> None:
    browser = closed.browser(token("anna"))
    listed = json.dumps({"fileids": []})
    assert browser.client.post("/one", data=listed).status_code == 401
    bearer = {"Authorization": f"Bearer {token('bert')}"}
    assert browser.client.post("/two", data=listed, headers=bearer).status_code == 201
    assert browser.client.delete("/two").status_code == 401
    assert browser.client.get("/two/status").status_code == 404
    remove_token(closed.service.database, "anna")
    assert "a token is needed" in browser.open("/", 401).text


def test_over_tls_the_cookie_stays_there(closed: Site, token: Callable[..., str]) -> None:
    client = closed.app.test_client()
    page = HTML(client.get("/page/login", base_url="https://localhost").text)
    data = {**page.form("/page/login").fields, "token": token("anna")}
    answer = client.post("/page/login", data=data, base_url="https://localhost")
    assert "Secure" in answer.headers["Set-Cookie"]


def test_who_may_only_look_has_no_forms(closed: Site, token: Callable[..., str]) -> None:
    rita = closed.browser(token("rita", write=False))
    page = rita.open("/")
    assert page.form("/page/cart").boxes == {}
    assert "button" not in [tag for tag, _ in page.tags if "Put into" in page.text]
    answer = rita.send(page, "/page/cart", state="vm1/disk/on")
    assert answer.status_code == 403
    assert "this token may only read" in answer.text


def test_what_is_not_permitted_is_not_shown(closed: Site, token: Callable[..., str]) -> None:
    bert = closed.browser(token("bert", objects="vm1/disk/i*"))
    page = bert.open("/")
    assert page.form("/page/cart").boxes["state"] == ["vm1/disk/install"]
    assert "customize" not in page.source
    bert.open("/page/state/vm1/disk/customize", 404)
    assert bert.send(page, "/page/cart", state="vm1/disk/customize").status_code == 403
    anna = closed.browser(token("anna"))
    anna.send(anna.open("/"), "/page/cart", state="vm1/disk/install", uid="hers")
    assert "hers" not in bert.open("/").source
    bert.open("/page/cart/hers", 404)
    key = bert.open("/").form("/page/cart").fields["key"]
    for action in ("delete", "again"):
        answer = bert.client.post(f"/page/cart/hers/{action}", data={"key": key})
        assert answer.status_code == 404
    assert "hers" in anna.open("/").source


# -- much ------------------------------------------------------------------------------------------


def load(browser: Browser, path: str) -> int:
    """:returns: bytes of a page with all that it is drawn with"""
    page = browser.open(path)
    tags = [found for tag, found in page.tags if tag in ("link", "script")]
    places = {found.get("src") or found["href"] for found in tags}
    assert len(places) == 3
    return sum(len(browser.fetch(place).data) for place in places) + len(page.source.encode())


def test_ten_thousand_carts(site: Site, browser: Browser) -> None:
    error = "cannot be had " * 500
    rows = [
        {"cart_uid": f"cart-{number}-{'x' * 100}", "status": "error", "error": error, "size": 7}
        for number in range(10_000)
    ]
    with site.service.database.session(write=True):
        for start in range(0, len(rows), 500):
            Cart.insert_many(rows[start : start + 500]).execute()
    page = browser.open("/")
    shown = [name for name in page.links if name.startswith("cart-")]
    assert len(shown) == 20
    assert "1 to 20 of 10000" in page.text
    assert load(browser, "/") < LOAD
    older = browser.open(page.links["carts-older"])
    assert not set(shown) & set(older.links)
    assert older.links["carts-newer"].startswith("/?carts=0")
    assert "There are none from here on" in browser.open("/?carts=99999").text
    for odd in ("-1", "x", "9" * 50, "²"):
        assert "1 to 20 of 10000" in browser.open("/", query_string={"carts": odd}).text


def test_thousands_of_states_and_files(tmp_path: Path, stack: ExitStack) -> None:
    image = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    place = tmp_path / "pool" / "vm1" / "disk"
    place.mkdir(parents=True)
    names = [f"{number:04}-{'x' * 100}" for number in range(2000)]
    for name in names:
        (place / f"{name}.qcow2").hardlink_to(image)
    site = stack.enter_context(run_site(tmp_path, tmp_path / "pool"))
    browser = site.browser()
    seen: list[str] = []
    path = "/"
    while path:
        page = browser.open(path)
        seen += page.form("/page/cart").boxes["state"]
        following = re.search(r'href="([^"]*from=[0-9]+#states)"', page.source)
        path = following[1].replace("&amp;", "&") if following else ""
    assert seen == [f"vm1/disk/{name}" for name in names]
    assert load(browser, "/") < LOAD
    assert load(browser, f"/page/state/{seen[1000]}") < LOAD
    with site.service.database.session(write=True):
        cart = Cart.create(cart_uid="many", status="ready")
        rows = [
            {"cart": cart, "bundle_path": f"{n:05}/{'y' * 900}", "file_name": "z" * 900, "size": 1}
            for n in range(5000)
        ]
        for start in range(0, len(rows), 100):
            File.insert_many(rows[start : start + 100]).execute()
    assert "1 to 100 of 5000" in browser.open("/page/cart/many").text
    assert "4901 to 5000 of 5000" in browser.open("/page/cart/many?from=4900").text
    assert load(browser, "/page/cart/many") < LOAD
