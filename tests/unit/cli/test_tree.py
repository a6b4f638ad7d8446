"""The order of a tree, and listings that are odd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from click.testing import Result

from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, Parent
from statepool.model.outcomes import Listed
from statepool.model.trees import arrange

Run = Callable[..., Result]


def digest(text: str) -> Digest:
    return Digest.of(text.encode())


def state(
    name: str,
    parent: str | None = None,
    *,
    content: str | None = None,
    of: str | None = None,
    object: str = "vm1/disk",
) -> Listed:
    """A state whose content is named after it, on a parent with the content ``of``."""
    backing = Parent(parent, digest(of or parent)) if parent else None
    return Listed(
        Manifest(object, name, digest=digest(content or name), parent=backing), ("file:///p",)
    )


def order(*listed: Listed) -> list[tuple[str, int]]:
    return [(node.listed.manifest.state, node.depth) for node in arrange(listed)]


def test_children_follow_their_parents() -> None:
    tree = order(state("d", "b"), state("c", "a"), state("b", "a"), state("a"), state("e"))
    assert tree == [("a", 0), ("b", 1), ("d", 2), ("c", 1), ("e", 0)]


def test_objects_stay_apart() -> None:
    tree = order(state("b", "a", object="vm2/disk"), state("a", object="vm1/disk"))
    assert tree == [("a", 0), ("b", 0)]


def test_a_parent_needs_the_right_content() -> None:
    tree = order(state("a", content="new"), state("b", "a", of="old"), state("c", "a", of="new"))
    assert tree == [("a", 0), ("c", 1), ("b", 0)]


def test_two_contents_of_one_name_are_two_trees() -> None:
    tree = order(
        state("a", content="new"),
        state("a", content="old"),
        state("b", "a", of="old"),
        state("c", "a", of="new"),
    )
    assert sorted(tree) == [("a", 0), ("a", 0), ("b", 1), ("c", 1)]


def test_an_unmanaged_parent_is_known_by_its_name() -> None:
    assert order(Listed(Manifest("vm1/disk", "a"), ("p",), managed=False), state("b", "a")) == [
        ("a", 0),
        ("b", 1),
    ]


def test_loops_are_cut() -> None:
    assert order(state("a", "b"), state("b", "a"), state("c", "a")) == [
        ("a", 0),
        ("b", 1),
        ("c", 1),
    ]
    assert order(state("a", "a")) == [("a", 0)]


def test_deep_chains() -> None:
    chain = [
        state("s0000"),
        *(state(f"s{number:04}", f"s{number - 1:04}") for number in range(1, 3000)),
    ]
    assert order(*chain) == [(f"s{number:04}", number) for number in range(3000)]


def test_drawing(run: Run, api: Any) -> None:
    api.answers["show"] = [
        state("a"), state("b", "a"), state("c", "b"), state("d", "a"),
        state("x", "gone"), state("y", "z"), state("z", "y"), state("a", object="vm2/disk"),
    ]  # fmt: skip
    assert [line.split("  0 B  /p")[0].rstrip() for line in run("tree").stdout.splitlines()] == [
        "vm1/disk",
        "  a",
        "  ├── b",
        "  │   └── c",
        "  └── d",
        "  x",
        "  y",
        "  └── z",
        "vm2/disk",
        "  a",
    ]
    text = run("tree").stdout
    assert "its parent gone is not here with the content it needs" in text
    assert "its chain is a loop" in text


def test_drawing_nothing(run: Run, api: Any) -> None:
    api.answers["show"] = []
    assert run("tree").stdout == ""
    assert run("tree", "--dot").stdout.startswith("digraph")
