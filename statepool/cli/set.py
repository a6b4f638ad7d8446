"""``statepool set``."""

from __future__ import annotations

from pathlib import Path

import click

from statepool.cli import complete, output
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option
from statepool.errors import TransportError
from statepool.model.outcomes import Presence, Stored, StoredAt


def _labels(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"{text!r} is not of the form KEY=VALUE", context, parameter)
        if key in labels:
            raise click.BadParameter(f"{key!r} is given twice", context, parameter)
        labels[key] = value
    return labels


@click.command("set", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state")
@click.option("--from", "source", type=click.Path(path_type=Path, readable=False), metavar="FILE", required=True, help="The working image.")
@click.option("--replace", is_flag=True, help="Replace a state of this name that has other content.")
@click.option("--label", "labels", metavar="KEY=VALUE", multiple=True, callback=_labels, help="Remember this with the state; may be repeated.")
@dry_run_option
@click.pass_obj
def command(session: Session, object: str, state: str, source: Path, replace: bool, labels: dict[str, str], dry_run: bool) -> int:
    """
    Store a state in the cache and in the sources.

    The working image becomes the state; an empty one, backed by it, takes its place, so that the machine can go on. The exit code is 7 if a pool
    could not take the state.
    """
    stored = session.pool().image(object).set(state, source=source, replace=replace, labels=labels or None, dry_run=dry_run)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"stored": form(stored), "dry_run": dry_run})
    else:
        _tell(session, stored, dry_run)
    return 0 if stored.complete else TransportError.exit_code


def _tell(session: Session, stored: Stored, dry_run: bool) -> None:
    for text in stored.warnings:
        warn(f"warning: {text}")
    for at in stored.pools:
        place = session.place(at.pool)
        if at.result is Presence.FAILED:
            warn(f"{stored.object} {stored.state} is not in {place}: {at.error}")
        else:
            session.say(f"{stored.object} {stored.state}: {_told(at, dry_run)} {place}")


def _told(at: StoredAt, dry_run: bool) -> str:
    if at.result is Presence.PRESENT:
        return "was already in"
    if dry_run:
        return "would be stored in"
    moved = f" ({output.size(at.bytes)})" if at.bytes else ""
    return f"stored{moved}{'' if at.durable else ', not safe from a power cut yet,'} in"
