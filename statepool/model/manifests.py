"""
Many manifests at once, as a checkpoint has them.

Listing ten thousand states must not take ten thousand times what reading one takes. So the fields of all are checked together, a column at a time,
by the same rules as :meth:`~statepool.model.manifest.Manifest.from_json` has; and the values are made when somebody looks at them, by that method
itself. The check by columns only ever says "all are good": whatever it does not understand is read one by one, which also finds the words for what is
wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from statepool.errors import InvalidName
from statepool.model.manifest import MAX_EXTENTS, MAX_LABELS, ROOT, Manifest, are_texts, is_long
from statepool.model.names import ROOT_STATES, are_names
from statepool.model.objects import Image, parse_object

_DIGESTS = re.compile(r"(?:(?:blake3|sha256):[0-9a-f]{64}\n)*+\Z")
_DIGEST_LINE = len("blake3:") + 64 + 1
_SIZES = ("size", "virtual_size", "cluster_size")
_TABLES = ("creator", "labels", "fingerprint")


FEW = 4
"""Fewer than so many are read one by one: looking at columns does not pay."""


def read_manifests(data: Sequence[Any]) -> list[Manifest]:
    """
    :param data: what a JSON reader made of them
    :returns: the manifests, in their order
    :raises BadRecord: one of them is none
    """
    if len(data) < FEW or not _only(data, dict):
        return [Manifest.from_json(one) for one in data]
    images = [one for one in data if _is_image(one)]
    if not images or not _are_good(images):
        return [Manifest.from_json(one) for one in data]
    unread = iter(Manifest.unread(images))
    return [next(unread) if _is_image(one) else Manifest.from_json(one) for one in data]


def _is_image(one: dict[str, Any]) -> bool:
    return one.get("kind") == "image"


def _are_good(images: list[dict[str, Any]]) -> bool:
    """Whether all of these surely are manifests of images."""
    parents = _given(images, "parent")
    return (
        _are_objects([one.get("object") for one in images])
        and _are_states([one.get("state") for one in images])
        and _are_digests([one.get("digest") for one in images])
        and _are_digests(_given(images, "origin"))
        and _only(parents, dict)
        and _are_names([parent.get("state") for parent in parents])
        and _are_digests([parent.get("digest") for parent in parents])
        and all(_are_sizes([one.get(name, 0) for one in images]) for name in _SIZES)
        and _are_times([one.get("created", 0.0) for one in images])
        and all(_are_tables(_given(images, name)) for name in _TABLES)
        and _are_extents(_given(images, "extents"), [one.get("size", 0) for one in images if one.get("extents") is not None])
        and not _given(images, "members")
    )


def _given(images: list[dict[str, Any]], name: str) -> list[Any]:
    return [value for one in images if (value := one.get(name)) is not None]


def _only(values: Iterable[Any], *types: type) -> bool:
    return set(map(type, values)) <= {*types}


def _are_objects(values: list[Any]) -> bool:
    try:
        return _only(values, str) and all(isinstance(parse_object(value), Image) for value in set(values))
    except InvalidName:
        return False


def _are_states(values: list[Any]) -> bool:
    return _are_names(values) and not set(values) & (ROOT_STATES - {ROOT})


def _are_names(values: list[Any]) -> bool:
    return _only(values, str) and are_names(values)


def _are_digests(values: list[Any]) -> bool:
    if not _only(values, str):
        return False
    lines = "\n".join((*values, ""))
    # As long as so many digests are: so no value can have been two lines.
    return len(lines) == _DIGEST_LINE * len(values) and _DIGESTS.match(lines) is not None


def _are_sizes(values: list[Any]) -> bool:
    return _only(values, int) and min(values) >= 0 and max(values) < 1 << 63


def _are_times(values: list[Any]) -> bool:
    return _only(values, int, float) and all(0 <= value < 1e12 for value in values)


def _are_tables(values: list[Any]) -> bool:
    return _only(values, dict) and all(len(value) <= MAX_LABELS for value in values) and are_texts(*values) and not any(map(is_long, values))


def _are_extents(values: list[Any], sizes: list[int]) -> bool:
    if not _only(values, list) or any(len(value) > MAX_EXTENTS for value in values):
        return False
    pairs = list(chain.from_iterable(values))
    if not _only(pairs, list) or set(map(len, pairs)) - {2} or not _only(chain.from_iterable(pairs), int):
        return False
    for value, size in zip(values, sizes, strict=True):
        end = 0
        for offset, length in value:
            if offset < end or length <= 0:
                return False
            end = offset + length
        if end > size:
            return False
    return True
