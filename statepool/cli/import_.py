"""``statepool import``."""

from __future__ import annotations

import sys

import click

from statepool.cli import output, paths
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option
from statepool.cli.signals import orderly
from statepool.errors import StatePoolError, TransportError
from statepool.model.carried import Imported


@click.command("import", cls=Command)
@click.argument("file", shell_complete=paths.files)
@click.option(
    "--to",
    "target",
    metavar="POOL",
    help="Also store it in this pool, given by the name of a source or its location.",
)
@click.option("--replace", is_flag=True, help="Replace a state of POOL that has other content.")
@dry_run_option
@click.pass_obj
def command(session: Session, file: str, target: str | None, replace: bool, dry_run: bool) -> int:
    """
    Bring the state in such a file here.

    FILE is a bundle that statepool export has written; - is standard input. Its state comes into
    the cache with all that it stands on, every byte checked: all of it, or nothing. The exit code
    is 7 if it could not be stored in POOL.
    """
    if replace and target is None:
        raise click.UsageError("--replace needs --to")
    if file == "-" and sys.stdin is None:
        raise StatePoolError("standard input is closed", hint="name a file")
    with orderly():
        bundle = sys.stdin.buffer if file == "-" else file
        imported = session.pool().import_bundle(bundle, to=target, replace=replace, dry_run=dry_run)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"imported": form(imported), "dry_run": dry_run})
    else:
        tell(session, imported, dry_run)
    return 0 if imported.complete else TransportError.exit_code


def tell(session: Session, imported: Imported, dry_run: bool) -> None:
    """Say what was imported."""
    for text in imported.warnings:
        warn(f"warning: {text}")
    name = f"{imported.object} {imported.state}"
    moved = "all of it was in the cache"
    if imported.bytes:
        moved = f"{'would import ' if dry_run else ''}{output.size(imported.bytes)}"
    session.say(f"{name}: {moved}" + ("" if dry_run else "; every byte was checked"))
    if (at := imported.stored) is not None:
        if at.error is not None:
            warn(f"{name} is not in {session.place(at.pool)}: {at.error}")
        else:
            session.say(f"{name}: {at.result} in {session.place(at.pool)}")
