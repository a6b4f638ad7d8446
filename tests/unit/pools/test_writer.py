from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import astuple, evolve

from statepool.errors import BadRecord
from statepool.pools import writer as writer_module
from statepool.pools.writer import Writer, machine_of


@pytest.fixture
def here() -> Writer:
    return Writer.current()


def test_this_process_is_alive(here: Writer) -> None:
    assert here.pid == os.getpid()
    assert here.is_here
    assert not here.is_dead


def test_a_process_that_ended_is_dead(here: Writer) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from statepool.pools.writer import Writer; print(Writer.current().start); input()",
        ],
        stdin=-1,
        stdout=-1,
    )
    assert child.stdout is not None
    writer = evolve(here, pid=child.pid, start=int(child.stdout.readline()))
    assert not writer.is_dead
    child.kill()
    # A process that its parent has not asked after keeps its id, but does nothing any more.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert writer.is_dead
    child.communicate()
    assert writer.is_dead


def test_a_process_id_that_was_used_again_is_another_writer(here: Writer) -> None:
    assert evolve(here, start=here.start + 1).is_dead


def test_nobody_survives_a_boot(here: Writer) -> None:
    before = evolve(here, boot="another")
    assert before.is_here
    assert before.is_dead
    assert evolve(before, space=here.space + 1).is_dead


def test_nothing_is_known_of_other_hosts(here: Writer) -> None:
    there = evolve(here, machine="another", boot="another", pid=1 << 22)
    assert not there.is_here
    assert not there.is_dead


def test_a_host_of_the_same_name_is_another_host(here: Writer) -> None:
    there = evolve(here, machine="0" * 32, boot="another")
    assert there.host == here.host
    assert not there.is_here
    assert not there.is_dead


@pytest.mark.parametrize("boot", ["", "another"])
def test_a_host_that_was_renamed_is_the_same(here: Writer, boot: str) -> None:
    before = evolve(here, host="its-old-name", boot=boot or here.boot, start=here.start + 1)
    assert before.is_here
    assert before.is_dead


def test_who_wrote_before_machines_were_told_apart_is_known_by_name(here: Writer) -> None:
    old = {
        key: value
        for key, value in evolve(here, boot="another").to_json().items()
        if key != "machine"
    }
    assert Writer.from_json(old).is_dead
    assert not Writer.from_json({**old, "host": "another"}).is_here
    assert Writer.from_json(old).to_json() == old


def test_in_a_place_of_this_host_nobody_survives_a_boot(here: Writer) -> None:
    there = evolve(here, host="container-1", machine="another", boot="another")
    assert not there.is_dead
    assert there.has_ended_here
    assert not here.has_ended_here


def test_a_process_id_namespace_that_is_gone_has_no_writers(
    here: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = evolve(here, space=4)
    assert not gone.is_dead
    monkeypatch.setattr(writer_module, "_FIRST_SPACE", here.space)
    # Whoever may not look at all processes cannot tell.
    assert gone.has_ended_here is (os.geteuid() == 0)
    monkeypatch.setattr(writer_module, "_FIRST_SPACE", here.space + 1)
    assert not gone.has_ended_here


@pytest.mark.parametrize(
    ("files", "same"),
    [
        pytest.param(
            {"id": "", "addresses": ["a"]}, False, id="no id of the installation: the name"
        ),
        pytest.param(
            {"id": "i", "addresses": []},
            False,
            id="a container of an image with an id: the name, too",
        ),
        pytest.param({"id": "i", "addresses": ["a"]}, True, id="a host: whatever its name"),
    ],
)
def test_what_a_host_is_told_by(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, Any], same: bool
) -> None:
    monkeypatch.setattr(writer_module, "_read", lambda path: files["id"])
    monkeypatch.setattr(writer_module, "_addresses", lambda: iter(files["addresses"]))
    assert (machine_of("one") == machine_of("other")) is same


def test_clones_of_an_installation_are_two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_read", lambda path: "i")
    found = []
    for address in ("52:54:00:00:00:01", "52:54:00:00:00:02"):
        monkeypatch.setattr(writer_module, "_addresses", lambda address=address: iter([address]))
        found.append(machine_of("vm"))
    assert found[0] != found[1]


def test_nothing_is_known_of_other_containers(here: Writer) -> None:
    there = evolve(here, space=here.space + 1, pid=1 << 22)
    assert not there.is_here
    assert not there.is_dead


def test_json_round_trip(here: Writer) -> None:
    assert Writer.from_json(here.to_json()) == here


@pytest.mark.parametrize(
    "lie",
    [
        {"host": 1},
        {"boot": None},
        {"pid": "1"},
        {"pid": True},
        {"start": 1.0},
        {"space": None},
        {"machine": 1},
    ],
    ids=str,
)
def test_what_is_no_writer(here: Writer, lie: dict[str, object]) -> None:
    with pytest.raises(BadRecord):
        Writer.from_json({**here.to_json(), **lie})
    with pytest.raises(BadRecord):
        Writer.from_json([])


def test_a_child_is_another_writer(here: Writer) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(Writer.current().pid).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100) == str(child).encode()
    os.close(reading)
    os.close(writing)


def in_own_mounts(mount: list[str], script: str) -> str:
    """
    :returns: what a Python script prints after a file system was mounted where only it sees it
    """
    words = [
        "unshare",
        "-m",
        "sh",
        "-ec",
        (
            f"{shlex.join(['mount', *mount])}; exec {shlex.quote(sys.executable)} -c"
            f" {shlex.quote(script)}"
        ),
    ]
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("only root can mount, where unshare (util-linux) is installed")
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    if "mount" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_writer_that_is_hidden_is_not_dead(here: Writer) -> None:
    """``hidepid`` shows an account its own processes only: that of another one may be at work."""
    dead = evolve(here, pid=2**22 + 1)  # more than there can be
    script = f"""
import os
from statepool.pools.writer import Writer, _is_space
hidden, dead = [Writer(*fields) for fields in {[astuple(here), astuple(dead)]!r}]
Writer.current()
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
seen = os.path.exists(f"/proc/{{hidden.pid}}")
print(seen, hidden.is_dead, hidden.has_ended_here, dead.is_dead, _is_space(1))
"""
    assert (
        in_own_mounts(["-t", "proc", "-o", "hidepid=2", "proc", "/proc"], script)
        == "False False False True True"
    )


def test_a_host_without_proc(tmp_path: Path) -> None:
    """No writer could be told from a dead one: that is said, and nothing is done."""
    script = f"""
import statepool
try:
    statepool.init({str(tmp_path / "pool")!r})
except statepool.ToolError as error:
    print(error)
"""
    said = in_own_mounts(["-t", "tmpfs", "none", "/proc"], script)
    assert (
        said
        == "/proc is not mounted, by which it is known which writers are at work (mount -t proc"
        " proc /proc)"
    )
