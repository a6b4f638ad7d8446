"""``statepool archive run``: archives that configuration files of AutoArchive describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from statepool.cli import output, paths
from statepool.cli.archiving import default_work_dir, make
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option

if TYPE_CHECKING:
    from statepool.archive.aaconfig import Spec, Unused


@click.command("run", cls=Command)
@click.option(
    "--aaconfig",
    "file",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=paths.files,
    help="aa.conf, with the specifications in its directory; or one specification, NAME.aa.",
)
@click.argument("ids", metavar="[ID]...", nargs=-1)
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
    session: Session, file: Path, ids: tuple[str, ...], work_dir: Path | None, dry_run: bool
) -> None:
    """
    Make the archives that AutoArchive's configuration describes.

    Without ID, all of them. Keywords of these files that have no meaning here are told on standard
    error; --dry-run only reads the files.
    """
    specs, unused = _chosen(file.absolute(), ids)
    if not session.json:
        for one in unused:
            warn(f"warning: {output.safe(str(one))}")
    made: dict[str, str | None] = {}
    for spec in specs:
        definition, path = spec.definition, None
        told = f"would archive {definition.root} in {definition.destination}"
        if not dry_run:
            options = _options(spec)
            path, _ = make(session, spec.archiver, work_dir or default_work_dir(), **options)
            told = str(path)
        made[definition.backup_id] = str(path) if path is not None else None
        if not session.json:
            session.say(f"{definition.backup_id}: {told}")
    if session.json:
        archives = [{"id": name, "archive": path} for name, path in made.items()]
        answer = {"archives": archives, "unused": list(map(str, unused)), "dry_run": dry_run}
        session.answer_json(answer)


def _chosen(file: Path, ids: tuple[str, ...]) -> tuple[list[Spec], list[Unused]]:
    """:returns: the chosen specifications, and the keywords without a meaning here"""
    from statepool.archive.aaconfig import SUFFIX, read_config, read_spec, read_specs
    from statepool.errors import NotFound

    unused: list[Unused] = []
    if file.name.endswith(SUFFIX):
        found = [read_spec(file)]
    else:
        config = read_config(file)
        unused += config.unused
        found = read_specs(config)
    known = {spec.definition.backup_id for spec in found}
    if unknown := [name for name in ids if name not in known]:
        raise NotFound(
            f"{file} specifies no archive {unknown[0]}",
            path=str(file),
            hint="it specifies " + (", ".join(sorted(known)) or "none"),
        )
    chosen = [spec for spec in found if not ids or spec.definition.backup_id in ids]
    return chosen, unused + [one for spec in chosen for one in spec.unused]


def _options(spec: Spec) -> dict[str, Any]:
    """:returns: how an archive is made"""
    from statepool.archive.levels import Restarts

    restarts = None
    if spec.restarting:
        restarts = Restarts(
            after_level=spec.restart_after_level,
            after_age=spec.restart_after_age,
            full_after_count=spec.full_restart_after_count,
            full_after_age=spec.full_restart_after_age,
            largest=spec.max_restart_level_size,
        )
    return {
        "definition": spec.definition,
        "incremental": spec.incremental,
        "restarts": restarts,
        "strength": spec.strength,
        "overwrite_at_start": spec.overwrite_at_start,
        "keep": spec.keep,
    }
