"""
Peers that are reached by a command like ``scp``, which the user has configured.

It is run without a shell, with a remote file or pattern and a local directory as its last words, as
CedarBackup runs it. Nothing is known of what it does, so all files are copied into a temporary
directory each time; those that differ from what is there then get their names.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from statepool.errors import ToolError, TransportError
from statepool.model.location import Location
from statepool.staging.files import Stop
from statepool.staging.settings import Peer
from statepool.transports.failures import Subject, translate_os_errors
from statepool.transports.local import LocalTransport
from statepool.transports.ssh.program import environment

TICK = 0.2
"""Seconds between two looks whether a command is to end."""

MOST_TEXT = 500
"""The most characters of the output of a command that a message has."""


@frozen
class CopyCommand:
    """
    The command of a peer.

    :param peer: the peer
    :param stop: ends it
    """

    peer: Peer
    stop: Stop

    def has(self, name: str) -> bool:
        """
        :returns: whether a file can be copied from the peer: any failure means no, since commands
            do not tell why
        """
        with _temporary() as directory:
            target = os.path.join(directory, name)
            done = self._run(self._remote(name), target)
            return done.returncode == 0 and os.path.isfile(target)

    @contextmanager
    def fetched(self, directory: str) -> Iterator[LocalTransport]:
        """
        Copy all files.

        :param directory: a temporary directory is made in it, for the ``with`` block
        :returns: the transport that reads the copies
        :raises TransportError: the command failed
        """
        with _temporary(directory) as place:
            self._require(self._run(self._remote("*"), f"{place}/"), "copy files from")
            yield LocalTransport(Location("file", place))

    def mark(self, name: str) -> None:
        """
        Make an empty file at the peer.

        :raises TransportError: the command failed
        """
        with _temporary() as directory:
            empty = Path(directory) / name
            empty.touch()
            self._require(self._run(str(empty), self._remote(name)), f"make {name} at")

    def _remote(self, name: str) -> str:
        where = self.peer.location
        assert where.host is not None
        host = f"[{where.host}]" if ":" in where.host else where.host
        user = f"{where.user}@" if where.user is not None else ""
        return f"{user}{host}:{where.path.rstrip('/')}/{name}"

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*self.peer.copy_command, *words]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment(),
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise ToolError(
                f"the copy command of the peer {self.peer.name} cannot be run: {error.strerror}",
                hint=f"install {self.peer.copy_command[0]}, or leave out the copy command",
                path=self.peer.copy_command[0],
            ) from error
        with process:
            while True:
                try:
                    output, _ = process.communicate(timeout=TICK)
                    return subprocess.CompletedProcess(command, process.returncode, output)
                except subprocess.TimeoutExpired:
                    if self.stop.is_set:
                        process.kill()

    def _require(self, done: subprocess.CompletedProcess[str], doing: str) -> None:
        if done.returncode != 0:
            text = " ".join(done.stdout.split())[:MOST_TEXT] or f"exit code {done.returncode}"
            raise TransportError(
                f"{self.peer.copy_command[0]} cannot {doing} {self.peer.location}: {text}",
                hint="try the copy command by hand",
                pool=str(self.peer.location),
            )


@contextmanager
def _temporary(directory: str | None = None) -> Iterator[str]:
    """Make a temporary directory for a ``with`` block, in another one or where such ones are."""
    subject = Subject("a temporary directory", path=directory)
    with (
        translate_os_errors("make", subject),
        tempfile.TemporaryDirectory(prefix="statepool-stage-", dir=directory) as place,
    ):
        yield place
