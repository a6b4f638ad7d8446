"""``statepool check``."""

from __future__ import annotations

import click

from statepool.cli import complete, names
from statepool.cli.session import Command, Session, scope_option
from statepool.errors import NotFound


@click.command("check", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state", shell_complete=complete.states)
@scope_option
@click.pass_obj
def command(session: Session, object: str, state: str, scope: str | None) -> int:
    """
    Tell by the exit code whether a state is there.

    The exit code is 0 if the cache or a source has it, and 3 if none has. Nothing is printed but
    with -v or --json. If only built states have this name, before their keys, it is the newest of
    these, and the command says which.
    """
    present = session.handle(object).check(state, scope=scope)
    if not present and (built := names.newest_built(session, object, state, scope)) is not None:
        state, present = built, True
    if session.json:
        session.answer_json({"object": object, "state": state, "present": present})
    elif session.verbose:
        session.say(f"{object} {state} is {'there' if present else 'not there'}")
    return 0 if present else NotFound.exit_code
