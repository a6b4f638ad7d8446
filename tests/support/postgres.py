"""A real PostgreSQL, of an account without privileges, that listens on a socket."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from attrs import define, field

from tests.support.carts import LIMIT, until


@define(eq=False)
class Postgres:
    """PostgreSQL with all that it writes in one directory."""

    directory: Path = field(init=False)
    url: str = field(init=False)
    _program: Path = field(init=False)
    _account: str | None = field(init=False)
    _process: subprocess.Popen[bytes] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # sockets: short paths
        self._program, self._account = _programs()[-1].parent, _account()
        if self._account is not None:
            shutil.chown(self.directory, self._account)
        make = self._command("initdb", "-D", "data", "-A", "trust", "-U", "carts", "--no-sync")
        subprocess.run(make, cwd=self.directory, check=True, capture_output=True)
        self.url = f"postgresql://carts@/postgres?host={self.directory}"

    def _command(self, name: str, *arguments: str) -> list[str]:
        command = [str(self._program / name), *arguments]
        if self._account is None:
            return command
        return ["setpriv", "--reuid", self._account, "--clear-groups", *command]

    def start(self) -> None:
        """Start it, and wait until it can be used."""
        options = ("-k", str(self.directory), "-h", "", "-c", "fsync=off")
        with (self.directory / "log").open("wb") as log:
            # Not by pg_ctl: the process is a child of this one, and can be waited for.
            command = self._command("postgres", "-D", "data", *options)
            self._process = subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=log)
        until(lambda: "ready to accept connections" in self._said())

    def _said(self) -> str:
        said = (self.directory / "log").read_text(errors="replace")
        assert self._process.poll() is None, said
        return said

    def stop(self) -> None:
        """Stop it at once, without a checkpoint, unless it has ended."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(LIMIT)

    def kill(self) -> None:
        """Kill it with all its processes."""
        parent = self._process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        self._process.kill()  # the parent first: it would end the others in order
        for process in map(int, children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait(LIMIT)
        until(lambda: not any(_runs(int(process)) for process in children))

    def remove(self) -> None:
        """Remove what it wrote."""
        shutil.rmtree(self.directory)


def _runs(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _programs() -> list[Path]:
    return sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def _account() -> str | None:
    return pwd.getpwnam("postgres").pw_name if os.geteuid() == 0 else None


def missing() -> str:
    """:returns: why there can be none, if there is a reason"""
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed: statepool[postgresql]"
    if not _programs():
        return "PostgreSQL is not installed (Debian: postgresql)"
    try:
        _account()
    except KeyError:
        return "PostgreSQL does not run as root, and there is no account postgres"
    return ""
