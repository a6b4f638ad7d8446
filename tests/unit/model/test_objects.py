"""What has states, and how it is written."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import InvalidName, UsageError
from statepool.model.objects import Image, Machine, parse_image, parse_object


def test_forms() -> None:
    assert parse_object("vm1") == Machine("vm1")
    assert parse_object("vm1/disk") == parse_image("vm1/disk") == Image("vm1", "disk")


@given(st.data())
def test_what_is_printed_is_read_back(some, data: st.DataObject) -> None:
    machine, image = data.draw(some.names), data.draw(some.names)
    for value in (Machine(machine), Image(machine, image)):
        assert parse_object(str(value)) == value
        assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "vm1/",
        "/disk",
        "vm1/disk/",
        "vm1//disk",
        "vm1/disk/x",
        "../vm1",
        "vm1/..",
        "vm1/disk.qcow2",
        " vm1",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InvalidName):
        parse_object(text)


def test_a_machine_is_no_image() -> None:
    with pytest.raises(InvalidName, match="names a machine") as caught:
        parse_image("vm1")
    assert "vm1/disk" in str(caught.value.hint)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Image("vm1", "a/b"),
        lambda: Image("..", "disk"),
        lambda: Machine(""),
        lambda: Machine("vm1", ("disk", "..")),
    ],
)
def test_values_with_bad_names_cannot_be_made(make) -> None:
    with pytest.raises(InvalidName):
        make()


def test_images_do_not_make_another_machine() -> None:
    assert Machine("vm1", ["disk", "data"]) == Machine("vm1")
    assert hash(Machine("vm1", ("disk",))) == hash(Machine("vm1"))
    assert Machine("vm1", ["disk", "data"]).images == ("disk", "data")


@pytest.mark.parametrize("images", ["disk", "d", "", b"disk"])
def test_the_images_of_a_machine_are_not_one_text(images) -> None:
    with pytest.raises(UsageError, match="not one text") as caught:
        Machine("vm1", images)
    assert f"[{images!r}]" in str(caught.value.hint)
