"""
Running the program ``ssh``: without a terminal for prompts, without secrets in its environment, and
with untranslated messages.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import IO

from attrs import frozen

from statepool.errors import ConfigError
from statepool.model.secrets import SECRET_VARIABLES
from statepool.model.settings import Settings
from statepool.transports.ssh.askpass import Askpass
from statepool.transports.ssh.carrier import SSH_PORT, Endpoint
from statepool.transports.ssh.hosts import HostKey, HostSettings

LONGEST_SOCKET = 104
"""
The most bytes of a socket's name that every Unix permits. ``ssh`` appends 17 to ours until it
listens.
"""

_TICK = 0.05


def environment() -> dict[str, str]:
    """
    Return the environment of started programs: without secrets, and with untranslated messages.
    """
    environ = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
    return {**environ, "LC_ALL": "C", "SSH_ASKPASS_REQUIRE": "never"}


def run(
    command: list[str], output: IO[bytes], asking: Askpass | None, seconds: float
) -> int | None:
    """:returns: the exit status of a command, or None after the timeout"""
    environ = {**environment(), **(asking.environ if asking is not None else {})}
    # In its own session it has no terminal for prompts, and a Ctrl-C here does not interrupt it.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environ,
        cwd="/",
        start_new_session=True,
    )
    deadline = time.monotonic() + seconds
    try:
        while (code := process.poll()) is None and time.monotonic() < deadline:
            if asking is not None:
                asking.serve(_TICK)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        return code
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def quoted(path: str) -> str:
    """:returns: a path as the value of an option"""
    return '"' + path.replace("%", "%%") + '"'


def configured(words: list[str], host: str, seconds: float) -> dict[str, list[str]]:
    """
    :returns: the configuration of ssh for a host, by its keywords in lower case
    :raises ConfigError: it cannot be used
    """
    try:
        done = subprocess.run(
            [*words, "-G", "--", host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment(),
            check=False,
            cwd="/",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"the configuration of ssh for {host} takes longer than {seconds:g} seconds",
            hint="look at its Match exec",
        ) from error
    if done.returncode != 0:
        lines = [
            line
            for line in done.stderr.decode("utf-8", "replace").splitlines()
            if not line.startswith("debug")
        ]
        raise ConfigError(
            f"ssh cannot be used: {'; '.join(line.strip() for line in lines)}",
            hint="see ssh_config(5)",
        )
    found: dict[str, list[str]] = {}
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        keyword, _, value = line.partition(" ")
        found.setdefault(keyword, []).append(value)
    return found


def settings_of(
    found: dict[str, list[str]], endpoint: Endpoint, settings: Settings
) -> HostSettings:
    """
    :param found: the configuration
    :returns: the settings of the host
    """

    def word(keyword: str) -> str | None:
        value = found.get(keyword, ["none"])[0]
        return value if value != "none" else None

    files = (
        [settings.known_hosts]
        if settings.known_hosts is not None
        else (word("userknownhostsfile") or "").split()
    )
    return HostSettings(
        name=endpoint.host,
        address=word("hostname") or endpoint.host,
        port=int(word("port") or SSH_PORT),
        user=word("user") or "",
        known_hosts=tuple(Path(os.path.expanduser(name)) for name in files),
        alias=word("hostkeyalias"),
        proxied=word("proxyjump") is not None or word("proxycommand") is not None,
    )


@frozen
class Looked:
    """
    The result of a second look at a host.

    :param key: the host's key, or None if it could not be fetched
    :param text: the output of ``ssh`` and of programs on the way to the host
    """

    key: HostKey | None
    text: str


def look(words: list[str], name: str, seconds: float) -> Looked:
    """
    Ask a host for its key, by the configured way to it, and send nothing else to it.

    A master does not show the output of a ``ProxyCommand``; this does.

    :param words: the command line of ``ssh``
    :param name: the user's name for the host
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "known"
        options = {
            "UserKnownHostsFile": f'"{file}"',
            "GlobalKnownHostsFile": "none",
            "StrictHostKeyChecking": "accept-new",
            "HashKnownHosts": "no",
            "BatchMode": "yes",
            "PreferredAuthentications": "none",
            "ControlMaster": "no",
            "ControlPath": "none",
        }
        command = [
            words[0],
            *(word for key, value in options.items() for word in ("-o", f"{key}={value}")),
            *words[1:],
            "-n",
            "-N",
            "--",
            name,
        ]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=environment(),
                timeout=seconds,
                check=False,
                cwd="/",
            )
        except subprocess.TimeoutExpired:
            return Looked(None, "")
        fields = file.read_text().split() if file.exists() else []
        key = HostKey(fields[1], base64.b64decode(fields[2])) if len(fields) >= 3 else None
        return Looked(key, done.stderr.decode("utf-8", "replace"))


def identity() -> tuple[str | None, str | None]:
    """:returns: which ``ssh`` is run, and which agent it finds: another agent has other keys"""
    return shutil.which("ssh"), os.environ.get("SSH_AUTH_SOCK")


def sockets_directory() -> str:
    """
    :returns: a directory that only this user can access, with a short name; the same for all of the
        user's processes, if possible
    """
    name = f"statepool-ssh-{os.getuid()}"
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        path = os.path.join(base, name) if base else ""
        if (
            not path
            or len(os.fsencode(path)) + len("/0123456789abcdef.01234567.0123456789abcdef")
            > LONGEST_SOCKET
        ):
            continue
        with contextlib.suppress(OSError):
            os.mkdir(path, 0o700)
        with contextlib.suppress(OSError):
            found = os.lstat(path)
            if (
                stat.S_ISDIR(found.st_mode)
                and found.st_uid == os.getuid()
                and not found.st_mode & 0o077
            ):
                return path
    return _directory_of_this_process()  # another account has taken the name


@cache
def _directory_of_this_process() -> str:
    path = tempfile.mkdtemp(prefix="statepool-ssh-", dir="/tmp")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
