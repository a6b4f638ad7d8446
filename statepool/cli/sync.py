"""``statepool sync``."""

from __future__ import annotations

import click

from statepool.cli import complete, output
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option
from statepool.errors import TransportError
from statepool.model.outcomes import SyncAction, Synced

_DONE = {SyncAction.COPIED: "copied", SyncAction.REMOVED: "removed"}
_WOULD = {SyncAction.COPIED: "would copy", SyncAction.REMOVED: "would remove"}


@click.command("sync", cls=Command)
@click.argument("origin", metavar="FROM")
@click.argument("target", metavar="TO")
@click.argument("object", required=False, shell_complete=complete.objects)
@click.option("--delete", is_flag=True, help="Remove from TO what FROM does not have.")
@click.option("--replace", is_flag=True, help="Replace states of TO that have other content.")
@dry_run_option
@click.pass_obj
def command(
    session: Session,
    origin: str,
    target: str,
    object: str | None,
    delete: bool,
    replace: bool,
    dry_run: bool,
) -> int:
    """
    Copy chains from one pool to another.

    FROM and TO are locations, or names of configured sources. Parents go first, what is there is
    skipped, and what was interrupted is simply done again. The exit code is 7 if a state could not
    be copied or removed.
    """
    from statepool.api import sync

    synced = sync(
        session.located(origin),
        session.located(target),
        object,
        delete=delete,
        replace=replace,
        dry_run=dry_run,
        settings=session.config.settings,
        progress=session.progress(),
    )
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"synced": form(synced), "dry_run": dry_run})
    else:
        _tell(session, synced, dry_run)
    return 0 if synced.complete else TransportError.exit_code


def _counted(action: SyncAction, dry_run: bool) -> str:
    return f"would be {action}" if dry_run and action in _WOULD else str(action)


def _tell(session: Session, synced: Synced, dry_run: bool) -> None:
    words = _WOULD if dry_run else _DONE
    for state in synced.states:
        name = f"{state.object} {state.state}"
        if state.action is SyncAction.FAILED:
            warn(f"{name}: {state.error}")
        elif state.action in words:
            session.say(
                f"{words[state.action]} {name}"
                + (f" ({output.size(state.bytes)})" if state.bytes else "")
            )
    counts = [
        (sum(1 for state in synced.states if state.action is action), _counted(action, dry_run))
        for action in SyncAction
    ]
    session.say(", ".join(f"{count} {what}" for count, what in counts if count) or "nothing to do")
