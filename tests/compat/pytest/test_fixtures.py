"""A test says which state it starts from, and has it."""

from __future__ import annotations

from typing import Any

import pytest

READ = """
def content(image, offset):
    command = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -v {offset} 1", os.fspath(image)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[1], 16)
"""


def test_a_marked_test_has_a_fresh_working_image(suite: Any) -> None:
    suite.write(
        READ
        + """
@pytest.mark.vm_state("vm1/disk", "customize")
@pytest.mark.parametrize("number", range(3))
def test_it(vm_state, number):
    assert (content(vm_state, 0), content(vm_state, 65536), content(vm_state, 131072)) == (1, 2, 0)
    command = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 9 128k 64k", vm_state.path]
    subprocess.run(command, check=True)
    assert vm_state.object == "vm1/disk"
    assert (vm_state.state, vm_state.name) == ("customize", "customize")
    assert f"file={vm_state},format=qcow2" == f"file={vm_state.path},format=qcow2"
    assert repr(vm_state).startswith("Working(object='vm1/disk', state='customize'")
"""
    )
    outcome = suite.run()
    assert list(outcome.tests.values()) == ["passed"] * 3
    assert suite.images() == []
    assert "statepool: cache" in outcome.out
    assert "vm1/disk customize: 1 x fetched, 2 x reused" in outcome.out


def test_several_images(suite: Any) -> None:
    suite.write(
        READ
        + """
@pytest.mark.vm_state("vm1/disk", "install")
class TestThem:
    def test_one(self, vm_state):
        assert content(vm_state, 65536) == 0

    @pytest.mark.vm_state("vm1/disk", "customize")
    def test_nearest_marker_counts(self, vm_state):
        assert content(vm_state, 65536) == 2

    def test_more(self, make_vm_state):
        one, two = make_vm_state("vm1/disk", "install"), make_vm_state("vm1/disk", "customize")
        assert (content(one, 65536), content(two, 65536)) == (0, 2)
"""
    )
    suite.run()


def test_a_marker_for_each_image(suite: Any) -> None:
    import statepool

    pool = statepool.StatePool("author2", ["pool"])
    pool.image("vm1/disk").get("install", to="x.qcow2")
    import subprocess

    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "y.qcow2", "1M"], check=True)
    pool.image("vm2/data").set("empty", source="y.qcow2")
    suite.write("""
@pytest.mark.vm_state("vm1/disk", "install")
@pytest.mark.vm_state("vm2/data", "empty")
def test_both(vm_state):
    assert {working.object for working in vm_state} == {"vm1/disk", "vm2/data"}
    assert vm_state["vm1/disk"].path != vm_state["vm2/data"].path
    assert vm_state["vm2/data"].path.exists()
""")
    suite.run()


@pytest.mark.parametrize(("keep", "kept"), [("never", 0), ("failed", 1), ("always", 2)])
def test_images_are_kept_if_asked(suite: Any, keep: str, kept: int) -> None:
    suite.write("""
@pytest.mark.vm_state("vm1/disk", "install")
@pytest.mark.parametrize("good", [True, False])
def test_it(vm_state, good):
    assert good
""")
    outcome = suite.run(f"--vm-state-keep={keep}", code=1)
    assert len(suite.images()) == kept
    assert all(f"kept: {path}" in outcome.out for path in suite.images())
    # The next run leaves alone what was kept.
    suite.run("-k", "True")
    assert len(suite.images()) == kept


FAILING_LATE = """
@pytest.fixture(scope="{scope}", autouse={autouse})
def late({arguments}):
    yield
    {raising}

@pytest.mark.vm_state("vm1/disk", "install")
def test_before(vm_state): pass

@pytest.mark.vm_state("vm1/disk", "install")
def test_it(vm_state, late): pass
"""


@pytest.mark.parametrize(
    ("scope", "autouse", "arguments", "kept"),
    [
        ("function", False, "vm_state", 1),
        ("function", True, "", 2),
        ("module", True, "", 1),
        ("session", True, "vm_state_pool", 1),
    ],
)
@pytest.mark.parametrize("raising", ["raise ValueError", "pytest.fail('here')"])
def test_images_are_kept_if_a_teardown_fails(
    suite: Any, scope: str, autouse: bool, arguments: str, kept: int, raising: str
) -> None:
    """Before and after that of the image itself, and at the end of the run."""
    suite.write(
        FAILING_LATE.format(scope=scope, autouse=autouse, arguments=arguments, raising=raising)
    )
    outcome = suite.run("--vm-state-keep=failed", code=1)
    assert outcome.tests["test_it"] == "teardown failed"
    assert len(suite.images()) == kept
    assert all(f"kept: {path}" in outcome.out for path in suite.images())
    assert suite.run("--vm-state-keep=failed", "-n", "1", code=1).out.count("kept: ") == kept
    assert len(suite.images()) == 2 * kept


def test_images_are_not_kept_if_teardowns_do_not_fail(suite: Any) -> None:
    for raising in ("pass", "pytest.skip('never mind')", "raise KeyboardInterrupt"):
        suite.write(
            FAILING_LATE.format(scope="function", autouse=True, arguments="", raising=raising)
        )
        outcome = suite.run("--vm-state-keep=failed", code=None)
        assert "test_before" in outcome.tests
        assert "kept: " not in outcome.out
        assert list((suite.root / "cache/.statepool/working").iterdir()) == []


def test_a_cache_that_goes_with_its_fixture(suite: Any) -> None:
    suite.write("""
import statepool, tempfile

@pytest.fixture(scope="session")
def vm_state_pool():
    with tempfile.TemporaryDirectory() as cache:
        yield statepool.StatePool(cache, ["pool"])

@pytest.mark.vm_state("vm1/disk", "install")
def test_it(vm_state): pass
""")
    suite.run("--vm-state-keep=failed")


def test_the_pool_and_its_configuration_can_be_overridden(suite: Any) -> None:
    (suite.root / "pytest.ini").write_text("[pytest]\n")
    suite.write("""
import statepool

@pytest.fixture(scope="session")
def vm_state_pool():
    return statepool.StatePool("elsewhere", ["pool"])

@pytest.mark.vm_state("vm1/disk", "install")
def test_it(vm_state):
    assert "elsewhere" in str(vm_state.path)
""")
    suite.run()
    (suite.root / "statepool.toml").write_text('cache = "third"\nsources = ["pool"]\n')
    suite.write(
        '@pytest.mark.vm_state("vm1/disk", "install")\ndef test_it(vm_state):\n    assert "third"'
        " in str(vm_state.path)\n"
    )
    assert "third" in suite.run().out


def test_options_count_more_than_the_ini_file(suite: Any) -> None:
    suite.write(
        '@pytest.mark.vm_state("vm1/disk", "install")\ndef test_it(vm_state):\n    assert "other"'
        " in str(vm_state.path)\n"
    )
    suite.run("--vm-state-cache=other", "--vm-state-pool=pool")


def test_offline_is_content_with_the_cache(suite: Any) -> None:
    suite.write('@pytest.mark.vm_state("vm1/disk", "install")\ndef test_it(vm_state): pass\n')
    assert "--vm-state-offline" not in suite.run("--vm-state-offline", code=1).out
    suite.run()
    (suite.root / "pool").rename(suite.root / "gone")
    assert "offline" in suite.run("--vm-state-offline").out


@pytest.mark.parametrize(
    ("missing", "outcome", "code"), [("fail", "setup failed", 1), ("skip", "setup skipped", 0)]
)
def test_a_state_that_cannot_be_had(suite: Any, missing: str, outcome: str, code: int) -> None:
    suite.write('@pytest.mark.vm_state("vm1/disk", "nothing")\ndef test_it(vm_state): pass\n')
    run = suite.run("-rs", f"--vm-state-missing={missing}", code=code)
    assert run.tests == {"test_it": outcome}
    (line,) = {
        line
        for line in run.out.splitlines()
        if "test_suite.py::test_it cannot have vm1/disk nothing" in line
        and "statepool show" in line
    }
    assert line
    assert "Traceback" not in run.out


@pytest.mark.parametrize(
    ("missing", "outcome", "code"), [("fail", "setup failed", 1), ("skip", "setup skipped", 0)]
)
def test_a_pool_that_cannot_be_reached(suite: Any, missing: str, outcome: str, code: int) -> None:
    suite.write('@pytest.mark.vm_state("vm1/disk", "install")\ndef test_it(vm_state): pass\n')
    (suite.root / "pool").rename(suite.root / "gone")
    run = suite.run("-rs", f"--vm-state-missing={missing}", code=code)
    assert run.tests == {"test_it": outcome}
    assert "is not a pool" in run.out
    assert "statepool init" in run.out


def test_what_is_wrong_is_not_skipped(suite: Any) -> None:
    """
    A name that no state can have, and a builder that fails, are mistakes here, wherever the pools
    are.
    """
    suite.write("""
from pytest_statepool import vm_state_builder

@vm_state_builder("vm1/disk", "broken", parent="install")
def broken(image): raise ValueError("boom")

def test_name(make_vm_state): make_vm_state("vm1/disk", "in stall")

@pytest.mark.vm_state("vm1/disk", "broken")
def test_builder(vm_state): pass
""")
    run = suite.run("--vm-state-missing=skip", code=1)
    assert run.tests == {"test_name": "failed", "test_builder": "setup failed"}
    assert "'in stall' is not a valid name for a state" in run.out


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ('"vm1/disk"', "takes an object and a state"),
        ('"vm1/disk", 7', "takes an object and a state"),
        ('"vm1/disk", states="x"', "takes an object and a state, not 'vm1/disk', states='x'"),
        ('"vm1/disk", object="vm1/disk", state="x"', "takes an object and a state"),
        ('"vm1/disk", "x", "y"', "takes an object and a state"),
        ('"vm1/../disk", "x"', "cannot be used"),
        ('"vm1/disk", "in stall"', "cannot be used: 'in stall' is not a valid name for a state"),
        ('"vm1/disk", "boot"', "cannot be used: 'boot' is reserved"),
    ],
)
def test_a_marker_that_cannot_be_understood(suite: Any, marker: str, message: str) -> None:
    suite.write(f"@pytest.mark.vm_state({marker})\ndef test_it(vm_state): pass\n")
    out = suite.run(code=4).out
    assert "test_suite.py::test_it: the marker vm_state" in out
    assert message in out


@pytest.mark.parametrize(
    "marker", ['object="vm1/disk", state="customize"', '"vm1/disk", state="customize"']
)
def test_a_marker_with_names(suite: Any, marker: str) -> None:
    suite.write(
        f"@pytest.mark.vm_state({marker})\ndef test_it(vm_state): assert (vm_state.object,"
        ' vm_state.state) == ("vm1/disk", "customize")\n'
    )
    suite.run()


def test_the_fixture_without_a_marker(suite: Any) -> None:
    suite.write("def test_it(vm_state): pass\n")
    assert "add @pytest.mark.vm_state" in suite.run(code=1).out


def test_a_marker_without_the_fixture(suite: Any) -> None:
    suite.write("""
@pytest.fixture
def disk(request):
    return request.getfixturevalue("vm_state")

@pytest.mark.vm_state("vm1/disk", "nothing-of-the-kind")
def test_without(): pass

IN = pytest.mark.vm_state("vm1/disk", "install")

@pytest.mark.parametrize("release", [pytest.param(12, marks=IN)])
def test_parameter(release): pass

@pytest.mark.vm_state("vm1/disk", "install")
@pytest.mark.usefixtures("vm_state")
def test_used(): pass

@pytest.mark.vm_state("vm1/disk", "install")
def test_by_another_fixture(disk): assert disk.path.exists()

@pytest.mark.vm_state("vm1/disk", "install")
def test_as_it_runs(request): assert request.getfixturevalue("vm_state").path.exists()

@pytest.mark.vm_state("vm1/disk", "install")
@pytest.mark.skip
def test_skipped(): pass

@pytest.mark.vm_state("vm1/disk", "install")
class TestThem:
    def test_without_a_need(self): pass
""")
    run = suite.run(code=1)
    assert {name for name, outcome in run.tests.items() if outcome == "setup failed"} == {
        "test_without",
        "test_parameter[12]",
    }
    assert {name for name, outcome in run.tests.items() if outcome == "passed"} == {
        "test_used",
        "test_by_another_fixture",
        "test_as_it_runs",
        "TestThem::test_without_a_need",
    }
    assert (
        "test_suite.py::test_without has the marker vm_state, but does not use the state: add the"
        " fixture vm_state, or vm, to its arguments" in run.out
    )


def test_nothing_is_imported_before_a_state_is_asked_for(suite: Any) -> None:
    suite.write("""
import sys

def test_it():
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert "pytest_statepool" in loaded
    assert not loaded & {"statepool", "attr", "blake3", "paramiko", "qemu"}
""")
    # xdist imports attrs by itself.
    suite.run("-p", "no:xdist")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("vm_state_keep = sometimes", ("vm_state_keep", "'sometimes'", "never, failed, always")),
        ("vm_state_missing = bogus", ("vm_state_missing", "'bogus'", "fail, skip")),
        ("vm_state_offline = maybe", ("vm_state_offline", "'maybe'", "true or false")),
    ],
)
def test_an_ini_value_that_does_not_exist(suite: Any, said: str, words: tuple[str, ...]) -> None:
    suite.write("def test_plain(): pass\n")
    ini = suite.root / "pytest.ini"
    before = ini.read_text()
    ini.write_text(before + said + "\n")
    for arguments in ([], ["-n", "1"]):
        (line,) = suite.run(*arguments, code=4).out.strip().splitlines()
        assert line.startswith(f"ERROR: {ini}: ")
        assert all(word in line for word in words)
    ini.write_text(before)
    assert (
        "ERROR: --override-ini: " + words[0] in suite.run("-o", said.replace(" ", ""), code=4).out
    )


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ('cache = ""', "cache"),
        ("fresh = 'soon'", "fresh"),
        ('sources = ["cache"]', "is the cache itself"),
    ],
)
def test_a_configuration_that_cannot_be_used(suite: Any, key: str, said: str) -> None:
    (suite.root / "statepool.toml").write_text(key + "\n")
    suite.write('@pytest.mark.vm_state("vm1/disk", "install")\ndef test_it(vm_state): pass\n')
    (suite.root / "pytest.ini").write_text(
        "[pytest]\nvm_state_cache = cache\n" if "sources" in key else "[pytest]\n"
    )
    out = suite.run(code=1).out
    assert "there is no state pool: " in out
    assert said in out
    assert "Traceback" not in out
    assert "fixtures.py" not in out
    assert "During handling" not in out
    assert out.count(said) <= 2  # with the summary's line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--vm-state-cache=cache", "--vm-state-pool="],
            "the command line: --vm-state-pool: not a location: ''",
        ),
        (
            ["--vm-state-cache=cache", "--vm-state-pool=p", "--vm-state-pool=p"],
            "the command line: --vm-state-pool: two sources are named",
        ),
        (["--vm-state-cache="], "the command line: --vm-state-cache: not a location: ''"),
        ([], "/pytest.ini: vm_state_cache: "),
        (["-o", "vm_state_cache=ssh://h/p"], "--override-ini: vm_state_cache: "),
    ],
)
def test_an_option_that_cannot_be_used(suite: Any, arguments: list[str], said: str) -> None:
    (suite.root / "pytest.ini").write_text(
        "[pytest]\nvm_state_pool = pool\nvm_state_cache = ssh://host/cache\n"
    )
    suite.write('@pytest.mark.vm_state("vm1/disk", "install")\ndef test_it(vm_state): pass\n')
    out = suite.run(*arguments, code=1).out
    (line,) = [line for line in out.splitlines() if line.startswith("there is no state pool: ")]
    assert said in line
    assert "During handling" not in out
