"""The one validator of names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import InvalidName
from statepool.model.names import (
    MAX_LENGTH,
    RESERVED_SUFFIXES,
    ROOT,
    ROOT_STATES,
    check_name,
    check_state_name,
    is_name,
)

GOOD = [
    "a",
    "0",
    "vm1",
    "install",
    "install.v2",
    "a+b-c_d.e",
    "A" * MAX_LENGTH,
    "qcow2",
    "lock",
    "x.qcow",
    "x.qcow2.bak",
    "a..b",
    "a.",
]

BAD = [
    "",
    ".",
    "..",
    ".hidden",
    "-rf",
    "_x",
    "+x",
    "a/b",
    "../a",
    "/a",
    "a b",
    "a\n",
    "\na",
    "a\0",
    "a:b",
    "a,b",
    "a%2f",
    "json:{}",
    "é",
    "a\u0301",
    "а",  # noqa: RUF001 - a Cyrillic letter, which is the point
    "٣",
    "a\udcff",
    "x.qcow2",
    "x.QCOW2",
    "x.state",
    "x.json",
    "x.lock",
    "A" * (MAX_LENGTH + 1),
]


@pytest.mark.parametrize("name", GOOD)
def test_good_names_come_back(name: str) -> None:
    assert is_name(name)
    assert check_name(name, "a state") == name
    assert check_state_name(name) == name


@pytest.mark.parametrize("name", BAD)
def test_bad_names_are_refused(name: str) -> None:
    assert not is_name(name)
    with pytest.raises(InvalidName, match="not a valid name for an image") as caught:
        check_name(name, "an image")
    assert caught.value.hint
    assert str(caught.value).isprintable(), (
        "what somebody typed must not reach the terminal as it is"
    )
    assert len(str(caught.value)) < 400
    with pytest.raises(InvalidName):
        check_state_name(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a" * 200, "it has 200 characters, more than 128"),
        ("x.QCOW2", r"it ends in \.QCOW2"),
        ("a b", "letters, digits and"),
    ],
)
def test_reason_is_given(name: str, reason: str) -> None:
    with pytest.raises(InvalidName, match=reason):
        check_name(name, "a state")


@pytest.mark.parametrize("name", sorted(ROOT_STATES))
def test_root_states_cannot_name_another_state(name: str) -> None:
    assert check_name(name, "a machine") == name
    with pytest.raises(InvalidName, match="reserved"):
        check_state_name(name, root=False)


def test_the_root_state_has_one_name() -> None:
    assert check_state_name(ROOT) == ROOT
    for name in ROOT_STATES - {ROOT}:
        with pytest.raises(InvalidName, match="reserved") as caught:
            check_state_name(name)
        assert caught.value.hint == "the root state is called root"


@given(st.text(max_size=140))
def test_rule_is_the_written_one(text: str) -> None:
    """The rule in one expression, as docs/formats.rst has it."""
    assert is_name(text) == bool(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}", text)
        and not any(text.lower().endswith(suffix) for suffix in RESERVED_SUFFIXES)
    )


@given(st.data())
def test_what_is_accepted_is_safe_in_a_path(some, data: st.DataObject) -> None:
    name = data.draw(some.names)
    assert "/" not in name
    assert name not in (".", "..")
    assert not name.startswith((".", "-"))
    assert len((name + ".qcow2").encode()) < 255
