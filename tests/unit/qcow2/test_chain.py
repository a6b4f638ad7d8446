"""The walk from a state down to its root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from statepool.errors import MissingFile, NotFound, UnsafeImage
from statepool.qcow2.chain import walk
from statepool.qcow2.checks import Backing
from statepool.qcow2.header import Read
from tests.support.images import CHILD, GOOD


def made(depth: int) -> dict[str, bytes]:
    images = {"s0": GOOD.build()}
    for number in range(1, depth):
        images[f"s{number}"] = evolve(CHILD, backing=f"s{number - 1}.qcow2".encode()).build()
    return images


class Images:
    """Opens images in memory, and remembers which."""

    def __init__(self, images: dict[str, bytes], error: type[Exception] = MissingFile) -> None:
        self.images = images
        self.error = error
        self.opened: list[str] = []

    def __call__(self, state: str) -> tuple[Read, int]:
        self.opened.append(state)
        if state not in self.images:
            raise self.error(f"no {state}")
        data = self.images[state]
        return (lambda offset, size: data[offset : offset + size]), len(data)


def test_a_chain_comes_tip_first() -> None:
    links = walk("s4", Images(made(5)))
    assert [link.state for link in links] == ["s4", "s3", "s2", "s1", "s0"]
    assert [link.header.backing_name for link in links] == [
        b"s3.qcow2",
        b"s2.qcow2",
        b"s1.qcow2",
        b"s0.qcow2",
        None,
    ]


@pytest.mark.parametrize("depth", [1, 256])
def test_a_chain_may_be_as_deep_as_permitted(depth: int) -> None:
    assert len(walk(f"s{depth - 1}", Images(made(depth)), max_depth=depth)) == depth


def test_a_deeper_chain_is_refused_before_the_next_image_is_opened() -> None:
    images = Images(made(300))
    with pytest.raises(UnsafeImage, match="more than 256 states") as caught:
        walk("s299", images, what="vm1/disk")
    assert caught.value.check == "depth"
    assert "vm1/disk s299" in str(caught.value)
    assert len(images.opened) == 256


@pytest.mark.parametrize("loop", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_a_loop_is_refused(loop: dict[str, str]) -> None:
    images = Images(
        {
            state: evolve(CHILD, backing=f"{parent}.qcow2".encode()).build()
            for state, parent in loop.items()
        }
    )
    with pytest.raises(UnsafeImage) as caught:
        walk("a", images)
    assert caught.value.check == "loop"
    assert len(images.opened) == len(loop)


@pytest.mark.parametrize("error", [MissingFile, NotFound])
def test_a_missing_parent_is_refused_and_named(error: type[Exception]) -> None:
    images = made(3)
    del images["s0"]
    with pytest.raises(UnsafeImage, match=r"vm1/disk s0 .*backs 's1'") as caught:
        walk("s2", Images(images, error), what="vm1/disk")
    assert caught.value.check == "missing-parent"
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize("error", [MissingFile, NotFound])
def test_a_missing_tip_is_simply_not_there(error: type[Exception]) -> None:
    with pytest.raises(error):
        walk("nothing", Images({}, error))


def test_nothing_is_opened_behind_a_refused_image() -> None:
    images = Images({**made(2), "s1": evolve(CHILD, backing=b"s0.qcow2", incompatible=4).build()})
    with pytest.raises(UnsafeImage) as caught:
        walk("s1", images)
    assert caught.value.check == "data-file"
    assert images.opened == ["s1"]


def test_absolute_names_are_followed_only_where_they_may_be() -> None:
    images = {**made(1), "s1": evolve(CHILD, backing=b"/srv/elsewhere/s0.qcow2").build()}
    assert [link.state for link in walk("s1", Images(images))] == ["s1", "s0"]
    with pytest.raises(UnsafeImage) as caught:
        walk("s1", Images(images), backing=Backing.SIBLING)
    assert caught.value.check == "backing-absolute"


def test_files_in_a_directory(tmp_path: Path, open_in: Any) -> None:
    for state, data in made(3).items():
        (tmp_path / f"{state}.qcow2").write_bytes(data)
    with open_in(tmp_path) as open_image:
        assert len(walk("s2", open_image)) == 3
