"""``statepool export``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import IO

import click

from statepool.cli import complete, output, paths
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, scope_option
from statepool.cli.signals import orderly
from statepool.errors import StatePoolError, TransportError


@click.command("export", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state", shell_complete=complete.states)
@click.option(
    "-o",
    "--output",
    "place",
    metavar="FILE",
    default="-",
    shell_complete=paths.files,
    help="Write this file; - is standard output, also if not given, but never a terminal.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@click.option("--flat", is_flag=True, help="Write one qcow2 image that nothing backs.")
@click.option(
    "--compress",
    type=click.Choice(["zstd", "zlib", "none"]),
    help="A bundle: zstd (if not given) or none; a flat image: none (if not given), zstd or zlib.",
)
@scope_option
@click.pass_obj
def command(
    session: Session,
    object: str,
    state: str,
    place: str,
    overwrite: bool,
    flat: bool,
    compress: str | None,
    scope: str | None,
) -> None:
    """
    Write a state, with all it stands on, into one file.

    The file is a bundle: statepool import brings what is in it into the cache of any host, and
    unpacked by tar it is a pool. Of a machine, such as vm1, all images and the RAM are in it.
    """
    if place == "-":
        if session.json:
            raise click.UsageError("--json needs -o FILE: standard output has the bundle")
        if overwrite:
            raise click.UsageError("--overwrite needs -o FILE")
    handle = session.handle(object)
    with orderly(), _until_reader_leaves(place):
        exported = handle.export(
            state,
            to=place if place != "-" else _standard_output(),
            flat=flat,
            compress=compress,
            overwrite=overwrite,
            scope=scope,
        )
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"exported": form(exported)})
        return
    for text in exported.warnings:
        warn(f"warning: {text}")
    if exported.path is not None:
        session.say(f"{object} {state}: {output.size(exported.bytes)} in {exported.path}")


def _standard_output() -> IO[bytes]:
    if sys.stdout is None:
        raise StatePoolError("standard output is closed", hint="name a file with -o")
    return sys.stdout.buffer


@contextlib.contextmanager
def _until_reader_leaves(place: str) -> Iterator[None]:
    """
    End quietly if the reader of standard output closes it: that program has reported its reason.
    """
    try:
        yield
    except TransportError as error:
        if place != "-" or not isinstance(error.__cause__, BrokenPipeError):
            raise
        raise click.exceptions.Exit(output.BROKEN_PIPE) from error
