"""``statepool tree``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import click

from statepool.cli import complete, output
from statepool.cli.report import warn
from statepool.cli.session import Command, Session
from statepool.cli.show import note, require_any
from statepool.model.trees import DRAWN, TreeNode, arrange


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


def _draw(session: Session, nodes: Iterable[TreeNode]) -> list[str]:
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


def _branch(node: TreeNode) -> str:
    if not node.last:
        return ""
    *above, last = node.last
    return (
        ("… " if node.depth > DRAWN else "")
        + "".join("    " if ended else "│   " for ended in above)
        + ("└── " if last else "├── ")
    )


def _remark(node: TreeNode) -> str:
    words = [note(node.listed)] if note(node.listed) else []
    parent = node.listed.manifest.parent
    if parent is not None and node.depth == 0:
        words.append(
            f"its parent {parent.state} is not here with the content it needs"
            if node.parent is None
            else "its chain is a loop"
        )
    return ", ".join(words)


def _dot(session: Session, nodes: Sequence[TreeNode]) -> Iterator[str]:
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
