"""``statepool ensure``."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click
from attrs import frozen

from statepool.cli import complete
from statepool.cli.report import warn
from statepool.cli.session import Command, Session
from statepool.cli.signals import orderly
from statepool.errors import BuildFailed, ToolError, UsageError
from statepool.model.outcomes import Presence
from statepool.transports.reading import hash_part

PLACE = "{image}"
"""The placeholder for the path of the working image in the words of a command."""


def _seconds(context: click.Context, parameter: click.Parameter, value: float) -> float:
    from statepool.ensure import can_wait

    if not can_wait(value):  # not a range of click: NaN is neither above nor below any limit
        raise click.BadParameter(
            f"{value:g} is not a time that one can wait for", context, parameter
        )
    return value


@click.command("ensure", cls=Command)
@click.argument("object", shell_complete=complete.objects)
@click.argument("state")
@click.option(
    "--parent",
    metavar="STATE",
    help="The state to start from; without one, COMMAND makes the image itself.",
)
@click.option(
    "--key",
    help="What tells this builder from others; COMMAND, and the files that it names, if not given.",
)
@click.option(
    "--rebuild",
    is_flag=True,
    help="Build it anew, whatever is there; the old one stays, and is not used any more.",
)
@click.option(
    "--timeout",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    default=14400.0,
    help="How long COMMAND may take: 4 hours if not given.",
)
@click.argument("words", metavar="-- COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def command(
    session: Session,
    object: str,
    state: str,
    parent: str | None,
    key: str | None,
    rebuild: bool,
    timeout: float,
    words: tuple[str, ...],
) -> None:
    """
    Get a state, or have it built once.

    If nobody has the state, COMMAND is run with {image} replaced by the path of a working image of
    the parent, which becomes the state if the exit code is 0. Others who ask meanwhile wait, for as
    long as the setting lock-timeout and --timeout together. The name under which it is kept is
    printed: STATE--KEY.
    """
    from statepool.ensure import Recipe
    from statepool.pools.log import random_nonce

    if not any(PLACE in word for word in words):
        raise click.UsageError(
            f"COMMAND does not say where it wants the image: one of its words must have {PLACE}"
            " in it"
        )
    recipe = Recipe(
        Run(words, timeout),
        parent,
        key or fingerprint(words),
        patience=timeout,
        again=random_nonce() if rebuild else None,
    )
    with orderly():
        ensured = session.pool().image(object).ensure_recipe(state, recipe)
    if session.json:
        from statepool.cli.forms import form

        session.answer_json({"ensured": form(ensured)})
        return
    for at in ensured.stored.pools if ensured.stored is not None else ():
        if at.result is Presence.FAILED:
            warn(f"{object} {ensured.name} is not in {session.place(at.pool)}: {at.error}")
    for old in ensured.superseded:
        warn(
            f"{object} {old} is still there; to remove it:"
            f" {session.spelled('unset', object, old, '--everywhere')}"
        )
    session.answer(ensured.name)


def fingerprint(words: Sequence[str]) -> str:
    """
    :returns: what identifies a command: its words, and the content of the files that they name
    :raises UsageError: a word names a pipe
    """
    return " ".join(_meaning(word) for word in words)


def _meaning(word: str) -> str:
    try:
        found = os.stat(word)
        if stat.S_ISREG(found.st_mode):
            # the file may be an installation medium, and larger than the memory
            with open(word, "rb", buffering=0) as file:
                return str(hash_part(file.fileno(), 0, found.st_size, "blake3"))
    except OSError:
        # A whole script is too long for a file name; and of a file that cannot be read, only the
        # name is known.
        return repr(word)
    # such as <(...) of a shell: its name does not identify its content, which can be read only once
    if stat.S_ISFIFO(found.st_mode):
        raise UsageError(
            f"{word} is a pipe, and what comes out of it cannot be part of the key",
            hint="put it into a file, and name that",
        )
    return repr(word)


@frozen
class Run:
    """
    A builder that runs a command.

    :param words: of the command
    :param timeout: how long it may take, in seconds
    """

    words: tuple[str, ...]
    timeout: float

    def __call__(self, image: Path) -> None:
        """
        :raises BuildFailed: the command failed, or took too long
        :raises ToolError: there is no such command
        """
        words = [word.replace(PLACE, os.fspath(image)) for word in self.words]
        code = self._code(words)
        if code is None:
            raise BuildFailed(
                f"{words[0]} did not end within {self.timeout:g} s, and was stopped",
                hint="allow it more time with --timeout",
            )
        if code:
            told = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise BuildFailed(f"{words[0]} {told}", hint="what it printed may say why")

    def _code(self, words: list[str]) -> int | None:
        """
        :returns: the exit code; None if it did not end in time. No process that it has started is
            left running.
        """
        from statepool.machine.guard import guarded, watched

        if shutil.which(words[0]) is None:
            raise ToolError(
                f"cannot run {words[0]}: there is no such program, or it may not be run"
            )
        try:
            # The command gets its own session, so that its child processes can be ended with it.
            # Its output is not the answer of this program.
            process = subprocess.Popen(
                guarded(words), stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
            )
        except OSError as error:
            raise ToolError(f"cannot run {words[0]}: {error.strerror}") from error
        try:
            with watched(process.pid):
                ended = _has_ended(process.pid, self.timeout)
        finally:
            # Its id is that of the group, and no other process can get this id before the exit
            # status is collected. processes of another account, as by sudo, cannot be killed: wait
            # for them
            with contextlib.suppress(PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        return code if ended else None


def _has_ended(pid: int, seconds: float) -> bool:
    """:returns: whether a child ends within this time; its exit code is not collected"""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)
