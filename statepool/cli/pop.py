"""``statepool pop``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from statepool.api import StatePool
from statepool.backends.base import Options
from statepool.cli import complete
from statepool.cli.outcome import report_outcome
from statepool.cli.session import Command, Session, dry_run_option, scope_option
from statepool.errors import NotFound
from statepool.model.objects import Machine, parse_object
from statepool.model.scope import Scope
from statepool.policy import Item


@click.command("pop", cls=Command)
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
    "--mode",
    metavar="XY",
    default="ra",
    show_default=True,
    help="What to do where the state exists, and where it does not: see below.",
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
    mode: str,
    scope: str | None,
    dry_run: bool,
) -> int:
    """
    Get a state, and remove it.

    It is removed from all pools, or from those of --scope; its bytes stay for as long as the
    working image stands on them. The mode has two letters. Where the state exists: r (get it and
    remove it), i (leave it) or a (abort). Where it does not: a (abort) or i (ignore).
    """
    if overwrite and to is None:
        raise click.UsageError("--overwrite needs --to")
    pool = session.pool()
    item = Item(
        parse_object(object), state, _working(pool, object, state, to) if to is not None else {}
    )
    options = Options(overwrite=overwrite, scope=Scope.permitted(scope), dry_run=dry_run)
    return report_outcome(session, pool.policy().pop([item], mode=mode, options=options), dry_run)


def _working(pool: StatePool, object: str, state: str, to: str) -> Mapping[str, str | Path]:
    found = parse_object(object)
    if not isinstance(found, Machine):
        return {found.name: to}
    try:
        return {image: Path(to) / f"{image}.qcow2" for image in pool.machine(object).images(state)}
    except NotFound:
        return {}  # the mode says what to do in this case
