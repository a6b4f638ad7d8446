"""
What a pool knows of a state: read back as it was written, and nothing believed that cannot be.
"""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import BadRecord
from statepool.model.digest import Digest
from statepool.model.manifest import MAX_EXTENTS, MAX_LABELS, Kind, Manifest, Parent, StateId

TIP = Digest.of(b"tip")
BASE = Digest.of(b"base")

FULL = Manifest(
    object="vm1/disk",
    state="customize",
    size=1 << 20,
    digest=TIP,
    origin=Digest.of(b"before", "sha256"),
    parent=Parent("install", BASE),
    virtual_size=8 << 20,
    cluster_size=65536,
    extents=((0, 65536), (131072, 4096)),
    created=1700000000.25,
    creator={"statepool": "0.1.0", "host": "lab7"},
    labels={"os": "debian"},
)

GOOD: dict[str, Any] = FULL.to_json()
RAM: dict[str, Any] = {
    "object": "vm1",
    "state": "loggedin",
    "kind": "ram",
    "size": 4096,
    "digest": str(TIP),
    "fingerprint": {"cpu": "max"},
}
MACHINE: dict[str, Any] = {
    "object": "vm1",
    "state": "loggedin",
    "kind": "machine",
    "members": {"vm1/disk": str(TIP), "ram": str(BASE)},
}


def without(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in names}


LIES: dict[str, object] = {
    "not an object": [GOOD],
    "nothing": None,
    "a number": 1,
    "a text": "manifest",
    "empty": {},
    "no object": without(GOOD, "object"),
    "no state": without(GOOD, "state"),
    "no digest": without(GOOD, "digest"),
    "object is a number": {**GOOD, "object": 1},
    "object leaves the pool": {**GOOD, "object": "../vm1"},
    "object with three parts": {**GOOD, "object": "vm1/disk/x"},
    "object over-long": {**GOOD, "object": "v" * 5000 + "/disk"},
    "object is a machine": {**GOOD, "object": "vm1"},
    "state is a list": {**GOOD, "state": ["install"]},
    "state with a path": {**GOOD, "state": "../../etc/passwd"},
    "state with a newline": {**GOOD, "state": "a\nb"},
    "state with an ending": {**GOOD, "state": "a.qcow2"},
    "state is another root": {**GOOD, "state": "0root"},
    "root of a machine": {**RAM, "state": "root"},
    "kind unknown": {**GOOD, "kind": "floppy"},
    "kind over-long": {**GOOD, "kind": "x" * 5000},
    "kind is a list": {**GOOD, "kind": []},
    "kind is an object": {**GOOD, "kind": {}},
    "kind is null": {**GOOD, "kind": None},
    "kind of another object": {**GOOD, "kind": "ram"},
    "size negative": {**GOOD, "size": -1},
    "size is a text": {**GOOD, "size": "1048576"},
    "size is a float": {**GOOD, "size": 1048576.0},
    "size is a bool": {**GOOD, "size": True},
    "size is null": {**GOOD, "size": None},
    "size over-large": {**GOOD, "size": 1 << 63},
    "virtual size negative": {**GOOD, "virtual_size": -5},
    "cluster size is a list": {**GOOD, "cluster_size": [65536]},
    "digest is a number": {**GOOD, "digest": 5},
    "digest too short": {**GOOD, "digest": "blake3:00"},
    "digest of an unknown kind": {**GOOD, "digest": "md5:" + "0" * 32},
    "digest is a path": {**GOOD, "digest": "blake3:../../../etc/passwd"},
    "digest over-long": {**GOOD, "digest": "blake3:" + "0" * 100_000},
    "origin is nonsense": {**GOOD, "origin": "x"},
    "parent is a text": {**GOOD, "parent": "install"},
    "parent is a list": {**GOOD, "parent": ["install", str(BASE)]},
    "parent without digest": {**GOOD, "parent": {"state": "install"}},
    "parent without state": {**GOOD, "parent": {"digest": str(BASE)}},
    "parent leaves the pool": {**GOOD, "parent": {"state": "../install", "digest": str(BASE)}},
    "parent with a file's name": {
        **GOOD,
        "parent": {"state": "install.qcow2", "digest": str(BASE)},
    },
    "extents are a number": {**GOOD, "extents": 5},
    "extents are an object": {**GOOD, "extents": {"0": 65536}},
    "an extent is a number": {**GOOD, "extents": [5]},
    "an extent of three": {**GOOD, "extents": [[0, 1, 2]]},
    "an extent of texts": {**GOOD, "extents": [["0", "1"]]},
    "an extent of bools": {**GOOD, "extents": [[False, True]]},
    "an extent of nothing": {**GOOD, "extents": [[0, 0]]},
    "a negative extent": {**GOOD, "extents": [[0, -1]]},
    "an extent before the file": {**GOOD, "extents": [[-5, 10]]},
    "an extent past the end": {**GOOD, "extents": [[1 << 20, 1]]},
    "extents overlap": {**GOOD, "extents": [[0, 10], [5, 10]]},
    "extents out of order": {**GOOD, "extents": [[10, 10], [0, 10]]},
    "too many extents": {**GOOD, "extents": [[2 * number, 1] for number in range(MAX_EXTENTS + 1)]},
    "created is a text": {**GOOD, "created": "yesterday"},
    "created is a bool": {**GOOD, "created": True},
    "created before the epoch": {**GOOD, "created": -1},
    "created in a far future": {**GOOD, "created": 1e13},
    "created never": {**GOOD, "created": float("nan")},
    "labels are a list": {**GOOD, "labels": ["x"]},
    "a label is a number": {**GOOD, "labels": {"x": 1}},
    "too many labels": {**GOOD, "labels": {str(number): "" for number in range(MAX_LABELS + 1)}},
    "a label of megabytes": {**GOOD, "labels": {"x": "y" * (1 << 20)}},
    "creator is a text": {**GOOD, "creator": "me"},
    "a creator of megabytes": {**GOOD, "creator": {"y" * (1 << 20): ""}},
    "a fingerprint of many long texts": {
        **RAM,
        "fingerprint": {str(number): "y" * (1 << 14) for number in range(64)},
    },
    "fingerprint is a number": {**RAM, "fingerprint": 5},
    "an image with members": {**GOOD, "members": {"vm1/disk": str(TIP)}},
    "RAM with members": {**RAM, "members": {"vm1/disk": str(TIP)}},
    "a machine without members": without(MACHINE, "members"),
    "a machine with no members": {**MACHINE, "members": {}},
    "a machine with a digest": {**MACHINE, "digest": str(TIP)},
    "members are a list": {**MACHINE, "members": ["vm1/disk"]},
    "a member is a machine": {**MACHINE, "members": {"vm2": str(TIP)}},
    "a member has no digest": {**MACHINE, "members": {"vm1/disk": None}},
    "a member leaves the pool": {**MACHINE, "members": {"vm1/../disk": str(TIP)}},
    "a member of another machine": {**MACHINE, "members": {"vm2/disk": str(TIP)}},
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_not_believed(lie: str) -> None:
    data = LIES[lie]
    before = copy.deepcopy(data)
    with pytest.raises(BadRecord) as caught:
        Manifest.from_json(data)
    assert len(str(caught.value)) < 400
    assert json.dumps(data) == json.dumps(before)


@pytest.mark.parametrize("data", [GOOD, RAM, MACHINE], ids=["image", "ram", "machine"])
def test_what_the_lies_are_made_of_is_believed(data: dict[str, Any]) -> None:
    assert Manifest.from_json(data).to_json() == {"kind": "image", "size": 0, **data}


@pytest.mark.parametrize(
    "name",
    [
        "object",
        "state",
        "kind",
        "digest",
        "size",
        "parent",
        "extents",
        "created",
        "labels",
        "members",
    ],
)
@pytest.mark.parametrize(
    "value",
    [None, True, -1, 1.5, float("inf"), "", "x", [], {}, [[]], {"": None}, [None, None]],
    ids=repr,
)
def test_a_field_of_another_type_is_refused_or_read(name: str, value: object) -> None:
    """
    Whatever stands in one field, the answer is a manifest or a BadRecord; a manifest is written as
    it was read.
    """
    for data in (GOOD, RAM, MACHINE):
        try:
            manifest = Manifest.from_json({**data, name: value})
        except BadRecord:
            continue
        assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@pytest.mark.parametrize("name", ["kind", "size", "virtual_size", "cluster_size", "created"])
def test_a_field_that_is_never_null(name: str) -> None:
    with pytest.raises(BadRecord):
        Manifest.from_json({**GOOD, name: None})


@pytest.mark.parametrize(
    "name", ["origin", "parent", "extents", "creator", "labels", "fingerprint", "members"]
)
def test_a_field_that_is_null_is_as_if_left_out(name: str) -> None:
    assert Manifest.from_json({**GOOD, name: None}) == Manifest.from_json(
        {key: value for key, value in GOOD.items() if key != name}
    )


def test_the_last_moment_that_a_state_can_be_of() -> None:
    assert Manifest.from_json({**GOOD, "created": 999_999_999_999.5}).created == 999_999_999_999.5
    with pytest.raises(BadRecord, match="not a time"):
        Manifest.from_json({**GOOD, "created": 10**12})


def test_all_fields_are_read_back() -> None:
    assert Manifest.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL
    assert pickle.loads(pickle.dumps(FULL)) == FULL


def test_fields_of_a_later_version_are_left_alone() -> None:
    assert Manifest.from_json({**GOOD, "colour": {"deep": ["red"]}}) == FULL


def test_fields_without_a_value_are_not_written() -> None:
    assert Manifest("vm1/disk", "install", size=5, digest=TIP).to_json() == {
        "object": "vm1/disk",
        "state": "install",
        "kind": "image",
        "size": 5,
        "digest": str(TIP),
    }


def manifests(some: Any) -> st.SearchStrategy[Manifest]:
    sizes = st.integers(0, (1 << 63) - 1)
    tables = st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=3)
    objects = st.builds("{}/{}".format, some.names, some.names)
    extents = st.lists(st.integers(0, 1 << 40), unique=True, max_size=8).map(
        lambda edges: tuple(
            (low, high - low)
            for low, high in zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False)
        )
    )
    common = {"created": st.floats(0, 9e11), "creator": tables, "labels": tables}
    images = st.builds(
        Manifest,
        object=objects,
        state=some.states | st.just("root"),
        size=st.integers(1 << 40, (1 << 63) - 1),
        digest=some.digests,
        origin=st.none() | some.digests,
        parent=st.none() | st.builds(Parent, some.names, some.digests),
        virtual_size=sizes,
        cluster_size=sizes,
        extents=extents,
        **common,
    )
    ram = st.builds(
        Manifest,
        some.names,
        some.states,
        st.just(Kind.RAM),
        sizes,
        some.digests,
        fingerprint=tables,
        **common,
    )

    def machine(name: str) -> st.SearchStrategy[Manifest]:
        members = st.dictionaries(
            st.just("ram") | some.names.map(f"{name}/{{}}".format),
            some.digests,
            min_size=1,
            max_size=3,
        )
        return st.builds(
            Manifest, st.just(name), some.states, st.just(Kind.MACHINE), members=members, **common
        )

    return images | ram | some.names.flatmap(machine)


@given(st.data())
def test_what_is_written_is_read_back(some, data: st.DataObject) -> None:
    manifest = data.draw(manifests(some))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


@given(st.data())
def test_no_json_at_all_raises_anything_else(some, data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([{}, GOOD, RAM, MACHINE]))
    lies = data.draw(
        st.dictionaries(st.sampled_from(sorted({*GOOD, *RAM, *MACHINE})), some.json, max_size=3)
    )
    whole = data.draw(st.just({**base, **lies}) | some.json)
    try:
        manifest = Manifest.from_json(whole)
    except BadRecord:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_states_are_told_apart_by_object_name_and_kind() -> None:
    ram, machine = Manifest.from_json(RAM), Manifest.from_json(MACHINE)
    assert ram.id == StateId("vm1", "loggedin", Kind.RAM)
    assert ram.id != machine.id
    assert {str(value.id) for value in (ram, machine, FULL)} == {
        "vm1 loggedin (RAM)",
        "vm1 loggedin",
        "vm1/disk customize",
    }
    assert {value.id.machine for value in (ram, machine, FULL)} == {"vm1"}


def test_files_have_plain_names() -> None:
    assert FULL.file_name == "customize.qcow2"
    assert Manifest.from_json(RAM).file_name == "loggedin.state"


def test_data_is_what_is_not_a_hole() -> None:
    assert FULL.data_size == 65536 + 4096
    assert Manifest.from_json(without(GOOD, "extents")).data_size == 1 << 20


def test_a_copy_takes_over_what_nothing_can_be_derived_from() -> None:
    copy = FULL.derived(size=7, digest=TIP)
    assert (copy.id, copy.created, copy.creator, copy.labels) == (
        FULL.id,
        FULL.created,
        FULL.creator,
        FULL.labels,
    )
    assert (
        copy.size,
        copy.origin,
        copy.parent,
        copy.virtual_size,
        copy.cluster_size,
        copy.extents,
    ) == (7, None, None, 0, 0, ())
    assert FULL.derived(size=7, extents=((0, 7),)).extents == ()  # no holes


def test_content_is_ours_or_what_it_was_made_of() -> None:
    assert FULL.is_content(TIP)
    assert FULL.is_content(Digest.of(b"before", "sha256"))
    assert not FULL.is_content(BASE)
