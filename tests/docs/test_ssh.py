"""
Every command of the page about pools on other hosts does what it says there, on a chrooted account
of a real sshd.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.sshd import Sshd

ROOT = Path(__file__).resolve().parents[2]

SCAN = """#!/bin/sh
# As for a host that is called store.example.org, and listens on the usual port.
for last; do :; done
[ "$last" = store.example.org ] || exit 1
ssh-keygen -y -f {key} | sed "s/^/store.example.org /"
"""


SSH = """#!/bin/sh
# ssh looks for its files in the home directory that the system has for the account, not in HOME.
exec {ssh} -F {home}/config "$@"
"""


@pytest.mark.slow
def test_the_page_can_be_followed(
    open_page: Callable[..., Any],
    programs: Callable[[Any], Path],
    chrooted_sshd: Sshd,
    nobodys_environment: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chrooted_sshd.directory_for("srv/pool")
    home = nobodys_environment / ".ssh"
    home.mkdir()
    (home / "id_ed25519").write_bytes(chrooted_sshd.identity.read_bytes())
    (home / "id_ed25519").chmod(0o600)
    (home / "config").write_text(
        f"Host store\n  HostName 127.0.0.1\n  Port {chrooted_sshd.port}\n  User"
        f" {chrooted_sshd.user}\n  HostKeyAlias store.example.org\n  IdentityFile"
        f" {home}/id_ed25519\n  UserKnownHostsFile {home}/known_hosts\n"
    )
    page = open_page("docs/ssh.rst", (ROOT / "docs/ssh.rst").read_text(encoding="utf-8"))
    scan = programs(page) / "ssh-keyscan"
    scan.write_text(SCAN.format(key=chrooted_sshd.host_key))
    scan.chmod(0o755)
    program = programs(page) / "ssh"
    program.write_text(SSH.format(ssh=shutil.which("ssh"), home=home))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    assert page.run() > 10
