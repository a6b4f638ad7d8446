"""States as people name them: without the key of a built one, and with slips of the keyboard."""

from __future__ import annotations

import difflib

from statepool.cli.report import warn
from statepool.cli.session import Session
from statepool.errors import NotFound, TransportError
from statepool.model.keys import parse_name
from statepool.model.outcomes import Listed


def newest_built(session: Session, object: str, state: str, scope: str | None = None) -> str | None:
    """
    Find the state that a user means by the name that a builder was given, and say which it is.

    :returns: the newest state that was built under this name; None if there is a state of exactly
        this name, or no built one
    """
    try:
        return _newest(object, state, session.handle(object).show(scope=scope))
    except TransportError:
        return None  # a pool does not answer: what is known is that there is no such state


def meant(
    session: Session, object: str, state: str, error: NotFound, scope: str | None = None
) -> str:
    """
    Find the state that a user means by a name that no state has.

    :param error: says so, or that another state is missing
    :returns: the newest state that was built under this name
    :raises NotFound: the error itself, with the names that are most like it, if there is none
    """
    if (error.object, error.state) != (object, state):
        raise error
    try:
        listed = session.handle(object).show(scope=scope)
    except TransportError:
        raise error from None  # a pool does not answer: nothing can be said of its names
    if (name := _newest(object, state, listed)) is not None:
        return name
    if listed:
        words = {one.manifest.state for one in listed if one.manifest.object == object}
        word = state
    else:
        words = {one.manifest.object for one in session.pool().show(scope=scope)}
        word = object
    if likely := difflib.get_close_matches(word, sorted(words), n=1):
        error.hint = f"did you mean {likely[0]}? " + (error.hint or "")
    raise error


def _newest(object: str, state: str, listed: list[Listed]) -> str | None:
    manifests = [one.manifest for one in listed if one.manifest.object == object]
    built = [
        manifest
        for manifest in manifests
        if (parsed := parse_name(manifest.state)) is not None and parsed[0] == state
    ]
    if not built or any(manifest.state == state for manifest in manifests):
        return None
    name = max(built, key=lambda manifest: (manifest.created, manifest.state)).state
    warn(f"{object} has no state {state}: this is {name}, the newest that was built under the name")
    return name
