"""States in the order of their chains: each below the one that backs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from statepool.model.digest import Digest
from statepool.model.outcomes import Listed

DRAWN = 64
"""
Levels that are drawn at most: a line for each of a thousand states on each other would be a
thousand levels long.
"""


@frozen
class TreeNode:
    """
    A state in its place.

    :param listed: the state
    :param depth: how many states of the listing are below it in its chain
    :param parent: the state that backs it, or None where that is not listed; at depth 0, there is
        one only in a chain that is a loop
    :param last: for it and those it stands below, as far as they are drawn, whether each is the
        last child of its parent
    """

    listed: Listed
    depth: int = 0
    parent: Listed | None = None
    last: tuple[bool, ...] = ()


def arrange(listed: Sequence[Listed]) -> Iterator[TreeNode]:
    """
    Bring states into the order of a tree: each after its parent, objects and siblings by name.

    What a listing says is not believed further than needed: a chain may be deep, lack its
    beginning, or be a loop, which is cut somewhere.
    """
    ordered = sorted(listed, key=lambda item: (item.manifest.id, str(item.manifest.digest)))
    exact = {
        (item.manifest.object, item.manifest.state, item.manifest.digest): item
        for item in reversed(ordered)
    }
    named = {
        (item.manifest.object, item.manifest.state): item
        for item in reversed(ordered)
        if item.manifest.digest is None
    }
    children: dict[int, list[Listed]] = {}
    roots: list[Listed] = []
    parents: dict[int, Listed] = {}
    for item in ordered:
        parent = _parent(item, exact, named)
        if parent is None:
            roots.append(item)
        else:
            parents[id(item)] = parent
            children.setdefault(id(parent), []).append(item)
    seen: set[int] = set()
    # Those of a loop have no root: they are reached by the second list, which is sorted in behind
    # the roots of their object.
    for root in sorted([*roots, *ordered], key=lambda item: item.manifest.object):
        yield from _walk(root, children, parents, seen)


def _parent(
    item: Listed,
    exact: Mapping[tuple[str, str, Digest | None], Listed],
    named: Mapping[tuple[str, str], Listed],
) -> Listed | None:
    manifest = item.manifest
    if manifest.parent is None:
        return None
    name = (manifest.object, manifest.parent.state)
    return exact.get((*name, manifest.parent.digest)) or named.get(name)


def _walk(
    root: Listed, children: dict[int, list[Listed]], parents: dict[int, Listed], seen: set[int]
) -> Iterator[TreeNode]:
    """Without recursion: chains may be deeper than Python's stack."""
    stack = [TreeNode(root, parent=parents.get(id(root)))]
    while stack:
        node = stack.pop()
        if id(node.listed) in seen:
            continue
        seen.add(id(node.listed))
        yield node
        below = children.get(id(node.listed), [])
        for index, child in reversed(list(enumerate(below))):
            stack.append(
                TreeNode(
                    child,
                    node.depth + 1,
                    parents[id(child)],
                    (*node.last, index == len(below) - 1)[-DRAWN:],
                )
            )
