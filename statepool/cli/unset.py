"""``statepool unset``."""

from __future__ import annotations

import fnmatch
import re
import time

import click

from statepool.cli import complete
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option, scope_option
from statepool.errors import HasDependants, NotFound, TransportError
from statepool.model.outcomes import Removed

_SPANS = {"h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
_PATTERN = re.compile(r"[*?\[]")
"""What no name has, and a pattern has."""


def _span(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,6})([hdw])", text)
    if found is None:
        raise click.BadParameter(
            f"{text!r} is not a number of hours, days or weeks, such as 12h, 30d or 4w",
            context,
            parameter,
        )
    return int(found[1]) * _SPANS[found[2]]


@click.command("unset", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state", shell_complete=complete.states)
@click.option("--everywhere", is_flag=True, help="Remove it from the sources, too.")
@scope_option
@click.option("--cascade", is_flag=True, help="Remove all states that stand on it, too.")
@click.option(
    "--older-than",
    metavar="SPAN",
    callback=_span,
    help="With a pattern: only states made longer ago than this, such as 12h, 30d or 4w.",
)
@dry_run_option
@click.pass_obj
def command(
    session: Session,
    object: str,
    state: str,
    everywhere: bool,
    scope: str | None,
    cascade: bool,
    older_than: int | None,
    dry_run: bool,
) -> int:
    """
    Remove a state.

    It is removed from the cache, and with --everywhere from the sources. A state that others stand
    on is not removed. A state of a machine, such as vm1, goes together with those of its images.
    Bytes that a working image stands on stay until that is gone. The exit code is 7 if the state
    could not be removed from a pool.

    STATE can be a pattern, in quotes: 'customize--*' means all states whose names begin so. Those
    on which others stand are left out, and the exit code is 4 then.
    """
    if everywhere and scope is not None:
        raise click.UsageError("--everywhere and --scope exclude each other")
    where = "all" if everywhere else scope or "own"
    if _PATTERN.search(state):
        return _unset_all(
            session, object, state, older_than, cascade=cascade, where=where, dry_run=dry_run
        )
    if older_than is not None:
        raise click.UsageError("--older-than needs a pattern, such as 'customize--*'")
    removed = session.handle(object).unset(state, cascade=cascade, scope=where, dry_run=dry_run)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"removed": form(removed), "dry_run": dry_run})
    else:
        tell(session, removed, state, dry_run)
    return TransportError.exit_code if removed.errors else 0


def _unset_all(
    session: Session,
    object: str,
    pattern: str,
    older_than: int | None,
    *,
    cascade: bool,
    where: str,
    dry_run: bool,
) -> int:
    """
    Remove all states of a pattern, the newest first: what stands on others was made after them.

    :returns: the exit code
    """
    handle = session.handle(object)
    before = time.time() - (older_than or 0)
    manifests = [one.manifest for one in handle.show(scope=where) if one.manifest.object == object]
    made = {manifest.state: manifest.created for manifest in manifests}
    names = [
        name
        for name in sorted(made, key=lambda name: -made[name])
        if fnmatch.fnmatchcase(name, pattern) and (older_than is None or made[name] < before)
    ]
    done: dict[str, Removed] = {}
    refused: list[HasDependants] = []
    for name in names:
        try:
            done[name] = handle.unset(name, cascade=cascade, scope=where, dry_run=dry_run)
        except HasDependants as error:
            refused.append(error)
        except NotFound:
            continue  # it went with one that it stood on, or another process has removed it
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"removed": [form(each) for each in done.values()], "dry_run": dry_run})
    else:
        for name, removed in done.items():
            tell(session, removed, name, dry_run)
        for one in refused:
            warn(str(one))
        if not names:
            old = " and is old enough" if older_than is not None else ""
            session.say(f"no state of {object} is like {pattern}{old}")
    if refused:
        return HasDependants.exit_code
    return TransportError.exit_code if any(each.errors for each in done.values()) else 0


def tell(session: Session, removed: Removed, state: str, dry_run: bool) -> None:
    """Print the result of removing a state."""
    for pool, states in removed.states.items():
        names = ", ".join(states) or "nothing"
        session.say(
            f"{removed.object}: {'would remove' if dry_run else 'removed'} {names} from"
            f" {session.place(pool)}"
        )
    for pool, problem in removed.errors.items():
        warn(f"{removed.object} {state} was not removed from {session.place(pool)}: {problem}")
