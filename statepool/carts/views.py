"""The HTTP interface: that of Cartd, and its extensions; see ``docs/serve.rst``."""

from __future__ import annotations

import logging
import time
from http import HTTPStatus

from attrs import evolve
from flask import Blueprint, Flask, Response, g, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from statepool import (
    Conflict,
    NoSpace,
    NotFound,
    RefusedError,
    StatePoolError,
    TransportError,
    UsageError,
    __version__,
)
from statepool.carts import page
from statepool.carts.auth import Denied
from statepool.carts.carts import (
    Download,
    delete_cart,
    describe_cart,
    find_cart,
    list_carts,
    make_cart,
)
from statepool.carts.lists import check_uid, parse_request
from statepool.carts.migrations import require_current
from statepool.carts.parts import Parts, reading, the_identity, the_parts
from statepool.carts.sending import send
from statepool.carts.service import log

access = logging.getLogger("statepool.carts.access")

_STATUS = (
    (UsageError, 400),
    (NotFound, 404),
    (Conflict, 409),
    (RefusedError, 403),
    (NoSpace, 507),
    (TransportError, 503),
)
"""The HTTP status of each class of errors; all others are bugs, 500."""

_OPEN = frozenset({"/healthz", "/readyz"}) | page.OPEN

_SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}

pages = Blueprint("carts", __name__)


def create_app(parts: Parts) -> Flask:
    """:returns: the WSGI application"""
    app = Flask("statepool.carts", static_folder=None)
    app.url_map.merge_slashes = False
    app.json.sort_keys = False  # type: ignore[attr-defined]  # keys have their order already
    app.jinja_options = {"trim_blocks": True, "lstrip_blocks": True}
    app.config["MAX_CONTENT_LENGTH"] = parts.service.settings.max_body
    app.extensions["carts"] = parts
    app.register_blueprint(pages)
    app.register_blueprint(page.pages)
    app.before_request(_identify)
    app.after_request(_finish)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Denied, _denied)
    app.register_error_handler(StatePoolError, _error)
    return app


# -- Cartd's ---------------------------------------------------------------------------------------


@pages.get("/")
def greet() -> Response:
    """Answer that the service is running; show a browser the page."""
    if page.is_asked():
        return page.show()
    return jsonify(message="Pacifica Cartd Interface Up and Running")


@pages.post("/<uid>")
def post_cart(uid: str) -> tuple[Response, int]:
    """Make a cart."""
    parts, identity = the_parts(), the_identity(write=True)
    settings = parts.service.settings
    with reading():
        body = request.get_data(cache=False)
    if request.content_length is None and len(body) >= settings.max_body:
        raise RequestEntityTooLarge  # a body in chunks is only cut off there
    wanted = parse_request(body, settings, parts.service.archives, identity.objects)
    number = make_cart(parts.service, check_uid(uid), wanted, identity)
    parts.runner.submit(number)
    return jsonify(message="Cart Processing has begun"), HTTPStatus.CREATED


@pages.route("/<uid>", methods=["GET", "HEAD"])
def get_cart(uid: str) -> Response:
    """Send the tar of a cart; for HEAD, tell its status."""
    parts = the_parts()
    if request.method == "HEAD":
        return _head(uid)
    cart = find_cart(parts.service, uid, the_identity())
    if cart.status == "error":
        raise StatePoolError(cart.error, hint="post the same list to try again, or delete the cart")
    if cart.status != "ready":
        text = "The cart is not ready for download."
        return Response(text, HTTPStatus.ACCEPTED, mimetype="text/plain")
    download = Download(parts.service, cart)
    default = time.strftime("data_%Y_%m_%d_%H_%M_%S.tar")  # in local time, as in Cartd
    content = evolve(download.content, name=request.args.get("filename") or default)
    content, close = parts.downloads.watch(cart, parts.metrics.counted(content), download.close)
    return send(request, content, close)


def _head(uid: str) -> Response:
    try:
        cart = find_cart(the_parts().service, uid, the_identity())
    except NotFound as error:
        return _told(HTTPStatus.NOT_FOUND, "error", error.message)
    failed = cart.status == "error"
    status = HTTPStatus.INTERNAL_SERVER_ERROR if failed else HTTPStatus.NO_CONTENT
    response = _told(status, cart.status, cart.error)
    if cart.digest and cart.status == "ready":
        response.set_etag(cart.digest)
    return response


def _told(status: HTTPStatus, state: str, message: str) -> Response:
    response = Response(status=status, mimetype="application/json")
    response.headers["X-Pacifica-Status"] = state
    response.headers["X-Pacifica-Message"] = _printable(message)
    return response


@pages.delete("/<uid>")
def remove_cart(uid: str) -> Response:
    """Delete a cart."""
    delete_cart(the_parts().service, uid, the_identity(write=True))
    return jsonify(message="Cart Deleted Successfully")


# -- ours ------------------------------------------------------------------------------------------


@pages.get("/<uid>/status")
def get_status(uid: str) -> Response:
    """Tell the progress of a cart."""
    service = the_parts().service
    return jsonify(describe_cart(service, find_cart(service, uid, the_identity())))


@pages.get("/carts")
def get_carts() -> Response:
    """List carts."""
    return jsonify(carts=list_carts(the_parts().service, the_identity()))


@pages.get("/pools/<name>/", defaults={"path": ""})
@pages.get("/pools/<name>/<path:path>")
def get_pool(name: str, path: str) -> Response:
    """Send a file of a pool, or list a directory of it."""
    if the_identity().objects != "*":
        raise RefusedError("this token is for some objects only", hint="use one for all of them")
    found = the_parts().shelves.find(name, path)
    if isinstance(found, list):
        return jsonify(entries=found)
    return send(request, the_parts().metrics.counted(found.content), found.close)


@pages.get("/metrics")
def get_metrics() -> Response:
    """Send metrics to Prometheus."""
    the_identity()
    text, kind = the_parts().metrics.text()
    return Response(text, content_type=kind)


@pages.get("/healthz")
def get_health() -> Response:
    """Answer that the process is alive."""
    return jsonify(status="ok")


@pages.get("/readyz")
def get_readiness() -> Response:
    """Tell whether carts can be created now."""
    service = the_parts().service
    require_current(service.database)
    service.volume.prepare()
    the_parts().runner.check()
    return jsonify(status="ready")


# -- around every request --------------------------------------------------------------------------


def _identify() -> None:
    if request.path not in _OPEN:
        g.identity = the_parts().authenticator.identify(request)


def _finish(response: Response) -> Response:
    for header, value in _SECURITY.items():
        response.headers.setdefault(header, value)
    phrase = HTTPStatus(response.status_code).phrase
    response.status = f"{response.status_code} {phrase}"
    the_parts().metrics.asked(request.method, response.status_code)
    name = getattr(g.get("identity"), "name", "") or "-"
    access.info(
        "%s %s %s %s %d",
        request.remote_addr,
        name,
        request.method,
        _printable(request.full_path.removesuffix("?")),
        response.status_code,
    )
    return response


def _printable(text: str) -> str:
    """:returns: the text as one line for a log or a header, with all other characters escaped"""
    safe = text[:2000].encode("ascii", "backslashreplace").decode()
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in safe)


def _failure(status: int, message: str) -> Response:
    if page.is_asked():
        return page.failure(status, message)
    title = f"{status} {HTTPStatus(status).phrase}"
    body = jsonify(status=title, message=message, traceback="", version=__version__)
    body.status_code = status
    return body


def _http_error(error: HTTPException) -> Response:
    status = error.code or 500
    response = _failure(status, error.description or HTTPStatus(status).phrase)
    for name, value in error.get_headers():
        if name.lower() in ("allow", "retry-after"):
            response.headers[name] = value
    return response


def _denied(error: Denied) -> Response:
    response = _failure(error.status, error.message)
    if error.status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = 'Bearer realm="carts"'
    return response


def _error(error: StatePoolError) -> Response:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("%s", _printable(str(error)))
    return _failure(status, str(error))
