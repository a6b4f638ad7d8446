"""The page on JSON names every field that is printed, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from statepool.cli.forms import form
from statepool.errors import (
    DigestMismatch,
    HasDependants,
    LockTimeout,
    NoSpace,
    TransportError,
    UnsafeImage,
)
from statepool.model.carried import Exported, Imported
from statepool.model.manifest import Manifest
from statepool.model.outcomes import (
    Adopted,
    Checked,
    Collected,
    Ensured,
    Finding,
    GetResult,
    Kept,
    Level,
    Listed,
    Logged,
    Presence,
    Removed,
    SetResult,
    SourceStatus,
    StoredAt,
    SyncAction,
    Synced,
    SyncedState,
)
from statepool.model.scope import Scope
from statepool.policy import Done, ItemOutcome, Outcome

PAGE = Path(__file__).parents[3] / "docs" / "json.rst"


def documented(label: str) -> list[set[str]]:
    """:returns: the fields in each table of the section behind a label"""
    section = re.split(
        r"^\.\. _", PAGE.read_text().split(f".. _{label}:\n")[1], flags=re.MULTILINE
    )[0]
    tables = re.findall(r"^=+ =+ =+\n(.*?)^=+ =+ =+\n", section, flags=re.MULTILINE | re.DOTALL)
    return [set(re.findall(r"^([a-z_]+) ", table, flags=re.MULTILINE)) for table in tables]


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("state", Listed(Manifest("vm1/disk", "a"), ())),
        ("got", GetResult("vm1/disk", "a", (), "")),
        ("ensured", Ensured("a", "a--0123456789ab", True, GetResult("vm1/disk", "a", (), ""))),
        ("exported", Exported("vm1/disk", "a", (), "")),
        ("imported", Imported("vm1/disk", "a", (), "")),
        ("removed", Removed("vm1/disk")),
        ("source", SourceStatus("s", "file:///s", Scope.SHARED, "this host")),
        ("checked", Checked("p", "vm1/disk", "a")),
        ("adopted", Adopted("p", "vm1/disk", "a")),
        ("collected", Collected("p", "w", "n")),
        ("kept", Kept("p", (), 0, "b")),
        ("record", Logged("p", "vm1", 1, 0.0, "b", ())),
        ("finding", Finding(Level.OK, "p", "w")),
    ],
)
def test_outcomes(label: str, value: object) -> None:
    assert documented(label) == [set(form(value))]


def test_stored() -> None:
    stored, at = documented("stored")
    assert stored == set(form(SetResult("vm1/disk", "a", "")))
    assert at == set(form(StoredAt("p", Presence.STORED)))


def test_policies() -> None:
    outcome, item = documented("outcome")
    assert outcome == set(form(Outcome("push", "af", ())))
    assert item == set(form(ItemOutcome("vm1/disk", "a", None, Done.DONE, "")))


def test_synced() -> None:
    synced, state = documented("synced")
    assert synced == set(form(Synced("a", "b")))
    assert state == set(form(SyncedState("vm1/disk", "a", "image", SyncAction.COPIED)))


def test_errors() -> None:
    always, known = documented("error")
    assert always == {"kind", "message", "hint", "exit_code"}
    facts: set[str] = set()
    for error in (
        HasDependants("m"),
        DigestMismatch("m"),
        UnsafeImage("m"),
        LockTimeout("m"),
        NoSpace("m"),
        TransportError("m"),
    ):
        facts |= vars(error).keys()
    assert known == (facts | {"causes", "traceback"}) - always
