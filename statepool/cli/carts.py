"""``statepool carts``: its database, carts that went wrong or are old, and tokens."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from statepool.cli.serve import open_for, settings_of
from statepool.cli.session import Command, Helpful, Session, dry_run_option

if TYPE_CHECKING:
    from statepool.carts.database import Database
    from statepool.carts.service import Service

_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400, "week": 604_800}
_AGO = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s+([a-z]+?)s?\s+ago\Z")


class _Group(Helpful, click.Group):
    """A command with commands below it."""


@click.command("carts", cls=_Group)
def command() -> None:
    """
    Look after the service of carts.

    The settings are those of statepool serve.
    """


def _open(session: Session) -> Database:
    from statepool.carts.database import Database
    from statepool.carts.waiting import wait_for
    from statepool.cli.report import warn

    settings = settings_of(session)
    settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(settings.database_url)
    wait_for(database.reach, settings, time.sleep, warn)
    return database


def _service(session: Session) -> Service:
    from statepool.carts.service import open_service
    from statepool.cli.report import warn

    return open_service(settings_of(session), session.config, tell=warn)


@command.command("dbsync", cls=Command)
@click.pass_obj
def dbsync(session: Session) -> None:
    """Make the tables of the database, or bring them to this version."""
    from statepool.carts.migrations import dotted, synchronise

    before, after = synchronise(_open(session))
    if session.json:
        session.answer_json({"before": before and dotted(before), "after": dotted(after)})
    elif before == after:
        session.say(f"the database has the version {dotted(after)} already")
    else:
        from_ = f", from {dotted(before)}" if before is not None else ""
        session.say(f"the database has the version {dotted(after)} now{from_}")


@command.command("dbchk", cls=Command)
@click.option("--equal", is_flag=True, help="Also the minor version must be the same.")
@click.pass_obj
def dbchk(session: Session, equal: bool) -> None:
    """Tell by the exit code whether the database fits this version."""
    from statepool.carts.migrations import CURRENT, dotted, require_current, version

    database = _open(session)
    found = version(database)
    if equal or found is None or found[0] != CURRENT[0]:
        require_current(database)
    assert found is not None
    session.say(f"the database has the version {dotted(found)}")


@command.command("fixit", cls=Command)
@click.option(
    "--cartid",
    "cart_ids",
    metavar="ID",
    type=int,
    multiple=True,
    help="Only this one; may be repeated.",
)
@click.pass_obj
def fixit(session: Session, cart_ids: tuple[int, ...]) -> None:
    """Begin carts in error again: the service takes them up."""
    from statepool.carts.admin import fix_carts

    uids = fix_carts(_service(session), cart_ids)
    _tell(session, "begun", uids, lambda uid: f"{uid}: begun again")


@command.command("dump", cls=Command)
@click.pass_obj
def dump(session: Session) -> None:
    """Show all carts that are not deleted; with --json, also their files."""
    from statepool.carts.admin import dump_carts

    carts = dump_carts(_service(session))
    if session.json:
        session.answer_json({"carts": carts})
    else:
        titles = ["uid", "status", "used", "error"]
        session.answer_table(titles, [[one[title] for title in titles] for one in carts])


@command.command("purge", cls=Command)
@click.option(
    "--time-ago",
    default="180 days ago",
    metavar="AGO",
    help="Not used since: '7 days ago'; 180 days if not given.",
)
@dry_run_option
@click.pass_obj
def purge(session: Session, time_ago: str, dry_run: bool) -> None:
    """Delete carts that were not used for long."""
    from statepool.carts.admin import purge_carts

    found = _AGO.match(time_ago.strip())
    if found is None or found[2] not in _UNITS:
        raise click.UsageError(f"--time-ago cannot be {time_ago!r}: write, as in '7 days ago'")
    seconds = float(found[1]) * _UNITS[found[2]]
    uids = purge_carts(_service(session), seconds, dry_run=dry_run)
    _tell(session, "deleted", uids, lambda uid: f"{uid}: {'would be ' * dry_run}deleted")


def _tell(session: Session, key: str, uids: list[str], line: Callable[[str], str]) -> None:
    if session.json:
        session.answer_json({key: uids})
    for uid in uids if not session.json else ():
        session.say(line(uid))


@command.command("worker", cls=Command)
@click.pass_obj
def worker(session: Session) -> None:
    """
    Fill carts for statepool serve --tasks celery, until SIGTERM.

    It may run more than once, and on other hosts that have the same directory of carts.
    """
    settings = settings_of(session, tasks="celery")
    from statepool.carts.celery import work
    from statepool.cli.report import warn

    work(open_for(session, settings), warn)


@command.group("token", cls=_Group)
def token() -> None:
    """Say who may use the service from other hosts."""


@token.command("add", cls=Command)
@click.argument("name")
@click.option("--read", is_flag=True, help="Only to download; what is so without --write.")
@click.option("--write", is_flag=True, help="Also to make and delete carts.")
@click.option(
    "--objects",
    default="*",
    metavar="PATTERN",
    help="Only these files and states, as in 'vm1/*'.",
)
@click.pass_obj
def add(session: Session, name: str, read: bool, write: bool, objects: str) -> None:
    """Make a token, and show it: once, since only a hash of it is kept."""
    from statepool.carts.auth import add_token

    if read and write:
        raise click.UsageError("--read and --write exclude each other: who may write may read")
    made = add_token(_current(session), name, write=write, objects=objects)
    if session.json:
        session.answer_json({"name": name, "token": made})
    else:
        session.answer(made)


@token.command("remove", cls=Command)
@click.argument("name")
@click.pass_obj
def remove(session: Session, name: str) -> None:
    """Make a token useless, at once."""
    from statepool.carts.auth import remove_token

    remove_token(_current(session), name)
    _tell(session, "removed", [name], lambda one: f"{one}: removed")


@token.command("list", cls=Command)
@click.pass_obj
def list_(session: Session) -> None:
    """List tokens by their names."""
    from statepool.carts.auth import tokens

    known = tokens(_current(session))
    found: list[dict[str, Any]]
    found = [{"name": one.name, "write": one.write, "objects": one.objects} for one in known]
    if session.json:
        session.answer_json({"tokens": found})
    else:
        rows = [[one["name"], "write" if one["write"] else "read", one["objects"]] for one in found]
        session.answer_table(["name", "may", "objects"], rows)


def _current(session: Session) -> Database:
    from statepool.carts.migrations import require_current, synchronise, version

    database = _open(session)
    if version(database) is None:
        synchronise(database)
    require_current(database)
    return database
