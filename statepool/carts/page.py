"""
The page: what there is, as HTML that works without scripts, and forms that fill and delete carts.

A browser sends its cookies along with whatever another site has it send, so every form has a key
that only a page of ours knows, and the cookie with a token counts for nothing else that changes
something.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from http import HTTPStatus
from itertools import groupby
from typing import Any

from flask import (
    Blueprint,
    Response,
    current_app,
    g,
    make_response,
    redirect,
    render_template,
    request,
    send_from_directory,
    url_for,
)

from statepool import Image, NotFound, UsageError, parse_object
from statepool.carts import overview
from statepool.carts.auth import COOKIE, Denied
from statepool.carts.carts import delete_cart, find_cart, make_cart, retry_cart
from statepool.carts.lists import check_uid, parse_request
from statepool.carts.parts import reading, the_identity, the_parts
from statepool.carts.settings import POOLS
from statepool.carts.trees import Placed, States, nested

OPEN = frozenset(
    {"/page/login", "/page/logout", "/page/style.css", "/page/page.js", "/page/icon.svg"}
)
"""Paths that need no token."""

_FORM = "statepool-form"
"""The cookie from which the keys of forms are made if no user has signed in."""

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self';"
        " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "private, no-cache",
    "Referrer-Policy": "same-origin",  # with less, a browser does not say where a form comes from
    "Vary": "Accept, Cookie",
}

_ROOM = 50_000
"""Bytes of HTML that states may take on a page: with everything around it, a load is 100 kB."""

_STATES = 100
"""States on a page at most."""

_NEAR = 50
"""States that one is said to stand on, or to carry, at most."""

_FEW = 4
"""Contents of one name that are shown at most."""

pages = Blueprint("page", __name__, url_prefix="/page")


def is_asked() -> bool:
    """:returns: whether the answer is to be a page: clients of Cartd do not ask for HTML"""
    if request.path != "/":
        return request.path.startswith("/page/")
    kinds = request.accept_mimetypes
    return kinds.best_match(["application/json", "text/html"]) == "text/html"


def _answer(template: str, status: int = HTTPStatus.OK, **context: Any) -> Response:
    text = render_template(
        template,
        identity=g.get("identity"),
        signed_in=COOKIE in request.cookies,
        key=_form_key(),
        **context,
    )
    response = make_response(text, status)
    response.headers.update(_HEADERS)
    if "form_secret" in g:
        _set_cookie(response, _FORM, g.form_secret)
    return response


def failure(status: int, message: str) -> Response:
    """:returns: a page with an error; without a known token, the form to sign in"""
    if status == HTTPStatus.UNAUTHORIZED:
        return _answer("login.html", status, problem=message)
    return _answer("error.html", status, title=HTTPStatus(status).phrase, message=message)


# -- looking ---------------------------------------------------------------------------------------


def show() -> Response:
    """:returns: the page itself"""
    words = request.args.get("q", "")[:200]
    seen = the_parts().pools.look()
    states = _states()
    found = states.find(words)
    start = min(_number("from"), len(found))
    placed = _fitting(found[start:])
    groups = groupby(placed, lambda one: one.row.object)
    return _answer(
        "home.html",
        words=words,
        seen=seen,
        groups=[(name, list(nested(same))) for name, same in groups],
        start=start,
        end=start + len(placed),
        count=len(found),
        **_live(),
    )


@pages.get("/live")
def show_live() -> Response:
    """Show what changes of the page by itself: a script puts it in place of what was there."""
    return _answer("live.html", **_live())


def _live() -> dict[str, Any]:
    parts, identity = the_parts(), the_identity()
    start = _number("carts")
    carts, count = overview.carts_of(parts.service, identity, start)
    moving, waiting = overview.transfers(parts.service, identity)
    sent = parts.downloads.of(identity)
    disks = [overview.disk_of_carts(parts.service), parts.pools.disk()]
    return {
        "carts": carts,
        "carts_start": start,
        "carts_count": count,
        "moving": moving,
        "waiting": waiting,
        "sent": sent,
        "disks": [disk for disk in disks if disk is not None],
        "active": bool(sent or waiting or any(cart["active"] for cart in carts)),
    }


def _states() -> States:
    seen = the_parts().pools.look()
    return States(seen.listing, seen.names, the_identity().objects)


def _fitting(placed: list[Placed]) -> list[Placed]:
    """:returns: as many states as a page has room for, one at least"""
    room = _ROOM
    for number, one in enumerate(placed[:_STATES]):
        room -= 350 + 4 * len(one.row.id) + sum(80 for _ in one.row.listed.manifest.labels)
        if room < 0 and number:
            return placed[:number]
    return placed[:_STATES]


@pages.get("/state/<path:name>")
def show_state(name: str) -> Response:
    """Show a state: where it is, what it is made from, and what stands on it."""
    states = _states()
    rows = states.named(name)
    if not rows:
        raise NotFound(f"there is no state {name[:400]} in the pools", hint="look for another one")
    return _answer(
        "state.html",
        name=name,
        found=[
            (row, states.below(row), states.above(row), states.draw(row)) for row in rows[:_FEW]
        ],
        near=_NEAR,
    )


@pages.get("/cart/<uid>")
def show_cart(uid: str) -> Response:
    """Show how far a cart is."""
    service = the_parts().service
    cart = find_cart(service, uid, the_identity())
    start = _number("from")
    (told,) = overview.tell(service, [cart])
    files = overview.files_of(service, cart, start)
    return _answer(
        "cart.html",
        cart=told,
        files=files,
        start=start,
        end=start + len(files),
        active=told["active"],
    )


def _number(name: str) -> int:
    text = request.args.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0


# -- doing -----------------------------------------------------------------------------------------


@pages.post("/cart")
def fill_cart() -> Response:
    """Make a cart of the states that were chosen."""
    form, parts, identity = _form(), the_parts(), the_identity(write=True)
    names = form.getlist("state")
    if not names:
        raise UsageError("no state is chosen", hint="go back, and choose some")
    uid = check_uid(form.get("uid", "").strip() or _new_uid(names))
    chain = "chain" in form
    fileids = [
        {"id": name, "path": _path(name), "archive": POOLS, "chain": chain} for name in names
    ]
    body = json.dumps({"fileids": fileids}).encode()
    wanted = parse_request(body, parts.service.settings, parts.service.archives, identity.objects)
    parts.runner.submit(make_cart(parts.service, uid, wanted, identity))
    return _go(url_for("page.show_cart", uid=uid))


def _new_uid(names: list[str]) -> str:
    """:returns: a uid that cannot be guessed, and that names the first state of the cart"""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", names[0].rpartition("/")[2])[:80].lstrip("._-")
    return f"{plain or 'cart'}-{secrets.token_hex(8)}"


def _path(name: str) -> str:
    """:returns: where a state goes in the tar: a file, or the directory of a machine"""
    subject = name.rpartition("/")[0]
    return f"{name}.qcow2" if isinstance(parse_object(subject), Image) else name


@pages.post("/cart/<uid>/delete")
def remove_cart(uid: str) -> Response:
    """Delete a cart."""
    _form()
    delete_cart(the_parts().service, uid, the_identity(write=True))
    return _go("/")


@pages.post("/cart/<uid>/again")
def try_again(uid: str) -> Response:
    """Begin a cart in error again."""
    _form()
    parts = the_parts()
    parts.runner.submit(retry_cart(parts.service, uid, the_identity(write=True)))
    return _go(url_for("page.show_cart", uid=uid))


# -- signing in ------------------------------------------------------------------------------------


@pages.get("/login")
def show_login() -> Response:
    """Show a form for a token."""
    return _answer("login.html", problem="")


@pages.post("/login")
def login() -> Response:
    """Keep a token in a cookie, which no script can read and no other site has sent along."""
    token = _form().get("token", "").strip()
    try:
        the_parts().authenticator.of_token(token)
    except Denied as error:
        return _answer("login.html", error.status, problem=error.message)
    response = _go("/")
    _set_cookie(response, COOKIE, token)
    return response


@pages.post("/logout")
def logout() -> Response:
    """Forget the token."""
    _form()
    response = _go("/")
    response.delete_cookie(COOKIE, httponly=True, samesite="Strict", secure=request.is_secure)
    return response


def _set_cookie(response: Response, name: str, value: str) -> None:
    response.set_cookie(name, value, httponly=True, samesite="Strict", secure=request.is_secure)


def _go(place: str) -> Response:
    response = make_response(redirect(place, HTTPStatus.SEE_OTHER))
    response.headers.update(_HEADERS)
    return response


# -- forms -----------------------------------------------------------------------------------------


def _secret() -> str | None:
    return request.cookies.get(COOKIE) or request.cookies.get(_FORM) or g.get("form_secret")


def _form_key() -> str:
    """:returns: the key of the forms in this browser"""
    secret = _secret()
    if secret is None:
        secret = g.form_secret = secrets.token_urlsafe(32)
    return _key_of(secret)


def _key_of(secret: str) -> str:
    return hmac.new(
        secret.encode(errors="replace"), b"a form of statepool", hashlib.sha256
    ).hexdigest()


def _form() -> Any:
    """
    :returns: what was sent
    :raises Denied: a page of another site sent it, or one that is too old
    """
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    if site is not None:
        ours = site == "same-origin"
    else:  # also where nothing is encrypted, and by browsers of old
        there = (origin or "").partition("://")[2]
        ours = origin is None or (there != "" and there == request.host)
    if not ours:
        raise Denied(HTTPStatus.FORBIDDEN, "a page of another site sends this")
    with reading():
        form = request.form
    secret = _secret()
    given = form.get("key", "").encode(errors="replace")
    if secret is None or not hmac.compare_digest(_key_of(secret).encode(), given):
        raise Denied(
            HTTPStatus.FORBIDDEN,
            "this form is too old, or the browser keeps no cookies: load the page once more",
        )
    return form


# -- files of the package --------------------------------------------------------------------------


@pages.get("/<any('style.css', 'page.js', 'icon.svg'):name>")
def send_file(name: str) -> Response:
    """Send what the page is drawn with."""
    return send_from_directory(f"{current_app.root_path}/static", name)


@pages.app_template_filter("moment")
def _moment(value: Any) -> str:
    """:returns: a time in UTC, as people read it: given as the database or a manifest has it"""
    if not value:
        return "unknown"
    if isinstance(value, float | int):
        return time.strftime("%Y-%m-%d %H:%M", time.gmtime(value))
    return f"{value:%Y-%m-%d %H:%M}"


@pages.app_template_filter("duration")
def _duration(seconds: float) -> str:
    """:returns: a time that something takes, as people say it"""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
