"""What a configuration of ssh means for us is what it means for ssh itself: ``ssh -G`` says it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from statepool.errors import ConfigError
from statepool.model.settings import Settings
from statepool.transports.ssh.hosts import Endpoint, resolve

CONFIGURATIONS = [
    "Host other\n  Include @/inc\nHost *\n  Port 2\n",
    "Host store\n  Include @/inc\nHost *\n  Port 2\n",
    "Host\tother\n  Include @/inc\n  User wrong\n",
    "Host=other\n  Include @/inc\n  User wrong\n",
    "Include\t@/inc\n",
    "Include=@/inc\n",
    'Include "@/i n c"\n',
    "Include @/missing @/in?\nUser late\n",
    'UserKnownHostsFile "@/my known" @/two\n',
    "UserKnownHostsFile '@/my known'\n",
    "UserKnownHostsFile @/my\\ known # mine\n",
    'UserKnownHostsFile "@/my\n',
    "UserKnownHostsFile @/my's\n",
    "Match user lab\n  IdentityFile @/labkey\n  Port 99\n",
    "Match user kim,!lab\n  Port 99\n",
    "Host store\n  User kim\nMatch user kim\n  Port 99\n",
    "Host store\n  HostName real.example.org\nMatch host real.example.org\n  Port 99\n",
    "Host store\n  HostName real.example.org\nMatch host store\n  Port 99\n",
    "Host store\n  HostName real.example.org\nMatch originalhost store\n  Port 99\n",
    "Match all\n  Port 99\n",
    "Match final host store\n  Port 99\nHost *\n  User kim\n",
    "Match final all\n  Port 99\nHost *\n  Port 98\n",
    'Match exec "true" host store\n  Port 99\n',
    'Match exec "test %h-%n-%% = store-store-%%"\n  Port 99\n',
    "Match !host foo\n  Port 99\n",
    "Match nonsense x\n  Port 99\n",
    "IdentitiesOnly true\n",
    "IdentitiesOnly perhaps\n",
    "ConnectTimeout 1m30\n",
    "ConnectTimeout soon\n",
    "ProxyJump a@b:3,[::1]:4,ssh://u@c:5\n",
    "Host store\n  ProxyJump none\nHost *\n  ProxyJump gate\n",
    "Host store\n  ProxyCommand none\nHost *\n  ProxyJump gate\n",
    "Host store\n  ProxyJump gate\nHost *\n  ProxyCommand foo\n",
    "Host * !store\n  Port 99\n",
    'Host "store" b\n  Port 99\n',
    "Host st?re\n  Port 99\n",
    "Host [s]tore\n  Port 99\n",
    "Host *\n  HostName %h.example.org\n",
    "Host *\n  HostName %h.Example.ORG\n",
    "Host *\n  HostName %x\n",
    "CanonicalizeHostname yes\nCanonicalDomains example.invalid\nMatch canonical\n  Port 5\n",
    "Host store # a comment\n  Port 99 # another\n",
    'HOST store\n  PORT=99\n  user = "kim"\n',
    "Host store\r\n  Port 99\r\n  User kim\r\n",
    "Port 99 98\n",
    "Host store\n  IdentityFile @/a\nHost *\n  IdentityFile @/b\n  IdentityFile @/a\n",
    'IdentityFile "@/a b"\n',
    "HostKeyAlias lab\n",
]


def ours(config: Path, user: str | None) -> dict[str, object] | None:
    try:
        found = resolve(Endpoint("store", None, user), Settings(ssh_config=str(config), connect_timeout=7))
    except ConfigError:
        return None
    return {
        "hostname": found.address,
        "user": found.user,
        "port": str(found.port),
        "identityfile": [str(key) for key in found.keys] if found.keys_are_chosen else [],
        "identitiesonly": "yes" if found.only_these_keys else "no",
        "proxyjump": ",".join(map(str, found.jumps)),
        "userknownhostsfile": " ".join(str(path) for path in found.known_hosts if "/etc/" not in str(path) and "/.ssh/" not in str(path)),
        "connecttimeout": f"{found.connect_timeout:g}",
        "hostkeyalias": found.key_name if found.alias else "",
    }


def theirs(config: Path, user: str | None) -> dict[str, object] | None:
    command = ["ssh", "-G", "-F", str(config), *(["-l", user] if user else []), "store"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    lines = [line.partition(" ")[::2] for line in done.stdout.splitlines()]
    said = dict(lines)
    return {
        "hostname": said["hostname"],
        "user": said["user"],
        "port": said["port"],
        "identityfile": [value for keyword, value in lines if keyword == "identityfile" and not value.startswith("~")],
        "identitiesonly": said["identitiesonly"],
        "proxyjump": said.get("proxyjump", ""),
        "userknownhostsfile": "" if "/.ssh/" in said["userknownhostsfile"] else said["userknownhostsfile"],
        "connecttimeout": said["connecttimeout"].replace("none", "7"),
        "hostkeyalias": said.get("hostkeyalias", ""),
    }


@pytest.mark.parametrize("text", CONFIGURATIONS)
@pytest.mark.parametrize("user", [None, "lab"])
def test_it_means_what_it_means_for_ssh(tmp_path: Path, ssh_config: Callable[[str], str], text: str, user: str | None) -> None:
    for name in ("inc", "i n c"):
        (tmp_path / name).write_text("Host *\n  User included\n  HostName 192.0.2.7\n")
    config = Path(ssh_config(text.replace("@/", f"{tmp_path}/")))
    assert ours(config, user) == theirs(config, user)
