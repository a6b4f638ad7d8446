"""
The only validator of names. An accepted name is safe as a file name, in a URL path and in a qcow2
backing name.

Names are checked on input (what a user types) and on output (what a pool lists). So neither a user
nor a pool can make statepool touch a file that is not ours.
"""

from __future__ import annotations

import re

from statepool.errors import InvalidName

MAX_LENGTH = 128
"""
Longest name of a machine, image or state, in characters. ``name.qcow2`` and our temporary names
stay far below the 255 bytes of a file name.
"""

ROOT = "root"
"""
The root state of an object: the object exists. The root state of an image is an image file without
a backing file. The root state of a running machine is that it runs.
"""

ROOT_STATES = frozenset({ROOT, "0root", "boot", "0boot"})
"""
All names of root states that avocado-i2n knows. No state can have a name from this set other than
``root``: only the plugin for avocado-i2n reads them.
"""

RESERVED_SUFFIXES = (".qcow2", ".state", ".json", ".lock")
"""Endings that mean something in a pool's directories."""

_ENDINGS = "".join(rf"(?<!(?i:{re.escape(suffix)}))" for suffix in RESERVED_SUFFIXES)
# as long as MAX_LENGTH
_matches = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\Z" + _ENDINGS).match


def is_name(text: str) -> bool:
    """:returns: whether ``text`` can name a machine, an image or a state"""
    return _matches(text) is not None


def check_name(text: str, what: str) -> str:
    """
    :param text: the name
    :param what: what the name is for, for the message
    :returns: the name itself
    :raises InvalidName: the name cannot be used
    """
    if is_name(text):
        return text
    if len(text) > MAX_LENGTH:
        reason = f"it has {len(text)} characters, more than {MAX_LENGTH}"
    elif text.lower().endswith(RESERVED_SUFFIXES):
        reason = f"it ends in {text[text.rindex('.') :]}, which is reserved for files"
    else:
        reason = "names begin with a letter or digit and hold only letters, digits and . _ + -"
    shown = text if len(text) <= 60 else text[:57] + "..."
    raise InvalidName(
        f"{shown!r} is not a valid name for {what}: {reason}", hint="choose another name"
    )


def check_state_name(text: str, *, root: bool = True) -> str:
    """
    Check the name of a state, as :func:`check_name`.

    :param root: whether the name of the root state is permitted
    :raises InvalidName: the name cannot be used, or is reserved
    """
    if text in ROOT_STATES and not (root and text == ROOT):
        hint = f"the root state is called {ROOT}" if root else "choose another name"
        raise InvalidName(
            f"{text!r} is reserved: it means the object itself and cannot name another state",
            hint=hint,
        )
    return check_name(text, "a state")
