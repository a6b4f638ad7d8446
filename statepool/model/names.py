"""
The one validator of names. What it accepts is safe as a file name, in a URL path and in a qcow2 backing name.

Names are used on the way in (what a user types) and on the way out (what a pool lists), so that neither can make the other touch a file that is
not ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from statepool.errors import InvalidName

MAX_LENGTH = 128
"""Longest name of a machine, image or state, in characters. ``name.qcow2`` and our temporary names stay far below the 255 bytes of a file name."""

ROOT_STATES = frozenset({"root", "0root", "boot", "0boot"})
"""Reserved: they speak of the object itself, not of a state of it. The names are those of avocado-i2n."""

RESERVED_SUFFIXES = (".qcow2", ".state", ".json", ".lock")
"""Endings that mean something in a pool's directories."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\Z")  # as long as MAX_LENGTH
_matches = _NAME.match
_NAMES = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\n)*+\Z")  # lines of such names
_RESERVED = re.compile("(?:" + "|".join(map(re.escape, RESERVED_SUFFIXES)) + r")$", re.IGNORECASE | re.MULTILINE)


def is_name(text: str) -> bool:
    """:returns: whether ``text`` can name a machine, an image or a state"""
    return _matches(text) is not None and not text.lower().endswith(RESERVED_SUFFIXES)


def are_names(texts: Collection[str]) -> bool:
    """:returns: whether each of these is a name, found out for all of them together"""
    lines = "\n".join((*texts, ""))
    return lines.count("\n") == len(texts) and _NAMES.match(lines) is not None and _RESERVED.search(lines) is None


def check_name(text: str, what: str) -> str:
    """
    :param text: the name
    :param what: what it names, for the message
    :returns: the name itself
    :raises InvalidName: it cannot be used
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
    raise InvalidName(f"{shown!r} is not a valid name for {what}: {reason}", hint="choose another name")


def check_state_name(text: str) -> str:
    """
    As :func:`check_name`, for states that a user names: the names of root states are not among them.

    :raises InvalidName: it cannot be used, or is reserved
    """
    if text in ROOT_STATES:
        raise InvalidName(
            f"{text!r} is reserved: it means the object itself and cannot name a state",
            hint="choose another name; in Python, get_root, set_root and their like speak of the root image",
        )
    return check_name(text, "a state")
