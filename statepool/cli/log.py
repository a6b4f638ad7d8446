"""``statepool log``."""

from __future__ import annotations

import click

from statepool.cli import complete, output
from statepool.cli.session import Command, Session


@click.command("log", cls=Command)
@click.argument("object", required=False, shell_complete=complete.objects)
@click.pass_obj
def command(session: Session, object: str | None) -> None:
    """
    Show what happened.

    The records of the logs of OBJECT's machine, or of all machines, are shown, those of each pool in their order.
    """
    records = session.pool().log(object)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"records": form(records)})
        return
    rows = [
        (session.place(record.pool), record.machine, str(record.number), output.moment(record.time), record.by, "; ".join(record.changes))
        for record in records
    ]
    session.answer_table(("WHERE", "MACHINE", "RECORD", "TIME", "BY", "CHANGES"), rows, right=("RECORD",))
