"""
A real sshd on loopback.

Nothing of the person's own configuration is used or written: host key, user key, ``known_hosts``
and the configuration of ssh are made in a directory of their own. With root's rights a chrooted
account without a shell can be had, too. The proxy is in :mod:`tests.support.proxy`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from attrs import define, field

from statepool.model.location import Location
from statepool.model.settings import Settings

SFTP_SERVER = "/usr/lib/openssh/sftp-server"
"""Where Debian has the SFTP server that is a program of its own."""

NAME = "sshd-under-test"
"""What the host key is known as, whatever port leads there."""

_CHROOTS = ("/var/cache", "/run")
"""
sshd wants every directory above a chroot to be root's, and writable for nobody else: not /tmp.
"""


def sshd_program() -> str | None:
    """:returns: the absolute path, which sshd insists on, or None where it is not installed"""
    folders = ("/usr/sbin", "/usr/local/sbin", "/sbin", "/usr/bin")
    return next((path for folder in folders if os.access(path := f"{folder}/sshd", os.X_OK)), None)


@define(eq=False)
class Sshd:
    """
    A server that runs. Made by :func:`run_sshd`.

    :param directory: where its files are; with ``chrooted``, also what the account sees as ``/``
    :param port: the TCP port on 127.0.0.1
    :param user: the account to log in to
    :param root: the directory that the account sees as ``/``
    """

    directory: Path
    port: int
    user: str
    root: Path
    process: subprocess.Popen[bytes]
    command: list[str] = field(factory=list)
    carrier: ClassVar[str] = "auto"
    """What carries SSH with the settings that are given out."""

    @property
    def known_hosts(self) -> Path:
        """The file that has its key, under the name :data:`NAME`."""
        return self.directory / "known_hosts"

    @property
    def identity(self) -> Path:
        """The private key that is let in."""
        return self.directory / "user_key"

    @property
    def host_key(self) -> Path:
        """Its own private key."""
        return self.directory / "host_key"

    @property
    def ssh_config(self) -> Path:
        """
        A configuration of ssh with the alias ``store``, for ``ssh -F`` and
        :attr:`Settings.ssh_config`.
        """
        return self.directory / "ssh_config"

    @property
    def log(self) -> str:
        """What it has logged."""
        return (self.directory / "log").read_text(errors="replace")

    def settings(self, **knobs: Any) -> Settings:
        """:returns: settings with which it can be reached, by whatever port"""
        return Settings(
            **{
                "ssh_config": str(self.ssh_config),
                "known_hosts": str(self.known_hosts),
                "timeout": 20.0,
                "carrier": self.carrier,
                **knobs,
            }
        )

    def location(self, path: str | Path, port: int | None = None) -> Location:
        """
        :param path: as this host sees it
        :param port: of a proxy
        :returns: the same directory as the account sees it
        """
        seen = "/" + os.path.relpath(path, self.root) if self.root != Path("/") else str(path)
        return Location(
            "ssh", os.path.normpath(seen), host="127.0.0.1", user=self.user, port=port or self.port
        )

    def directory_for(self, name: str) -> Path:
        """:returns: a new directory that the account may write, as this host sees it"""
        base = self.root if self.root != Path("/") else self.directory / "pools"
        path = base / name
        path.mkdir(parents=True)
        if os.getuid() == 0:
            entry = pwd.getpwnam(self.user)
            os.chown(path, entry.pw_uid, entry.pw_gid)
        return path

    def sessions(self) -> list[int]:
        """:returns: the processes that serve its connections"""
        return _descendants(self.process.pid)

    def kill_sessions(self) -> None:
        """End all connections at once, as if the host had crashed; new ones are taken."""
        _kill(self.sessions())

    def kill(self) -> None:
        """End it and all its connections at once."""
        _kill([*self.sessions(), self.process.pid])
        self.process.wait()

    def restart(self) -> None:
        """Have it again, on the same port."""
        self.process = _start(self.command, self.port, self.directory)


@contextlib.contextmanager
def run_sshd(
    *,
    chrooted: bool = False,
    user: str | None = None,
    sftp: str = "internal-sftp",
    options: Mapping[str, str] = {},
) -> Iterator[Sshd]:
    """
    :param chrooted: an account without a shell, whose ``/`` is a directory of its own (needs root)
    :param user: the account; that of this process, or ``nobody`` in a chroot
    :param sftp: the program behind the subsystem, such as :data:`SFTP_SERVER` or one that runs it
        with faults; empty: there is no SFTP
    :param options: lines of sshd_config(5) that go before the usual ones; the first value of a key
        counts
    """
    program = sshd_program()
    if program is None:
        raise FileNotFoundError("sshd is not installed (Debian: openssh-server)")
    directory = Path(
        tempfile.mkdtemp(prefix="statepool-sshd-", dir=_chroot_parent() if chrooted else None)
    )
    directory.chmod(0o755)
    user = user or ("nobody" if chrooted else pwd.getpwuid(os.getuid()).pw_name)
    root = directory / "root" if chrooted else Path("/")
    root.mkdir(exist_ok=True, mode=0o755)
    port = free_port()
    _make_keys(directory)
    _write_config(directory, port, user, root, sftp, options)
    if os.getuid() == 0:
        # where it drops its rights; Debian's service makes it
        Path("/run/sshd").mkdir(exist_ok=True, mode=0o755)
    command = [program, "-D", "-f", str(directory / "sshd_config"), "-E", str(directory / "log")]
    server = Sshd(directory, port, user, root, _start(command, port, directory), command)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    """:returns: a TCP port on loopback on which no process listens"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_key(path: Path, *, type: str = "ed25519", passphrase: str = "") -> Path:
    """:returns: the path of a new private key; its public half is beside it"""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", type, "-N", passphrase, "-C", "statepool test", "-f", str(path)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return path


def _chroot_parent() -> str:
    for candidate in _CHROOTS:
        found = os.stat(candidate) if os.path.isdir(candidate) else None
        if found is not None and found.st_uid == 0 and not found.st_mode & 0o022:
            return candidate
    raise FileNotFoundError(
        f"none of {', '.join(_CHROOTS)} is a directory that only root may write"
    )


def _make_keys(directory: Path) -> None:
    make_key(directory / "host_key")
    make_key(directory / "user_key")
    shutil.copy(directory / "user_key.pub", directory / "authorized_keys")
    (directory / "authorized_keys").chmod(0o644)
    kind, blob, *_ = (directory / "host_key.pub").read_text().split()
    (directory / "known_hosts").write_text(f"{NAME} {kind} {blob}\n")


def _write_config(
    directory: Path, port: int, user: str, root: Path, sftp: str, options: Mapping[str, str]
) -> None:
    lines = {
        **options,
        "Port": str(port),
        "ListenAddress": "127.0.0.1",
        "HostKey": str(directory / "host_key"),
        "AuthorizedKeysFile": str(directory / "authorized_keys"),
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "UseDNS": "no",
        "PrintMotd": "no",
        "PermitRootLogin": "yes",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "MaxStartups": "200",
        "LogLevel": "VERBOSE",
        **options,
    }
    if sftp:
        lines["Subsystem"] = f"sftp {sftp}"
    if root != Path("/"):
        lines |= {
            "ChrootDirectory": str(root),
            "ForceCommand": "internal-sftp",
            "AllowTcpForwarding": "no",
            **options,
        }
    (directory / "sshd_config").write_text(
        "".join(f"{key} {value}\n" for key, value in lines.items())
    )
    (directory / "ssh_config").write_text(
        f"Host store\n  HostName 127.0.0.1\n  Port {port}\n  User {user}\nHost *\n  IdentityFile"
        f" {directory}/user_key\n  IdentitiesOnly yes\n  HostKeyAlias {NAME}\n  UserKnownHostsFile"
        f" {directory}/known_hosts\n  GlobalKnownHostsFile none\n"
    )


def _start(command: list[str], port: int, directory: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
                if link.recv(8).startswith(b"SSH-2.0-"):
                    return process
        except OSError:
            time.sleep(0.02)
    process.kill()
    process.wait()
    log = directory / "log"
    raise RuntimeError(
        f"sshd did not start: {log.read_text(errors='replace') if log.exists() else 'no log'}"
    )


def _descendants(pid: int) -> list[int]:
    """The sessions leave the process group of the listener, but stay its children."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, ahead = [], [pid]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
