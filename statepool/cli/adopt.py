"""``statepool adopt``."""

from __future__ import annotations

import click

from statepool.cli import paths
from statepool.cli.session import Command, Session, dry_run_option
from statepool.errors import IntegrityError


@click.command("adopt", cls=Command)
@click.argument("pool", required=False, shell_complete=paths.directories)
@click.option(
    "--relocate", is_flag=True, help="Rewrite absolute backing names in images that are not in use."
)
@dry_run_option
@click.pass_obj
def command(session: Session, pool: str | None, relocate: bool, dry_run: bool) -> int:
    """
    Make unmanaged states managed.

    POOL is a directory or another location; without it, the cache is meant. The files of other
    tools stay where they are. The exit code is 5 if one had to be left alone.
    """
    from statepool import api

    place, settings = pool if pool is not None else session.config.cache, session.config.settings
    adopted = api.adopt(
        place, relocate=relocate, dry_run=dry_run, settings=settings, progress=session.progress()
    )
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"adopted": form(adopted), "dry_run": dry_run})
    else:
        rows = [
            (
                item.object,
                item.state,
                session.place(item.pool),
                _result(item.problem, item.relocated, dry_run),
            )
            for item in adopted
            if item.problem or not session.quiet
        ]
        session.answer_table(("OBJECT", "STATE", "WHERE", "RESULT"), rows)
    return IntegrityError.exit_code if any(item.problem for item in adopted) else 0


def _result(problem: str | None, relocated: bool, dry_run: bool) -> str:
    if problem is not None:
        return f"left alone: {problem}"
    return ("would be adopted" if dry_run else "adopted") + (" and relocated" if relocated else "")
