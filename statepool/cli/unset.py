"""``statepool unset``."""

from __future__ import annotations

import click

from statepool.cli import complete
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option, scope_option
from statepool.errors import TransportError
from statepool.model.outcomes import Removed


@click.command("unset", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state", shell_complete=complete.states)
@click.option("--everywhere", is_flag=True, help="Remove it from the sources, too.")
@scope_option
@click.option("--cascade", is_flag=True, help="Remove all states that stand on it, too.")
@dry_run_option
@click.pass_obj
def command(
    session: Session,
    object: str,
    state: str,
    everywhere: bool,
    scope: str | None,
    cascade: bool,
    dry_run: bool,
) -> int:
    """
    Remove a state.

    It is removed from the cache, and with --everywhere from the sources. A state that others stand
    on is not removed. A state of a machine, such as vm1, goes together with those of its images.
    Bytes that a working image stands on stay until that is gone. The exit code is 7 if the state
    could not be removed from a pool.
    """
    if everywhere and scope is not None:
        raise click.UsageError("--everywhere and --scope exclude each other")
    where = "all" if everywhere else scope or "own"
    removed = session.handle(object).unset(state, cascade=cascade, scope=where, dry_run=dry_run)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"removed": form(removed), "dry_run": dry_run})
    else:
        tell(session, removed, state, dry_run)
    return TransportError.exit_code if removed.errors else 0


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
