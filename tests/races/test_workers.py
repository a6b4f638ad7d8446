"""
Many processes at one cache at the same moment: one does the work, the others use it; and whoever
dies holds nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import StateId
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.transports.registry import open_transport

KIB, LIMIT = 1 << 10, 120
OBJECT = "vm1/disk"

WORKER = """
import json, sys
import statepool

cache, operation, state, image, hold = json.loads(sys.argv[1])

class Hold:
    '''Stops for ever as soon as bytes move, if it is told to.'''
    def begin(self, what, total): pass
    def end(self): pass
    def advance(self, count):
        if hold:
            print("holding", flush=True)
            sys.stdin.read()

disk = statepool.StatePool(cache=cache, sources=["pool"], progress=Hold()).image("vm1/disk")
print("ready", flush=True)
sys.stdin.readline()
try:
    if operation == "get":
        outcome = disk.get(state, to=image)
        facts = {name: getattr(outcome, name) for name in ("bytes", "source", "digest")}
        print(json.dumps(facts))
    else:
        outcome = disk.set(state, source=image)
        print(json.dumps({"complete": outcome.complete, "digest": outcome.digest}))
except statepool.StatePoolError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
"""


class Worker:
    """A process that does one thing when it is told to."""

    def __init__(
        self,
        root: Path,
        operation: str,
        state: str,
        image: str | None,
        *,
        cache: str = "cache",
        hold: bool = False,
    ) -> None:
        command = [sys.executable, "-c", WORKER, json.dumps([cache, operation, state, image, hold])]
        self.process = subprocess.Popen(
            command,
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def expect(self, word: str) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"{word}\n", (
            line,
            self.process.stderr.read() if self.process.stderr and not line else "",
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def outcome(self) -> dict[str, Any]:
        out, err = self.process.communicate(timeout=LIMIT)
        assert not err, err
        answer: dict[str, Any] = json.loads(out)
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def together(stack: ExitStack, workers: Sequence[Worker]) -> list[dict[str, Any]]:
    """:returns: what they said, having begun at the same moment"""
    for worker in workers:
        stack.callback(worker.kill)
    for worker in workers:
        worker.expect("ready")
    for worker in workers:
        worker.go()
    return [worker.outcome() for worker in workers]


def qemu(*command: str | Path) -> None:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def write(image: Path, value: int, number: int) -> None:
    qemu(
        "qemu-io", "-f", "qcow2", "-c", f"write -P {value} {number * 256 * KIB} {256 * KIB}", image
    )


def require_content(image: Path, *values: int) -> None:
    reads = [
        part
        for number, value in enumerate(values)
        for part in ("-c", f"read -P {value} {number * 256 * KIB} {256 * KIB}")
    ]
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", *reads, str(image)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verification failed" not in done.stdout, done.stdout
    qemu("qemu-img", "check", "-q", "-f", "qcow2", image)


def pool_at(path: Path) -> Pool:
    return Pool(open_transport(Location("file", str(path))))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A pool with install <- customize, that a cache filled which is gone."""
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed (Debian: qemu-utils)")
    statepool.init(tmp_path / "pool")
    disk = statepool.StatePool(cache=tmp_path / "first", sources=[tmp_path / "pool"]).image(OBJECT)
    work = tmp_path / "work.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", work, "1M")
    for number, state in enumerate(("install", "customize")):
        write(work, number + 1, number)
        disk.set(state, source=work)
    work.unlink()
    return tmp_path


def sizes(root: Path) -> int:
    return sum(
        manifest.data_size
        for manifest in pool_at(root / "pool").chain(StateId(OBJECT, "customize"))
    )


def published(root: Path, cache: str = "cache") -> list[str]:
    return [
        str(change)
        for record in pool_at(root / cache).log("vm1").records()
        for change in record.changes
    ]


def require_tidy(root: Path, cache: str = "cache") -> None:
    for directory in (layout.INCOMING, layout.TRASH):
        assert not list((root / cache / directory).iterdir())
    assert not list(root.glob(".statepool-*"))
    for path in (root / cache / layout.DATA).glob("*[0-9a-f]"):
        assert Digest.of(path.read_bytes()) == Digest.from_file_name(path.name)


# -- getting ---------------------------------------------------------------------------------------


def test_sixteen_get_one_copy(root: Path, stack: ExitStack) -> None:
    outcomes = together(
        stack, [Worker(root, "get", "customize", f"work{number}.qcow2") for number in range(16)]
    )
    assert not [outcome for outcome in outcomes if "error" in outcome]
    assert sum(outcome["bytes"] for outcome in outcomes) == sizes(root), (
        "one copy was made, no more"
    )
    assert len({outcome["digest"] for outcome in outcomes}) == 1
    assert len(published(root)) == 2, "each member is there once in the log"
    for number in range(16):
        require_content(root / f"work{number}.qcow2", 1, 2)
    require_tidy(root)


def test_sixteen_want_one_place(root: Path, stack: ExitStack) -> None:
    """Nobody's working image is overwritten by another's."""
    outcomes = together(stack, [Worker(root, "get", "customize", "work.qcow2") for _ in range(16)])
    errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
    assert errors == ["FileInTheWay"] * 15
    require_content(root / "work.qcow2", 1, 2)
    require_tidy(root)


def test_others_wait_for_who_fetches(root: Path, stack: ExitStack) -> None:
    holder = Worker(root, "get", "customize", None, hold=True)
    stack.callback(holder.kill)
    holder.expect("ready")
    holder.go()
    holder.expect("holding")
    waiting = Worker(root, "get", "customize", "work.qcow2")
    stack.callback(waiting.kill)
    waiting.expect("ready")
    waiting.go()
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.process.wait(timeout=0.5)
    assert published(root) == []
    # A holder that is killed holds nothing.
    holder.kill()
    outcome = waiting.outcome()
    assert outcome["bytes"] == sizes(root)
    require_content(root / "work.qcow2", 1, 2)
    statepool.StatePool(cache=root / "cache", sources=[root / "pool"]).image(OBJECT).get(
        "customize"
    )
    require_tidy(root)


def test_holder_that_ends_leaves_its_work(root: Path, stack: ExitStack) -> None:
    holder = Worker(root, "get", "customize", None, hold=True)
    stack.callback(holder.kill)
    holder.expect("ready")
    holder.go()
    holder.expect("holding")
    waiting = [Worker(root, "get", "customize", f"work{number}.qcow2") for number in range(4)]
    for worker in waiting:
        stack.callback(worker.kill)
        worker.expect("ready")
        worker.go()
    assert holder.process.stdin is not None
    holder.process.stdin.close()  # it goes on, from now on without stopping
    holder.process.stdin = None
    out, _ = holder.process.communicate(timeout=LIMIT)
    assert json.loads(out.replace("holding\n", ""))["bytes"] == sizes(root)
    assert [worker.outcome()["bytes"] for worker in waiting] == [0] * 4
    assert len(published(root)) == 2


# -- setting ---------------------------------------------------------------------------------------


@pytest.fixture
def images(root: Path) -> list[str]:
    """Eight working images on one parent in one cache, each with other content."""
    disk = statepool.StatePool(cache=root / "cache", sources=[root / "pool"]).image(OBJECT)
    names = []
    for number in range(8):
        names.append(f"work{number}.qcow2")
        disk.get("customize", to=root / names[-1])
        write(root / names[-1], 10 + number, 2)
    return names


def test_eight_children_of_one_parent(root: Path, images: list[str], stack: ExitStack) -> None:
    outcomes = together(
        stack, [Worker(root, "set", f"child{number}", image) for number, image in enumerate(images)]
    )
    assert [outcome.get("complete") for outcome in outcomes] == [True] * 8, outcomes
    for where in ("cache", "pool"):
        fold = pool_at(root / where).fold("vm1")
        assert {state.state for state in fold.states} == {
            "install",
            "customize",
            *(f"child{number}" for number in range(8)),
        }
        assert all(
            len(fold.chain(manifest)) == 3
            for state, manifest in fold.states.items()
            if state.state.startswith("child")
        )
        require_tidy(root, where)
    for number, image in enumerate(images):
        require_content(root / image, 1, 2, 10 + number)


def test_eight_give_one_name_to_different_content(
    root: Path, images: list[str], stack: ExitStack
) -> None:
    outcomes = together(stack, [Worker(root, "set", "child", image) for image in images])
    winners = [number for number, outcome in enumerate(outcomes) if "error" not in outcome]
    assert len(winners) == 1, outcomes
    assert [outcome["error"] for outcome in outcomes if "error" in outcome] == ["Conflict"] * 7
    for where in ("cache", "pool"):
        manifest = pool_at(root / where).find(StateId(OBJECT, "child"))
        assert manifest is not None
        assert str(manifest.digest) == outcomes[winners[0]]["digest"]
        require_tidy(root, where)
    disk = statepool.StatePool(cache=root / "cache", sources=[root / "pool"]).image(OBJECT)
    for number, image in enumerate(images):
        require_content(root / image, 1, 2, 10 + number)
    # The losers' images are as they were: each can still become a state.
    loser = next(number for number in range(8) if number not in winners)
    assert disk.set("another", source=root / images[loser]).complete
    require_content(root / images[loser], 1, 2, 10 + loser)


def test_eight_give_one_name_to_the_same_content(root: Path, stack: ExitStack) -> None:
    disk = statepool.StatePool(cache=root / "cache", sources=[root / "pool"]).image(OBJECT)
    disk.get("customize", to=root / "work0.qcow2")
    write(root / "work0.qcow2", 10, 2)
    for number in range(1, 8):
        shutil.copy(root / "work0.qcow2", root / f"work{number}.qcow2")
    outcomes = together(
        stack, [Worker(root, "set", "child", f"work{number}.qcow2") for number in range(8)]
    )
    assert [outcome.get("complete") for outcome in outcomes] == [True] * 8, outcomes
    assert len([text for text in published(root) if "child" in text]) == 1
    for number in range(8):
        require_content(root / f"work{number}.qcow2", 1, 2, 10)
        # Each stands on the state, and not on what the others write to.
        write(root / f"work{number}.qcow2", 50 + number, 3)
    for number in range(8):
        require_content(root / f"work{number}.qcow2", 1, 2, 10, 50 + number)
    require_tidy(root)
