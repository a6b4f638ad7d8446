"""
The names of states that were built: with the key of what they were made from, as in
``connect--1f0c9d2a7b3e``.
"""

from __future__ import annotations

import re

from statepool.model.names import check_name, check_state_name

KEY_LENGTH = 12
"""
Characters of a key: 48 bits, so that a thousand builders of one state meet by chance once in half a
billion.
"""

LABEL_STATE = "statepool.state"
"""The label of a built state that says which name was asked for."""

LABEL_KEY = "statepool.key"
"""The label of a built state that says its key."""

LABEL_ANEW = "statepool.anew"
"""
The label of a state that was built anew: the key of the one in whose place it is used. That one
stays as it is.
"""

_KEYED = re.compile(r"(?P<state>.+)--(?P<key>[0-9a-f]{12})\Z")


def name_of(state: str, key: str) -> str:
    """
    :returns: what a built state is kept under
    :raises InvalidName: no state can have this name
    """
    return check_state_name(f"{check_name(state, 'a state')}--{key}")


def parse_name(name: str) -> tuple[str, str] | None:
    """
    :returns: the name that was asked for, and the key, of the name of a built state; None for other
        names
    """
    match = _KEYED.match(name)
    return (match["state"], match["key"]) if match is not None else None
