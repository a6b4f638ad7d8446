"""``statepool import``."""

from __future__ import annotations

import sys
from typing import Any

import click

from statepool.api import ImageHandle
from statepool.cli import output, paths
from statepool.cli import set as setting
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option, scope_option
from statepool.cli.signals import orderly
from statepool.errors import StatePoolError, TransportError
from statepool.handles import MachineHandle
from statepool.model.carried import Imported


@click.command("import", cls=Command)
@click.argument(
    "words", metavar="[OBJECT STATE] FILE", nargs=-1, required=True, shell_complete=paths.files
)
@click.option(
    "--to",
    "target",
    metavar="POOL",
    help="Also store a bundle in this pool, given by the name of a source or its location.",
)
@click.option("--sha256", metavar="SUM", help="The checksum that a disk image must have.")
@click.option("--sha512", metavar="SUM", help="Likewise, by SHA-512.")
@click.option(
    "--raw", is_flag=True, help="FILE is a raw disk image, although nothing in it shows that."
)
@setting.labels_option
@click.option("--replace", is_flag=True, help="Replace a state of this name with other content.")
@scope_option
@dry_run_option
@click.pass_obj
def command(
    session: Session,
    words: tuple[str, ...],
    target: str | None,
    sha256: str | None,
    sha512: str | None,
    raw: bool,
    labels: dict[str, str],
    replace: bool,
    scope: str | None,
    dry_run: bool,
) -> int:
    """
    Bring a bundle here, or make a state of a disk image.

    With FILE alone, it is a bundle that statepool export has written; - is standard input. Its
    state comes into the cache with all that it stands on, every byte checked: all of it, or
    nothing. The exit code is 7 if it could not be stored in POOL.

    With OBJECT and STATE, FILE is a disk image that stands alone, as distributions have them for
    download: qcow2, raw, VMDK, VDI, VHD, VHDX or QED, also compressed by gzip, bzip2, xz or zstd.
    FILE stays exactly as it is; a copy becomes the state, in the cache and in the sources. With a
    wrong checksum nothing changes.
    """
    of_images: dict[str, Any] = {
        "sha256": sha256,
        "sha512": sha512,
        "raw": raw,
        "labels": labels or None,
        "scope": scope,
    }
    if len(words) == 3:
        if target is not None:
            raise click.UsageError("--to is for a bundle; a disk image is stored in the sources")
        with orderly():
            stored = _image(session, words[0]).import_file(
                *words[1:], replace=replace, dry_run=dry_run, **of_images
            )
        return setting.answer(session, stored, dry_run=dry_run)
    if len(words) != 1:
        raise click.UsageError(
            "name a bundle alone: statepool import FILE; or the state that a disk image becomes:"
            " statepool import OBJECT STATE FILE"
        )
    if any(of_images.values()):
        given = next(name for name, value in of_images.items() if value)
        raise click.UsageError(
            f"--{given.removesuffix('s')} is for a disk image: name its OBJECT and STATE before it"
        )
    (file,) = words
    if replace and target is None:
        raise click.UsageError("--replace needs --to")
    if file == "-" and sys.stdin is None:
        raise StatePoolError("standard input is closed", hint="name a file")
    with orderly():
        bundle = sys.stdin.buffer if file == "-" else file
        imported = session.pool().import_bundle(bundle, to=target, replace=replace, dry_run=dry_run)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"imported": form(imported), "dry_run": dry_run})
    else:
        tell(session, imported, dry_run)
    return 0 if imported.complete else TransportError.exit_code


def _image(session: Session, object: str) -> ImageHandle:
    handle = session.handle(object)
    if isinstance(handle, MachineHandle):
        raise click.UsageError(f"{object} is a machine; name its image too, as in {object}/disk")
    return handle


def tell(session: Session, imported: Imported, dry_run: bool) -> None:
    """Say what was imported."""
    for text in imported.warnings:
        warn(f"warning: {text}")
    name = f"{imported.object} {imported.state}"
    moved = "all of it was in the cache"
    if imported.bytes:
        moved = f"{'would import ' if dry_run else ''}{output.size(imported.bytes)}"
    session.say(f"{name}: {moved}" + ("" if dry_run else "; every byte was checked"))
    if (at := imported.stored) is not None:
        if at.error is not None:
            warn(f"{name} is not in {session.place(at.pool)}: {at.error}")
        else:
            session.say(f"{name}: {at.result} in {session.place(at.pool)}")
