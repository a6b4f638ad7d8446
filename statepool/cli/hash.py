"""``statepool hash``."""

from __future__ import annotations

import os
import stat

import click

from statepool.cli import paths
from statepool.cli.session import Command, Session
from statepool.errors import IntegrityError, NotFound, UsageError
from statepool.model.digest import ALGORITHMS, DEFAULT_ALGORITHM


@click.command("hash", cls=Command)
@click.argument("file", shell_complete=paths.files)
@click.option(
    "--algorithm",
    type=click.Choice(ALGORITHMS),
    default=DEFAULT_ALGORITHM,
    show_default=True,
    help="How to make the digest.",
)
@click.pass_obj
def command(session: Session, file: str, algorithm: str) -> None:
    """
    Print the digest of a file.

    It is what a state with the bytes of FILE is named by, as show --json gives it.
    """
    from statepool.beneath import Descriptor
    from statepool.cache.check_cached import hash_open
    from statepool.qcow2.files import translated

    try:  # opening a FIFO would block until its other end is opened
        opened = Descriptor(os.open, file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {file}", path=file) from error
    except OSError as error:
        raise translated(error, file, "open") from error
    with opened as descriptor:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError(f"{file} is not a regular file", path=file)
        title, progress = f"hash {file}", session.progress()
        hashed = hash_open(descriptor, algorithm=algorithm, title=title, progress=progress)
    if hashed.status is None:
        hint = "hash it when no process writes to it"
        raise IntegrityError(f"{file} was changed while it was read", path=file, hint=hint)
    if session.json:
        size, digest = hashed.status.st_size, str(hashed.digest)
        session.answer_json({"path": file, "size": size, "digest": digest})
    else:
        session.answer(str(hashed.digest))
