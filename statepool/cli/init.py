"""``statepool init``."""

from __future__ import annotations

import click

from statepool.cli import paths
from statepool.cli.session import Command, Session, dry_run_option, written


@click.command("init", cls=Command)
@click.argument("pool", required=False, shell_complete=paths.directories)
@dry_run_option
@click.pass_obj
def command(session: Session, pool: str | None, dry_run: bool) -> None:
    """
    Make a pool.

    POOL is a directory or another location; without it, the cache is made. A pool that is there
    already stays as it is.
    """
    from statepool import api

    location = str(
        api.init(
            pool if pool is not None else session.config.cache,
            dry_run=dry_run,
            settings=session.config.settings,
        )
    )
    if session.json:
        session.answer_json({"pool": location, "dry_run": dry_run})
    else:
        session.say(
            f"{'would make a pool' if dry_run else 'there is a pool'} at {written(location)}"
        )
