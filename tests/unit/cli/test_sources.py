"""What the command line says of sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import evolve
from click.testing import Result

from statepool.model.outcomes import (
    GetResult,
    Listing,
    Presence,
    SetResult,
    SourceStatus,
    StoredAt,
    WaitFor,
)
from statepool.model.scope import Scope

Run = Callable[..., Result]

STORE = SourceStatus(
    "store",
    "ssh://lab@store/srv/pool",
    Scope.SHARED,
    "elsewhere",
    0.0213,
    104857600.0,
    why="elsewhere, shared, speed measured",
)
NEAR = SourceStatus(
    "file:///near",
    "file:///near",
    Scope.SWARM,
    "this host",
    rest=12.5,
    failures=2,
    failed=5.0,
    problem="wrong\nbytes",
    corrupt=True,
    why=(
        "left alone for 12 s: was corrupt 2 times in a row, this host, swarm, speed not"
        " measured yet"
    ),
)


def test_sources(run: Run, api: Any) -> None:
    api.answers["sources_status"] = [STORE, NEAR]
    titles, store, near = run("sources").stdout.splitlines()
    assert titles.split() == ["NAME", "WHERE", "LATENCY", "RATE", "WHY", "NOTE"]
    assert store.split() == [
        "store",
        "ssh://lab@store/srv/pool",
        "21.3",
        "ms",
        "100",
        "MiB/s",
        *STORE.why.split(),
    ]
    assert near.split()[:2] == ["/near", "left"]
    assert near.endswith(r"corrupt at 1970-01-01 00:00:05: wrong\nbytes")


def test_sources_json(run: Run, api: Any) -> None:
    api.answers["sources_status"] = [STORE, NEAR]
    store, near = json.loads(run("sources", "--json").stdout)["sources"]
    assert (store["scope"], store["latency"], store["rate"], store["problem"]) == (
        "shared",
        0.0213,
        104857600.0,
        None,
    )
    assert (near["rest"], near["failures"], near["corrupt"], near["rate"]) == (12.5, 2, True, None)


def test_the_authority(run: Run, api: Any) -> None:
    api.answers["sources_status"] = [evolve(STORE, authority=True), evolve(NEAR, authority=True)]
    _, store, near = run("sources").stdout.splitlines()
    assert store.endswith(" authority")
    assert " authority; corrupt at " in near


def test_without_sources(run: Run, api: Any) -> None:
    api.answers["sources_status"] = []
    assert run("sources").stdout == ""
    assert json.loads(run("sources", "--json").stdout) == {"sources": []}


def test_warnings_are_told(run: Run, api: Any) -> None:
    api.answers["get"] = GetResult(
        "vm1/disk", "a", ("a",), "d", warnings=("the source x is corrupt",)
    )
    result = run("get", "vm1/disk", "a")
    assert result.stderr == "statepool: warning: the source x is corrupt\n"
    assert json.loads(run("get", "vm1/disk", "a", "--json").stdout)["got"]["warnings"] == [
        "the source x is corrupt"
    ]
    api.answers["show"] = Listing([], ["the source x could not be used"])
    for command in ("show", "tree"):
        assert run(command).stderr == "statepool: warning: the source x could not be used\n"
        result = run(command, "--json")
        assert json.loads(result.stdout)["warnings"] == ["the source x could not be used"]
        assert result.stderr == ""


def test_scope_and_everywhere_exclude_each_other(run: Run, api: Any) -> None:
    assert (
        "exclude each other"
        in run("unset", "vm1/disk", "a", "--scope", "swarm", "--everywhere", code=2).stderr
    )


def test_what_a_set_waits_for(run: Run, api: Any, tmp_path: Path) -> None:
    pools = (
        StoredAt("file:///cache", Presence.STORED),
        StoredAt("file:///store", Presence.FAILED, error="it is off"),
    )
    for wait_for, code in ((WaitFor.ALL, 7), (WaitFor.ANY, 7), (WaitFor.OWN, 0)):
        api.answers["set"] = SetResult("vm1/disk", "a", "d", pools, wait_for=wait_for)
        result = run("set", "vm1/disk", "a", "--from", "w", "--wait-for", str(wait_for), code=code)
        assert "is not in /store: it is off" in result.stderr  # told in any case
        stored = json.loads(
            run(
                "set",
                "vm1/disk",
                "a",
                "--from",
                "w",
                "--wait-for",
                str(wait_for),
                "--json",
                code=code,
            ).stdout
        )["stored"]
        assert (stored["wait_for"], stored["complete"]) == (wait_for, code == 0)
    assert (
        "--wait-for"
        in run("set", "vm1/disk", "a", "--from", "w", "--wait-for", "some", code=2).stderr
    )
