"""
The files of a log: what is wrong with one is said in one order and in words, and what other writers
may write is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from statepool.errors import BadRecord, UnsupportedFormat
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, Parent, StateId
from statepool.pools.fold import Fold, Publish, Remove
from statepool.pools.records import Checkpoint, Record

DIGEST = Digest.of(b"a")
MANIFEST = Manifest("vm1/disk", "a", size=8, digest=DIGEST, parent=Parent("b", DIGEST))
PUBLISH = Publish(MANIFEST, DIGEST)
REMOVE = Remove(StateId("vm1", "a", Kind.MACHINE), None)
RECORD: dict[str, Any] = json.loads(Record(1, "n", 1.0, "host:1", (PUBLISH, REMOVE)).to_bytes())
CHECKPOINT: dict[str, Any] = json.loads(
    Checkpoint.of(Fold("vm1").after(1, "n", [Publish(Manifest("vm1/disk", "a", digest=DIGEST))]))
)

Read = Callable[[dict[str, Any]], Any]
READERS: dict[str, tuple[dict[str, Any], Read]] = {
    "record": (RECORD, lambda data: Record.from_bytes(json.dumps(data).encode(), 1, "here")),
    "checkpoint": (
        CHECKPOINT,
        lambda data: Checkpoint.from_bytes(json.dumps(data).encode(), "vm1", 1, "here"),
    ),
}


def with_publish(**facts: Any) -> dict[str, Any]:
    """:returns: a record with other facts of the state that it publishes"""
    change = RECORD["changes"][0]
    return {**RECORD, "changes": [{**change, "publish": {**change["publish"], **facts}}]}


def read(data: dict[str, Any]) -> Record:
    return Record.from_bytes(json.dumps(data).encode(), 1, "here")


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "lie",
    [
        {},
        {"changes": 5, "states": 5},
        {"nonce": "\ud800", "nonces": {"1": "\ud800"}},
        {"later": float("nan")},
    ],
    ids=ascii,
)
def test_a_newer_format_is_said_before_anything_else(kind: str, lie: dict[str, Any]) -> None:
    good, reader = READERS[kind]
    with pytest.raises(UnsupportedFormat, match="format 2"):
        reader({**good, **lie, "format": 2})


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("value", [None, 0, -1, 1.0, True, "1"], ids=repr)
def test_a_format_is_a_number(kind: str, value: object) -> None:
    good, reader = READERS[kind]
    with pytest.raises(BadRecord, match="does not say its format"):
        reader({**good, "format": value})


def test_a_newer_format_may_have_other_digests() -> None:
    data = with_publish(digest="blake9:00")
    with pytest.raises(BadRecord, match="unknown digest algorithm"):
        read(data)
    with pytest.raises(UnsupportedFormat):
        read({**data, "format": 2})


@pytest.mark.parametrize(
    "name", ["origin", "parent", "extents", "creator", "labels", "fingerprint", "members"]
)
def test_a_null_is_as_if_left_out(name: str) -> None:
    (change,) = read(with_publish(**{name: None})).changes
    assert isinstance(change, Publish)
    left_out = {key: value for key, value in MANIFEST.to_json().items() if key != name}
    assert change.manifest == Manifest.from_json(left_out)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {"deep": [[]]}, 10**30, "\U0001f600"], ids=ascii
)
def test_fields_of_a_later_version_may_be_anything(value: object) -> None:
    found = read({**with_publish(later=value), "later": value})
    assert found.changes == (PUBLISH,)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"publish": None},
        {"remove": None},
        {"publish": MANIFEST.to_json(), "remove": None},
        {"publish": MANIFEST.to_json(), "remove": REMOVE.to_json()["remove"]},
        {"publish": MANIFEST.to_json(), "supersedes": 5},
        {"remove": {"object": "vm1/disk"}},
        {"remove": {"object": "vm1/disk", "state": "a", "kind": "floppy"}},
        {"remove": {"object": "vm1/disk", "state": "a", "kind": None}},
        {"remove": {"object": "vm1/disk", "state": "\ud800"}},
        "publish",
    ],
    ids=ascii,
)
def test_a_change_that_is_none(change: object) -> None:
    with pytest.raises(BadRecord, match="here"):
        read({**RECORD, "changes": [change]})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"later":"\xff",' + json.dumps(RECORD).encode()[1:],
        b"[" * 100000,
    ],
    ids=lambda one: ascii(one[:9]),
)
def test_what_is_no_json_object(content: bytes) -> None:
    with pytest.raises(BadRecord, match="here is not"):
        Record.from_bytes(content, 1, "here")


def test_the_words_name_the_file_and_the_field() -> None:
    for facts, words in (
        ({"size": -1}, "here has no size that can be used: Expected `int` >= 0 at 'size'"),
        (
            {"parent": {"state": 5, "digest": str(DIGEST)}},
            (
                "here has no parent.state that can be used: Expected `str`, got `int` at"
                " 'parent.state'"
            ),
        ),
        ({"labels": {"x": 1}}, "Expected `str`, got `int` at 'labels[...]'"),
        ({"extents": [[9, 1]]}, "leave the file, in here"),
        ({"digest": "x"}, "here has a bad digest: not a digest: 'x'"),
    ):
        with pytest.raises(BadRecord) as caught:
            read(with_publish(**facts))
        assert words in caught.value.message
        assert caught.value.path == "here"
