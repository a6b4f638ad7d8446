"""
Records, checkpoints and folds of anything at all: refused, or understood so that what is written of
them is understood likewise.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import BadRecord, UnsupportedFormat
from statepool.model.digest import Digest
from statepool.model.manifest import Kind, Manifest, Parent, StateId
from statepool.pools.fold import Change, Fold, Publish, Remove
from statepool.pools.records import Checkpoint, Record

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANY = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
BYTES = tuple(Digest.of(bytes([number])) for number in range(3))
STATES = ("a", "b", "c")
DISKS = ("vm1/disk", "vm1/more")


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Of few states with few contents, so that they meet; by no rule."""
    kind = draw(st.sampled_from([Kind.IMAGE] * 4 + [Kind.RAM, Kind.MACHINE]))
    subject = draw(st.sampled_from(DISKS)) if kind is Kind.IMAGE else "vm1"
    state, digest = draw(st.sampled_from(STATES)), draw(st.sampled_from(BYTES))
    if draw(st.integers(0, 2)) == 0:
        return Remove(StateId(subject, state, kind), None if kind is Kind.MACHINE else digest)
    supersedes = draw(st.none() | st.sampled_from(BYTES))
    if kind is Kind.MACHINE:
        members = draw(
            st.dictionaries(st.sampled_from([*DISKS, "ram"]), st.sampled_from(BYTES), min_size=1)
        )
        return Publish(Manifest(subject, state, kind, members=members), supersedes)
    below = st.builds(Parent, st.sampled_from(STATES), st.sampled_from(BYTES))
    return Publish(
        Manifest(
            subject,
            state,
            kind,
            1,
            digest,
            parent=draw(st.none() | below) if kind is Kind.IMAGE else None,
        ),
        supersedes,
    )


def folded(records: list[list[Change]]) -> Fold:
    """:returns: what comes of those that are not refused"""
    fold = Fold("vm1")
    for record in records:
        try:
            fold = fold.after(fold.number + 1, "n", record)
        except BadRecord:
            pass  # and none of it counts
    return fold


def shown(fold: Fold) -> Any:
    depths = {manifest.key: fold.depth(manifest) for manifest in fold.manifests}
    return (
        dict(fold.states),
        sorted(map(str, (manifest.key for manifest in fold.superseded))),
        depths,
        fold.digests,
        fold.number,
    )


@given(st.lists(st.lists(changes(), min_size=1, max_size=3), max_size=12))
def test_a_fold_is_whole_whatever_is_tried(records: list[list[Change]]) -> None:
    fold = folded(records)
    for manifest in fold.manifests:
        chain = fold.chain(manifest)
        assert len(chain) == fold.depth(manifest)
        assert len({link.id for link in chain}) == len(chain)
    for manifest in fold.superseded:
        assert fold.has_children(manifest), "nothing stands on what has no name"
    for manifest in fold.states.values():
        for name, digest in manifest.members.items():
            member = (
                StateId("vm1", manifest.state, Kind.RAM)
                if name == "ram"
                else StateId(name, manifest.state)
            )
            assert fold.states[member].digest == digest
    assert shown(
        Checkpoint.from_bytes(Checkpoint.of(fold), "vm1", fold.number, "here").fold()
    ) == shown(fold)


@given(st.lists(changes(), min_size=1, max_size=4), st.text(max_size=8), st.floats(-9e11, 9e11))
def test_a_record_is_read_as_it_was_written(record: list[Change], text: str, time: float) -> None:
    written = Record(7, text, time, text, tuple(record))
    assert Record.from_bytes(written.to_bytes(), 7, "here") == written


RECORD = json.loads(
    Record(
        1, "n", 1.0, "x", (Publish(Manifest("vm1/disk", "a", Kind.IMAGE, 1, BYTES[0])),)
    ).to_bytes()
)
FOLD = Fold("vm1").after(1, "n", [Publish(Manifest("vm1/disk", "a", Kind.IMAGE, 1, BYTES[0]))])
CHECKPOINT = json.loads(Checkpoint.of(FOLD))


def lied_about(good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Something else in a few places of JSON that is good; other JSON; bytes that are none."""
    places = list(_places(good))

    def lie(lies: list[tuple[tuple[str | int, ...], Any]]) -> bytes:
        whole = json.loads(json.dumps(good))
        for place, value in lies:
            inner = whole
            for key in place[:-1]:
                inner = inner[key] if _has(inner, key) else {}
            if _has(inner, place[-1]):
                inner[place[-1]] = copy.deepcopy(value)  # what is drawn once may be put into itself
        return json.dumps(whole).encode()

    some = st.lists(
        st.tuples(
            st.sampled_from(places),
            ANY | st.sampled_from([10**400, -1, "9" * 5000, "\ud800", [[]] * 3]),
        ),
        max_size=3,
    )
    return (
        some.map(lie)
        | st.builds(lambda value: json.dumps(value).encode(), ANY)
        | st.binary(max_size=60)
    )


def _has(value: Any, key: str | int) -> bool:
    return (
        key in value
        if isinstance(value, dict)
        else isinstance(value, list) and isinstance(key, int) and key < len(value)
    )


def _places(value: Any, before: tuple[str | int, ...] = ()) -> Any:
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in pairs:
        yield (*before, key)
        yield from _places(inner, (*before, key))


@given(lied_about(RECORD))
def test_a_record_of_anything(content: bytes) -> None:
    try:
        record = Record.from_bytes(content, 1, "here")
    except (BadRecord, UnsupportedFormat):
        return
    assert Record.from_bytes(record.to_bytes(), 1, "here") == record
    try:
        fold = Fold("vm1").after(1, record.nonce, record.changes)
    except BadRecord:
        return
    assert shown(Checkpoint.from_bytes(Checkpoint.of(fold), "vm1", 1, "here").fold()) == shown(fold)


@given(lied_about(CHECKPOINT))
def test_a_checkpoint_of_anything(content: bytes) -> None:
    try:
        fold = Checkpoint.from_bytes(content, "vm1", 1, "here").fold()
    except (BadRecord, UnsupportedFormat):
        return
    assert shown(Checkpoint.from_bytes(Checkpoint.of(fold), "vm1", 1, "here").fold()) == shown(fold)
