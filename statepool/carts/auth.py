"""
Authentication and permissions of clients: open on loopback; elsewhere by tokens, or by a trusted
proxy.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import secrets
from urllib.parse import urlsplit

from attrs import frozen
from flask import Request

from statepool import Conflict, NotFound, UsageError
from statepool.carts.database import CartToken, Database
from statepool.carts.settings import ServeSettings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}\Z")
_BYTES = 32
"""Random bytes of a token: with so many, no slow hash is needed."""

COOKIE = "statepool-token"
"""The cookie with the token of a user who has signed in."""

_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP")
"""Headers that a proxy adds: its client is then not on this host."""


@frozen
class Identity:
    """
    The identity of a client.

    :param name: the owner of the client's carts; empty: all users on this host
    :param read: whether carts and pools may be read
    :param write: whether carts may be created and deleted
    :param objects: a pattern of the objects that may be requested
    :param everything: whether the carts of other owners may be read
    """

    name: str
    read: bool = True
    write: bool = True
    objects: str = "*"
    everything: bool = False


class Denied(Exception):
    """
    An error: the client is not authenticated.

    :param status: the HTTP status
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Authenticator:
    """
    An authenticator of clients.

    :param open_here: whether clients on this host may do everything without a token
    """

    def __init__(self, settings: ServeSettings, database: Database, *, open_here: bool) -> None:
        self._settings = settings
        self._database = database
        self._open = open_here
        try:
            self._proxies = [
                ipaddress.ip_network(text, strict=False) for text in settings.trusted_proxies
            ]
        except ValueError as error:
            raise UsageError(
                f"trusted-proxies: {error}", hint="write addresses, or networks as 10.0.0.0/8"
            ) from error

    def identify(self, request: Request) -> Identity:
        """
        :returns: the identity of the client
        :raises Denied: the client cannot be identified
        """
        given = request.authorization
        if given is not None:
            token = given.token if given.type == "bearer" else given.password
            return self.of_token(token or "")
        if (known := self._of_cookie(request)) is not None:
            return known
        header = self._settings.trust_header
        if header is not None and self._is_proxy(request.remote_addr):
            name = request.headers.get(header, "")
            if not _NAME.match(name):
                raise Denied(401, f"the proxy does not say who asks in {header}")
            return Identity(name)
        if not self._open:
            raise Denied(401, "a token is needed: Authorization: Bearer TOKEN")
        self._refuse_strangers(request)
        return Identity("", everything=True)

    def _of_cookie(self, request: Request) -> Identity | None:
        """
        Identify a user by the cookie alone. It permits only reading, and the forms of the page,
        which contain a key: a browser sends the cookie also if another site caused the request.
        """
        token = request.cookies.get(COOKIE)
        looks = request.method in ("GET", "HEAD") or request.path.startswith("/page/")
        if self._open or not token or not looks:
            return None
        try:
            return self.of_token(token)
        except Denied:
            return None  # it was removed: another way may do, or a form asks for another one

    def of_token(self, token: str) -> Identity:
        """
        :returns: the identity that belongs to a token
        :raises Denied: the token is not known
        """
        with self._database.session():
            found = CartToken.get_or_none(CartToken.hash == _hash(token))
        if found is None:
            raise Denied(401, "the token is not known")
        return Identity(found.name, write=found.write, objects=found.objects)

    def _is_proxy(self, address: str | None) -> bool:
        try:
            known = ipaddress.ip_address(address or "")
        except ValueError:
            return False
        return any(known in network for network in self._proxies)

    def _refuse_strangers(self, request: Request) -> None:
        """Refuse requests that a browser or a proxy on this host sends for a foreign client."""
        if any(name in request.headers for name in _FORWARDED):
            raise Denied(403, "a proxy sends this, and none is trusted: see --trust-header")
        if not is_loopback(urlsplit(f"//{request.host}").hostname or ""):
            raise Denied(403, "this service is asked by another name than that of this host")
        origin = request.headers.get("Origin", "")
        same = origin == f"{request.scheme}://{request.host}"
        # A user may follow a link from another site: that site cannot read the page.
        follows = request.method == "GET" and request.headers.get("Sec-Fetch-Dest") == "document"
        strange = request.headers.get("Sec-Fetch-Site") == "cross-site" and not follows
        if (origin and not same) or strange:
            raise Denied(403, "a page of another site sends this")


def is_loopback(name: str) -> bool:
    """:returns: whether a name or an address can only mean this host"""
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


# -- tokens ----------------------------------------------------------------------------------------


def add_token(database: Database, name: str, *, write: bool, objects: str) -> str:
    """
    :returns: a new token, which cannot be shown again: only its hash is kept
    :raises UsageError: the name cannot be used
    :raises Conflict: the name has a token already
    """
    if not _NAME.match(name):
        hint = "use up to 64 letters, digits, ., _, @ and -"
        raise UsageError(f"{name[:80]!r} cannot be the name of a token", hint=hint)
    token = secrets.token_urlsafe(_BYTES)
    with database.session(write=True):
        if CartToken.get_or_none(CartToken.name == name) is not None:
            hint = f"statepool carts token remove {name}"
            raise Conflict(f"there is a token {name} already", hint=hint)
        CartToken.insert(name=name, hash=_hash(token), write=write, objects=objects).execute()
    return token


def remove_token(database: Database, name: str) -> None:
    """
    :raises NotFound: there is no such token
    """
    with database.session(write=True):
        if not CartToken.delete().where(CartToken.name == name).execute():
            raise NotFound(f"there is no token {name}", hint="statepool carts token list")


def tokens(database: Database) -> list[CartToken]:
    """:returns: all tokens, by name"""
    with database.session():
        return list(CartToken.select().order_by(CartToken.name))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
