"""``statepool doctor``."""

from __future__ import annotations

import click
from attrs import evolve

from statepool.cli.session import Command, Session
from statepool.model.outcomes import Finding, Level


@click.command("doctor", cls=Command)
@click.pass_obj
def command(session: Session) -> int:
    """
    Look for what this host or a pool lacks.

    The exit code is 1 if something is wrong that needs a cure.
    """
    findings = [
        evolve(found, cure=session.completed(found.cure or "") or None)
        for found in session.pool().doctor()
    ]
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"findings": form(findings)})
    else:
        rows = [
            (str(finding.level), session.place(finding.where), finding.what, finding.cure or "")
            for finding in findings
            if _shown(finding, session)
        ]
        session.answer_table(("LEVEL", "WHERE", "WHAT", "WHAT TO DO"), rows)
    return 1 if any(finding.level is Level.ERROR for finding in findings) else 0


def _shown(finding: Finding, session: Session) -> bool:
    return not session.quiet or finding.level in (Level.WARNING, Level.ERROR)
