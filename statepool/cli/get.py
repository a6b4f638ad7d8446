"""``statepool get``."""

from __future__ import annotations

from typing import Any

import click

from statepool.cli import complete, names, output
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option, scope_option
from statepool.errors import NotFound
from statepool.model.outcomes import GetResult, Verified

VERIFIED = {
    Verified.ARRIVED: "every byte was checked as it arrived",
    Verified.TRUSTED: "unchanged since it was checked",
    Verified.REHASHED: "every byte was checked once more",
    Verified.UNMANAGED: "nothing is known to check it against",
}
"""How the bytes of a state were verified, in the text output."""


@click.command("get", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state", shell_complete=complete.states)
@click.option(
    "--to",
    type=click.Path(readable=False),
    metavar="FILE",
    help=(
        "Make this working image, backed by the state; for a machine, IMAGE.qcow2 of each image in"
        " this directory."
    ),
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@click.option(
    "--from",
    "source",
    metavar="SOURCE",
    shell_complete=complete.sources,
    help="Have it as this source has it, given by its name or location.",
)
@scope_option
@dry_run_option
@click.pass_obj
def command(
    session: Session,
    object: str,
    state: str,
    to: str | None,
    overwrite: bool,
    source: str | None,
    scope: str | None,
    dry_run: bool,
) -> None:
    """
    Bring a state here; make a working image of it.

    The state and all that backs it come into the cache from the best source, unless they are there.
    With --to, a working image is made, on which a machine can run. Of a machine, such as vm1, all
    images come, and all working images are made, or none. Of states that were built, STATE may be
    the name without the key: it is the newest of them then.
    """
    if overwrite and to is None:
        raise click.UsageError("--overwrite needs --to")
    how: dict[str, Any] = {
        "to": to,
        "overwrite": overwrite,
        "mirror": source,
        "scope": scope,
        "dry_run": dry_run,
    }
    handle = session.handle(object)
    try:
        got = handle.get(state, **how)
    except NotFound as error:
        got = handle.get(names.meant(session, object, state, error, scope), **how)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"got": form(got), "dry_run": dry_run})
    else:
        tell(session, got, dry_run)


def tell(session: Session, got: GetResult, dry_run: bool) -> None:
    """Print the result of getting a state."""
    for text in got.warnings:
        warn(f"warning: {text}")
    session.say(_told(session, got, dry_run))
    for path in got.images.values() or (got.working,):
        if path is not None:
            session.say(f"{'would make the working image' if dry_run else 'working image'}: {path}")


def _told(session: Session, got: GetResult, dry_run: bool) -> str:
    name = f"{got.object} {got.state}"
    if got.source is None:
        return f"{name}: in the cache" + ("" if dry_run else f"; {VERIFIED[got.verified]}")
    way = f"{output.size(got.bytes)} from {session.place(got.source)}"
    return (
        f"{name}: would fetch {way}"
        if dry_run
        else f"{name}: {way} ({got.how}); {VERIFIED[got.verified]}"
    )
