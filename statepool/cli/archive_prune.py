"""``statepool archive prune``: which archives stay, and which go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from statepool.cli import output, paths
from statepool.cli.archiving import default_work_dir
from statepool.cli.session import Command, Session, dry_run_option
from statepool.cli.signals import orderly

if TYPE_CHECKING:
    from statepool.archive.prune import Pruned
    from statepool.archive.retention import Decision, Rules

_Function = TypeVar("_Function", bound=Callable[..., Any])

DAY = 86400.0
"""Seconds of a day."""

_COUNTS = (
    ("--restarts", "All that stands on the last N archives of level 0."),
    ("--kept", "The present ones, and those under the first N keeping ids; 0: the present ones."),
    ("--last", "The last N archives."),
    ("--daily", "The last archive of each of the last N days that have one, in UTC."),
    ("--weekly", "The last archive of each of the last N weeks that have one."),
    ("--monthly", "The last archive of each of the last N months that have one."),
)
_AGES = (
    ("--restarts-within", "All that stands on an archive of level 0 that is not older."),
    ("--within", "Archives that are not older."),
)


def _rules(function: _Function) -> _Function:
    """Add the options of rules to a command."""
    options = [
        click.option(name, metavar="N", type=click.IntRange(min=0), help=told)
        for name, told in _COUNTS
    ]
    options += [
        click.option(name, metavar="DAYS", type=click.FloatRange(min=0), help=told)
        for name, told in _AGES
    ]
    options.append(
        click.option(
            "--levels",
            metavar="LEVEL=N",
            multiple=True,
            help="The last N archives of a level; may be repeated.",
        )
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command("prune", cls=Command)
@click.argument(
    "directory",
    metavar="DIR",
    type=click.Path(path_type=Path),
    shell_complete=paths.directories,
)
@click.argument("backup_id", metavar="[ID]", required=False)
@_rules
@click.option(
    "--orphans",
    is_flag=True,
    help="Remove archives, too, that cannot be restored: a level is missing or damaged.",
)
@click.option(
    "--work-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    shell_complete=paths.directories,
    help="Where snapshot files are; if not given, statepool/archive in $XDG_STATE_HOME.",
)
@dry_run_option
@click.pass_obj
def command(
    session: Session,
    /,
    directory: Path,
    backup_id: str | None,
    levels: tuple[str, ...],
    orphans: bool,
    work_dir: Path | None,
    dry_run: bool,
    **rules: float | None,
) -> None:
    """
    Remove archives that no rule keeps, and what was left of archives that are gone.

    An archive stays if one of the rules keeps it, if one that stays stands on it, or if it is the
    newest that can be restored. Without a rule, only manifests without an archive, and snapshot
    files of levels that are gone, are removed. --dry-run shows the tree of archives, and why each
    stays or goes.
    """
    from statepool.archive.prune import backups_in, prune

    place, work = directory.absolute(), (work_dir or default_work_dir()).absolute()
    given = _given(levels, orphans, rules)
    ids = [backup_id] if backup_id is not None else backups_in(place)
    with orderly():
        found = [prune(place, name, work, given, dry_run=dry_run) for name in ids]
    if session.json:
        session.answer_json({"pruned": [_form(one) for one in found], "dry_run": dry_run})
        return
    for one in found:
        _show(session, one, dry_run)


def _given(levels: Sequence[str], orphans: bool, rules: dict[str, float | None]) -> Rules | None:
    """:returns: the rules; None if none is given"""
    from statepool.archive.retention import Rules

    counts = {key: value for key, value in rules.items() if value is not None}
    if not counts and not levels:
        if orphans:
            raise click.UsageError("--orphans needs a rule, such as --kept 676")
        return None
    values: dict[str, Any] = {
        key: value * DAY if key.endswith("within") else value for key, value in counts.items()
    }
    return Rules(levels=dict(map(_level, levels)), orphans=not orphans, **values)


def _level(text: str) -> tuple[int, int]:
    level, _, count = text.partition("=")
    if not (level.isascii() and level.isdigit() and count.isascii() and count.isdigit()):
        raise click.UsageError(f"--levels cannot be {text!r}: write, as in 0=3")
    return int(level), int(count)


def _show(session: Session, pruned: Pruned, dry_run: bool) -> None:
    if dry_run and pruned.plan is not None:
        for line in map(_line, pruned.plan.decisions):
            session.answer(line)
    would = "would be " if dry_run else ""
    for name in (*(pruned.files if pruned.plan is None or not dry_run else ()), *pruned.leftovers):
        session.say(f"{output.safe(name)}: {would}removed")
    total, count = output.size(pruned.bytes), len(pruned.files)
    done = "would remove" if dry_run else "removed"
    told = f"{done} {count} {'archive' if count == 1 else 'archives'}, {total}"
    session.say(f"{output.safe(pruned.backup_id)}: {told}")


def _line(decision: Decision) -> str:
    archive = decision.archive
    made = output.moment(archive.time) if archive.time else "?"
    stays = "stays" if decision.stays else "goes"
    name = output.safe(str(archive))
    indent = "  " * archive.depth
    why = "; ".join(map(output.safe, decision.reasons))
    return f"{indent}{name}  {made}  {output.size(archive.size)}  {stays}: {why}"


def _form(pruned: Pruned) -> dict[str, Any]:
    decisions = pruned.plan.decisions if pruned.plan is not None else ()
    return {
        "backup_id": pruned.backup_id,
        "archives": [
            {
                "archive": str(one.archive),
                "type": one.archive.kind,
                "stays": one.stays,
                "reasons": list(one.reasons),
                "base": str(one.base) if one.base is not None else None,
            }
            for one in decisions
        ],
        "removed": list(pruned.files),
        "leftovers": list(pruned.leftovers),
        "bytes": pruned.bytes,
    }
