"""
Decoding of JSON into values by the types of their fields. A class declares its JSON form; data that
does not fit is refused while it is decoded.

Unknown fields are ignored. A field that has a default may be missing.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Meta

from statepool.errors import BadRecord

__all__ = ["Form", "Meta"]

_PROBLEM = re.compile(
    r"(?P<problem>.*?)(?: - at `\$(?:.*\]\.|\.)?(?:publish\.)?(?P<field>.*)`)?", re.DOTALL
)
"""The text of an error of msgspec: the problem, and the field that it concerns."""

_LONGEST = 200
"""
Longest part of an error message that is parsed, in characters: the message can contain the value.
"""

Value = TypeVar("Value")


class Form(Generic[Value]):
    """
    The JSON form of a class of attrs.

    :param made: the class of the decoded values
    """

    def __init__(self, made: type[Value]) -> None:
        self._made = made
        self._decoder = msgspec.json.Decoder(made, dec_hook=_custom)

    def decode(self, content: bytes) -> Value | None:
        """
        :returns: the value; None if the content is not of this form. :meth:`convert` tells the
            reason, once the content is parsed.
        """
        try:
            # all of the content must be UTF-8, also the ignored fields
            return self._decoder.decode(content.decode())
        except (UnicodeDecodeError, msgspec.MsgspecError, RecursionError, BadRecord):
            return None

    def convert(self, data: Any, what: str) -> Value:
        """
        :param data: the result of a JSON parser
        :param what: the name of the data, for messages
        :returns: the value
        :raises BadRecord: the data is not of this form
        """
        try:
            value = msgspec.convert(data, self._made, dec_hook=_custom)
            # JSON can contain one half of a surrogate pair, which is not a character
            json.dumps(data, ensure_ascii=False).encode()
        except msgspec.ValidationError as error:
            found = _PROBLEM.fullmatch(str(error)[:_LONGEST])
            assert found is not None
            problem, field = found["problem"], found["field"]
            said = (
                f"has no {field} that can be used: {problem} at {field!r}"
                if field
                else f"cannot be used: {problem}"
            )
            raise BadRecord(f"{what} {said}") from error
        except (UnicodeEncodeError, RecursionError) as error:
            raise BadRecord(
                f"{what} has a text that is not Unicode text, or is nested too deeply"
            ) from error
        except BadRecord as error:
            raise BadRecord(f"{what} has a bad digest: {error.message}", hint=error.hint) from error
        return value


# Called for each value of a type that JSON does not have: a digest. The digest of the same parent
# often occurs many times in a row.
_custom: Any = lru_cache(maxsize=64)(lambda form, value: form.parse(value))
