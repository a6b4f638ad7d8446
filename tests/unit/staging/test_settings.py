"""The sections [stage] and [collect], and a configuration of CedarBackup: what is read, and what is
refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from statepool.errors import ConfigError
from statepool.model.location import Location
from statepool.staging.cedar import read_cedar
from statepool.staging.settings import (
    ArchiveMode,
    CollectMode,
    Ignore,
    Indicators,
    Item,
    Peer,
    PeerKind,
    collect_settings,
    stage_settings,
    tar_name,
)

PEER = {"name": "web", "location": "ssh://backup@web/collect"}
STAGE: dict[str, Any] = {"directory": "/srv/staging", "peers": [PEER]}
ITEM = {"path": "/etc"}
COLLECT: dict[str, Any] = {"directory": "/c", "notes": "/n", "items": [ITEM]}


def test_all_keys_of_stage() -> None:
    found = stage_settings(
        [
            ("etc.toml", {**STAGE, "jobs": 2}),
            (
                "own.toml",
                {
                    "indicators": {"collect": "done"},
                    "starting-day": "friday",
                    "user": "backup",
                    "group": "backup",
                    "ssh-config": "/etc/ssh/backup",
                    "peers": [
                        {**PEER, "ignore-failures": "daily", "copy-command": "scp -B 'a b'"},
                        {
                            "name": "lab",
                            "location": "/srv/pool",
                            "kind": "states",
                            "objects": ["vm1/*"],
                        },
                    ],
                },
            ),
        ]
    )
    assert found.directory == Path("/srv/staging")
    assert (found.jobs, found.starting_day, found.user) == (2, 4, "backup")
    assert found.indicators == Indicators(collect="done")
    assert found.peers == (
        Peer(
            "web",
            Location("ssh", "/collect", host="web", user="backup"),
            ignore_failures=Ignore.DAILY,
            copy_command=("scp", "-B", "a b"),
        ),
        Peer("lab", Location("file", "/srv/pool"), PeerKind.STATES, ("vm1/*",)),
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"peers": []}, "there are no peers"),
        ({"peers": [PEER, PEER]}, "two peers have the name web"),
        ({"peers": "web"}, "not a list of tables"),
        ({"peers": [{"name": "web"}]}, "location is missing"),
        ({"peers": [{**PEER, "name": "a/b"}]}, "cannot have the name 'a/b'"),
        ({"peers": [{**PEER, "name": ".."}]}, "cannot have the name"),
        ({"peers": [{**PEER, "name": ".staging"}]}, "cannot have the name"),
        ({"peers": [{**PEER, "name": "-oProxyCommand=x"}]}, "cannot have the name"),
        ({"peers": [{**PEER, "name": "cback.stage"}]}, "cannot have the name"),
        ({"peers": [{**PEER, "name": "staged.json"}]}, "cannot have the name"),
        ({"peers": [{**PEER, "name": "x" * 256}]}, "cannot have the name"),
        ({"peers": [{**PEER, "name": "a\nb"}]}, "is not a text"),
        ({"peers": [{**PEER, "location": "ssh://web"}]}, "has no path"),
        ({"peers": [{**PEER, "kind": "pool"}]}, "kind: it cannot be 'pool'"),
        ({"peers": [{**PEER, "ignore-failures": "never"}]}, "cannot be 'never'"),
        ({"peers": [{**PEER, "copy-command": "scp '"}]}, "is no command"),
        ({"peers": [{**PEER, "colour": "red"}]}, "colour: there is no such setting"),
        ({"peers": [{**PEER, "copy-command": "scp", "kind": "states"}]}, "has states"),
        ({"peers": [{**PEER, "copy-command": "scp", "location": "/x"}]}, "needs a host"),
        ({"peers": [{**PEER, "location": "link:///x"}]}, "only a pool"),
        ({"peers": [{**PEER, "location": "collect"}]}, "is not an absolute path"),
        ({"directory": "../x"}, "is not an absolute path"),
        ({"jobs": 0}, "is not a count"),
        ({"jobs": True}, "is not a count"),
        ({"starting-day": "sonntag"}, "is no day"),
        ({"indicators": {"collect": "a/b"}}, "is not a file name"),
        ({"indicators": "x"}, "is not a table"),
        ({"user": 7}, "is not a text"),
    ],
)
def test_what_stage_refuses(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        stage_settings([("own.toml", {**STAGE, **change})])
    assert caught.value.message.startswith("own.toml: [stage]: ")
    assert caught.value.hint


def test_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"\[stage\]: directory is missing"):
        stage_settings([])
    with pytest.raises(ConfigError, match=r"\[collect\]: items is missing"):
        collect_settings([("x", {"directory": "/c"})])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"items": []}, "nothing to collect"),
        ({"items": [{"path": "etc"}]}, "is not an absolute path"),
        ({"items": [{"path": "/a/b"}, {"path": "/a-b"}]}, "would both be collected as a-b.tar.gz"),
        ({"items": [{**ITEM, "mode": "hourly"}]}, "cannot be 'hourly'"),
        ({"items": [{**ITEM, "patterns": ["("]}]}, "is no regular expression"),
    ],
)
def test_what_collect_refuses(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        collect_settings([("own.toml", {**COLLECT, **change})])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/etc", "etc.tar.gz"),
        ("/var/lib/my data", "var-lib-my_data.tar.gz"),
        ("/", "_.tar.gz"),
        ("/.ssh/a:b", "_ssh-a_b.tar.gz"),
    ],
)
def test_tars_are_named_as_by_cedar_backup(path: str, name: str) -> None:
    assert tar_name(Item(path)) == name


@pytest.mark.parametrize(
    ("mode", "usual", "start"),
    [("none", False, False), ("all", True, True), ("daily", True, False), ("weekly", False, True)],
)
def test_when_a_failure_is_ignored(mode: str, usual: bool, start: bool) -> None:
    assert Ignore(mode).applies(start=False) is usual
    assert Ignore(mode).applies(start=True) is start


# -- CedarBackup -----------------------------------------------------------------------------------

OPTIONS = """<options><starting_day>tuesday</starting_day><working_dir>/w</working_dir>
<backup_user>backup</backup_user><backup_group>group</backup_group>
<rcp_command>{scp}</rcp_command></options>"""
LOCAL = "<peer><name>me</name><type>local</type><collect_dir>/c</collect_dir></peer>"
REMOTE = """<peer><name>far</name><type>remote</type><collect_dir>/c</collect_dir>
<ignore_failures>weekly</ignore_failures>{more}</peer>"""
STAGING = "<stage><staging_dir>/s</staging_dir>{peers}</stage>"


def cedar(tmp_path: Path, *parts: str, head: str = "") -> Any:
    path = tmp_path / "cback3.conf"
    path.write_text(f"{head}<cb_config>{''.join(parts)}</cb_config>")
    return read_cedar(path)


def options(scp: str = "/usr/bin/scp -B -q -C") -> str:
    return OPTIONS.format(scp=scp)


def test_a_configuration_of_cedar_backup(tmp_path: Path) -> None:
    parts = (options(), f"<peers>{REMOTE.format(more='')}{LOCAL}</peers>", STAGING.format(peers=""))
    found = cedar(tmp_path, *parts).stage()
    assert found.directory == Path("/s")
    assert (found.starting_day, found.user, found.group) == (1, "backup", "group")
    assert found.peers == (  # local ones first
        Peer("me", Location("file", "/c")),
        Peer(
            "far",
            Location("ssh", "/c", host="far", user="backup"),
            ignore_failures=Ignore.WEEKLY,
        ),
    )


def test_peers_of_the_stage_section_replace_those_of_the_peers_section(tmp_path: Path) -> None:
    parts = (options(), f"<peers>{LOCAL}</peers>", STAGING.format(peers=REMOTE.format(more="")))
    assert [peer.name for peer in cedar(tmp_path, *parts).stage().peers] == ["far"]


@pytest.mark.parametrize(
    ("default", "own", "words", "port", "config"),
    [
        ("scp -B -q -C", "", (), None, None),
        ("scp -BqC -P 2222 -F /etc/x", "", (), 2222, "/etc/x"),
        ("scp -p", "", ("scp", "-p"), None, None),
        ("scp -B -i /key", "", ("scp", "-B", "-i", "/key"), None, None),
        ("rsync -t", "", ("rsync", "-t"), None, None),
        ("scp", "/usr/bin/scp -B", ("/usr/bin/scp", "-B"), None, None),
        ("scp -P 2222", 'scp "-o X Y"', ("scp", "-o X Y"), None, None),
    ],
)
def test_which_command_copies(
    tmp_path: Path,
    default: str,
    own: str,
    words: tuple[str, ...],
    port: int | None,
    config: str | None,
) -> None:
    more = f"<backup_user>kim</backup_user><rcp_command>{own}</rcp_command>"
    peers = f"<peers>{REMOTE.format(more=more)}</peers>"
    found = cedar(tmp_path, options(default), peers, STAGING.format(peers="")).stage()
    (peer,) = found.peers
    assert (peer.copy_command, peer.location.port, found.ssh_config) == (words, port, config)
    assert peer.location.user == "kim"


BOMB = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("head", "parts", "problem"),
    [
        (BOMB, ["<options>&b;</options>"], "entity"),
        (OUTSIDE, ["<options>&a;</options>"], "entity"),
        ('<!DOCTYPE x SYSTEM "http://127.0.0.1/x.dtd">', ["&a;"], "entity|no XML"),
        ("", ["<options>"], "is no XML: mismatched tag"),
        ("", ["&lol;"], "is no XML: undefined entity"),
        ("", [], "there is no section stage"),
        ("", [STAGING.format(peers="")], "there is no section options"),
        ("", [options(), STAGING.format(peers="")], "there are no peers"),
        ("", [options(), "<stage></stage>", f"<peers>{LOCAL}</peers>"], "staging_dir: it is miss"),
        ("", [options(), STAGING.format(peers=LOCAL + LOCAL)], "two peers have the name me"),
        ("", [options(), STAGING.format(peers=LOCAL.replace("me<", "a/b<"))], "cannot have the na"),
        (
            "",
            [options(), STAGING.format(peers=LOCAL.replace(">/c<", ">c<"))],
            "not an absolute path",
        ),
        ("", [options(), STAGING.format(peers=LOCAL.replace("local", "x"))], "it cannot be 'x'"),
        (
            "",
            [options(), STAGING.format(peers=REMOTE.format(more="").replace("far", "-oX=Y"))],
            "not a host name",
        ),
        (
            "",
            [options().replace("tuesday", "Dienstag"), STAGING.format(peers=LOCAL)],
            "starting_day: 'Dienstag' is no day",
        ),
    ],
)
def test_what_of_cedar_backup_is_refused(
    tmp_path: Path, head: str, parts: list[str], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        cedar(tmp_path, *parts, head=head).stage()
    assert "cback3.conf" in str(caught.value)
    assert caught.value.hint


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_cedar(tmp_path / "none")
    other = tmp_path / "other.xml"
    other.write_text("<html/>")
    with pytest.raises(ConfigError, match="no configuration of CedarBackup"):
        read_cedar(other)
    other.write_bytes(b"<x>" + b" " * (5 << 20))
    with pytest.raises(ConfigError, match="more than 4 MiB"):
        read_cedar(other)


COLLECTING = """<collect><collect_dir>/c</collect_dir><collect_mode>daily</collect_mode>
<archive_mode>targz</archive_mode><ignore_file>.cbignore</ignore_file>
<exclude><abs_path>/x</abs_path><pattern>.*~</pattern></exclude>
<file><abs_path>/etc/passwd</abs_path><mode>incr</mode><archive_mode>tar</archive_mode></file>
<dir><abs_path>/srv</abs_path><collect_mode>weekly</collect_mode>
<exclude><rel_path>kim/tmp</rel_path></exclude>{more}</dir></collect>"""


def test_what_cedar_backup_collects(tmp_path: Path) -> None:
    found = cedar(tmp_path, options(), COLLECTING.format(more="")).collect()
    assert (found.directory, found.notes, found.user) == (Path("/c"), Path("/w"), "backup")
    assert found.items == (
        Item(
            "/etc/passwd",
            CollectMode.INCREMENTAL,
            ArchiveMode.TAR,
            ".cbignore",
            ("/x",),
            (".*~",),
        ),
        Item(
            "/srv",
            CollectMode.WEEKLY,
            ArchiveMode.GZIP,
            ".cbignore",
            ("/x", "/srv/kim/tmp"),
            (".*~",),
        ),
    )


@pytest.mark.parametrize("more", ["<link_depth>1</link_depth>", "<dereference>Y</dereference>"])
def test_what_only_cedar_backup_can_collect(tmp_path: Path, more: str) -> None:
    with pytest.raises(ConfigError, match="only cback3 collect"):
        cedar(tmp_path, options(), COLLECTING.format(more=more)).collect()
    plain = COLLECTING.format(more="<link_depth>0</link_depth><dereference>N</dereference>")
    assert len(cedar(tmp_path, options(), plain).collect().items) == 2
