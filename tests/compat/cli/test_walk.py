"""The whole walk of a person at a shell, from an empty directory: real processes, real images."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import statepool

MIB = 1 << 20

Run = Callable[..., Any]
Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]
Tool = Callable[..., str]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A project: one cache, and one pool as its source."""
    (tmp_path / "statepool.toml").write_text(
        'cache = "cache"\nsources = [{ location = "pool", name = "lab" }]\n'
    )
    return tmp_path


@pytest.fixture
def filled(here: Path, make_image: Make, write_to_image: Write) -> Path:
    """
    The same with a chain of two in cache and pool, and ``work.qcow2`` on its tip; made in this
    process, as the first of these walks makes it.
    """
    statepool.init(here / "pool")
    disk = statepool.StatePool(here / "cache", [here / "pool"]).image("vm1/disk")
    work = make_image(here / "work.qcow2", 8 * MIB, writes=[(0, MIB, 1)])
    disk.set("install", source=work)
    write_to_image(work, [(MIB, MIB, 2)])
    disk.set("customize", source=work, labels={"os": "debian"})
    return here


def everything(directory: Path) -> dict[str, tuple[int, int]]:
    """Every name below a directory, with inode and change time: what a refusal must not touch."""
    found = {}
    for parent, directories, files in os.walk(directory):
        for name in [*directories, *files]:
            path = os.path.join(parent, name)
            if "/locks" not in path:
                stat = os.lstat(path)
                found[path] = (stat.st_ino, stat.st_ctime_ns if name in files else 0)
    return found


def error(ran: Any) -> dict[str, Any]:
    (line,) = ran.err.splitlines()
    assert ran.out == ""
    found: dict[str, Any] = json.loads(line)["error"]
    assert found["exit_code"] == ran.code
    return found


def states(run_statepool: Run, *words: str | Path) -> dict[str, list[str]]:
    """
    The names of the states of vm1/disk, each with its pools, by the last part of their locations.
    """
    listed = run_statepool("show", "vm1/disk", "--json", *words).json["states"]
    return {
        state["state"]: [pool.rpartition("/")[2] for pool in state["pools"]] for state in listed
    }


# -- there and back


def test_from_an_empty_directory_to_a_machine_elsewhere(
    here: Path, run_statepool: Run, make_image: Make, write_to_image: Write, qemu_img: Tool
) -> None:
    assert run_statepool("init", "pool").out == f"there is a pool at {here}/pool\n"
    make_image(here / "work.qcow2", 8 * MIB, writes=[(0, MIB, 1)])
    assert run_statepool("check", "vm1/disk", "install", code=3).out == ""
    told = run_statepool("set", "vm1/disk", "install", "--from", "work.qcow2")
    assert [[*line.split()[0:3:2], line.split()[-1]] for line in told.out.splitlines()] == [
        ["vm1/disk", "stored", "cache"],
        ["vm1/disk", "stored", "lab"],
    ]
    assert told.err == ""

    write_to_image(here / "work.qcow2", [(MIB, MIB, 2)])
    run_statepool("set", "vm1/disk", "customize", "--from", "work.qcow2", "--label", "os=debian")
    assert run_statepool("check", "vm1/disk", "customize").out == ""

    shown = run_statepool("show").out.splitlines()
    assert [line.split()[:2] for line in shown] == [
        ["OBJECT", "STATE"],
        ["vm1/disk", "customize"],
        ["vm1/disk", "install"],
    ]
    assert all(line.endswith("cache lab") for line in shown[1:])
    (tip, root) = run_statepool("show", "vm1", "--json").json["states"]
    assert tip["parent"] == {"state": "install", "digest": root["digest"]}
    assert tip["labels"] == {"os": "debian"}
    assert (root["parent"], root["virtual_size"], root["managed"], root["problem"]) == (
        None,
        8 * MIB,
        True,
        None,
    )

    tree = run_statepool("tree").out.splitlines()
    assert tree[0] == "vm1/disk"
    assert tree[1].startswith("  install ")
    assert tree[2].startswith("  └── customize ")
    assert "s0 -> s1;" in run_statepool("tree", "--dot").out

    other = here / "elsewhere" / "cache"
    got = run_statepool(
        "get", "vm1/disk", "customize", "--cache", other, "--to", "copy.qcow2", "--json"
    ).json["got"]
    assert got["chain"] == ["customize", "install"]
    assert got["source"] == f"file://{here}/pool"
    assert (got["verified"], got["working"]) == ("arrived", str(here / "copy.qcow2"))
    assert got["digest"] == tip["digest"]
    assert "Images are identical" in qemu_img(
        "compare", "-f", "qcow2", "-F", "qcow2", here / "work.qcow2", here / "copy.qcow2"
    )
    qemu_img("check", "-q", "-f", "qcow2", here / "copy.qcow2")

    write_to_image(here / "copy.qcow2", [(0, 4096, 9)])
    again = run_statepool(
        "get",
        "vm1/disk",
        "customize",
        "--cache",
        other,
        "--to",
        "copy.qcow2",
        "--overwrite",
        "--json",
    ).json["got"]
    assert (again["source"], again["bytes"], again["verified"]) == (None, 0, "trusted")
    assert "Images are identical" in qemu_img(
        "compare", "-f", "qcow2", "-F", "qcow2", here / "work.qcow2", here / "copy.qcow2"
    )


def test_a_machine_goes_on_after_a_set(
    filled: Path, run_statepool: Run, write_to_image: Write, qemu_img: Tool
) -> None:
    write_to_image(filled / "work.qcow2", [(2 * MIB, MIB, 3)])
    shutil.copy(filled / "work.qcow2", filled / "before.qcow2")
    run_statepool("set", "vm1/disk", "connect", "--from", "work.qcow2")
    assert "Images are identical" in qemu_img(
        "compare", "-f", "qcow2", "-F", "qcow2", filled / "work.qcow2", filled / "before.qcow2"
    )
    depths = [
        (state["state"], state["depth"]) for state in run_statepool("tree", "--json").json["states"]
    ]
    assert depths == [("install", 0), ("customize", 1), ("connect", 2)]


def test_setting_what_is_there_changes_nothing(filled: Path, run_statepool: Run) -> None:
    stored = run_statepool("set", "vm1/disk", "customize", "--from", "work.qcow2", "--json").json[
        "stored"
    ]
    assert [at["result"] for at in stored["pools"]] == ["present", "present"]
    assert stored["complete"] is True


def test_what_happened_is_in_the_log(filled: Path, run_statepool: Run) -> None:
    records = run_statepool("log", "vm1/disk", "--json").json["records"]
    assert [(record["pool"].rpartition("/")[2], record["number"]) for record in records] == [
        ("cache", 1),
        ("cache", 2),
        ("pool", 1),
        ("pool", 2),
    ]
    assert all("customize" in record["changes"][0] for record in records[1::2])


def test_damage_is_found(filled: Path, run_statepool: Run) -> None:
    assert [item["problem"] for item in run_statepool("verify", "--json").json["checked"]] == [
        None
    ] * 4
    (victim,) = [
        path
        for path in (filled / "pool/.statepool/data").iterdir()
        if path.name.endswith(_digest(run_statepool, "install"))
    ]
    victim.chmod(0o644)
    with victim.open("r+b") as file:
        file.seek(victim.stat().st_size // 2)
        file.write(b"not what was there")
    checked = run_statepool("verify", "--json", code=5).json["checked"]
    assert [
        (item["pool"].rpartition("/")[2], item["state"]) for item in checked if item["problem"]
    ] == [("pool", "install")]
    assert "install" in run_statepool("verify", "vm1/disk", "install", "-q", code=5).out
    assert (
        error(run_statepool("get", "vm1/disk", "customize", "--cache", "new", "--json", code=5))[
            "kind"
        ]
        == "DigestMismatch"
    )
    assert run_statepool("check", "vm1/disk", "install").code == 0


def _digest(run_statepool: Run, name: str) -> str:
    (found,) = [
        state["digest"]
        for state in run_statepool("show", "--json").json["states"]
        if state["state"] == name
    ]
    return str(found).partition(":")[2]


def test_removing(filled: Path, run_statepool: Run) -> None:
    removed = run_statepool("unset", "vm1/disk", "customize", "--json").json["removed"]
    assert removed == {
        "object": "vm1/disk",
        "states": {f"file://{filled}/cache": ["customize"]},
        "errors": {},
    }
    assert states(run_statepool) == {"customize": ["pool"], "install": ["cache", "pool"]}
    run_statepool("unset", "vm1/disk", "install", "--everywhere", "--cascade")
    run_statepool("show", "vm1/disk", code=3)
    assert run_statepool("show", "--json").json["states"] == []
    (filled / "work.qcow2").unlink()
    assert run_statepool("gc", "--dry-run", "--json").json["dry_run"] is True
    run_statepool("gc", "--everywhere")
    assert list((filled / "pool/.statepool/data").iterdir()) == []


def test_a_sound_house_has_no_findings(filled: Path, run_statepool: Run) -> None:
    findings = run_statepool("doctor", "--json").json["findings"]
    assert {finding["where"] for finding in findings} >= {
        f"file://{filled}/cache",
        f"file://{filled}/pool",
    }
    assert "error" not in {finding["level"] for finding in findings}


def test_a_source_that_is_gone_is_a_finding(filled: Path, run_statepool: Run) -> None:
    shutil.rmtree(filled / "pool")
    assert "error" in {
        finding["level"] for finding in run_statepool("doctor", "--json", code=1).json["findings"]
    }


def test_files_of_another_tool_are_listed_and_adopted(
    here: Path, run_statepool: Run, make_image: Make
) -> None:
    disk = here / "pool/vm1/disk"
    make_image(disk / "install.qcow2", 4 * MIB, writes=[(0, MIB, 1)])
    make_image(
        disk / "customize.qcow2", None, backing=disk / "install.qcow2", writes=[(MIB, MIB, 2)]
    )
    listed = run_statepool("show", "--json").json["states"]
    assert [(state["state"], state["managed"]) for state in listed] == [
        ("customize", False),
        ("install", False),
    ]
    assert "unmanaged" in run_statepool("show").out
    run_statepool("get", "vm1/disk", "customize", "--to", "work.qcow2")
    run_statepool("init", "pool")
    run_statepool("adopt", "pool", "--dry-run")
    assert [
        state["managed"]
        for state in run_statepool("show", "--json", "--cache", "new").json["states"]
    ] == [False, False]
    adopted = run_statepool("adopt", "pool", "--relocate", "--json").json["adopted"]
    assert sorted((item["state"], item["problem"]) for item in adopted) == [
        ("customize", None),
        ("install", None),
    ]
    assert [
        state["managed"]
        for state in run_statepool("show", "--json", "--cache", "new").json["states"]
    ] == [True, True]


@pytest.mark.parametrize(
    "words",
    [
        ["init", "another"],
        ["get", "vm1/disk", "customize", "--to", "new.qcow2"],
        ["get", "vm1/disk", "customize", "--to", "work.qcow2", "--overwrite"],
        ["set", "vm1/disk", "new", "--from", "work.qcow2"],
        ["unset", "vm1/disk", "install", "--cascade", "--everywhere"],
        ["adopt", "pool", "--relocate"],
        ["gc", "--everywhere"],
    ],
)
@pytest.mark.parametrize("form", [["--json"], []])
def test_a_dry_run_changes_nothing(
    filled: Path, run_statepool: Run, words: list[str], form: list[str]
) -> None:
    before = everything(filled)
    run_statepool(*words, "--dry-run", *form)
    assert everything(filled) == before


# -- what is refused, and that nothing changes then


@pytest.mark.parametrize(
    ("words", "code", "kind"),
    [
        (["get", "vm1/disk", "nothing"], 3, "NotFound"),
        (["get", "vm2/disk", "install"], 3, "NotFound"),
        (["unset", "vm1/disk", "nothing"], 3, "NotFound"),
        (["verify", "vm2/disk"], 3, "NotFound"),
        (["show", "vm2"], 3, "NotFound"),
        (["show", "vm1/disc"], 3, "NotFound"),
        (["tree", "vm2"], 3, "NotFound"),
        (["log", "vm2"], 3, "NotFound"),
        (["get", "vm1/disk", "../install"], 2, "InvalidName"),
        (["get", "vm1/disk/x", "install"], 2, "InvalidName"),
        (["get", "vm1", "install"], 3, "NotFound"),
        (["get", "vm1/disk", "install.qcow2"], 2, "InvalidName"),
        (["set", "vm1/disk", "boot", "--from", "work.qcow2"], 2, "InvalidName"),
        (["set", "vm1/disk", "x" * 200, "--from", "work.qcow2"], 2, "InvalidName"),
        (["show", "vm1/\x1b[2J"], 2, "InvalidName"),
        (["check", "vm1/disk", ""], 2, "InvalidName"),
        (["init", "foo:bar"], 2, "InvalidLocation"),
        (["show", "--source", "ssh:///x"], 2, "ConfigError"),
        (["show", "--config", "missing.toml"], 2, "ConfigError"),
        (["frobnicate"], 2, "UsageError"),
        (["get", "vm1/disk", "install", "--to", "work.qcow2"], 4, "FileInTheWay"),
        (["set", "vm1/disk", "install", "--from", "other.qcow2"], 4, "Conflict"),
        (["unset", "vm1/disk", "install"], 4, "HasDependants"),
        (["unset", "vm1/disk", "install", "--everywhere"], 4, "HasDependants"),
        (["set", "vm1/disk", "new", "--from", "raw.img"], 5, "UnsafeImage"),
        (["set", "vm1/disk", "new", "--from", "pool"], 5, "UnsafeImage"),
        (["show", "--source", "empty"], 7, "NotAPool"),
        (["get", "vm1/disk", "install", "--source", "empty", "--cache", "new"], 7, "NotAPool"),
        (["adopt", "empty"], 7, "NotAPool"),
    ],
)
def test_refusals(
    filled: Path, run_statepool: Run, make_image: Make, words: list[str], code: int, kind: str
) -> None:
    make_image(filled / "other.qcow2", 4 * MIB, writes=[(0, MIB, 7)])
    (filled / "raw.img").write_bytes(bytes(MIB))
    (filled / "empty").mkdir()
    before = everything(filled)
    ran = run_statepool(*words, code=code)
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("statepool: ")
    assert line.isprintable()
    found = error(run_statepool("--json", *words, code=code))
    assert found["kind"] == kind
    assert found["message"]
    after = everything(filled)
    assert {path: after.get(path) for path in before} == before


def test_dependants_are_named(filled: Path, run_statepool: Run) -> None:
    found = error(run_statepool("unset", "vm1/disk", "install", "--json", code=4))
    assert any("customize" in name for name in found["dependants"])
    assert found["state"] == "install"


def test_replacing_is_asked_for(
    filled: Path, run_statepool: Run, make_image: Make, write_to_image: Write
) -> None:
    run_statepool("get", "vm1/disk", "install", "--to", "new.qcow2")
    write_to_image(filled / "new.qcow2", [(3 * MIB, MIB, 9)])
    before = _digest(run_statepool, "customize")
    assert (
        error(
            run_statepool("set", "vm1/disk", "customize", "--from", "new.qcow2", "--json", code=4)
        )["kind"]
        == "Conflict"
    )
    assert _digest(run_statepool, "customize") == before
    run_statepool("set", "vm1/disk", "customize", "--from", "new.qcow2", "--replace")
    assert _digest(run_statepool, "customize") != before
    make_image(filled / "root.qcow2", 4 * MIB, writes=[(0, MIB, 7)])
    run_statepool("set", "vm1/disk", "install", "--from", "root.qcow2", "--replace", code=4)


def test_a_pool_that_cannot_take_a_state_does_not_hide_those_that_can(
    filled: Path, run_statepool: Run, write_to_image: Write
) -> None:
    both = ["--source", "pool", "--source", "pool2"]
    run_statepool("init", "pool2")
    (filled / "pool/.statepool/pool.json").write_text('{"format": 99}')
    write_to_image(filled / "work.qcow2", [(0, 4096, 9)])
    ran = run_statepool("set", "vm1/disk", "connect", "--from", "work.qcow2", *both, code=7)
    assert [line.split()[-1].rpartition("/")[2] for line in ran.out.splitlines()] == [
        "cache",
        "pool2",
    ]
    (line,) = ran.err.splitlines()
    assert f"vm1/disk connect is not in {filled}/pool: " in line
    assert "format 99" in line
    stored = run_statepool(
        "set", "vm1/disk", "connect", "--from", "work.qcow2", *both, "--json", code=7
    ).json["stored"]
    assert [at["result"] for at in stored["pools"]] == ["present", "failed", "present"]
    assert stored["complete"] is False

    removed = run_statepool(
        "unset", "vm1/disk", "connect", "--everywhere", *both, "--json", code=7
    ).json["removed"]
    assert removed["states"] == {f"file://{filled}/pool2": ["connect"]}
    assert list(removed["errors"]) == [f"file://{filled}/pool"]
    assert run_statepool("check", "vm1/disk", "connect", "--source", "pool2").out == "", (
        "the cache comes last, and keeps it until the sources let go"
    )


def test_json_and_text_end_with_the_same_code(filled: Path, run_statepool: Run) -> None:
    for words, code in (
        (["check", "vm1/disk", "install"], 0),
        (["check", "vm1/disk", "nothing"], 3),
    ):
        assert run_statepool(*words, code=code).err == ""
        assert run_statepool(*words, "--json", code=code).json["present"] is (code == 0)


def test_nothing_is_drawn_for_a_pipe(filled: Path, run_statepool: Run) -> None:
    ran = run_statepool("get", "vm1/disk", "customize", "--cache", "new")
    assert ran.err == ""
    assert "\x1b" not in ran.out
