"""Whatever pytest is told to do with tests, those that start from a state go along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import statepool

SHARED = """
@pytest.fixture(scope="class")
def shared(vm_state_provisioner):
    with vm_state_provisioner.working("vm1/disk", "customize") as image:
        yield image
        assert image.path.exists()
    assert not image.path.exists()

class TestShared:
    seen = []

    def test_one(self, shared): self.seen.append(shared.path)
    def test_two(self, shared): assert self.seen == [shared.path]

@pytest.mark.parametrize("number", [
    pytest.param(1, marks=pytest.mark.vm_state("vm1/disk", "install")),
    pytest.param(2, marks=pytest.mark.vm_state("vm1/disk", "customize")),
])
def test_parameter(vm_state, number):
    assert vm_state.state == {1: "install", 2: "customize"}[number]
"""

AGAIN = """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    # As plugins do that run a test once more after it has failed.
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if any(report.failed for report in reports):
        item._initrequest()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    return True
"""


def test_without_xdist_and_with_strict_markers(suite: Any) -> None:
    suite.write(SHARED)
    outcome = suite.run("-p", "no:xdist", "--strict-markers")
    assert set(outcome.tests.values()) == {"passed"}
    assert len(outcome.tests) == 4
    assert suite.images() == []
    assert "vm1/disk customize: 1 x fetched, 1 x reused" in outcome.out


def test_groups_of_workers(suite: Any) -> None:
    # What pytest-xdist makes of groups depends on its version, and on that of pytest.
    suite.write("""
@pytest.fixture(autouse=True)
def note(request):
    yield
    groups = [mark.args[0] for mark in request.node.iter_markers("xdist_group")]
    open("groups", "a").write(f"{request.node.originalname} {groups}\\n")

@pytest.mark.vm_state("vm1/disk", "install")
@pytest.mark.parametrize("number", range(2))
def test_it(vm_state, number): pass

@pytest.mark.xdist_group("mine")
class TestMine:
    @pytest.mark.vm_state("vm1/disk", "customize")
    def test_state(self, vm_state): pass
    def test_plain(self): pass
""")
    suite.run("-n", "2", "--dist=loadgroup")
    found = (suite.root / "groups").read_text().splitlines()
    assert sorted(found) == ["test_it ['vm_state vm1/disk install']"] * 2 + [
        "test_plain ['mine']",
        "test_state ['mine']",
    ]
    assert suite.images() == []


@pytest.mark.parametrize(
    "arguments", [("-n", "2"), ("-n", "1", "--dist=no"), ("-n", "2", "--dist=loadgroup")]
)
@pytest.mark.parametrize(
    ("wrong", "state"),
    [("", ""), ('@vm_state_builder("vm1/disk", "x")\ndef other(image): pass\n', ', "x"')],
)
def test_workers_say_what_is_wrong(
    suite: Any, arguments: tuple[str, ...], wrong: str, state: str
) -> None:
    suite.write(
        '@vm_state_builder("vm1/disk", "x")\ndef one(image): pass\n'
        + wrong
        + '@pytest.mark.vm_state("vm1/disk", "install")\ndef test_good(vm_state): pass\n'
        + f'@pytest.mark.vm_state("vm1/disk"{state})\ndef test_wrong(vm_state): pass\n'
    )
    # Versions of pytest-xdist differ in whether the name of a test has that of its group behind it.
    test, _, said = (
        suite.run(code=4).out.strip().splitlines()[-1].partition(": ")[2].partition(": ")
    )
    assert test == "test_suite.py::test_wrong"
    outcome = suite.run(*arguments, code=1)
    assert test in outcome.out
    assert said in outcome.out
    assert outcome.out.count("ERROR collecting") == 1
    assert outcome.tests == {}
    assert "INTERNALERROR" not in outcome.out
    assert list(suite.run(*arguments, "-k", "good").tests.values()) == ["passed"]


def test_only_collecting_and_stopping_early(suite: Any) -> None:
    suite.write("""
@pytest.mark.vm_state("vm1/disk", "install")
@pytest.mark.parametrize("number", range(3))
def test_it(vm_state, number): assert number != 1

@pytest.mark.vm_state("vm1/../disk", "install")
def test_wrong(vm_state): pass
""")
    out = suite.run("--collect-only", "-k", "test_it").out
    assert "3/4 tests collected" in out
    assert "statepool: cache" in out
    assert not (suite.root / "cache").exists()
    outcome = suite.run("-x", "-k", "test_it", code=1)
    assert list(outcome.tests.values()) == ["passed", "failed"]
    assert suite.images() == []


def test_a_test_that_is_run_once_more(suite: Any) -> None:
    (suite.root / "conftest.py").write_text(AGAIN)
    suite.write("""
@pytest.mark.vm_state("vm1/disk", "install")
def test_it(vm_state):
    first = not os.path.exists("been-here")
    open("been-here", "a").close()
    assert not first
""")
    outcome = suite.run("--vm-state-keep=failed")
    assert outcome.tests == {"test_it": "passed"}
    (kept,) = suite.images()  # of the first time only
    assert f"kept: {kept}" in outcome.out


def test_two_pools_in_one_run(suite: Any, tmp_path: Path) -> None:
    statepool.init("second")
    other = statepool.StatePool(tmp_path / "second-author", ["pool", "second"]).image("vm1/disk")
    other.get("install", to="third.qcow2")
    other.set("third", source="third.qcow2")
    (suite.root / "zzz").mkdir()
    for name, conftest in {
        "configured": (
            'def vm_state_config():\n    return statepool.Config.load({"cache": "cache2",'
            ' "sources": ["second"]})\n'
        ),
        "made": 'def vm_state_pool():\n    return statepool.StatePool("cache3", ["second"])\n',
    }.items():
        (suite.root / name).mkdir()
        (suite.root / name / "conftest.py").write_text(
            'import pytest, statepool\n\n@pytest.fixture(scope="session")\n' + conftest
        )
        cache = {"configured": "cache2", "made": "cache3"}[name]
        suite.write(
            f'@pytest.mark.vm_state("vm1/disk", "third")\ndef test_{name}(vm_state): assert'
            f' "/{cache}/" in str(vm_state.path)\n',
            f"{name}/test_{name}.py",
        )
    suite.write(
        '@pytest.mark.vm_state("vm1/disk", "customize")\ndef test_first(vm_state): assert "/cache/"'
        " in str(vm_state.path)\n",
        "test_a.py",
    )
    suite.write(
        '@pytest.mark.vm_state("vm1/disk", "customize")\ndef test_last(vm_state): assert "/cache/"'
        " in str(vm_state.path)\n",
        "zzz/test_z.py",
    )
    outcome = suite.run("test_a.py", "configured", "made", "zzz")
    assert set(outcome.tests.values()) == {"passed"}
    assert len(outcome.tests) == 4
    for cache in ("cache", "cache2", "cache3"):
        assert list((suite.root / cache / ".statepool/working").iterdir()) == []
