"""``statepool push``."""

from __future__ import annotations

from collections.abc import Sequence

import click

from statepool.backends.base import Options
from statepool.cli import complete, paths
from statepool.cli import set as setting
from statepool.cli.outcome import report_outcome
from statepool.cli.session import Command, Session, dry_run_option, scope_option
from statepool.model.objects import Machine, parse_object
from statepool.model.scope import Scope
from statepool.policy import Item


@click.command("push", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state")
@click.option(
    "--from",
    "sources",
    metavar="FILE",
    multiple=True,
    required=True,
    shell_complete=paths.files,
    help="The working image; for a machine, IMAGE=FILE for each image, or a directory.",
)
@click.option(
    "--mode",
    metavar="XY",
    default="af",
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
    sources: tuple[str, ...],
    mode: str,
    scope: str | None,
    dry_run: bool,
) -> int:
    """
    Store a state that is popped later.

    As set, with a mode of two letters. Where the state exists: a (abort), r (keep what is there) or
    f (replace it, unless something stands on it). Where it does not: f (store it) or a (abort).
    """
    item = Item(parse_object(object), state, _working(object, sources))
    options = Options(scope=Scope.permitted(scope), dry_run=dry_run)
    return report_outcome(
        session, session.pool().policy().push([item], mode=mode, options=options), dry_run
    )


def _working(object: str, sources: Sequence[str]) -> dict[str, str]:
    found = parse_object(object)
    if isinstance(found, Machine):
        return setting.of_images(sources)
    if len(sources) > 1:
        raise click.UsageError(f"{object} is one image: --from can only be given once")
    return {found.name: sources[0]}
