"""``statepool verify``."""

from __future__ import annotations

import click

from statepool.cli import complete, output
from statepool.cli.get import VERIFIED
from statepool.cli.session import Command, Session
from statepool.errors import IntegrityError
from statepool.model.outcomes import Checked, Verified


@click.command("verify", cls=Command)
@click.argument("object", required=False, shell_complete=complete.objects)
@click.argument("state", required=False, shell_complete=complete.states)
@click.pass_obj
def command(session: Session, object: str | None, state: str | None) -> int:
    """
    Read states once more, and check every byte.

    Those of OBJECT, or all, are checked in the cache and in the sources. The exit code is 5 if
    something is not what it should be.
    """
    checked = session.pool().verify(object, state)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"checked": form(checked)})
    else:
        rows = [
            (
                item.object,
                item.state,
                session.place(item.pool),
                output.size(item.bytes),
                _result(item),
            )
            for item in checked
            if item.problem or item.note or not session.quiet
        ]
        session.answer_table(("OBJECT", "STATE", "WHERE", "READ", "RESULT"), rows, right=("READ",))
    return IntegrityError.exit_code if any(item.problem for item in checked) else 0


def _result(item: Checked) -> str:
    result = item.problem or ("whole" if item.digest is not None else VERIFIED[Verified.UNMANAGED])
    return f"{result}; {item.note}" if item.note is not None else result
