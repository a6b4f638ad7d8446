"""``statepool collect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from statepool.cli.cback import cback_option, in_cedars_way
from statepool.cli.report import warn
from statepool.cli.session import Command, Session

if TYPE_CHECKING:
    from statepool.staging.collect import CollectedItem


@click.command("collect", cls=Command)
@cback_option
@click.option("--full", is_flag=True, help="Collect everything, as at the start of the week.")
@click.pass_obj
def command(session: Session, cback: str | None, full: bool) -> int:
    """
    Put files and directories into tars, to be staged.

    They are named in the section [collect] of statepool.toml, or in a configuration of
    CedarBackup.
    """
    from statepool.staging.cedar import read_cedar
    from statepool.staging.collect import Collect
    from statepool.staging.settings import collect_settings

    with in_cedars_way(session, cback) as codes:
        settings = (
            read_cedar(cback).collect()
            if cback is not None
            else collect_settings(session.config.collect)
        )
        done = Collect(settings, full, tell=lambda item: _tell(session, item)).run()
        if session.json:
            session.answer_json({"collected": [one.form() for one in done]})
    return codes.code


def _tell(session: Session, item: CollectedItem) -> None:
    for path in item.changed:
        warn(f"{path} changed while it was collected, or is gone")
    if not session.json:
        what = (
            f"{item.files} files in {item.tar}" if item.tar is not None else "nothing to do today"
        )
        session.say(f"{item.path}: {what}")
