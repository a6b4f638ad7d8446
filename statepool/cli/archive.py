"""``statepool archive``: archives of directories, in the terms of AutoArchive."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from statepool.cli import archive_prune, archive_run, output, paths
from statepool.cli.archiving import archiver_of, default_work_dir, make
from statepool.cli.report import warn
from statepool.cli.session import Command, Helpful, Session, dry_run_option
from statepool.cli.signals import orderly

if TYPE_CHECKING:
    from statepool.archive.definition import BackupDefinition
    from statepool.archive.directory import ArchiveDirectory, Stored
    from statepool.archive.levels import Restarts
    from statepool.archive.names import ArchiveName

_Function = TypeVar("_Function", bound=Callable[..., Any])

_TYPES = ("tar", "tar.gz", "tar.bz2", "tar.xz", "tar.zst")


class _Group(Helpful, click.Group):
    """A command with commands below it."""


@click.command("archive", cls=_Group)
def command() -> None:
    """
    Archive directories on levels, verify and restore them.

    DIR is the directory with the archives, and ID the name of a backup. An archive is
    ID[.LEVEL][.KEEPING_ID].tar.gz, or of another type; beside each is its manifest. Each of these
    commands prints JSON with --json.
    """


_work_dir_option = click.option(
    "--work-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    shell_complete=paths.directories,
    help="Where snapshot files are; if not given, statepool/archive in $XDG_STATE_HOME.",
)
_type_option = click.option(
    "--type",
    "backup_type",
    type=click.Choice(_TYPES),
    help="Of the archives; tar.gz if not given, and what there is of existing ones.",
)
_keeping_id_option = click.option(
    "--keeping-id", metavar="ID", help="What is kept under this id, aa to zz."
)


def _several(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    def add(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return add


_restart_options = _several(
    click.option(
        "--restart-after-level",
        "after_level",
        metavar="LEVEL",
        type=click.IntRange(min=1),
        help="The highest level; then level 1 is made again.",
    ),
    click.option(
        "--restart-after-age",
        "after_age",
        metavar="DAYS",
        type=click.FloatRange(min=1),
        help="Make level 1 again so many days after the last time.",
    ),
    click.option(
        "--full-restart-after-count",
        "full_after_count",
        metavar="COUNT",
        type=click.IntRange(min=1),
        help="Make level 0 again after so many restarts.",
    ),
    click.option(
        "--full-restart-after-age",
        "full_after_age",
        metavar="DAYS",
        type=click.FloatRange(min=1),
        help="Make level 0 again when it is so many days old.",
    ),
    click.option(
        "--max-restart-level-size",
        "largest",
        metavar="PERCENT",
        type=click.FloatRange(min=1),
        help="Restart to a higher level than 1 if that is larger than this part of level 0.",
    ),
)


@command.command("create", cls=Command)
@click.argument("backup_id", metavar="ID")
@click.argument("root", metavar="ROOT", shell_complete=paths.directories)
@click.option(
    "--to",
    "destination",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=paths.directories,
    help="The directory with the archives; it must exist.",
)
@_type_option
@click.option(
    "--archiver",
    metavar="NAME",
    help="external (GNU tar; if not given), internal (no other program, no levels), pool (if not"
    " given, and ROOT is a location with ://, or --object is given), or another.",
)
@click.option("-i", "--incremental", is_flag=True, help="Make the next level.")
@click.option(
    "--level",
    metavar="N",
    type=click.IntRange(min=0),
    help="Make this level; the next one if it is higher. Levels above it are overwritten.",
)
@click.option("--include", multiple=True, metavar="PATH", help="Only this; may be repeated.")
@click.option(
    "--object",
    "objects",
    multiple=True,
    metavar="PATTERN",
    help="Of a pool, only these, such as 'vm1/*'; may be repeated.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATH",
    help="Not this; of a pool a pattern, such as 'vm1/disk:rescue'; may be repeated.",
)
@click.option("--strength", metavar="0-9", type=click.IntRange(0, 9), help="Of the compression.")
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    default=None,
    help="How many compress at once; as many as there are processors if not given.",
)
@click.option(
    "--keep",
    metavar="N",
    type=click.IntRange(0, 676),
    default=0,
    help="Keep so many archives that would be overwritten; 0 if not given.",
)
@click.option(
    "--overwrite-at-start", is_flag=True, help="Remove, or keep, old archives first: saves space."
)
@_restart_options
@_work_dir_option
@click.pass_obj
def create(
    session: Session,
    /,
    backup_id: str,
    root: str,
    destination: Path,
    backup_type: str | None,
    archiver: str | None,
    incremental: bool,
    level: int | None,
    include: tuple[str, ...],
    objects: tuple[str, ...],
    exclude: tuple[str, ...],
    strength: int | None,
    threads: int | None,
    keep: int,
    overwrite_at_start: bool,
    work_dir: Path | None,
    **restarts: float | None,
) -> None:
    """
    Archive the directory, or the pool, ROOT.

    The archive appears when it is whole. PATH is relative to ROOT. Files that changed or vanished
    meanwhile, or cannot be read, are told on standard error, and the exit code is 0.
    """
    from statepool.archive.definition import BackupDefinition

    if archiver is None:
        archiver = "pool" if objects or "://" in root else "external"
    if objects and archiver != "pool":
        raise click.UsageError("--object is for pools; in a directory, it is --include")
    definition = BackupDefinition(
        backup_id, backup_type or "tar.gz", destination, root, (*include, *objects), exclude
    )
    path, told = make(
        session,
        archiver,
        work_dir or default_work_dir(),
        definition=definition,
        incremental=incremental,
        level=level,
        restarts=_restarts(restarts),
        strength=strength,
        threads=threads,
        overwrite_at_start=overwrite_at_start,
        keep=keep,
    )
    made = _stored(_directory(destination, backup_id), path.name)
    if session.json:
        events = [
            {"kind": one.kind, "operation": one.operation, "path": one.path, "text": one.text}
            for one in told
        ]
        session.answer_json({"archive": _form(made), "events": events})
        return
    manifest = made.manifest
    assert manifest is not None
    warnings = sum(one.kind.is_warning for one in told)
    held = f"{manifest.members} members"
    if "states" in manifest.facts:  # of a pool
        count, machines = manifest.facts["states"], manifest.facts["machines"]
        held = f"{count} {'state' if count == 1 else 'states'}"
        held += f" of {machines} {'machine' if machines == 1 else 'machines'}"
    session.say(
        f"{made.name}: {output.size(made.size)}, {held}"
        + (f", {warnings} {'warning' if warnings == 1 else 'warnings'}" if warnings else "")
    )


def _restarts(given: dict[str, Any]) -> Restarts | None:
    from statepool.archive.levels import Restarts

    values = {name: value for name, value in given.items() if value is not None}
    return Restarts(**values) if values else None


@command.command("list", cls=Command)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("backup_id", metavar="[ID]", required=False)
@click.pass_obj
def list_(session: Session, directory: Path, backup_id: str | None) -> None:
    """List the archives in a directory."""
    found = [
        one
        for name in _ids(directory, backup_id)
        for one in _directory(directory, name).stored().values()
    ]
    if session.json:
        session.answer_json({"archives": [_form(one) for one in found]})
        return
    rows = []
    for one in found:
        manifest = one.manifest
        rows.append(
            [
                str(one.name),
                "" if manifest is None or manifest.level is None else str(manifest.level),
                output.moment(manifest.created) if manifest is not None else "",
                output.size(one.size),
                str(manifest.members) if manifest is not None else "",
                one.problem,
            ]
        )
    titles = ["archive", "level", "made", "size", "members", "problem"]
    session.answer_table(titles, rows, right=["level", "size", "members"])


@command.command("verify", cls=Command)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("backup_id", metavar="[ID]", required=False)
@click.pass_obj
def verify(session: Session, directory: Path, backup_id: str | None) -> int:
    """
    Read archives once more, and check every byte.

    The exit code is 5 if one of them is damaged, altered, or lacks a level that it stands on.
    """
    from statepool.archive.verify import verify as verify_one
    from statepool.errors import IntegrityError

    results = []
    progress = session.progress()
    for name in _ids(directory, backup_id):
        place = _directory(directory, name)
        stored = place.stored()
        for archive in stored:
            found = verify_one(place, stored, archive, progress=progress)
            results.append(found)
            if not session.json and found.error is None:
                session.say(f"{archive}: every byte is right")
            elif not session.json:
                warn(str(found.error))
    if session.json:
        session.answer_json(
            {
                "verified": [
                    {
                        "archive": str(one.name),
                        "error": one.error.message if one.error is not None else None,
                        "member": one.member,
                    }
                    for one in results
                ]
            }
        )
    return IntegrityError.exit_code if any(one.error is not None for one in results) else 0


@command.command("restore", cls=Command)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("backup_id", metavar="ID")
@click.option(
    "--to",
    "target",
    metavar="TARGET",
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=paths.directories,
    help="A new or empty directory; with --member, the new path of the file.",
)
@click.option("--level", metavar="N", type=click.IntRange(min=0), help="As it was at this level.")
@_keeping_id_option
@click.option(
    "--at", metavar="TIME", help="As it was then, such as 2026-05-01 or 2026-05-01T12:30."
)
@click.option("--member", metavar="PATH", help="Only this file or directory, relative to the root.")
@click.option("--overwrite", is_flag=True, help="TARGET may exist.")
@click.option("--trusted", is_flag=True, help="Restore devices, and links that lead out, too.")
@click.pass_obj
def restore(
    session: Session,
    directory: Path,
    backup_id: str,
    target: Path,
    level: int | None,
    keeping_id: str | None,
    at: str | None,
    member: str | None,
    overwrite: bool,
    trusted: bool,
) -> None:
    """
    Restore a directory as it was at a level.

    All levels up to that one are read and checked. Without --level, --keeping-id and --at, it is
    the newest archive. TARGET appears when it is whole; with --overwrite, files that were not there
    are deleted.
    """
    import math

    from statepool.archive.names import check_keeping_id
    from statepool.archive.restore import Restore, choose

    if keeping_id is not None:
        check_keeping_id(keeping_id)
    place = _directory(directory, backup_id)
    until = _moment(at) if at is not None else math.inf
    name = choose(place.stored(), level=level, keeping_id=keeping_id, until=until)
    work = Restore(place, name, trusted=trusted, progress=session.progress())
    with orderly():
        if member is not None:
            done = work.one(member, target, overwrite=overwrite)
        else:
            done = work.to(target, overwrite=overwrite)
    for text in done.warnings:
        warn(f"warning: {text}")
    if session.json:
        answer = {
            "target": str(done.target),
            "archives": [str(one) for one in done.archives],
            "members": done.members,
        }
        session.answer_json({"restored": answer})
    else:
        archives = ", ".join(str(one) for one in done.archives)
        session.say(f"{done.target}: restored from {archives}; every byte was checked")


def _moment(text: str) -> float:
    try:
        return dt.datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise click.UsageError(
            f"--at cannot be {text!r}: write, as in 2026-05-01 or 2026-05-01T12:30"
        ) from error


@command.command("keep", cls=Command)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("backup_id", metavar="ID")
@click.argument("new_keeping_id", metavar="[NEW_ID]", required=False)
@_keeping_id_option
@click.option("--level", metavar="N", type=click.IntRange(min=0), help="Only this level.")
@click.option(
    "--keep",
    metavar="N",
    type=click.IntRange(1, 676),
    default=676,
    help="Without NEW_ID: keep so many at most; 676 if not given.",
)
@_type_option
@_work_dir_option
@click.pass_obj
def keep(
    session: Session,
    directory: Path,
    backup_id: str,
    new_keeping_id: str | None,
    keeping_id: str | None,
    level: int | None,
    keep: int,
    backup_type: str | None,
    work_dir: Path | None,
) -> None:
    """
    Keep archives: they are not overwritten any more.

    Without NEW_ID, they are kept as aa, and what was kept before moves on by one letter.
    """
    if new_keeping_id is None and (keeping_id is not None or level is not None):
        raise click.UsageError("--keeping-id and --level need NEW_ID")
    maker, _ = archiver_of(session, "external", work_dir)
    definition = _definition(directory, backup_id, backup_type)
    with orderly():
        if new_keeping_id is None:
            maker.keep_new(definition, keep)
        else:
            maker.keep_backup(definition, keeping_id, new_keeping_id, level)
    _tell(session, "kept", f"{backup_id}: kept as {new_keeping_id or 'aa'}")


@command.command("remove", cls=Command)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("backup_id", metavar="ID")
@_keeping_id_option
@click.option(
    "--from-level", metavar="N", type=click.IntRange(min=0), help="Only this level and above."
)
@_type_option
@_work_dir_option
@dry_run_option
@click.pass_obj
def remove(
    session: Session,
    directory: Path,
    backup_id: str,
    keeping_id: str | None,
    from_level: int | None,
    backup_type: str | None,
    work_dir: Path | None,
    dry_run: bool,
) -> None:
    """
    Remove archives with their manifests.

    Without --keeping-id, what is not kept is removed, with its snapshot files.
    """
    maker, _ = archiver_of(session, "external", work_dir)
    definition = _definition(directory, backup_id, backup_type)
    chosen = [
        str(name)
        for name in _directory(directory, backup_id).stored()
        if name.extension == definition.backup_type
        and name.keeping_id == keeping_id
        and name.level >= (from_level or 0)
    ]
    if not dry_run:
        with orderly():
            if from_level is None:
                maker.remove_backup(definition, keeping_id)
            else:
                maker.remove_backup_increments(definition, from_level, keeping_id)
    if session.json:
        session.answer_json({"removed": chosen, "dry_run": dry_run})
    for name in chosen if not session.json else ():
        session.say(f"{name}: {'would be ' * dry_run}removed")


@command.command("purge", cls=Command)
@click.argument("backup_id", metavar="[ID]", required=False)
@_work_dir_option
@dry_run_option
@click.pass_obj
def purge(session: Session, backup_id: str | None, work_dir: Path | None, dry_run: bool) -> None:
    """
    Remove the snapshot files of a backup: its next archive is of level 0.

    Without ID, the backups that have some are listed. Archives stay.
    """
    maker, _ = archiver_of(session, "external", work_dir)
    known = maker.get_stored_backup_ids()
    if backup_id is None:
        if session.json:
            session.answer_json({"stored": known})
        for name in known if not session.json else ():
            session.answer(output.safe(name))
        return
    if not dry_run:
        maker.purge_stored_backup_data(backup_id)
    _tell(session, "purged", f"{backup_id}: {'would be ' * dry_run}purged")


command.add_command(archive_prune.command)
command.add_command(archive_run.command)


# -- parts -----------------------------------------------------------------------------------------


def _tell(session: Session, key: str, line: str) -> None:
    if session.json:
        session.answer_json({key: True})
    else:
        session.say(line)


def _directory(path: Path, backup_id: str) -> ArchiveDirectory:
    from statepool.archive.directory import ArchiveDirectory
    from statepool.archive.names import check_backup_id

    check_backup_id(backup_id)
    return ArchiveDirectory(path.absolute(), backup_id)


def _ids(path: Path, backup_id: str | None) -> Sequence[str]:
    from statepool.archive.directory import backup_ids
    from statepool.errors import NotFound

    found = backup_ids(path)
    if backup_id is None:
        return found
    if backup_id not in found:
        raise NotFound(
            f"there are no archives of {backup_id} in {path}",
            path=str(path),
            hint="statepool archive list shows which there are",
        )
    return [backup_id]


def _definition(path: Path, backup_id: str, backup_type: str | None) -> BackupDefinition:
    from statepool.archive.definition import BackupDefinition

    if backup_type is None:
        types = {name.extension for name in _directory(path, backup_id).stored()}
        if len(types) > 1:
            raise click.UsageError(f"--type is needed: there are {', '.join(sorted(types))}")
        backup_type = types.pop() if types else "tar.gz"
    return BackupDefinition(backup_id, backup_type, path)


def _stored(directory: ArchiveDirectory, file: str) -> Stored:
    from statepool.archive.names import ArchiveName

    name: ArchiveName | None = ArchiveName.parse(file)
    assert name is not None
    return directory.stored()[name]


def _form(one: Stored) -> dict[str, Any]:
    manifest = one.manifest
    known = {
        "archive": str(one.name),
        "backup_id": one.name.backup_id,
        "keeping_id": one.name.keeping_id,
        "size": one.size,
        "problem": one.problem or None,
    }
    facts = ("level", "created", "host", "root", "provider", "members", "digest", "base", "events")
    return known | {
        name: getattr(manifest, name) if manifest is not None else None for name in facts
    }
