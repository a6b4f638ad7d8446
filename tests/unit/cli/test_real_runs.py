"""
What the options of each command change: the command line in this process, on real pools with real
images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import statepool
from statepool.cli.main import cli
from statepool.model.digest import Digest

SIZE = 1 << 20
PATTERN = 64 << 10

CONFIG = """
cache = "cache"
sources = [
    { location = "lab", name = "lab" },
    { location = "near", name = "near", scope = "swarm" },
]
"""


class Site:
    """
    A cache with two sources, both of which have a chain of two and a state of another machine; and
    a working image on the tip.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, *words: str, code: int = 0) -> Any:
        """:returns: the JSON that the command answers with, or None for an error"""
        result = CliRunner().invoke(cli, [*words, "--json"])
        assert result.exception is None or isinstance(result.exception, SystemExit), (
            result.exception
        )
        assert result.exit_code == code, (words, result.stdout, result.stderr)
        return json.loads(result.stdout) if result.stdout else None

    def state(self, name: str) -> Any:
        """:returns: what is shown of a state of vm1/disk"""
        (found,) = [
            listed for listed in self("show", "vm1/disk")["states"] if listed["state"] == name
        ]
        return found

    def pools(self, name: str = "customize") -> list[str]:
        """:returns: which pools have a state of vm1/disk, by the last parts of their paths"""
        return sorted(pool.rpartition("/")[2] for pool in self.state(name)["pools"])

    def states(self, *words: str) -> list[str]:
        return sorted(
            {f"{state['object']} {state['state']}" for state in self("show", *words)["states"]}
        )


@pytest.fixture
def site(
    tmp_path: Path,
    make_image: Callable[..., Path],
    write_to_image: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Site:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "statepool.toml").write_text(CONFIG)
    for name in ("lab", "near"):
        statepool.init(name)
    disk = statepool.StatePool("cache", ["lab", "near"]).image("vm1/disk")
    work = make_image(tmp_path / "work.qcow2", SIZE, writes=[(0, PATTERN, 1)])
    disk.set("install", source=work)
    write_to_image(work, [(PATTERN, PATTERN, 2)])
    disk.set("customize", source=work)
    other = make_image(tmp_path / "other.qcow2", SIZE, writes=[(0, PATTERN, 3)])
    make_image(tmp_path / "third.qcow2", SIZE, writes=[(0, PATTERN, 4)])
    statepool.StatePool("cache", ["lab", "near"]).image("vm2/disk").set("install", source=other)
    return Site(tmp_path)


def test_what_is_listed(site: Site) -> None:
    assert site.states() == ["vm1/disk customize", "vm1/disk install", "vm2/disk install"]
    assert site.states("vm2") == ["vm2/disk install"]
    assert {
        tuple(state["pools"]) for state in site("show", "--scope", "shared swarm")["states"]
    } == {(f"file://{site.root}/lab", f"file://{site.root}/near")}
    assert {tuple(state["pools"]) for state in site("show", "--scope", "own")["states"]} == {
        (f"file://{site.root}/cache",)
    }
    assert [state["object"] for state in site("tree", "vm1/disk")["states"]] == ["vm1/disk"] * 2
    assert {record["machine"] for record in site("log", "vm2")["records"]} == {"vm2"}
    assert {record["machine"] for record in site("log")["records"]} == {"vm1", "vm2"}
    assert [source["name"] for source in site("sources", "--scope", "swarm")["sources"]] == ["near"]
    assert {source["name"] for source in site("sources", "--scope", "shared swarm")["sources"]} == {
        "lab",
        "near",
    }


def test_what_is_checked_and_verified(site: Site) -> None:
    site("unset", "vm1/disk", "customize")
    assert site("check", "vm1/disk", "customize")["present"] is True
    assert site("check", "vm1/disk", "customize", "--scope", "own", code=3)["present"] is False
    assert site("check", "vm1/disk", "customize", "--scope", "own swarm")["present"] is True
    assert {
        (one["object"], one["state"]) for one in site("verify", "vm1/disk", "install")["checked"]
    } == {("vm1/disk", "install")}
    assert {one["object"] for one in site("verify")["checked"]} == {"vm1/disk", "vm2/disk"}


def test_where_a_get_comes_from_and_goes_to(site: Site) -> None:
    for words, source in (
        (("--from", "near"), "near"),
        (("--from", "lab"), "lab"),
        (("--scope", "swarm"), "near"),
        (("--scope", "shared"), "lab"),
    ):
        shutil.rmtree(site.root / "new", ignore_errors=True)
        assert (
            site("--cache", "new", "get", "vm1/disk", "customize", *words)["got"]["source"]
            == f"file://{site.root}/{source}"
        )
    assert site("get", "vm1/disk", "customize")["got"]["working"] is None
    got = site("get", "vm1/disk", "install", "--to", "new.qcow2", "--dry-run")
    assert (got["dry_run"], (site.root / "new.qcow2").exists()) == (True, False)
    assert site("get", "vm1/disk", "install", "--to", "new.qcow2")["got"]["working"] == str(
        site.root / "new.qcow2"
    )
    before = (site.root / "new.qcow2").stat().st_ino
    site("get", "vm1/disk", "customize", "--to", "new.qcow2", code=4)
    assert (site.root / "new.qcow2").stat().st_ino == before
    site("get", "vm1/disk", "customize", "--to", "new.qcow2", "--overwrite")
    assert b"customize.qcow2" in (site.root / "new.qcow2").read_bytes()


def test_what_a_set_makes(site: Site, write_to_image: Any) -> None:
    work = ("--from", "work.qcow2")
    write_to_image(site.root / "work.qcow2", [(2 * PATTERN, PATTERN, 4)])
    site("set", "vm1/disk", "planned", *work, "--dry-run")
    assert "vm1/disk planned" not in site.states()
    site(
        "set",
        "vm1/disk",
        "connect",
        *work,
        "--label",
        "a=b",
        "--label",
        "c=d=e",
        "--scope",
        "own shared",
    )
    first = site.state("connect")
    assert (first["parent"]["state"], first["labels"], site.pools("connect")) == (
        "customize",
        {"a": "b", "c": "d=e"},
        ["cache", "lab"],
    )
    write_to_image(site.root / "work.qcow2", [(3 * PATTERN, PATTERN, 5)])
    site("set", "vm1/disk", "connect", *work, code=4)
    squashed = site(
        "set", "vm1/disk", "connect", *work, "--squash", "--replace", "--wait-for", "any"
    )["stored"]
    assert (squashed["wait_for"], squashed["complete"]) == ("any", True)
    second = site.state("connect")
    assert (second["parent"], second["digest"], site.pools("connect")) == (
        first["parent"],
        squashed["digest"],
        ["cache", "lab", "near"],
    )
    assert second["digest"] != first["digest"]
    site("set", "vm2/disk", "install", "--from", "third.qcow2", code=4)
    site("set", "vm2/disk", "install", "--from", "third.qcow2", "--replace")


def test_what_is_left_without_its_source(site: Site, write_to_image: Any) -> None:
    """A set is complete once it is in the pools that it waits for."""
    write_to_image(site.root / "work.qcow2", [(2 * PATTERN, PATTERN, 4)])
    (site.root / "near/.statepool/pool.json").write_text('{"format": 99}')
    assert (
        site("set", "vm1/disk", "new", "--from", "work.qcow2", "--wait-for", "own")["stored"][
            "complete"
        ]
        is True
    )
    assert (
        site("set", "vm1/disk", "new", "--from", "work.qcow2", "--wait-for", "any")["stored"][
            "complete"
        ]
        is True
    )
    assert (
        site("set", "vm1/disk", "new", "--from", "work.qcow2", "--wait-for", "all", code=7)[
            "stored"
        ]["complete"]
        is False
    )
    assert (
        site("set", "vm1/disk", "new", "--from", "work.qcow2", code=7)["stored"]["wait_for"]
        == "all"
    )


def test_what_is_removed_from_where(site: Site) -> None:
    assert site("unset", "vm1/disk", "customize", "--dry-run")["removed"]["states"] == {
        f"file://{site.root}/cache": ["customize"]
    }
    assert site.pools() == ["cache", "lab", "near"]
    site("unset", "vm1/disk", "customize")
    assert site.pools() == ["lab", "near"]
    site("unset", "vm1/disk", "customize", "--scope", "swarm")
    assert site.pools() == ["lab"]
    site("unset", "vm1/disk", "install", "--everywhere", code=4)
    assert site.pools("install") == ["cache", "lab", "near"]
    site("unset", "vm1/disk", "install", "--everywhere", "--cascade")
    assert site.states() == ["vm2/disk install"]


def test_what_is_collected_where(site: Site) -> None:
    needless = [
        site.root / name / ".statepool/data" / Digest.of(b"needless").file_name
        for name in ("cache", "lab", "near")
    ]
    for path in needless:
        path.write_bytes(b"needless")
    assert len(site("gc", "--everywhere", "--dry-run")["collected"]) == 3
    assert [path.exists() for path in needless] == [True, True, True]
    site("gc")
    assert [path.exists() for path in needless] == [False, True, True]
    site("gc", "--everywhere")
    assert [path.exists() for path in needless] == [False, False, False]


def test_what_is_made_a_pool(site: Site) -> None:
    for words, place in ((("init", "another"), "another"), (("--cache", "new", "init"), "new")):
        assert site(*words, "--dry-run") == {"pool": f"file://{site.root}/{place}", "dry_run": True}
        assert not (site.root / place).exists()
        site(*words)
        assert (site.root / place / ".statepool/pool.json").exists()


@pytest.mark.parametrize("place", ["cache", "lab"])
def test_what_is_adopted(site: Site, make_image: Callable[..., Path], place: str) -> None:
    directory = site.root / place / "vm3/disk"
    make_image(directory / "install.qcow2", SIZE, writes=[(0, PATTERN, 6)])
    make_image(
        directory / "customize.qcow2",
        None,
        backing=directory / "install.qcow2",
        writes=[(PATTERN, PATTERN, 7)],
    )
    words = ("adopt",) if place == "cache" else ("adopt", place)
    assert {item["state"] for item in site(*words, "--relocate", "--dry-run")["adopted"]} == {
        "install",
        "customize",
    }
    assert {state["managed"] for state in site("show", "vm3")["states"]} == {False}
    assert str(directory).encode() in (directory / "customize.qcow2").read_bytes()
    assert {item["problem"] for item in site(*words, "--relocate")["adopted"]} == {None}
    assert str(directory).encode() not in (directory / "customize.qcow2").read_bytes()
    assert {state["managed"] for state in site("show", "vm3")["states"]} == {True}


@pytest.mark.parametrize(
    "words",
    [
        ["get", "vm1/disk", "install", "--overwrite"],
        ["set", "vm1/disk", "new", "--from", "work.qcow2", "--label", "a"],
        ["set", "vm1/disk", "new", "--from", "work.qcow2", "--label", "=b"],
        ["set", "vm1/disk", "new", "--from", "work.qcow2", "--label", "a=b", "--label", "a=c"],
    ],
)
def test_what_is_refused_before_anything_is_made(site: Site, words: list[str]) -> None:
    assert site("--cache", "new", *words, code=2) is None
    assert not (site.root / "new").exists()
    assert "vm1/disk new" not in site.states()
