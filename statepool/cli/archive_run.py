"""``statepool archive run``: archives that configuration files of AutoArchive describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from statepool.cli import output, paths
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option
from statepool.cli.signals import orderly

if TYPE_CHECKING:
    from statepool.archive.aaconfig import Spec


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
    from statepool.cli.archive import default_work_dir, make

    specs = _chosen(file.absolute(), ids)
    for one in (one for spec in specs for one in spec.unused):
        warn(f"warning: {output.safe(str(one))}")
    forms: list[dict[str, Any]] = []
    for spec in specs:
        definition = spec.definition
        if dry_run:
            forms.append({"id": definition.backup_id, "archive": None})
            session.say(
                f"{output.safe(definition.backup_id)}: would archive"
                f" {output.safe(definition.root)} in {output.safe(str(definition.destination))}"
            )
            continue
        with orderly():
            path = make(session, spec.archiver, work_dir or default_work_dir(), **_options(spec))
        forms.append({"id": definition.backup_id, "archive": str(path)})
        session.say(f"{output.safe(definition.backup_id)}: {output.safe(str(path))}")
    if session.json:
        unused = [str(one) for spec in specs for one in spec.unused]
        session.answer_json({"archives": forms, "unused": unused, "dry_run": dry_run})


def _chosen(file: Path, ids: tuple[str, ...]) -> list[Spec]:
    from statepool.archive.aaconfig import SUFFIX, read_config, read_spec, read_specs
    from statepool.errors import NotFound

    if file.name.endswith(SUFFIX):
        found = [read_spec(file)]
    else:
        config = read_config(file)
        for one in config.unused:
            warn(f"warning: {output.safe(str(one))}")
        found = read_specs(config)
    known = {spec.definition.backup_id for spec in found}
    if unknown := [name for name in ids if name not in known]:
        raise NotFound(
            f"{file} specifies no archive {unknown[0]}",
            path=str(file),
            hint="it specifies " + (", ".join(sorted(known)) or "none"),
        )
    return [spec for spec in found if not ids or spec.definition.backup_id in ids]


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
