"""A backup with peers, to be staged by CedarBackup and by us; and the same by hand."""

from __future__ import annotations

import grp
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import define, field, frozen

from tests.support.sshd import Sshd

CBACK = shutil.which("cback3")
"""The program of CedarBackup, or None where it is not installed."""

LIMIT = 300
"""Timeout of a run, in seconds."""


@frozen
class PeerDirectory:
    """
    A peer, as its collect directory on this host.

    :param name: its name; that of a host in the configuration of ssh, if it is remote
    :param directory: its collect directory
    :param ignore: its ignore_failures; empty: not given
    :param copy_command: its own rcp_command; empty: none
    """

    name: str
    directory: Path
    remote: bool = False
    ignore: str = ""
    copy_command: str = ""

    def fill(self, files: Mapping[str, bytes], *, ready: bool = True) -> PeerDirectory:
        """Put files into its collect directory, and the indicator."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.directory / name).write_bytes(content)
        if ready:
            (self.directory / "cback.collect").touch()
        return self


@frozen
class Run:
    """What a run came to: its exit code, and all that it printed."""

    code: int
    text: str


@define
class Backup:
    """
    The configuration of a backup.

    :param place: where its directories are
    :param peers: its peers
    :param server: the host of remote peers
    :param options: words of the default copy command
    :param start: the day on which the week begins
    :param extra: further sections
    """

    place: Path
    peers: Sequence[PeerDirectory]
    server: Sshd | None = None
    options: str = "-B -q -C"
    start: str = "sunday"
    extra: str = ""
    staging: Path = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.staging = self.place / "staging"
        self.staging.mkdir(parents=True, exist_ok=True)
        (self.place / "working").mkdir(exist_ok=True)

    @property
    def ssh_config(self) -> Path:
        """A configuration of ssh in which each remote peer is a host."""
        assert self.server is not None
        path = self.place / "ssh_config"
        hosts = " ".join(peer.name for peer in self.peers if peer.remote)
        text = self.server.ssh_config.read_text().replace("Host store", f"Host {hosts}")
        # An address that no process listens on.
        path.write_text(f"Host gone\n  HostName 127.0.0.1\n  Port 1\n{text}")
        return path

    def config(self) -> Path:
        """:returns: the configuration of CedarBackup"""
        scp = f"/usr/bin/scp {self.options}"
        scp += f" -F {self.ssh_config}" if self.server is not None else ""
        user = pwd.getpwuid(os.geteuid()).pw_name
        group = grp.getgrgid(os.getegid()).gr_name
        path = self.place / "cback3.conf"
        path.write_text(
            f"""<?xml version="1.0"?>
<cb_config>
  <reference><author>test</author></reference>
  <options>
    <starting_day>{self.start}</starting_day>
    <working_dir>{self.place}/working</working_dir>
    <backup_user>{user}</backup_user>
    <backup_group>{group}</backup_group>
    <rcp_command>{scp}</rcp_command>
  </options>
  <peers>{"".join(map(self._peer, self.peers))}</peers>
  <stage><staging_dir>{self.staging}</staging_dir></stage>
  {self.extra}
</cb_config>
"""
        )
        return path

    @staticmethod
    def _peer(peer: PeerDirectory) -> str:
        ignore = f"<ignore_failures>{peer.ignore}</ignore_failures>" if peer.ignore else ""
        command = f"<rcp_command>{peer.copy_command}</rcp_command>" if peer.copy_command else ""
        return f"""
    <peer>
      <name>{peer.name}</name>
      <type>{"remote" if peer.remote else "local"}</type>
      <collect_dir>{peer.directory}</collect_dir>{ignore}{command}
    </peer>"""

    def theirs(self, *options: str, action: str = "stage") -> Run:
        """:returns: what CedarBackup did"""
        assert CBACK is not None
        log = self.place / "cback3.log"
        log.unlink(missing_ok=True)
        words = [CBACK, "-c", str(self.config()), "-l", str(log), "-q", *options, action]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT)
        return Run(done.returncode, log.read_text() if log.exists() else done.stderr)

    def ours(self, *options: str, action: str = "stage") -> Run:
        """:returns: what statepool did"""
        words = [sys.executable, "-m", "statepool", action, "--cback", str(self.config())]
        done = subprocess.run(
            [*words, *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
            env={**os.environ, "HOME": str(self.place)},
        )
        return Run(done.returncode, done.stdout + done.stderr)

    def day(self) -> Path:
        """:returns: the only day that is staged"""
        (found,) = self.staging.glob("????/??/??")
        return found

    def tree(self) -> dict[str, bytes | None]:
        """:returns: the content of each file that is staged, and None for each directory"""
        return tree(self.day())


def tree(place: Path) -> dict[str, bytes | None]:
    """:returns: the content of each file, and None for each directory, without our own notes"""
    found: dict[str, bytes | None] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if name == "staged.json" or name.startswith(".staging"):
            continue
        found[name] = None if stat.S_ISDIR(path.lstat().st_mode) else path.read_bytes()
    return found


def outcomes_in(log: str) -> dict[str, str]:
    """:returns: the outcome of each peer, as the log of CedarBackup tells it"""
    found: dict[str, str] = {}
    for level, text in re.findall(r"--> \[(\w+) *\] (.*)", log):
        if match := re.fullmatch(r"Staged \d+ files for peer \[(.*)\]\.", text):
            found[match[1]] = "staged"
        elif match := re.fullmatch(r"Peer \[(.*)\] was not ready to be staged\.", text):
            found[match[1]] = "ignored" if level == "INFO" else "not-ready"
        elif match := re.match(r"Error staging \[(.*?)\]:", text):
            found[match[1]] = "failed"
    return found
