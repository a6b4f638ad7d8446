"""What each command says: to people, and as JSON. What it does is in test_real_runs.py."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from click.testing import Result

from statepool.cache import check_cached
from statepool.model.digest import ALGORITHMS, Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, Manifest, Parent
from statepool.model.outcomes import (
    Adopted,
    Checked,
    Collected,
    Collection,
    Finding,
    GetResult,
    Kept,
    Level,
    Listed,
    Listing,
    Logged,
    Presence,
    Removed,
    SetResult,
    StoredAt,
    Verified,
)
from statepool.transports.copying import hash_file

Run = Callable[..., Result]

ONE = Digest("blake3", "1" * 64)
TWO = Digest("blake3", "2" * 64)
INSTALL = Manifest(
    "vm1/disk",
    "install",
    size=3 << 20,
    digest=ONE,
    virtual_size=1 << 30,
    cluster_size=65536,
    extents=((0, 65536), (1 << 20, 65536)),
    created=5.0,
)
CUSTOMIZE = Manifest(
    "vm1/disk",
    "customize",
    size=1 << 20,
    digest=TWO,
    parent=Parent("install", ONE),
    labels={"os": "debian"},
    creator={"host": "h"},
)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return f"file://{tmp_path}/cache"


def answered(result: Result) -> Any:
    """The JSON on standard output, of which there is one object, and nothing else."""
    assert result.stderr == ""
    return json.loads(result.stdout)


# -- listing


def test_show(run: Run, api: Any, cache: str) -> None:
    api.answers["show"] = [
        Listed(INSTALL, (cache, "file:///srv/pool", "ssh://a/b")),
        Listed(CUSTOMIZE, (cache,), managed=False, problem="no parent"),
    ]
    lines = run("--source", "/srv/pool", "show", "vm1").stdout.splitlines()
    assert lines[0].split() == ["OBJECT", "STATE", "SIZE", "PARENT", "CREATED", "WHERE", "NOTE"]
    assert lines[2].split() == [
        "vm1/disk",
        "install",
        "128",
        "KiB",
        "1970-01-01",
        "00:00:05",
        "cache",
        "/srv/pool",
        "ssh://a/b",
    ]
    assert lines[1].split() == [
        "vm1/disk",
        "customize",
        "1.00",
        "MiB",
        "install",
        "cache",
        "unmanaged,",
        "no",
        "parent",
    ]


def test_a_state_with_ram_is_one_line(run: Run, api: Any, cache: str) -> None:
    machine = Manifest("vm1", "loggedin", kind=Kind.MACHINE, members={"disk": ONE, "ram": ONE})
    ram = Manifest("vm1", "loggedin", kind=Kind.RAM, size=1 << 20, digest=ONE)
    lost = Manifest("vm1", "other", kind=Kind.RAM, size=1 << 20, digest=ONE)
    api.answers["show"] = [Listed(machine, (cache,)), Listed(ram, (cache,)), Listed(lost, (cache,))]
    assert [line.split()[:4] for line in run("show", "vm1").stdout.splitlines()[1:]] == [
        ["vm1", "loggedin", "1.00", "MiB"],
        ["vm1", "other", "1.00", "MiB"],
    ]
    assert len(answered(run("show", "vm1", "--json"))["states"]) == 3


def test_show_json(run: Run, api: Any, cache: str) -> None:
    api.answers["show"] = [
        Listed(INSTALL, (cache,)),
        Listed(CUSTOMIZE, (cache, "file:///b"), managed=False, problem="x"),
    ]
    assert answered(run("show", "--json")) == {
        "states": [
            {
                "object": "vm1/disk",
                "state": "install",
                "kind": "image",
                "size": 3 << 20,
                "data_size": 131072,
                "digest": str(ONE),
                "origin": None,
                "parent": None,
                "virtual_size": 1 << 30,
                "cluster_size": 65536,
                "created": 5.0,
                "creator": {},
                "labels": {},
                "fingerprint": {},
                "members": {},
                "pools": [cache],
                "managed": True,
                "problem": None,
            },
            {
                "object": "vm1/disk",
                "state": "customize",
                "kind": "image",
                "size": 1 << 20,
                "data_size": 1 << 20,
                "digest": str(TWO),
                "origin": None,
                "parent": {"state": "install", "digest": str(ONE)},
                "virtual_size": 0,
                "cluster_size": 0,
                "created": 0.0,
                "creator": {"host": "h"},
                "labels": {"os": "debian"},
                "fingerprint": {},
                "members": {},
                "pools": [cache, "file:///b"],
                "managed": False,
                "problem": "x",
            },
        ],
        "warnings": [],
    }


def test_show_json_of_a_machine(run: Run, api: Any, cache: str) -> None:
    api.answers["show"] = [
        Listed(Manifest("vm1", "on", kind=Kind.MACHINE, members={"vm1/disk": ONE}), (cache,))
    ]
    (state,) = answered(run("show", "--json"))["states"]
    assert (state["kind"], state["digest"], state["members"]) == (
        "machine",
        None,
        {"vm1/disk": str(ONE)},
    )


def test_show_of_nothing(run: Run, api: Any) -> None:
    api.answers["show"] = []
    assert run("show").stdout == ""
    assert answered(run("show", "--json")) == {"states": [], "warnings": []}


@pytest.mark.parametrize("command", ["show", "tree", "log"])
def test_an_object_that_nobody_knows_is_an_error(
    run: Run, api: Any, cache: str, command: str
) -> None:
    api.answers |= {"show": [], "log": []}
    told = run("--source", "/b", command, "vm2", code=3)
    assert (told.stdout, told.stderr) == (
        "",
        (
            f"statepool: there is no state of vm2 in {cache}, file:///b (statepool --source /b show"
            " lists what there is)\n"
        ),
    )
    assert json.loads(run(command, "vm2", "--json", code=3).stderr)["error"]["object"] == "vm2"
    assert run(command).stdout == ""


@pytest.mark.parametrize("command", ["show", "tree", "log"])
def test_an_object_may_be_where_nobody_could_be_asked(run: Run, api: Any, command: str) -> None:
    api.answers |= {"show": Listing([], ["b could not be asked"]), "log": []}
    assert run(command, "vm2").stderr == "statepool: warning: b could not be asked\n"


def test_an_object_is_looked_for_within_the_scope(run: Run, api: Any, cache: str) -> None:
    api.answers["show"] = []
    assert (
        f"no state of vm2 in {cache} ("
        in run("--source", "/b", "show", "vm2", "--scope", "own", code=3).stderr
    )
    assert (
        "no state of vm2 in file:///b ("
        in run("--source", "/b", "show", "vm2", "--scope", "shared", code=3).stderr
    )
    assert "scope swarm" in run("--source", "/b", "show", "vm2", "--scope", "swarm", code=3).stderr


def test_states_without_records_are_no_error(run: Run, api: Any, cache: str) -> None:
    api.answers |= {"show": [Listed(INSTALL, (cache,), managed=False)], "log": []}
    assert run("log", "vm1/disk").stdout == ""


def test_quiet_listing_has_no_titles(run: Run, api: Any, cache: str) -> None:
    api.answers["show"] = [Listed(INSTALL, (cache,))]
    assert run("show", "-q").stdout.startswith("vm1/disk  install")


def test_configured_names_are_shown(run: Run, api: Any, tmp_path: Path) -> None:
    (tmp_path / "statepool.toml").write_text('[[sources]]\nlocation = "/srv/pool"\nname = "lab"\n')
    api.answers["show"] = [Listed(INSTALL, ("file:///srv/pool",))]
    assert run("show").stdout.splitlines()[1].split()[-1] == "lab"


def test_paths_are_shown_as_the_file_system_has_them(run: Run, api: Any, cache: str) -> None:
    odd = str(Location("file", "/srv/my Größe\u202e"))
    api.answers["show"] = [Listed(INSTALL, (odd, str(Location("ssh", "/a b", host="h"))))]
    assert run("show", "-q").stdout.rstrip().endswith("/srv/my Größe\\u202e ssh://h/a%20b")
    api.answers["init"] = Location("file", "/srv/with space")
    assert run("init", "/srv/with space").stdout == "there is a pool at /srv/with space\n"


def test_tree(run: Run, api: Any, cache: str) -> None:
    api.answers["show"] = [Listed(CUSTOMIZE, (cache,)), Listed(INSTALL, (cache, "file:///b"))]
    assert run("tree", "vm1/disk").stdout.splitlines() == [
        "vm1/disk",
        "  install         128 KiB  cache /b",
        "  └── customize  1.00 MiB  cache",
    ]


def test_tree_json(run: Run, api: Any, cache: str) -> None:
    api.answers["show"] = [Listed(CUSTOMIZE, (cache,)), Listed(INSTALL, (cache,))]
    states = answered(run("tree", "--json"))["states"]
    assert [(state["state"], state["depth"]) for state in states] == [
        ("install", 0),
        ("customize", 1),
    ]
    shown = answered(run("show", "--json"))["states"]
    assert [{**state, "depth": 0} for state in shown] == [
        {**state, "depth": 0} for state in reversed(states)
    ]


def test_tree_dot(run: Run, api: Any, cache: str) -> None:
    api.answers["show"] = [Listed(CUSTOMIZE, ('file:///a"\\b',)), Listed(INSTALL, (cache,))]
    text = run("tree", "--dot").stdout
    assert text.startswith("digraph states {\n")
    assert '  s0 [label = "vm1/disk install\\n128 KiB\\ncache"];\n' in text
    assert '\\n/a\\"\\\\b"];\n' in text
    assert "  s0 -> s1;\n" in text
    run("tree", "--dot", "--json", code=2)


def test_log(run: Run, api: Any, cache: str) -> None:
    api.answers["log"] = [
        Logged(cache, "vm1", 7, 5.0, "me@host", ("publish vm1/disk install", "remove vm1/disk old"))
    ]
    cells = re.split(" {2,}", run("log", "vm1").stdout.splitlines()[1])
    assert cells == [
        "cache",
        "vm1",
        "7",
        "1970-01-01 00:00:05",
        "me@host",
        "publish vm1/disk install; remove vm1/disk old",
    ]
    assert answered(run("log", "--json")) == {
        "records": [
            {
                "pool": cache,
                "machine": "vm1",
                "number": 7,
                "time": 5.0,
                "by": "me@host",
                "changes": ["publish vm1/disk install", "remove vm1/disk old"],
            }
        ]
    }


@pytest.mark.parametrize(
    ("level", "code"), [(Level.OK, 0), (Level.NOTE, 0), (Level.WARNING, 0), (Level.ERROR, 1)]
)
def test_doctor(run: Run, api: Any, cache: str, level: Level, code: int) -> None:
    api.answers["doctor"] = [
        Finding(Level.OK, "this host", "qemu-img 7.2"),
        Finding(level, cache, "not shared", "chmod g+w"),
    ]
    assert run("doctor", code=code).stdout.splitlines()[2].split() == [
        str(level),
        "cache",
        "not",
        "shared",
        "chmod",
        "g+w",
    ]
    assert answered(run("doctor", "--json", code=code)) == {
        "findings": [
            {"level": "ok", "where": "this host", "what": "qemu-img 7.2", "cure": None},
            {"level": str(level), "where": cache, "what": "not shared", "cure": "chmod g+w"},
        ]
    }


# -- one state


@pytest.mark.parametrize(("present", "code"), [(True, 0), (False, 3)])
def test_check(run: Run, api: Any, present: bool, code: int) -> None:
    api.answers["check"] = present
    api.answers["show"] = []  # is asked for built states of the name
    result = run("check", "vm1/disk", "install", code=code)
    assert (result.stdout, result.stderr) == ("", "")
    assert answered(run("check", "vm1/disk", "install", "--json", code=code)) == {
        "object": "vm1/disk",
        "state": "install",
        "present": present,
    }
    assert (
        run("check", "-v", "vm1/disk", "install", code=code).stdout
        == f"vm1/disk install is {'there' if present else 'not there'}\n"
    )


def test_get(run: Run, api: Any, cache: str) -> None:
    api.answers["get"] = GetResult(
        "vm1/disk",
        "customize",
        ("customize", "install"),
        str(TWO),
        "file:///b",
        4096,
        Verified.ARRIVED,
        "/w.qcow2",
        "reflink",
    )
    result = run("get", "vm1/disk", "customize", "--to", "w.qcow2", "--overwrite")
    assert result.stdout.splitlines() == [
        "vm1/disk customize: 4.00 KiB from /b (reflink); every byte was checked as it arrived",
        "working image: /w.qcow2",
    ]
    assert answered(run("get", "vm1/disk", "customize", "--json", "--dry-run")) == {
        "got": {
            "object": "vm1/disk",
            "state": "customize",
            "chain": ["customize", "install"],
            "digest": str(TWO),
            "source": "file:///b",
            "bytes": 4096,
            "verified": "arrived",
            "working": "/w.qcow2",
            "how": "reflink",
            "warnings": [],
            "images": {},
            "resumed": 0,
            "again": 0,
        },
        "dry_run": True,
    }
    assert run("get", "-q", "vm1/disk", "customize").stdout == ""
    assert "would fetch" in run("get", "vm1/disk", "customize", "--dry-run").stdout


@pytest.mark.parametrize("verified", Verified)
def test_get_says_what_stands_behind_the_bytes(run: Run, api: Any, verified: Verified) -> None:
    api.answers["get"] = GetResult("vm1/disk", "install", ("install",), str(ONE), verified=verified)
    assert run("get", "vm1/disk", "install").stdout.startswith("vm1/disk install: in the cache; ")


def test_overwrite_is_for_a_file(run: Run, api: Any) -> None:
    assert (
        "--overwrite needs --to" in run("get", "vm1/disk", "install", "--overwrite", code=2).stderr
    )


def test_set(run: Run, api: Any, cache: str) -> None:
    pools = (
        StoredAt(cache, Presence.STORED, bytes=2048),
        StoredAt("file:///b", Presence.PRESENT),
        StoredAt("file:///c", Presence.STORED, durable=False),
    )
    api.answers["set"] = SetResult(
        "vm1/disk", "new", str(ONE), pools, ("it has internal snapshots",)
    )
    result = run(
        "set",
        "vm1/disk",
        "new",
        "--from",
        "w.qcow2",
        "--replace",
        "--label",
        "a=b",
        "--label",
        "c=d=e",
    )
    assert result.stderr == "statepool: warning: it has internal snapshots\n"
    assert result.stdout.splitlines() == [
        "vm1/disk new: stored (2.00 KiB) in cache",
        "vm1/disk new: was already in /b",
        "vm1/disk new: stored, not safe from a power cut yet, in /c",
    ]
    assert answered(run("set", "vm1/disk", "new", "--from", "w.qcow2", "--json")) == {
        "stored": {
            "object": "vm1/disk",
            "state": "new",
            "digest": str(ONE),
            "pools": [
                {
                    "pool": cache,
                    "result": "stored",
                    "durable": True,
                    "bytes": 2048,
                    "error": None,
                    "resumed": 0,
                    "again": 0,
                },
                {
                    "pool": "file:///b",
                    "result": "present",
                    "durable": True,
                    "bytes": 0,
                    "error": None,
                    "resumed": 0,
                    "again": 0,
                },
                {
                    "pool": "file:///c",
                    "result": "stored",
                    "durable": False,
                    "bytes": 0,
                    "error": None,
                    "resumed": 0,
                    "again": 0,
                },
            ],
            "warnings": ["it has internal snapshots"],
            "wait_for": "all",
            "complete": True,
        },
        "dry_run": False,
    }
    assert (
        "would be stored" in run("set", "vm1/disk", "new", "--from", "w.qcow2", "--dry-run").stdout
    )


def test_incomplete_set(run: Run, api: Any, cache: str) -> None:
    api.answers["set"] = SetResult(
        "vm1/disk",
        "new",
        str(ONE),
        (StoredAt(cache, Presence.STORED), StoredAt("file:///b", Presence.FAILED, error="full")),
    )
    result = run("set", "vm1/disk", "new", "--from", "w", code=7)
    assert result.stdout == "vm1/disk new: stored in cache\n"
    assert result.stderr == "statepool: vm1/disk new is not in /b: full\n"
    assert (
        answered(run("set", "vm1/disk", "new", "--from", "w", "--json", code=7))["stored"][
            "complete"
        ]
        is False
    )


@pytest.mark.parametrize("labels", [["a"], ["=b"], ["a=b", "a=c"]])
def test_bad_labels(run: Run, api: Any, labels: list[str]) -> None:
    options = [word for label in labels for word in ("--label", label)]
    assert (
        len(run("set", "vm1/disk", "new", "--from", "w", *options, code=2).stderr.splitlines()) == 1
    )


def test_unset(run: Run, api: Any, cache: str) -> None:
    api.answers["unset"] = Removed("vm1/disk", {cache: ("a", "b"), "file:///c": ()})
    result = run("unset", "vm1/disk", "a", "--everywhere", "--cascade")
    assert result.stdout.splitlines() == [
        "vm1/disk: removed a, b from cache",
        "vm1/disk: removed nothing from /c",
    ]
    assert "would remove a, b" in run("unset", "vm1/disk", "a", "--dry-run").stdout


def test_incomplete_unset(run: Run, api: Any, cache: str) -> None:
    api.answers["unset"] = Removed("vm1/disk", {cache: ("a",)}, {"file:///c": "no permission"})
    result = run("unset", "vm1/disk", "a", code=7)
    assert result.stderr == "statepool: vm1/disk a was not removed from /c: no permission\n"
    assert answered(run("unset", "vm1/disk", "a", "--json", code=7)) == {
        "removed": {
            "object": "vm1/disk",
            "states": {cache: ["a"]},
            "errors": {"file:///c": "no permission"},
        },
        "dry_run": False,
    }


# -- pools


def test_init(run: Run, api: Any, tmp_path: Path) -> None:
    api.answers["init"] = Location("file", "/srv/pool")
    assert run("init", "/srv/pool").stdout == "there is a pool at /srv/pool\n"
    assert answered(run("init", "--json", "--dry-run")) == {
        "pool": "file:///srv/pool",
        "dry_run": True,
    }


def test_adopt(run: Run, api: Any, tmp_path: Path, cache: str) -> None:
    api.answers["adopt"] = [Adopted(cache, "vm1/disk", "a", str(ONE), relocated=True)]
    assert run("adopt", "--relocate").stdout.splitlines()[1].split() == [
        "vm1/disk",
        "a",
        "cache",
        "adopted",
        "and",
        "relocated",
    ]
    assert run("adopt", "/x", "--dry-run").stdout.splitlines()[1].split()[3:] == [
        "would",
        "be",
        "adopted",
        "and",
        "relocated",
    ]
    api.answers["adopt"] = [Adopted(cache, "vm1/disk", "a", problem="it is a FIFO")]
    assert answered(run("adopt", "--json", code=5)) == {
        "adopted": [
            {
                "pool": cache,
                "object": "vm1/disk",
                "state": "a",
                "digest": None,
                "relocated": False,
                "problem": "it is a FIFO",
            }
        ],
        "dry_run": False,
    }
    assert "left alone: it is a FIFO" in run("adopt", "-q", code=5).stdout


def test_verify(run: Run, api: Any, cache: str) -> None:
    whole = Checked(cache, "vm1/disk", "a", str(ONE), 1024)
    api.answers["verify"] = [whole]
    assert run("verify", "vm1/disk", "a").stdout.splitlines()[1].split() == [
        "vm1/disk",
        "a",
        "cache",
        "1.00",
        "KiB",
        "whole",
    ]
    assert run("verify", "-q").stdout == ""
    api.answers["verify"] = [
        whole,
        Checked("file:///b", "vm1/disk", "a", problem="torn", damaged=((0, 5),)),
    ]
    assert run("verify", "-q", code=5).stdout.split() == ["vm1/disk", "a", "/b", "0", "B", "torn"]
    assert answered(run("verify", "--json", code=5)) == {
        "checked": [
            {
                "pool": cache,
                "object": "vm1/disk",
                "state": "a",
                "digest": str(ONE),
                "bytes": 1024,
                "problem": None,
                "damaged": [],
                "note": None,
            },
            {
                "pool": "file:///b",
                "object": "vm1/disk",
                "state": "a",
                "digest": None,
                "bytes": 0,
                "problem": "torn",
                "damaged": [[0, 5]],
                "note": None,
            },
        ]
    }
    api.answers["verify"] = [evolve(whole, note="its list is wrong")]
    assert run("verify", "-q").stdout.endswith("  whole; its list is wrong\n")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hash(run: Run, tmp_path: Path, algorithm: str) -> None:
    content = b"pool" * (5 << 18)
    (tmp_path / "file").write_bytes(content)
    expected = str(Digest.of(content, algorithm))
    assert run("hash", "file", "--algorithm", algorithm).stdout == f"{expected}\n"
    assert answered(run("hash", "file", "--algorithm", algorithm, "--json")) == {
        "path": "file",
        "size": len(content),
        "digest": expected,
    }
    assert run("hash", "file").stdout == f"{Digest.of(content)}\n"


def test_hash_of_what_is_no_file(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("fifo", ".", "/dev/null"):
        assert f"{name} is not a regular file" in run("hash", name, code=2).stderr
    for name in ("none", "link"):
        assert f"there is no file {name}" in run("hash", name, code=3).stderr
    assert "'md5' is not one of" in run("hash", "--algorithm", "md5", "fifo", code=2).stderr


def test_hash_of_a_file_that_changes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"one")

    def hash_and_change(*arguments: Any, **options: Any) -> Digest:
        digest = hash_file(*arguments, **options)
        (tmp_path / "file").write_bytes(b"two")
        os.utime(tmp_path / "file", (1, 1))
        return digest

    monkeypatch.setattr(check_cached, "hash_file", hash_and_change)
    assert "file was changed while it was read" in run("hash", "file", code=5).stderr


def test_verify_does_not_call_whole_what_nobody_could_check(run: Run, api: Any, cache: str) -> None:
    api.answers["verify"] = [Checked(cache, "vm1/disk", "a")]
    assert (
        run("verify").stdout.splitlines()[1].endswith("  0 B  nothing is known to check it against")
    )


def test_gc(run: Run, api: Any, cache: str) -> None:
    kept = Kept(cache, ("install",), 4096, "/work.qcow2")
    api.answers["gc"] = Collection(
        [Collected(cache, "leftover of a crash", ".statepool/incoming/x", 2048)], [kept]
    )
    lines = run("gc", "--everywhere").stdout.splitlines()
    assert lines[1].split("  ") == [
        "cache",
        "leftover of a crash",
        ".statepool/incoming/x",
        "2.00 KiB",
    ]
    assert lines[2:] == [
        "removed 1 file, 2.00 KiB",
        "4.00 KiB of install stay, since the working image /work.qcow2 stands on them",
    ]
    assert answered(run("gc", "--json", "--dry-run")) == {
        "collected": [
            {
                "pool": cache,
                "what": "leftover of a crash",
                "path": ".statepool/incoming/x",
                "bytes": 2048,
                "problem": None,
                "code": 0,
            }
        ],
        "kept": [
            {
                "pool": cache,
                "states": ["install"],
                "bytes": 4096,
                "by": "/work.qcow2",
                "until": None,
            }
        ],
        "dry_run": True,
    }
    assert run("gc", "-q").stdout == ""
