"""
Names of built states. Such a name contains the key of what the state was built from, as in
``connect--1f0c9d2a7b3e``.
"""

from __future__ import annotations

import re

from statepool.model.names import check_name, check_state_name

KEY_LENGTH = 12
"""
Characters of a key. These are 48 bits: for a thousand builders of one state, the chance of a
collision is one in half a billion.
"""

LABEL_STATE = "statepool.state"
"""The label of a built state for the name that was asked for."""

LABEL_KEY = "statepool.key"
"""The label of a built state for its key."""

LABEL_ANEW = "statepool.anew"
"""
The label of a state that was built anew: the key of the state that it replaces in use. The old
state stays as it is.
"""

_KEYED = re.compile(r"(?P<state>.+)--(?P<key>[0-9a-f]{12})\Z")


def name_of(state: str, key: str) -> str:
    """
    :returns: the name under which a built state is kept
    :raises InvalidName: no state can have this name
    """
    return check_state_name(f"{check_name(state, 'a state')}--{key}")


def parse_name(name: str) -> tuple[str, str] | None:
    """
    :returns: for the name of a built state: the name that was asked for, and the key; None for
        other names
    """
    match = _KEYED.match(name)
    return (match["state"], match["key"]) if match is not None else None
