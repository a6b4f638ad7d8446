"""A test has its machine running, and nothing runs after it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import statepool

SIZE = 4 << 20
MEMORY = 32 << 20

NOTES = """
import json, statepool

def note(vm, vm_state):
    with open("machines.jsonl", "a") as file:
        file.write(json.dumps([vm.pid, [str(path) for path in vm.config.images.values()]]) + "\\n")
    assert vm.is_running
    assert all(path.exists() for path in vm.config.images.values())

@pytest.fixture(scope="session")
def vm_config():
    return statepool.MachineConfig(memory=int(os.environ.get("MEMORY", 32 << 20)))
"""


def is_running(pid: int) -> bool:
    try:
        return "qemu" in Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return False


def machines(suite: Any) -> list[tuple[int, list[str]]]:
    """:returns: process ids and images of the machines that ran"""
    return [
        (pid, images)
        for pid, images in map(json.loads, (suite.root / "machines.jsonl").read_text().splitlines())
    ]


@pytest.fixture(scope="module")
def pool_with_machine(tmp_path_factory: pytest.TempPathFactory, guests_programs: None) -> Path:
    """
    With the machine ``vm2`` in a state ``off`` of its two images, and in a state ``on`` with its
    RAM.
    """
    place = tmp_path_factory.mktemp("author")
    statepool.init(place / "pool")
    vm = statepool.StatePool(place / "cache", [place / "pool"]).machine(
        "vm2", images=("data", "disk")
    )
    images = {name: place / f"{name}.qcow2" for name in ("disk", "data")}
    for path in images.values():
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(SIZE)], check=True
        )
    vm.set("off", source=images)
    config = statepool.MachineConfig(
        {name: images[name] for name in ("data", "disk")}, memory=MEMORY
    )
    with statepool.RunningMachine.start(config) as machine:
        vm.set_running("on", machine)
    return place / "pool"


@pytest.fixture
def of_machine(suite: Any, pool_with_machine: Path) -> Any:
    (suite.root / "pytest.ini").write_text(
        f"[pytest]\nvm_state_pool = {pool_with_machine}\n  pool\nvm_state_cache = cache\n"
    )
    return suite


def test_machines_run_from_their_states_and_are_stopped(of_machine: Any) -> None:
    of_machine.write(
        NOTES
        + """
@pytest.mark.vm_state("vm1/disk", "customize")
@pytest.mark.parametrize("good", [True, False])
def test_image(vm, vm_state, good):
    note(vm, vm_state)
    assert vm.config.images == {"disk": vm_state.path}
    assert good

@pytest.mark.vm_state("vm2", "off")
def test_machine(vm, vm_state):
    note(vm, vm_state)
    assert {working.object for working in vm_state} == {"vm2/disk", "vm2/data"}
    assert vm_state["vm2/disk"].path == vm_state.path / "disk.qcow2" == vm.config.images["disk"]
    assert list(vm.config.images) == ["data", "disk"]
    assert vm.execute("query-migrate") == {}

@pytest.mark.vm_state("vm2", "on")
def test_on(vm, vm_state):
    note(vm, vm_state)
    assert vm.execute("query-migrate")["status"] == "completed"

@pytest.mark.vm_state("vm2", "off")
@pytest.mark.vm_state("vm1/disk", "install")
def test_two(make_vm, vm_state):
    config = statepool.MachineConfig(memory=32 << 20)
    one, two = make_vm(vm_state["vm1/disk"]), make_vm(vm_state["vm2/data"], config=config)
    assert (list(one.config.images), list(two.config.images)) == (["disk"], ["data"])
    note(one, vm_state)
    note(two, vm_state)

@pytest.mark.vm_state("vm2", "off")
@pytest.mark.vm_state("vm1/disk", "install")
def test_which(vm): pass

def test_none(vm): pass

@pytest.mark.vm_state("vm1/disk", "install")
def test_mixed(make_vm, vm_state, make_vm_state):
    said = "one machine cannot be started on working images of vm1 and vm2"
    with pytest.raises(pytest.fail.Exception, match=said):
        make_vm(vm_state, make_vm_state("vm2/disk", "off"))
    with pytest.raises(pytest.fail.Exception, match="two working images of vm1/disk"):
        make_vm(vm_state, vm_state)
"""
    )
    outcome = of_machine.run(code=1)
    assert outcome.tests == {
        "test_image[True]": "passed",
        "test_image[False]": "failed",
        "test_machine": "passed",
        "test_on": "passed",
        "test_two": "passed",
        "test_which": "setup failed",
        "test_none": "setup failed",
        "test_mixed": "passed",
    }
    assert (
        "test_suite.py::test_which uses vm, and its markers name vm1 and vm2: start each of them by"
        " make_vm" in outcome.out
    )
    assert "test_suite.py::test_none uses vm_state without saying which" in outcome.out
    assert len(machines(of_machine)) == 6
    assert not any(is_running(pid) for pid, _ in machines(of_machine))
    assert of_machine.images() == []


def test_ram_of_another_machine_is_refused(
    of_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_machine.write(NOTES + '\n@pytest.mark.vm_state("vm2", "on")\ndef test_on(vm): pass\n')
    monkeypatch.setenv("MEMORY", str(64 << 20))
    outcome = of_machine.run(code=1)
    assert "test_suite.py::test_on cannot run a machine from vm2 on: " in outcome.out
    assert f"the RAM in bytes is {64 << 20}, not {MEMORY}" in outcome.out
    assert of_machine.images() == []


@pytest.mark.parametrize(
    ("lacking", "said"),
    [("qemu-system-x86_64", "install qemu-system-x86"), ("qemu-img", "install qemu-utils")],
)
def test_without_a_program(
    suite: Any,
    guests_programs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lacking: str,
    said: str,
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in ("qemu-img", "qemu-io", "qemu-system-x86_64", "setpriv", "sh"):
        found = shutil.which(program)
        if program != lacking and found is not None:
            (programs / program).symlink_to(found)
    monkeypatch.setenv("PATH", str(programs))
    suite.write("""
@vm_state_builder("vm1/disk", "built", parent="install")
def build(image):
    open(image, "r+b").close()

@pytest.mark.vm_state("vm1/disk", "built")
def test_it(vm): pass
""")
    out = suite.run(code=1).out
    assert "test_suite.py::test_it cannot" in out
    assert f"{lacking} is not installed" in out
    assert said in out
    assert "Traceback" not in out
    assert suite.images() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            (
                '@pytest.mark.vm_state("vm1", "x")\n@pytest.mark.vm_state("vm1/disk", "x")\ndef'
                " test_it(vm): pass\n"
            ),
            "test_suite.py::test_it: its markers name the machine vm1 and also vm1/disk",
        ),
        (
            (
                '@vm_state_builder("vm1", "x")\ndef build(image):'
                ' pass\n@pytest.mark.vm_state("vm1", "x")\ndef test_it(vm): pass\n'
            ),
            "vm1 is a machine, and builders build images",
        ),
    ],
)
def test_machines_where_images_should_be(suite: Any, text: str, message: str) -> None:
    suite.write(text)
    out = suite.run("--collect-only", code=4).out
    assert message in out
    assert "test_suite.py::test_it" in out


def test_a_machine_that_nobody_has(suite: Any) -> None:
    suite.write('@pytest.mark.vm_state("vm9", "x")\ndef test_it(vm): pass\n')
    out = suite.run(code=1).out
    assert "test_suite.py::test_it cannot have vm9 x: " in out
    assert os.listdir(suite.root / "cache/.statepool/working") == []
