"""A tree of states that is declared beside the tests."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import Any

import pytest

import statepool

BUILDER = """
@vm_state_builder("vm1/disk", "{state}", parent={parent!r})
def build_{state}(image):
    with open("built.log", "a") as file:
        file.write("{state}\\n")
    command = ["qemu-io", "-f", "qcow2", "-c", "write -q -P {value} {offset} 64k", image]
    subprocess.run(command, check=True)
"""


def builder(state: str, parent: str | None, value: int, offset: int = 0) -> str:
    return BUILDER.format(state=state, parent=parent, value=value, offset=offset)


def asking(*states: str, body: str = "pass") -> str:
    return "".join(
        f'\n@pytest.mark.vm_state("vm1/disk", "{state}")\ndef test_{state}(vm_state):\n    {body}\n'
        for state in states
    )


def tree(grandchild: int = 5, child: int = 4) -> str:
    return (
        builder("base", "install", 3)
        + builder("left", "base", child, 65536)
        + builder("right", "base", 6, 65536)
        + builder("leaf", "left", grandchild, 131072)
        + asking("leaf", "right", "left", "base")
    )


def test_a_tree_is_built_once_and_what_changes_again(suite: Any) -> None:
    suite.write(tree())
    outcome = suite.run()
    assert suite.built() == ["base", "left", "leaf", "right"]
    assert "vm1/disk leaf: 1 x built" in outcome.out
    suite.run()
    assert len(suite.built()) == 4
    suite.write(tree(child=14))
    suite.run()
    assert suite.built()[4:] == ["left", "leaf"]
    suite.write(tree())
    suite.run()
    assert len(suite.built()) == 6


def test_all_workers_build_once(suite: Any) -> None:
    suite.write(tree())
    suite.run("-n", "4")
    assert sorted(suite.built()) == ["base", "leaf", "left", "right"]


def test_states_can_be_built_anew(suite: Any) -> None:
    suite.write(tree())
    suite.run()
    suite.run("-n", "2", "--vm-state-rebuild")
    assert sorted(suite.built()[4:]) == ["base", "leaf", "left", "right"]
    assert list((suite.root / "cache/.statepool/working").iterdir()) == []
    suite.run()
    assert len(suite.built()) == 8


def known(suite: Any) -> dict[str, tuple[str, ...]]:
    """:returns: the states of the pool, each with its chain"""
    disk = statepool.StatePool(suite.root / "look", [suite.root / "pool"]).image("vm1/disk")
    return {listed.manifest.state: disk.get(listed.manifest.state).chain for listed in disk.show()}


@pytest.mark.parametrize("arguments", [[], ["-n", "2"]])
def test_building_anew_removes_nothing(suite: Any, arguments: list[str]) -> None:
    suite.write(builder("base", "install", 3) + builder("leaf", "base", 4) + asking("leaf", "base"))
    suite.run()
    built = next(state for state in known(suite) if state.startswith("base--"))
    disk = statepool.StatePool(suite.root / "author", [suite.root / "pool"]).image("vm1/disk")
    disk.get(built, to="mine.qcow2")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -q -P 9 1M 64k", "mine.qcow2"], check=True
    )
    disk.set("my-work", source="mine.qcow2")
    before = known(suite)
    out = suite.run("--vm-state-rebuild", *arguments).out
    after = known(suite)
    assert before.items() < after.items()
    assert sorted(suite.built()) == ["base", "base", "leaf", "leaf"]
    lines = [
        line.partition(": ")[2]
        for line in out.splitlines()
        if line.startswith("superseded, and still there: ")
    ]
    assert len(lines) == 2
    assert any(line.startswith(f"vm1/disk {built}: statepool --cache ") for line in lines)
    suite.run(*arguments)
    assert len(suite.built()) == 4
    # Each line has a command that works as it is, in this order: what stands on something first.
    for line in sorted(lines, reverse=True):
        command = shlex.split(line.partition(": ")[2])
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == (4 if built in command else 0), done.stderr
    assert {"my-work", built} < known(suite).keys()


def test_what_cannot_be_built_anew_stays(suite: Any) -> None:
    suite.write(
        '@vm_state_builder("vm1/disk", "base", parent="install", key="1")\ndef build(image):\n'
        '    with open("built.log", "a") as file:\n        file.write("base\\n")\n'
        '    if Path("broken").exists():\n        raise RuntimeError("mirror is down")\n'
        + asking("base")
        + asking("base").replace("test_base", "test_more")
    )
    suite.run()
    before = known(suite)
    (suite.root / "broken").touch()
    out = suite.run("--vm-state-rebuild", code=1).out
    assert out.count("mirror is down") >= 2  # the second test does not pass on the old one
    assert known(suite) == before
    suite.run()
    assert known(suite) == before


@pytest.mark.parametrize("arguments", [[], ["-x"], ["-n", "1"], ["-n", "2", "-x"]])
def test_nothing_stays_of_building_anew(suite: Any, arguments: list[str]) -> None:
    suite.write(
        builder("base", "install", 3)
        + asking("base", body="assert 0")
        + "\ndef test_other(): pass\n"
    )
    suite.run("--vm-state-rebuild", *arguments, code=None)
    assert suite.built() == ["base"]
    assert list((suite.root / "cache/.statepool/working").iterdir()) == []


def test_tests_of_one_state_come_together(suite: Any) -> None:
    suite.write(
        "".join(
            f'\n@pytest.mark.vm_state("vm1/disk", "{state}")\ndef test_{number}(vm_state): pass\n'
            for number, state in enumerate(["install", "customize", "install", "customize"])
        )
        + "\ndef test_plain(): pass\n"
    )
    assert list(suite.run().tests) == ["test_0", "test_2", "test_1", "test_3", "test_plain"]


def test_a_cycle(suite: Any) -> None:
    suite.write(builder("one", "two", 1) + builder("two", "one", 2) + asking("one"))
    out = suite.run(code=4).out
    assert "test_suite.py::test_one" in out
    assert "circle: vm1/disk one -> vm1/disk two -> vm1/disk one" in out
    assert suite.built() == []


def test_two_builders_for_one_state(suite: Any) -> None:
    suite.write(builder("one", "install", 1) + builder("one", "install", 2) + asking("one"))
    out = suite.run(code=4).out
    assert "two builders build vm1/disk one: " in out
    assert out.count("test_suite.py:") >= 2


def test_a_parent_that_nobody_has_or_builds(suite: Any) -> None:
    suite.write(builder("one", "nothing", 1) + asking("one"))
    out = suite.run(code=1).out
    assert "test_suite.py::test_one cannot have vm1/disk one: the builder at " in out
    assert (
        "test_suite.py:7 starts from vm1/disk nothing, which no pool has and no builder makes"
        in out
    )
    assert 'declare @vm_state_builder("vm1/disk", "nothing")' in out
    assert "Traceback" not in out


HELPER = """
def give_up(image):
    raise RuntimeError("no network")

def look(image):
    assert image.stat().st_size < 0, "it is as long as before"
"""


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize(
    ("work", "shown"),
    [
        (
            "helper.give_up(image)",
            [
                "helper.py:8: in give_up",
                '    raise RuntimeError("no network")',
                "E   RuntimeError: no network",
            ],
        ),
        (
            "helper.look(image)",
            [
                "helper.py:11: in look",
                '    assert image.stat().st_size < 0, "it is as long as before"',
            ],
        ),
        (
            "assert image.name == 'other.qcow2'",
            ["E   AssertionError: assert 'disk.qcow2' == 'other.qcow2'"],
        ),
    ],
)
def test_a_builder_that_fails(suite: Any, work: str, shown: list[str], timeout: int | None) -> None:
    suite.write(HELPER, "helper.py")
    suite.write(
        'import helper\n@vm_state_builder("vm1/disk", "one", parent="install",'
        f" timeout={timeout})\ndef build(image):\n    {work}\n" + asking("one")
    )
    out = suite.run(code=1).out
    lines = out.splitlines()
    first = lines.index("test_suite.py:9: in build")
    assert "test_suite.py::test_one cannot have vm1/disk one: the builder of one--" in out
    assert lines[first + 1] == f"    {work}"
    assert [line for line in lines if line in shown] == shown
    for ours in (
        "fixtures.py",
        "provision.py",
        "ensure.py",
        "futures",
        "thread",
        "During handling",
    ):
        assert ours not in out
    assert suite.images() == []


def test_a_builder_that_leaves_no_image(suite: Any) -> None:
    suite.write(
        '@vm_state_builder("vm1/disk", "one")\ndef build(image): image.write_text("no image")\n'
        + asking("one")
    )
    out = suite.run(code=1).out
    assert "the image that it left cannot be used" in out
    assert "hidden" not in out
    assert ".py:" not in out.replace("test_suite.py::", "")


def test_what_a_builder_starts_inherits_no_passwords(
    suite: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATEPOOL_SSH_PASSWORD", "secret word")
    suite.write(
        '@vm_state_builder("vm1/disk", "one", parent="install")\ndef build(image):\n   '
        ' subprocess.run("env >environ", shell=True, check=True)\n'
        + asking("one", body='assert os.environ["STATEPOOL_SSH_PASSWORD"] == "secret word"')
    )
    suite.run()
    assert "PATH=" in (suite.root / "environ").read_text()
    assert "secret word" not in (suite.root / "environ").read_text()


def test_the_configuration_is_found_from_the_root_directory(suite: Any) -> None:
    (suite.root / "pytest.ini").write_text("[pytest]\n")
    (suite.root / "statepool.toml").write_text(
        'cache = "cache"\nsources = [{ location = "pool", name = "store" }]\n'
    )
    (suite.root / "elsewhere").mkdir()
    suite.write(asking("install"))
    words = suite.command("--rootdir", "..", "-c", "../pytest.ini", "../test_suite.py")
    done = subprocess.run(
        words,
        cwd=suite.root / "elsewhere",
        env=suite.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        f"statepool: cache {suite.root}/cache, pool store, as {suite.root}/statepool.toml says"
        in done.stdout
    )
