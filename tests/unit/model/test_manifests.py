"""Many manifests at once."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import BadRecord
from statepool.model.decoding import Form
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, Parent, StateId

FORM = Form(list[Manifest])


def read_manifests(data: list[Any]) -> list[Manifest]:
    return [one.check() for one in FORM.convert(data, "a manifest")]


def image(number: int, **facts: Any) -> Manifest:
    below = Parent(f"s{number - 1}", Digest.of(b"%d" % (number - 1))) if number else None
    known: dict[str, Any] = {
        "size": 1 << 20, "digest": Digest.of(b"%d" % number), "origin": Digest.of(b"o"),
        "parent": below, "virtual_size": 1 << 30, "cluster_size": 65536,
        "extents": ((0, 512), (4096, 512)), "created": 1.5, "creator": {"host": "h"},
        "labels": {"os": "debian"},
    }  # fmt: skip
    return Manifest("vm1/disk", f"s{number}", **{**known, **facts})


IMAGES = [image(number) for number in range(6)]
DATA = [manifest.to_json() for manifest in IMAGES]


def test_they_are_what_they_would_be_one_by_one() -> None:
    ram = Manifest("vm1", "on", Kind.RAM, digest=Digest.of(b"ram"))
    found = read_manifests([*DATA, ram.to_json()])
    assert found == [*IMAGES, ram]
    assert [manifest.to_json() for manifest in read_manifests(DATA)] == DATA


def test_they_know_what_they_are_told_apart_by() -> None:
    for read, manifest in zip(read_manifests(DATA), IMAGES, strict=True):
        assert (read.id, read.key, read.parent_key) == (
            manifest.id,
            manifest.key,
            manifest.parent_key,
        )
        assert read.id == StateId("vm1/disk", manifest.state)
        assert (read.size, read.data_size) == (manifest.size, manifest.data_size)


def test_one_that_was_read_is_copied_and_pickled_as_any_other() -> None:
    for again in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        assert again(read_manifests(DATA)[1]) == IMAGES[1]


def test_one_that_was_read_cannot_be_changed() -> None:
    read, *_ = read_manifests(DATA)
    for name in ("size", "id"):
        with pytest.raises(AttributeError):
            setattr(read, name, None)


def test_there_is_nothing_in_it_that_a_manifest_does_not_have() -> None:
    read = read_manifests(DATA)[0]
    assert not hasattr(read, "else")
    assert not hasattr(IMAGES[0], "else")


@pytest.mark.parametrize(
    "lie",
    [
        {"object": "vm1"},
        {"object": "vm1/a/b"},
        {"object": ["vm1/disk"]},
        {"state": "0root"},
        {"state": "a\nb"},
        {"state": "s.QCOW2"},
        {"state": 1},
        {"state": ""},
        {"size": -1},
        {"size": True},
        {"size": 1 << 63},
        {"digest": None},
        {"digest": "blake3:" + "0" * 63},
        {"digest": "blake3:" + "0" * 64 + "\n"},
        {"origin": "x"},
        {"labels": {"x": "y" * (1 << 20)}},
        {"parent": "s0"},
        {"parent": {"state": "a/b", "digest": str(Digest.of(b"0"))}},
        {"parent": {"state": "s0"}},
        {"virtual_size": "1"},
        {"created": float("nan")},
        {"created": 1e12},
        {"creator": {"host": 1}},
        {"creator": {"host": "\ud800"}},
        {"labels": {"\udfff": "x"}},
        {"fingerprint": {"qemu": "7 \udc80"}},
        {"labels": {str(number): "x" for number in range(65)}},
        {"extents": [[0, 0]]},
        {"extents": [[0, 1 << 21]]},
        {"extents": [[0, 512], [256, 512]]},
        {"extents": [[0, True]]},
        {"extents": [[0]]},
        {"extents": [0, 1]},
        {"members": {"ram": str(Digest.of(b"0"))}},
    ],
    ids=ascii,
)
def test_one_that_lies_among_good_ones(lie: dict[str, Any]) -> None:
    with pytest.raises(BadRecord) as alone:
        Manifest.from_json({**DATA[1], **lie})
    with pytest.raises(BadRecord) as among:
        read_manifests([*DATA, {**DATA[1], **lie}])
    assert among.value.message == alone.value.message


@pytest.mark.parametrize("number", [0, 3])
def test_texts_are_decoded_as_values_are_converted(number: int) -> None:
    decoded = FORM.decode(json.dumps(DATA).encode())
    assert decoded is not None
    assert decoded == FORM.convert(DATA, "a manifest") == IMAGES
    for field in DATA[number]:
        for value in (None, True, -1, 1.5, "x", "\ud800", [], {}, [[0, True]]):
            data = [*DATA, {**DATA[number], field: value}]
            decoded = FORM.decode(json.dumps(data).encode())
            try:
                converted = FORM.convert(data, "a manifest")
            except BadRecord:
                assert decoded is None
            else:
                assert decoded == converted


def test_a_text_that_is_not_utf8_is_not_decoded_where_it_is_ignored_either() -> None:
    content = json.dumps([{**DATA[0], "later": "X"}]).encode()
    assert FORM.decode(content) == IMAGES[:1]
    assert FORM.decode(content.replace(b"X", b"\xff")) is None


def test_texts_in_any_script_are_good() -> None:
    data = {**DATA[1], "labels": {"name\u00e9": "\U0001f600"}}
    assert (
        read_manifests([*DATA, data])[-1].labels
        == Manifest.from_json(data).labels
        == data["labels"]
    )


@given(data=st.data())
def test_whatever_is_found_good_together_is_good_alone(data: st.DataObject, some: Any) -> None:
    field = data.draw(st.sampled_from([*DATA[1], "members", "fingerprint"]))
    value = data.draw(
        some.json
        | some.names
        | st.builds(str, some.digests)
        | st.lists(st.lists(st.integers(-1, 9), max_size=3), max_size=3)
    )
    changed = {**DATA[1], field: value}
    try:
        expected = Manifest.from_json(changed)
    except BadRecord:
        with pytest.raises(BadRecord):
            read_manifests([*DATA, changed])
    else:
        assert read_manifests([*DATA, changed])[-1] == expected
