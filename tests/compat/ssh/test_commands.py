"""Every command on pools of other hosts: with a shell there, and with SFTP in a chroot only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from tests.support.sshd import Sshd

MIB = 1 << 20

Run = Callable[..., Any]
Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


@pytest.fixture(params=["sshd", "chrooted_sshd"])
def server(request: pytest.FixtureRequest) -> Sshd:
    """Each of the two kinds of accounts."""
    found: Sshd = request.getfixturevalue(request.param)
    return found


@frozen
class Lab:
    """
    A cache here, and a pool there.

    :param here: the project's directory
    :param there: the pool's directory, as this host sees it
    :param location: its address
    """

    here: Path
    there: Path
    location: str

    def configure(self, cache: str) -> None:
        """From now on another host is meant: one with this cache."""
        knobs = {
            "known-hosts": os.environ["TEST_KNOWN_HOSTS"],
            "ssh-config": os.environ["TEST_SSH_CONFIG"],
        }
        lines = [
            f"cache = {json.dumps(cache)}",
            f"sources = [{json.dumps(self.location)}]",
            "fresh = 0",
        ]
        lines += [f"{key} = {json.dumps(value)}" for key, value in knobs.items()]
        (self.here / "statepool.toml").write_text("\n".join(lines) + "\n")


@pytest.fixture
def lab(server: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("TEST_KNOWN_HOSTS", str(server.known_hosts))
    monkeypatch.setenv("TEST_SSH_CONFIG", str(server.ssh_config))
    there = server.directory_for(tmp_path.name)
    found = Lab(tmp_path, there, str(server.location(there)))
    found.configure("cache")
    return found


def test_a_walk(lab: Lab, run_statepool: Run, make_image: Make, write_to_image: Write) -> None:
    """What a person does in a life: two hosts, one pool between them."""

    def states(*words: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for state in json.loads(run_statepool("show", "--json", *words).out)["states"]:
            found.setdefault(state["state"], []).extend(state["pools"])
        return found

    run_statepool("init", lab.location)
    work = make_image(lab.here / "work.qcow2", 16 * MIB, writes=[(0, 3 * MIB, 1)])
    stored = json.loads(run_statepool("set", "vm1/disk", "install", "--from", work, "--json").out)[
        "stored"
    ]
    at = stored["pools"][1]
    assert (at["pool"], at["result"], at["durable"], at["resumed"], at["again"]) == (
        lab.location,
        "stored",
        True,
        0,
        0,
    )
    write_to_image(work, [(4 * MIB, MIB, 2)])
    run_statepool("set", "vm1/disk", "customize", "--from", work)
    assert (lab.there / "vm1/disk/customize.qcow2").is_symlink(), "people there see it, too"

    lab.configure("elsewhere")
    assert states("vm1/disk") == {"install": [lab.location], "customize": [lab.location]}
    assert "customize" in run_statepool("tree").out
    assert run_statepool("check", "vm1/disk", "customize").code == 0
    got = json.loads(
        run_statepool(
            "get", "vm1/disk", "customize", "--to", lab.here / "other.qcow2", "--json"
        ).out
    )["got"]
    assert (got["source"], got["how"], got["verified"]) == (lab.location, "stream", "arrived")
    assert (
        json.loads(run_statepool("get", "vm1/disk", "customize", "--json").out)["got"]["bytes"] == 0
    )

    checked = json.loads(run_statepool("verify", "--json", "--source", lab.location).out)
    assert {one["problem"] for one in checked["checked"]} == {None}
    assert len(json.loads(run_statepool("log", "vm1", "--json").out)["records"]) >= 4
    assert json.loads(run_statepool("gc", "--json").out)["collected"] == []

    run_statepool("unset", "vm1/disk", "customize", "--everywhere")
    assert list(states("vm1/disk")) == ["install"]
    assert not (lab.there / "vm1/disk/customize.qcow2").is_symlink()
    assert list((lab.there / ".statepool/incoming").iterdir()) == []


def test_a_pool_whose_path_is_no_text(
    lab: Lab, server: Sshd, run_statepool: Run, make_image: Make
) -> None:
    named = lab.there / "p\udcff"
    location = str(server.location(named))
    assert location.endswith("/p%FF")
    run_statepool("init", location)
    assert [path.name for path in lab.there.iterdir()] == ["p\udcff"], "and no other directory"
    work = make_image(lab.here / "work.qcow2", 4 * MIB, writes=[(0, MIB, 1)])
    run_statepool("--source", location, "set", "vm1/disk", "install", "--from", work)
    checked = json.loads(run_statepool("verify", "--source", location, "--json").out)["checked"]
    assert [(one["pool"], one["problem"]) for one in checked if one["pool"] == location] == [
        (location, None)
    ]
    raw = f"ssh://{server.user}@127.0.0.1:{server.port}{server.location(named).path}"
    assert (
        json.loads(
            run_statepool(
                "--cache", "new", "--source", raw, "get", "vm1/disk", "install", "--json"
            ).out
        )["got"]["source"]
        == location
    )
    run_statepool("--source", location, "unset", "vm1/disk", "install", "--everywhere")


def test_files_of_another_tool_are_got_and_adopted(
    lab: Lab, server: Sshd, run_statepool: Run, make_image: Make
) -> None:
    make_image(lab.there / "vm1/disk/install.qcow2", 4 * MIB, writes=[(0, MIB, 1)])
    make_image(
        lab.there / "vm1/disk/customize.qcow2",
        None,
        backing="install.qcow2",
        writes=[(MIB, MIB, 2)],
    )
    for path in (lab.there / "vm1", lab.there / "vm1/disk", *(lab.there / "vm1/disk").iterdir()):
        shutil.chown(path, server.user)
    got = json.loads(run_statepool("get", "vm1/disk", "customize", "--json").out)["got"]
    assert got["verified"] == "unmanaged"
    run_statepool("init", lab.location)
    adopted = json.loads(run_statepool("adopt", lab.location, "--json").out)
    assert [(one["state"], one["problem"]) for one in adopted["adopted"]] == [
        ("install", None),
        ("customize", None),
    ]
    lab.configure("elsewhere")
    assert (
        json.loads(run_statepool("get", "vm1/disk", "customize", "--json").out)["got"]["verified"]
        == "arrived"
    )


def test_what_is_damaged_there_is_named(lab: Lab, run_statepool: Run, make_image: Make) -> None:
    run_statepool("init", lab.location)
    work = make_image(lab.here / "work.qcow2", 4 * MIB, writes=[(0, MIB, 1)])
    digest = json.loads(run_statepool("set", "vm1/disk", "install", "--from", work, "--json").out)[
        "stored"
    ]["digest"]
    data = lab.there / ".statepool/data" / digest.replace(":", "-")
    content = bytearray(data.read_bytes())
    content[-1000] ^= 0xFF
    data.chmod(0o644)
    data.write_bytes(content)
    found = run_statepool("verify", "--source", lab.location, "--json", code=5)
    assert any(one["problem"] for one in json.loads(found.out)["checked"])
    lab.configure("elsewhere")
    refused = run_statepool("get", "vm1/disk", "install", code=5)
    assert digest in refused.err
    assert list((lab.here / "elsewhere/.statepool/incoming").iterdir()) == []


def test_doctor_says_what_the_server_offers(lab: Lab, run_statepool: Run) -> None:
    run_statepool("init", lab.location)
    said = run_statepool("doctor", code=None).out
    assert lab.location in said
