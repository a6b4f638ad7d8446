"""``statepool show``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import click

from statepool.cli import complete, output
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, scope_option
from statepool.errors import NotFound
from statepool.model.keys import LABEL_KEY, LABEL_STATE, parse_name
from statepool.model.location import Location
from statepool.model.manifest import Kind
from statepool.model.outcomes import Listed, Listing
from statepool.model.scope import Scope


@click.command("show", cls=Command)
@click.argument("object", required=False, shell_complete=complete.objects)
@scope_option
@click.pass_obj
def command(session: Session, object: str | None, scope: str | None) -> None:
    """
    List states, and where each is.

    OBJECT is a machine, such as vm1, or an image, such as vm1/disk; without it, all are listed. The
    exit code is 3 if it has no state.
    """
    listed = session.pool().show(object, scope=scope)
    require_any(session, object, listed, scope=scope)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"states": form(listed), "warnings": list(listed.warnings)})
        return
    for text in listed.warnings:
        warn(f"warning: {text}")
    titles = ("OBJECT", "STATE", "SIZE", "PARENT", "CREATED", "WHERE", "NOTE")
    session.answer_table(
        titles,
        [_row(session, item, size) for item, size in _with_ram(sorted(listed, key=_place))],
        right=("SIZE",),
    )


def _with_ram(listed: Sequence[Listed]) -> Iterator[tuple[Listed, int]]:
    """
    :returns: the states, each with its size. The RAM of a machine's state counts for that state,
        and is not listed as a separate state.
    """

    def part_of(item: Listed) -> tuple[str, str, tuple[str, ...]]:
        return item.manifest.object, item.manifest.state, item.pools

    ram = {
        part_of(item): item.manifest.data_size for item in listed if item.manifest.kind is Kind.RAM
    }
    machines = {part_of(item) for item in listed if item.manifest.kind is Kind.MACHINE}
    for item in listed:
        if item.manifest.kind is Kind.MACHINE:
            yield item, item.manifest.data_size + ram.get(part_of(item), 0)
        elif item.manifest.kind is not Kind.RAM or part_of(item) not in machines:
            yield item, item.manifest.data_size


def require_any(
    session: Session, object: str | None, listed: Listing, *, scope: str | None = None
) -> None:
    """
    Check that an object that the user has named is known at all, since its name may be mistyped.

    If a pool could not be asked, this is unknown: its warning is the answer then.

    :param listed: its states
    :param scope: of the pools that were asked; all if not given
    :raises NotFound: no pool has a state of it
    """
    if object is None or listed or listed.warnings:
        return
    scopes = Scope.permitted(scope)
    asked = [str(Location("file", session.config.cache))] if Scope.OWN in scopes else []
    asked += [str(source.location) for source in session.config.sources if source.scope in scopes]
    where = ", ".join(asked) or f"pools of the scope {scope}, of which there are none"
    raise NotFound(
        f"there is no state of {object} in {where}",
        object=object,
        hint="statepool show lists what there is",
    )


def _place(item: Listed) -> tuple[str, str, float, str]:
    """Return a sort key that groups the states built under one name, the newest key first."""
    built = parse_name(item.manifest.state)
    state, age = (
        (built[0], -item.manifest.created)
        if built is not None
        else (item.manifest.state, -math.inf)
    )
    return item.manifest.object, state, age, str(item.manifest.kind)


def _row(session: Session, item: Listed, size: int) -> tuple[str, ...]:
    manifest = item.manifest
    return (
        manifest.object,
        manifest.state,
        output.size(size),
        manifest.parent.state if manifest.parent else "",
        output.moment(manifest.created),
        " ".join(map(session.place, item.pools)),
        note(item),
    )


def note(item: Listed) -> str:
    """:returns: what the user should know of a state in addition"""
    words = [] if item.managed else ["unmanaged"]
    if LABEL_KEY in item.manifest.labels:
        words.append(f"a key of {item.manifest.labels.get(LABEL_STATE)}")
    return ", ".join(words + ([item.problem] if item.problem else []))
