"""The context of the views: the parts of the service, and the identity of the client."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from attrs import frozen
from flask import current_app, g, request

from statepool.carts.auth import Authenticator, Denied, Identity
from statepool.carts.metrics import Metrics
from statepool.carts.overview import Downloads, Pools
from statepool.carts.runner import Runner
from statepool.carts.service import Service
from statepool.carts.shelves import Shelves

READING = "statepool.reading"
"""Where a server puts a context to read a body in, which ends clients that take too long."""


@frozen
class Parts:
    """What the views work with."""

    service: Service
    runner: Runner
    authenticator: Authenticator
    shelves: Shelves
    metrics: Metrics
    pools: Pools
    downloads: Downloads


def the_parts() -> Parts:
    """:returns: those of the application that answers"""
    parts = current_app.extensions["carts"]
    assert isinstance(parts, Parts)
    return parts


def the_identity(*, write: bool = False) -> Identity:
    """
    :param write: whether something is to be changed
    :returns: the identity of the client
    :raises Denied: the client may only read
    """
    identity = g.identity
    assert isinstance(identity, Identity)
    if write and not identity.write:
        raise Denied(403, "this token may only read")
    return identity


def reading() -> AbstractContextManager[Any]:
    """:returns: a context in which the body of the request is to be read"""
    found: AbstractContextManager[Any] = request.environ.get(READING, nullcontext)()
    return found
