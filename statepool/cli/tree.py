"""``statepool tree``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import click
from attrs import frozen

from statepool.cli import complete, output
from statepool.cli.report import warn
from statepool.cli.session import Command, Session
from statepool.cli.show import note, require_any
from statepool.model.digest import Digest
from statepool.model.outcomes import Listed


@click.command("tree", cls=Command)
@click.argument("object", required=False, shell_complete=complete.objects)
@click.option("--dot", is_flag=True, help="Print a graph for Graphviz.")
@click.pass_obj
def command(session: Session, object: str | None, dot: bool) -> None:
    """
    Show chains as a tree.

    OBJECT is a machine, such as vm1, or an image, such as vm1/disk; without it, all are shown. A
    state stands below its parent. The exit code is 3 if OBJECT has no state.
    """
    if dot and session.json:
        raise click.UsageError("--dot and --json exclude each other")
    listed = session.pool().show(object)
    require_any(session, object, listed)
    nodes = list(arrange(listed))
    if session.json:
        from statepool.cli.forms import form

        session.answer_json(
            {
                "states": [form(node.listed) | {"depth": node.depth} for node in nodes],
                "warnings": list(listed.warnings),
            }
        )
        return
    for text in listed.warnings:
        warn(f"warning: {text}")
    if dot:
        session.answer("\n".join(_dot(session, nodes)))
    elif nodes:
        session.answer("\n".join(_draw(session, nodes)))


DRAWN = 64
"""
The most levels that are drawn: in a chain of a thousand states, each line would contain up to a
thousand levels.
"""


@frozen
class Node:
    """
    A state at its place in the tree.

    :param listed: the state
    :param depth: how many states of the listing are below it in its chain
    :param parent: the state that backs it, or None if that is not listed; at depth 0 it is set only
        in a chain that is a loop
    :param last: for the state and its drawn ancestors, whether each is the last child of its parent
    """

    listed: Listed
    depth: int = 0
    parent: Listed | None = None
    last: tuple[bool, ...] = ()


def arrange(listed: Sequence[Listed]) -> Iterator[Node]:
    """
    Sort states in the order of a tree: each after its parent, objects and siblings by name.

    A listing is not trusted: a chain may be deep, lack its beginning, or be a loop, which is cut
    somewhere.
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
    # The states of a loop have no root: they are reached by the second list, which is sorted in
    # after the roots of their object.
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
) -> Iterator[Node]:
    """Walk the tree without recursion: chains may be deeper than Python's stack."""
    stack = [Node(root, parent=parents.get(id(root)))]
    while stack:
        node = stack.pop()
        if id(node.listed) in seen:
            continue
        seen.add(id(node.listed))
        yield node
        below = children.get(id(node.listed), [])
        for index, child in reversed(list(enumerate(below))):
            stack.append(
                Node(
                    child,
                    node.depth + 1,
                    parents[id(child)],
                    (*node.last, index == len(below) - 1)[-DRAWN:],
                )
            )


def _draw(session: Session, nodes: Iterable[Node]) -> list[str]:
    lines: list[tuple[str, str, str, str]] = []
    name = None
    for node in nodes:
        manifest = node.listed.manifest
        if manifest.object != name:
            name = manifest.object
            lines.append((name, "", "", ""))
        where = " ".join(map(session.place, node.listed.pools))
        lines.append(
            (
                f"  {_branch(node)}{manifest.state}",
                output.size(manifest.data_size),
                where,
                _remark(node),
            )
        )
    return output.aligned(
        [tuple(map(output.safe, line)) for line in lines], (False, True, False, False)
    )


def _branch(node: Node) -> str:
    if not node.last:
        return ""
    *above, last = node.last
    return (
        ("… " if node.depth > DRAWN else "")
        + "".join("    " if ended else "│   " for ended in above)
        + ("└── " if last else "├── ")
    )


def _remark(node: Node) -> str:
    words = [note(node.listed)] if note(node.listed) else []
    parent = node.listed.manifest.parent
    if parent is not None and node.depth == 0:
        words.append(
            f"its parent {parent.state} is not here with the content it needs"
            if node.parent is None
            else "its chain is a loop"
        )
    return ", ".join(words)


def _dot(session: Session, nodes: Sequence[Node]) -> Iterator[str]:
    names = {id(node.listed): f"s{index}" for index, node in enumerate(nodes)}
    yield "digraph states {"
    yield "  rankdir = LR;"
    yield "  node [shape = box];"
    for node in nodes:
        manifest = node.listed.manifest
        where = " ".join(map(session.place, node.listed.pools))
        label = "\\n".join(
            _quoted(text)
            for text in (
                f"{manifest.object} {manifest.state}",
                output.size(manifest.data_size),
                where,
                _remark(node),
            )
            if text
        )
        yield f'  {names[id(node.listed)]} [label = "{label}"];'
    for node in nodes:
        if node.parent is not None:
            yield f"  {names[id(node.parent)]} -> {names[id(node.listed)]};"
    yield "}"


def _quoted(text: str) -> str:
    """
    Escape a text for a quoted string of the DOT language; see
    https://graphviz.org/doc/info/lang.html.
    """
    return output.safe(text).replace("\\", "\\\\").replace('"', '\\"')
