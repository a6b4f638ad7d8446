"""
The answers of commands as JSON.

``docs/json.rst`` describes the forms field by field. A field is always present, with null, ``[]``
or ``{}`` if it has no value. So a form is made from all fields of a value, and only exceptions are
written down here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from statepool.model.carried import Imported
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Listed, SetResult, Synced
from statepool.policy import Outcome


def form(value: object) -> Any:
    """:returns: the JSON form of a value, recursively"""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)  # the value of an enumeration
    if isinstance(value, Digest | Location | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): form(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [form(item) for item in value]
    return _fields(value) | _more(value)


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, Listed):
        return {
            **form(value.manifest),
            "pools": list(value.pools),
            "managed": value.managed,
            "problem": value.problem,
        }
    # Up to a thousand extents would hide everything else; their sum is given instead.
    left_out = {"extents"} if isinstance(value, Manifest) else set()
    return {
        field.name: form(getattr(value, field.name))
        for field in attrs.fields(type(value))
        if field.name not in left_out
    }


def _more(value: object) -> dict[str, Any]:
    if isinstance(value, Manifest):
        return {"data_size": value.data_size}
    if isinstance(value, Synced):
        return {"bytes": value.bytes, "complete": value.complete}
    return {"complete": value.complete} if isinstance(value, SetResult | Outcome | Imported) else {}
