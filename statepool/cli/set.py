"""``statepool set``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from statepool.capture.importing import is_importable
from statepool.cli import complete, output, paths
from statepool.cli.report import warn
from statepool.cli.session import Command, Session, dry_run_option, scope_option
from statepool.errors import AccessDenied, StatePoolError, TransportError, UnsafeImage
from statepool.handles import MachineHandle
from statepool.model.objects import Machine, parse_object
from statepool.model.outcomes import Presence, SetResult, StoredAt, WaitFor
from statepool.qcow2.files import open_regular
from statepool.qcow2.header import read_header_fd


def _labels(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"{text!r} is not of the form KEY=VALUE", context, parameter)
        if key in labels:
            raise click.BadParameter(f"{key!r} is given twice", context, parameter)
        labels[key] = value
    return labels


labels_option = click.option(
    "--label",
    "labels",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_labels,
    help="Remember this with the state; may be repeated.",
)
"""The option of commands that make states."""


@click.command("set", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state")
@click.option(
    "--from",
    "sources",
    metavar="FILE",
    multiple=True,
    required=True,
    shell_complete=paths.files,
    help="The working image; for a machine, IMAGE=FILE for each image, or a directory.",
)
@click.option(
    "--replace", is_flag=True, help="Replace a state of this name that has other content."
)
@labels_option
@click.option(
    "--squash",
    is_flag=True,
    help="FILE stands on this very state: both together become its new content.",
)
@click.option(
    "--monitor",
    metavar="SOCKET",
    shell_complete=paths.files,
    help="A machine runs on FILE, and this is its QMP monitor: it goes on in a fresh overlay.",
)
@click.option(
    "--compress",
    is_flag=True,
    help="With --monitor, for a machine: compress its RAM, which is part of the state then.",
)
@click.option(
    "--agent",
    metavar="SOCKET",
    shell_complete=paths.files,
    help=(
        "With --monitor, for an image: have its file systems made consistent by QEMU's guest agent."
    ),
)
@scope_option
@click.option(
    "--wait-for",
    type=click.Choice([str(which) for which in WaitFor]),
    default="all",
    help="Which pools must have it for the exit code to be 0.",
)
@dry_run_option
@click.pass_obj
def command(
    session: Session,
    object: str,
    state: str,
    sources: tuple[str, ...],
    replace: bool,
    labels: dict[str, str],
    squash: bool,
    monitor: str | None,
    compress: bool,
    agent: str | None,
    scope: str | None,
    wait_for: str,
    dry_run: bool,
) -> int:
    """
    Store a state in the cache and in the sources.

    The working image becomes the state; an empty one, backed by it, takes its place, so that the
    machine can go on. With --monitor this is done while it runs; the state of a machine, such as
    vm1, then has its RAM, too. The exit code is 7 if a pool could not take the state; with
    --wait-for any, if no source could; with --wait-for own, the cache alone matters.
    """
    how = {
        "replace": replace,
        "squash": squash,
        "labels": labels or None,
        "scope": scope,
        "wait_for": wait_for,
        "dry_run": dry_run,
    }
    if monitor is None:
        if compress or agent:
            raise click.UsageError("--compress and --agent need --monitor")
        stored = store(session, object, state, sources, how)
    else:
        if squash:
            raise click.UsageError("--squash and --monitor exclude each other")
        del how["squash"]
        stored = _store_running(
            session,
            object,
            state,
            sources,
            {**how, "machine": monitor},
            compress=compress,
            agent=agent,
        )
    return answer(session, stored, dry_run=dry_run)


def store(
    session: Session, object: str, state: str, sources: Sequence[str], how: Mapping[str, Any]
) -> SetResult:
    """
    Set a state of an image, or of a machine.

    :param sources: as the user names them: FILE for an image, IMAGE=FILE or a directory for a
        machine
    :param how: the other arguments of a handle's set
    :raises click.UsageError: the sources do not fit the object
    """
    handle = session.handle(object)
    if isinstance(handle, MachineHandle):
        return handle.set(state, source=of_images(sources), **how)
    if len(sources) > 1:
        raise click.UsageError(f"{object} is one image: --from can only be given once")
    importing = session.spelled("import", object, state, sources[0])
    if _looks_downloaded(sources[0]) and not session.quiet:
        warn(
            f"{sources[0]} itself becomes the state, and an empty image on top of it takes its"
            f" place; to leave it as it is: {importing}"
        )
    try:
        return handle.set(state, source=sources[0], **how)
    except (AccessDenied, UnsafeImage) as error:
        if (
            error.path == os.path.abspath(sources[0])
            if isinstance(error, AccessDenied)
            else error.check == "magic" and is_importable(sources[0])
        ):
            error.hint = f"make a state of a copy of it: {importing}"
        raise


_DOWNLOADED = re.compile(r"amd64|x86[-_]64|arm64|aarch64|cloud|generic|\.img$", re.IGNORECASE)
"""What the names of images that distributions offer have, and those of working images seldom."""


def _looks_downloaded(path: str) -> bool:
    """:returns: whether a working image stands alone and is read-only or named like a download"""
    try:
        with open_regular(path) as descriptor:
            mode = os.fstat(descriptor).st_mode
            if not (_DOWNLOADED.search(os.path.basename(path)) or not mode & 0o222):
                return False
            return read_header_fd(descriptor, path).backing_name is None
    except StatePoolError:
        return False  # what is wrong with it is said where it is set


def _store_running(
    session: Session,
    object: str,
    state: str,
    sources: Sequence[str],
    how: Mapping[str, Any],
    *,
    compress: bool,
    agent: str | None,
) -> SetResult:
    """Set a state while a machine runs; otherwise as :func:`store`."""
    parsed = parse_object(object)
    machine = session.pool().machine(parsed.machine)
    if isinstance(parsed, Machine):
        if agent is not None:
            raise click.UsageError(
                "--agent is for an image: what a guest has not written yet is in its RAM, which is"
                " part of the state"
            )
        return machine.set_running(state, images=of_images(sources), compress=compress, **how)
    if len(sources) > 1:
        raise click.UsageError(f"{object} is one image: --from can only be given once")
    if compress:
        raise click.UsageError("--compress is for a machine, whose state has RAM")
    return machine.set_running_image(parsed.name, state, source=sources[0], agent=agent, **how)


def of_images(sources: Sequence[str]) -> dict[str, str]:
    """
    :returns: the working images of a machine, as the user names them: IMAGE=FILE each, or a
        directory
    """
    if len(sources) == 1 and os.path.isdir(sources[0]):
        return {path.stem: str(path) for path in sorted(Path(sources[0]).glob("*.qcow2"))}
    named: dict[str, str] = {}
    for text in sources:
        image, equals, path = text.partition("=")
        if not (image and equals and path):
            raise click.UsageError(
                f"--from {text} is not of the form IMAGE=FILE, which a machine needs, and no"
                " directory"
            )
        if image in named:
            raise click.UsageError(f"--from names the image {image} twice")
        named[image] = path
    return named


def answer(session: Session, stored: SetResult, *, dry_run: bool = False) -> int:
    """
    Print the result of setting a state, as the whole answer of a command.

    :returns: the exit code
    """
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"stored": form(stored), "dry_run": dry_run})
    else:
        tell(session, stored, dry_run)
    return 0 if stored.complete else TransportError.exit_code


def tell(session: Session, stored: SetResult, dry_run: bool) -> None:
    """Print the result of setting a state."""
    for text in stored.warnings:
        warn(f"warning: {text}")
    for at in stored.pools:
        place = session.place(at.pool)
        if at.result is Presence.FAILED:
            warn(f"{stored.object} {stored.state} is not in {place}: {at.error}")
        else:
            session.say(f"{stored.object} {stored.state}: {_told(at, dry_run)} {place}")
    # failed sources were reported already
    if not dry_run and not session.quiet and len(stored.pools) == 1:
        warn(f"no source has {stored.object} {stored.state}: what is in the cache is the only copy")


def _told(at: StoredAt, dry_run: bool) -> str:
    if at.result is Presence.PRESENT:
        return "was already in"
    if dry_run:
        return "would be stored in"
    moved = f" ({output.size(at.bytes)})" if at.bytes else ""
    return f"stored{moved}{'' if at.durable else ', not safe from a power cut yet,'} in"
