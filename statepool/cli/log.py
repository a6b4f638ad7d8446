"""``statepool log``."""

from __future__ import annotations

import click

from statepool.cli import complete, output
from statepool.cli.report import warn
from statepool.cli.session import Command, Session
from statepool.cli.show import require_any


@click.command("log", cls=Command)
@click.argument("object", required=False, shell_complete=complete.objects)
@click.pass_obj
def command(session: Session, object: str | None) -> None:
    """
    Show what happened.

    The records of the logs of OBJECT's machine, or of all machines, are shown, those of each pool
    in their order. The exit code is 3 if OBJECT has neither a record nor a state.
    """
    pool = session.pool()
    records = pool.log(object)
    if object is not None and not records:
        listed = pool.show(object)
        # unmanaged states have no records, and old records are not kept
        require_any(session, object, listed)
        for text in listed.warnings if not session.json else ():
            warn(f"warning: {text}")
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"records": form(records)})
        return
    rows = [
        (
            session.place(record.pool),
            record.machine,
            str(record.number),
            output.moment(record.time),
            record.by,
            "; ".join(record.changes),
        )
        for record in records
    ]
    session.answer_table(
        ("WHERE", "MACHINE", "RECORD", "TIME", "BY", "CHANGES"), rows, right=("RECORD",)
    )
