"""``statepool gc``."""

from __future__ import annotations

import click

from statepool.cli import output
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option
from statepool.model.outcomes import Kept


@click.command("gc", cls=Command)
@click.option("--everywhere", is_flag=True, help="Clean the sources, too.")
@click.option(
    "--keep-keys",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of states that were built, keep the newest N keys.",
)
@click.option(
    "--now",
    is_flag=True,
    help="Do not keep anything for working images that are gone: none was moved.",
)
@dry_run_option
@click.pass_obj
def command(
    session: Session, everywhere: bool, keep_keys: int | None, now: bool, dry_run: bool
) -> int:
    """
    Remove leftovers, and bytes that nobody needs.

    What crashes left behind, data that no state needs and old records are removed from the cache,
    and with --everywhere from the sources. What working images stood on that are gone is kept for
    seven days, since they may have been moved; with --now it is removed too. The exit code is that
    of the first error if a source had to be left alone, as 7 is for one that cannot be changed.
    """
    answer = session.pool().gc(everywhere=everywhere, keep_keys=keep_keys, now=now, dry_run=dry_run)
    code = next((item.code for item in answer if item.problem is not None), 0)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json(
            {"collected": form(answer), "kept": form(answer.kept), "dry_run": dry_run}
        )
        return code
    collected = [item for item in answer if item.problem is None]
    rows = (
        []
        if session.quiet
        else [
            (session.place(item.pool), item.what, item.path, output.size(item.bytes))
            for item in collected
        ]
    )
    session.answer_table(("WHERE", "WHAT", "NAME", "SIZE"), rows, right=("SIZE",))
    total = output.size(sum(item.bytes for item in collected))
    session.say(
        f"{'would remove' if dry_run else 'removed'} {len(collected)}"
        f" {'file' if len(collected) == 1 else 'files'}, {total}"
    )
    for kept in answer.kept:
        session.say(
            f"{output.size(kept.bytes)}{' of ' if kept.states else ''}{', '.join(kept.states)}"
            f" {_why(session, kept)}"
        )
    for item in answer:
        if item.problem is not None:
            warn(f"{session.place(item.pool)} was left alone: {item.problem}")
    return code


def _why(session: Session, kept: Kept) -> str:
    if not kept.states:
        return f"stay, since the cache {session.place(kept.by)} refers to them"
    if kept.until is None:
        return f"stay, since the working image {kept.by} stands on them"
    return (
        f"stay until {output.moment(kept.until)}, since the working image {kept.by} stood on them,"
        " and may have been moved; gc --now removes them"
    )
