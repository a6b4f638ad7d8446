"""``statepool stage``."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING

import click

from statepool.cli import output, paths
from statepool.cli.cback import cback_option, in_cedars_way
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option

if TYPE_CHECKING:
    from statepool.staging.settings import StageSettings
    from statepool.staging.stage import PeerResult


@click.command("stage", cls=Command)
@cback_option
@click.option("--full", is_flag=True, help="As at the start of the week; store: today in any case.")
@click.option(
    "-j", "--jobs", type=click.IntRange(1, 64), metavar="N", help="Peers at a time; 4 if not given."
)
@click.option(
    "--store",
    metavar="POOL",
    shell_complete=paths.directories,
    help="Stage nothing: copy the states of a staged day into this pool.",
)
@click.option(
    "--purge",
    type=click.IntRange(0),
    metavar="DAYS",
    help="Stage nothing: remove what is so many whole days old.",
)
@dry_run_option
@click.pass_obj
def command(
    session: Session,
    cback: str | None,
    full: bool,
    jobs: int | None,
    store: str | None,
    purge: int | None,
    dry_run: bool,
) -> int:
    """
    Bring what all peers have collected into the directory of the day.

    Peers are in the section [stage] of statepool.toml, or in a configuration of CedarBackup. A
    peer that fails does not stop the others; the exit code is then that of the first one.
    """
    if store is not None and purge is not None:
        raise click.UsageError("--store and --purge exclude each other")
    if dry_run and purge is None:
        raise click.UsageError("--dry-run is for --purge")
    with in_cedars_way(session, cback) as codes:
        settings = _settings(session, cback, jobs)
        if store is not None:
            code = _store(session, settings, store, full)
        elif purge is not None:
            code = _purge(session, settings, purge, dry_run)
        else:
            code = _stage(session, settings, full)
        codes.failed(code)
    return codes.code


def _settings(session: Session, cback: str | None, jobs: int | None) -> StageSettings:
    from statepool.staging.cedar import read_cedar
    from statepool.staging.settings import stage_settings, with_jobs

    found = read_cedar(cback).stage() if cback is not None else stage_settings(session.config.stage)
    return with_jobs(found, jobs)


def _stage(session: Session, settings: StageSettings, full: bool) -> int:
    from statepool.staging.stage import Stage

    staged = Stage(
        settings, session.config.settings, full, tell=lambda result: _tell(session, result)
    ).run()
    if session.json:
        session.answer_json({"staged": staged.form()})
    failed = [one.error for one in staged.peers if not one.succeeded]
    return next((error.exit_code for error in failed if error is not None), 0)


def _tell(session: Session, result: PeerResult) -> None:
    if session.json:
        return
    brought = result.brought
    if result.error is not None:
        hint = f" ({result.error.hint})" if result.error.hint else ""
        ignored = ", which is ignored" if result.ignored else ""
        text = f"{result.peer}: {result.error.message}{ignored}{hint}"
        session.say(text) if result.ignored else warn(text)
        return
    size = output.size(sum(one.size for one in brought.staged))
    what = "states" if result.kind == "states" else "files"
    session.say(f"{result.peer}: {len(brought.staged)} {what} ({size}), {brought.new} of them new")
    if brought.left_out:
        warn(f"{result.peer}: left out, since they are no files: {', '.join(brought.left_out)}")


def _store(session: Session, settings: StageSettings, pool: str, full: bool) -> int:
    from statepool.staging.store import store

    stored = store(
        settings,
        session.located(pool),
        session.config.settings,
        today=dt.datetime.now().astimezone().date(),
        full=full,
    )
    if session.json:
        session.answer_json({"stored": stored.form()})
    else:
        for peer, count, new in stored.states:
            session.say(f"{peer}: {count} states, {new} of them new")
    for error in stored.errors:
        warn(str(error))
    return next((error.exit_code for error in stored.errors), 0)


def _purge(session: Session, settings: StageSettings, days: int, dry_run: bool) -> int:
    from statepool.staging.purge import purge

    purged = purge(settings, days, dry_run=dry_run)
    if session.json:
        session.answer_json({"purged": list(purged), "dry_run": dry_run})
    else:
        for path in purged:
            session.say(f"{'would remove' if dry_run else 'removed'} {path}")
    return 0
