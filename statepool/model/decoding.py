"""
JSON becomes values by the types of their fields: a class says what its JSON form is, and what does
not fit is refused while it is decoded.

Fields that the class does not have are ignored, and a field may be missing where it has a default.
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
"""What msgspec says, and of which field of which of many things."""

_LONGEST = 200
"""Characters of what is wrong with a value, which can hold the value."""

Value = TypeVar("Value")


class Form(Generic[Value]):
    """
    The JSON form of a class of attrs.

    :param made: the class
    """

    def __init__(self, made: type[Value]) -> None:
        self._made = made
        self._decoder = msgspec.json.Decoder(made, dec_hook=_custom)

    def decode(self, content: bytes) -> Value | None:
        """
        :returns: the value; None if this is not of this form, for a reason that :meth:`convert`
            tells once it is parsed
        """
        try:
            # all of it must be UTF-8, also what is ignored
            return self._decoder.decode(content.decode())
        except (UnicodeDecodeError, msgspec.MsgspecError, RecursionError, BadRecord):
            return None

    def convert(self, data: Any, what: str) -> Value:
        """
        :param data: what a JSON reader made of a text
        :param what: it is, for messages
        :returns: the value
        :raises BadRecord: it is not of this form
        """
        try:
            value = msgspec.convert(data, self._made, dec_hook=_custom)
            # JSON can have half of a pair of surrogates, which is no character
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


# Called for each value of a type that JSON does not have: a digest. Those of parents come many
# times in a row.
_custom: Any = lru_cache(maxsize=64)(lambda form, value: form.parse(value))
