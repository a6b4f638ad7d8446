"""States of pools as the page shows them: found, in the order of their chains, and drawn."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from attrs import frozen

from statepool import Kind, Listed, TreeNode, arrange

DRAWN = 60
"""States that are drawn at most."""

_STEP, _LINE, _LETTER = 22, 30, 8.5
"""Pixels: of a level of the tree, of a line, and of a letter at most."""


@frozen(eq=False, slots=False)
class Row:
    """
    A state.

    :param id: what the archive of states calls it
    :param listed: what the pools say of it
    :param size: bytes that are not holes, with the RAM of a machine
    :param places: what the pools that have it are called
    :param dependants: how many states stand on it, directly or not
    """

    id: str
    listed: Listed
    size: int
    places: tuple[str, ...]
    dependants: int

    @property
    def object(self) -> str:
        """What it is a state of."""
        return self.listed.manifest.object

    @cached_property
    def text(self) -> str:
        """What is searched."""
        labels = (f"{name}={value}" for name, value in self.listed.manifest.labels.items())
        return " ".join((self.id, *self.places, *labels)).lower()


@frozen(eq=False)
class Placed:
    """
    A state in its place on a page.

    :param depth: how many states of the page are above it in its chain
    :param parent: what backs it, where that is not what it is below
    """

    row: Row
    depth: int
    parent: str | None


class States:
    """
    The states that a user may see.

    :param listed: what the pools have
    :param names: what pools are called, by their locations
    :param objects: a pattern of the ids that may be seen
    """

    def __init__(self, listed: Iterable[Listed], names: Mapping[str, str], objects: str) -> None:
        seen = [item for item in listed if fnmatch.fnmatchcase(id_of(item), objects)]
        # The RAM of a machine is part of its state, and no state of its own for people.
        ram = {id_of(item): item.manifest.data_size for item in seen if _is_ram(item)}
        self._nodes = list(arrange([item for item in seen if not _is_ram(item)]))
        self._lists = _machines(self._nodes)
        counts = _dependants(self._nodes, self._lists)
        self._rows = {
            id(node.listed): Row(
                id_of(node.listed),
                node.listed,
                node.listed.manifest.data_size
                + (ram.get(id_of(node.listed), 0) if _is_machine(node.listed) else 0),
                tuple(names.get(pool, pool) for pool in node.listed.pools),
                count,
            )
            for node, count in zip(self._nodes, counts, strict=True)
        }

    def find(self, words: str) -> list[Placed]:
        """
        :param words: all of which are in the id, a label or the name of a pool; case does not count
        :returns: the states, in the order of a tree of those that were found
        """
        wanted = words.lower().split()
        rows = self._rows.values()
        found = [row for row in rows if all(word in row.text for word in wanted)]
        nodes = self._nodes if not wanted else arrange([row.listed for row in found])
        return [Placed(self._rows[id(node.listed)], node.depth, _parent(node)) for node in nodes]

    def named(self, name: str) -> list[Row]:
        """:returns: the states of this id: more than one where pools do not agree"""
        return [row for row in self._rows.values() if row.id == name]

    def below(self, row: Row) -> list[Row]:
        """:returns: what a state stands on, its parent first; of a machine, its images"""
        if _is_machine(row.listed):
            return [
                self._rows[one] for one, machines in self._lists.items() if row.listed in machines
            ]
        parents = {id(node.listed): node.parent for node in self._nodes}
        found: dict[int, Row] = {}
        parent = parents[id(row.listed)]
        while parent is not None and parent is not row.listed and id(parent) not in found:
            found[id(parent)] = self._rows[id(parent)]
            parent = parents[id(parent)]
        return list(found.values())

    def above(self, row: Row) -> list[Row]:
        """:returns: what stands on a state: in the order of the tree, then machines"""
        start = next(n for n, node in enumerate(self._nodes) if node.listed is row.listed)
        found = [row]
        for node in self._nodes[start + 1 :]:
            if node.depth <= self._nodes[start].depth:
                break
            found.append(self._rows[id(node.listed)])
        machines = [one for under in found for one in self._lists.get(id(under.listed), ())]
        return [*found[1:], *(self._rows[id(one)] for one in machines)]

    def draw(self, row: Row) -> Drawing:
        """:returns: the tree that a state is in; of a large one, what is next to it in its chain"""
        tree = [node.listed for node in self._nodes if node.listed.manifest.object == row.object]
        if len(tree) > DRAWN:
            chain = [*reversed(self.below(row)), row, *self.above(row)]
            near = [one.listed for one in chain if one.object == row.object]
            start = max(0, near.index(row.listed) - DRAWN // 2)
            tree = near[start : start + DRAWN]
        return _drawn([(node, self._rows[id(node.listed)]) for node in arrange(tree)])


# -- drawing ---------------------------------------------------------------------------------------


@frozen
class Mark:
    """
    A state in a drawing.

    :param x: of its dot, in pixels
    :param y: likewise
    :param row: the state
    :param line: the path that leads to it from its parent, as SVG has it; empty if there is none
    """

    x: int
    y: int
    row: Row
    line: str


@frozen
class Drawing:
    """
    A tree of states, as lines and dots.

    :param width: in pixels
    :param height: likewise
    :param marks: its states
    """

    width: int
    height: int
    marks: tuple[Mark, ...]


def _drawn(nodes: Sequence[tuple[TreeNode, Row]]) -> Drawing:
    marks: list[Mark] = []
    path: list[Mark] = []
    for number, (node, row) in enumerate(nodes):
        x, y = _LINE // 2 + node.depth * _STEP, _LINE // 2 + number * _LINE
        del path[node.depth :]
        line = f"M{path[-1].x} {path[-1].y}V{y}H{x}" if path else ""
        marks.append(Mark(x, y, row, line))
        path.append(marks[-1])
    widths = [mark.x + _LINE + _LETTER * len(mark.row.listed.manifest.state) for mark in marks]
    return Drawing(round(max(widths, default=0)), _LINE * len(marks), tuple(marks))


# -- counting --------------------------------------------------------------------------------------


def id_of(item: Listed) -> str:
    """:returns: what the archive of states calls a state"""
    return f"{item.manifest.object}/{item.manifest.state}"


def _is_ram(item: Listed) -> bool:
    return item.manifest.kind is Kind.RAM


def _is_machine(item: Listed) -> bool:
    return item.manifest.kind is Kind.MACHINE


def _parent(node: TreeNode) -> str | None:
    parent = node.listed.manifest.parent
    return parent.state if parent is not None and node.depth == 0 else None


def _machines(nodes: Sequence[TreeNode]) -> dict[int, list[Listed]]:
    """:returns: the states of machines that list the state of an image, by the latter"""
    manifests = {id(node.listed): node.listed.manifest for node in nodes}
    images = {(one.object, one.state, one.digest): key for key, one in manifests.items()}
    found: dict[int, list[Listed]] = {}
    for node in nodes:
        manifest = node.listed.manifest
        for member, digest in manifest.members.items():
            if (image := images.get((member, manifest.state, digest))) is not None:
                found.setdefault(image, []).append(node.listed)
    return found


def _dependants(nodes: Sequence[TreeNode], lists: Mapping[int, Sequence[Listed]]) -> list[int]:
    """:returns: for each state of a tree how many stand on it"""
    counts = [len(lists.get(id(node.listed), ())) for node in nodes]
    parents: list[int | None] = []
    path: list[int] = []
    for index, node in enumerate(nodes):
        del path[node.depth :]
        parents.append(path[-1] if path else None)
        path.append(index)
    for index in reversed(range(len(nodes))):  # children come after their parents
        if (parent := parents[index]) is not None:
            counts[parent] += counts[index] + 1
    return counts


# -- nested lists ----------------------------------------------------------------------------------


def nested(placed: Iterable[Placed]) -> Iterator[tuple[Placed | None, int, bool]]:
    """
    Tell how a list of lists is written, of which each state of a tree is an item.

    :returns: each state, how many lists end before it, and whether one begins with it; at the end
        None, with the lists that are still open
    """
    depths: list[int] = []
    for one in placed:
        ended = sum(depth > one.depth for depth in depths)
        depths = depths[: len(depths) - ended]
        begins = not depths or depths[-1] < one.depth
        if begins:
            depths.append(one.depth)
        yield one, ended, begins
    yield None, len(depths), False
