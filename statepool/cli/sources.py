"""``statepool sources``."""

from __future__ import annotations

import click

from statepool.cli import output
from statepool.cli.session import Command, Session, scope_option, written
from statepool.model.outcomes import SourceStatus


@click.command("sources", cls=Command)
@scope_option
@click.pass_obj
def command(session: Session, scope: str | None) -> None:
    """
    Show in which order sources are asked, and why.

    The first one that has a state is where it comes from. Nobody is contacted: shown is what was
    learnt when states were got. One that failed is left alone for a while, and then tried again.
    """
    sources = session.pool().sources_status(scope=scope)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"sources": form(sources)})
        return
    titles = ("NAME", "WHERE", "LATENCY", "RATE", "WHY", "NOTE")
    session.answer_table(titles, [_row(source) for source in sources], right=("LATENCY", "RATE"))


def _row(source: SourceStatus) -> tuple[str, ...]:
    return (
        source.name if source.name != source.location else "",
        written(source.location),
        f"{source.latency * 1000:.1f} ms" if source.latency is not None else "",
        f"{output.size(source.rate)}/s" if source.rate is not None else "",
        source.why,
        _note(source),
    )


def _note(source: SourceStatus) -> str:
    notes = ["authority"] if source.authority else []
    if source.problem is not None:
        notes.append(
            f"{'corrupt' if source.corrupt else 'failed'} at {output.moment(source.failed)}:"
            f" {source.problem}"
        )
    return "; ".join(notes)
