"""``statepool gc``."""

from __future__ import annotations

import click

from statepool.cli import output
from statepool.cli.session import Command, Session, dry_run_option


@click.command("gc", cls=Command)
@click.option("--everywhere", is_flag=True, help="Clean the sources, too.")
@click.option("--keep-keys", type=click.IntRange(min=1), metavar="N", help="Of states that were built, keep the newest N keys.")
@dry_run_option
@click.pass_obj
def command(session: Session, everywhere: bool, keep_keys: int | None, dry_run: bool) -> None:
    """
    Remove leftovers, and bytes that nobody needs.

    What crashes left behind, data that no state needs and old records are removed from the cache, and with --everywhere from the sources.
    """
    collected = session.pool().gc(everywhere=everywhere, keep_keys=keep_keys, dry_run=dry_run)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"collected": form(collected), "dry_run": dry_run})
        return
    rows = [] if session.quiet else [(session.place(item.pool), item.what, item.path, output.size(item.bytes)) for item in collected]
    session.answer_table(("WHERE", "WHAT", "NAME", "SIZE"), rows, right=("SIZE",))
    total = output.size(sum(item.bytes for item in collected))
    session.say(f"{'would remove' if dry_run else 'removed'} {len(collected)} {'file' if len(collected) == 1 else 'files'}, {total}")
