"""
States that are built when nobody has them: by workers of two caches and one pool, which die, fail
and hang.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.cli.ensure import fingerprint
from statepool.ensure import Recipe, key_of
from statepool.model.keys import name_of, parse_name
from tests.support.privileges import permissions_count

Make = Callable[..., Path]

WORKER = """
import os, sys, time
from pathlib import Path
import statepool

cache, pool, log, seconds = sys.argv[1:]

def build(image):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(seconds))
    os.system(f"qemu-io -f qcow2 -c 'write -P 7 0 64k' {image} >{os.devnull}")

print("ready", flush=True)
sys.stdin.readline()
disk = statepool.StatePool(cache, [pool]).image("vm1/disk")
ensured = disk.ensure("connect", build, parent="install", key="1")
print(ensured.name, ensured.built, ensured.got.digest, flush=True)
"""


@pytest.fixture
def root(tmp_path: Path, make_image: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool that has ``vm1/disk install``, and a cache."""
    monkeypatch.chdir(tmp_path)
    statepool.init("pool")
    make_image(Path("base.qcow2"), 4 << 20, writes=[(0, 65536, 1)])
    disk(tmp_path).set("install", source="base.qcow2")
    return tmp_path


def disk(root: Path, cache: str = "cache") -> statepool.ImageHandle:
    return statepool.StatePool(root / cache, [root / "pool"]).image("vm1/disk")


def write(value: int, image: Path) -> None:
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", f"write -P {value} 0 64k", str(image)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def states(root: Path) -> set[str]:
    return {listed.manifest.state for listed in disk(root).show()}


def nothing_is_left(root: Path) -> bool:
    left = [
        path
        for name in ("cache", "pool")
        for path in (root / name / ".statepool/incoming").iterdir()
    ]
    return not left and not list((root / "cache/.statepool/working").iterdir())


# -- keys ------------------------------------------------------------------------------------------


def test_a_state_is_built_once_and_then_used(root: Path) -> None:
    first = disk(root).ensure("connect", partial(write, 7), parent="install")
    assert first.built
    assert first.stored is not None
    assert first.stored.complete
    assert parse_name(first.name) is not None
    again = disk(root).ensure("connect", partial(write, 7), parent="install")
    elsewhere = disk(root, "other").ensure("connect", partial(write, 7), parent="install")
    assert (again.built, elsewhere.built) == (False, False)
    assert again.got.digest == elsewhere.got.digest == first.got.digest
    assert first.got.chain == (first.name, "install")
    assert nothing_is_left(root)


def test_another_builder_is_another_state_and_the_old_one_stays(root: Path) -> None:
    one = disk(root).ensure("connect", partial(write, 7), parent="install")
    two = disk(root).ensure("connect", partial(write, 8), parent="install")
    assert two.built
    assert {one.name, two.name} < states(root)


def test_another_parent_is_another_state(root: Path, make_image: Make) -> None:
    disk(root).set(
        "install2", source=make_image(root / "other.qcow2", 4 << 20, writes=[(0, 65536, 2)])
    )
    one = disk(root).ensure("connect", partial(write, 7), parent="install")
    two = disk(root).ensure("connect", partial(write, 7), parent="install2")
    assert one.name != two.name


def test_a_tree_of_built_states(root: Path) -> None:
    child = disk(root).ensure("connect", partial(write, 7), parent="install")
    grandchild = disk(root).ensure("login", partial(write, 8), parent=child.name)
    assert grandchild.got.chain == (grandchild.name, child.name, "install")


def test_a_state_without_a_parent(root: Path, make_image: Make) -> None:
    ensured = disk(root).ensure("bare", make_image)
    assert ensured.got.chain == (ensured.name,)


def test_what_a_key_is_made_of() -> None:
    keys = {
        key_of(Recipe(print, key=key, parameters=parameters), ())
        for key, parameters in [
            ("1", {}),
            ("2", {}),
            ("1", {"memory": 1}),
            ("1", {"memory": "1"}),
            ("1", {"memory": 1, "cpus": [1, 2]}),
        ]
    }
    assert len(keys) == 5
    assert key_of(Recipe(print, key="1", parameters={"a": 1, "b": 2}), ()) == key_of(
        Recipe(write, key="1", parameters={"b": 2, "a": 1}), ()
    )  # type: ignore[arg-type]


def test_a_builder_without_a_source_needs_a_key(root: Path) -> None:
    with pytest.raises(statepool.UsageError, match="key="):
        disk(root).ensure("connect", print, parent="install")
    assert disk(root).ensure("connect", print, parent="install", key="nothing happens").built


def test_parameters_that_cannot_be_told_apart(root: Path) -> None:
    with pytest.raises(statepool.UsageError, match="parameters"):
        disk(root).ensure(
            "connect", print, parent="install", key="1", parameters={"what": object()}
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("connect--0123456789ab", ("connect", "0123456789ab")),
        ("a--b", None),
        ("--0123456789ab", None),
    ],
)
def test_names_of_built_states(name: str, expected: tuple[str, str] | None) -> None:
    assert parse_name(name) == expected
    if expected is not None:
        assert name_of(*expected) == name


# -- built anew ------------------------------------------------------------------------------------


def test_a_state_that_is_built_anew_is_used_from_then_on_and_nothing_is_removed(root: Path) -> None:
    first = disk(root).ensure("connect", partial(write, 7), parent="install", key="1")
    disk(root).get(first.name, to=root / "mine.qcow2")
    write(9, root / "mine.qcow2")
    disk(root).set("my-work", source=root / "mine.qcow2")
    second = disk(root).ensure(
        "connect", partial(write, 8), parent="install", key="1", again="run 1"
    )
    assert second.built
    assert second.name != first.name
    assert second.superseded == (first.name,)
    assert states(root) == {"install", first.name, "my-work", second.name}
    assert disk(root, "third").get("my-work").chain == ("my-work", first.name, "install")
    for cache in ("cache", "other"):
        found = disk(root, cache).ensure("connect", fail, parent="install", key="1")
        assert (found.name, found.built, found.superseded) == (second.name, False, ())
        assert (
            disk(root, cache).ensure("connect", fail, parent="install", key="1", again="run 1").name
            == second.name
        )
    third = disk(root).ensure(
        "connect", partial(write, 8), parent="install", key="1", again="run 2"
    )
    assert set(third.superseded) == {first.name, second.name}
    assert disk(root).ensure("connect", fail, parent="install", key="1").name == third.name


def test_what_could_not_be_built_anew_is_still_there_and_the_next_tries_again(root: Path) -> None:
    first = disk(root).ensure("connect", partial(write, 7), parent="install", key="1")
    with pytest.raises(statepool.BuildFailed):
        disk(root).ensure("connect", fail, parent="install", key="1", again="run")
    assert (
        disk(root).ensure("connect", fail, parent="install", key="1").got.digest == first.got.digest
    )
    assert (
        disk(root)
        .ensure("connect", partial(write, 8), parent="install", key="1", again="run")
        .built
    )


def test_another_host_sees_what_was_built_anew_when_it_asks_again(root: Path) -> None:
    settings = statepool.Settings(fresh=0)
    first = disk(root).ensure("connect", partial(write, 7), parent="install", key="1")
    other = statepool.StatePool(root / "other", [root / "pool"], settings=settings).image(
        "vm1/disk"
    )
    assert other.ensure("connect", fail, parent="install", key="1").name == first.name
    second = disk(root).ensure("connect", partial(write, 8), parent="install", key="1", again="run")
    assert other.ensure("connect", fail, parent="install", key="1").name == second.name


def test_without_what_was_built_anew_the_old_one_is_used(root: Path) -> None:
    first = disk(root).ensure("connect", partial(write, 7), parent="install", key="1")
    second = disk(root).ensure("connect", partial(write, 8), parent="install", key="1", again="run")
    disk(root).unset(second.name, scope="all")
    assert disk(root).ensure("connect", fail, parent="install", key="1").name == first.name
    disk(root).unset(first.name, scope="all")
    assert (
        disk(root).ensure("connect", partial(write, 7), parent="install", key="1").name
        == first.name
    )


def test_old_ones_go_with_old_keys(root: Path) -> None:
    first = disk(root).ensure("connect", partial(write, 7), parent="install", key="1")
    second = disk(root).ensure("connect", partial(write, 8), parent="install", key="1", again="run")
    statepool.StatePool(root / "cache", [root / "pool"]).gc(keep_keys=1, everywhere=True)
    assert states(root) == {"install", second.name}
    assert first.name not in {listed.manifest.state for listed in disk(root, "none").show()}
    assert disk(root).ensure("connect", fail, parent="install", key="1").name == second.name


def test_offline_what_the_cache_has_is_built_anew(root: Path) -> None:
    first = disk(root).ensure("connect", partial(write, 7), parent="install", key="1")
    (root / "pool").rename(root / "away")
    offline = statepool.StatePool(
        root / "cache", [root / "pool"], settings=statepool.Settings(offline=True)
    ).image("vm1/disk")
    second = offline.ensure("connect", partial(write, 8), parent="install", key="1", again="run")
    assert second.superseded == (first.name,)
    assert offline.ensure("connect", fail, parent="install", key="1").name == second.name


def test_a_command_that_builds_anew_says_what_stays(root: Path, run_statepool: Any) -> None:
    common = (
        "--cache",
        "cache",
        "--source",
        "pool",
        "ensure",
        "vm1/disk",
        "connect",
        "--parent",
        "install",
    )
    words = (
        "--",
        "sh",
        "-c",
        'qemu-io -f qcow2 -c "write -P $(date +%N | cut -c1-2 | sed s/^0//) 0 64k" "$0"',
        "{image}",
    )
    old = run_statepool(*common, *words).out.strip()
    done = run_statepool(*common, "--rebuild", *words)
    new = done.out.strip()
    assert new != old
    command = f"statepool --cache cache --source pool unset vm1/disk {old} --everywhere"
    assert f"vm1/disk {old} is still there; to remove it: {command}" in done.err
    assert run_statepool(*common, *words).out.strip() == new
    assert set(
        run_statepool(*common, "--rebuild", "--json", *words).json["ensured"]["superseded"]
    ) == {old, new}
    run_statepool(*command.split()[1:])
    assert old not in states(root)


# -- many workers ----------------------------------------------------------------------------------


def start(root: Path, number: int, seconds: float = 0.5) -> list[subprocess.Popen[str]]:
    workers = []
    for index in range(number):
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(WORKER),
            f"cache{index % 2}",
            "pool",
            "built.log",
            str(seconds),
        ]
        workers.append(
            subprocess.Popen(
                command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        )
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    return workers


def release(workers: list[subprocess.Popen[str]]) -> None:
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.close()


def answers(workers: list[subprocess.Popen[str]]) -> list[list[str]]:
    found = []
    for worker in workers:
        assert worker.stdout is not None
        with worker.stdout:
            found.append(worker.stdout.read().split())
        assert worker.wait() == 0
    return found


def test_sixteen_workers_of_two_caches_build_once(root: Path) -> None:
    workers = start(root, 16)
    release(workers)
    found = answers(workers)
    assert len((root / "built.log").read_text().split()) == 1
    assert [built for _, built, _ in found].count("True") == 1
    assert len({(name, digest) for name, _, digest in found}) == 1


def test_a_worker_that_is_killed_while_it_builds_is_followed_by_one_other(root: Path) -> None:
    first = start(root, 1, seconds=60)
    release(first)
    wait_for((root / "built.log").exists)
    others = start(root, 3)
    release(others)
    first[0].send_signal(signal.SIGKILL)
    first[0].wait()
    assert first[0].stdout is not None
    first[0].stdout.close()
    found = answers(others)
    assert len((root / "built.log").read_text().split()) == 2
    assert [built for _, built, _ in found].count("True") == 1


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


# -- builders that do harm -------------------------------------------------------------------------


def corrupt(image: Path) -> None:
    write(7, image)
    with open(image, "r+b") as file:
        file.seek(64 << 10)
        file.write(b"\xff" * 65536)  # the table of its reference counts, or of its clusters


def cut(image: Path) -> None:
    os.truncate(image, 100)


def stand_on_another(image: Path) -> None:
    subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", str(image)], check=True)


def fail(image: Path) -> None:
    raise RuntimeError("no network")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (fail, "RuntimeError: no network"),
        (corrupt, "corrupt|cannot be used"),
        (cut, "cannot be used"),
        (os.unlink, "left no image"),
        (stand_on_another, "another one than its parent"),
    ],
)
def test_a_builder_that_fails_leaves_nothing_and_lets_the_next_try(
    root: Path, build: Callable[[Path], Any], message: str
) -> None:
    before = states(root)
    with pytest.raises(statepool.BuildFailed, match=message) as caught:
        disk(root).ensure("connect", build, parent="install", key="1")
    assert caught.value.object == "vm1/disk"
    assert states(root) == before
    assert nothing_is_left(root)
    assert disk(root).ensure("connect", partial(write, 7), parent="install", key="1").built


def test_a_builder_that_never_ends(root: Path) -> None:
    never = threading.Event()
    with pytest.raises(
        statepool.BuildFailed,
        match=r"^the builder of connect--\w+ of vm1/disk failed: it did not end within 0\.2 s \(",
    ):
        disk(root).ensure(
            "connect", lambda image: never.wait(), parent="install", key="1", timeout=0.2
        )
    never.set()
    assert nothing_is_left(root)
    assert (
        disk(root).ensure("connect", partial(write, 7), parent="install", key="1", timeout=60).built
    )


@pytest.mark.parametrize("timeout", [0, -5, float("nan"), float("inf"), 1e300, "1"])
def test_a_time_that_nobody_can_wait_for(root: Path, timeout: Any) -> None:
    with pytest.raises(statepool.UsageError, match="as its time"):
        disk(root).ensure("connect", partial(write, 7), parent="install", timeout=timeout)
    assert states(root) == {"install"}


def test_a_parent_that_is_not_there(root: Path) -> None:
    name = disk(root).ensure("connect", partial(write, 7), parent="install").name
    with pytest.raises(statepool.NotFound, match="to start from"):
        disk(root).ensure("login", fail, parent="nothing", key="1")
    with pytest.raises(statepool.NotFound) as caught:
        disk(root).ensure("login", fail, parent="connect", key="1")
    assert name in str(caught.value.hint)


# -- at a shell ------------------------------------------------------------------------------------


def test_a_command_that_builds(root: Path, run_statepool: Any) -> None:
    common = (
        "--cache",
        "cache",
        "--source",
        "pool",
        "ensure",
        "vm1/disk",
        "connect",
        "--parent",
        "install",
    )
    script = root / "build.sh"
    script.write_text('#!/bin/sh\necho building\nqemu-io -f qcow2 -c "write -P 7 0 64k" "$1"\n')
    script.chmod(0o755)
    first = run_statepool(*common, "--", script, "{image}")
    assert "building" in first.err
    assert run_statepool(*common, "--", script, "{image}").out == first.out
    script.write_text(script.read_text() + "# changed\n")
    second = run_statepool(*common, "--json", "--", script, "{image}").json["ensured"]
    assert (second["state"], second["built"]) == ("connect", True)
    assert second["name"] != first.out.strip()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("false", "{image}"), 1, "exit code 1"),
        (("no-such-program", "{image}"), 1, "failed: cannot run no-such-program"),
        (("true",), 2, "must have {image}"),
        (("sh", "-c", "sleep 100; : {image}"), 1, "was stopped"),
        (("sh", "-c", "kill -9 $$; : {image}"), 1, "signal 9"),
    ],
)
def test_a_command_that_fails(
    root: Path, run_statepool: Any, words: tuple[str, ...], code: int, message: str
) -> None:
    common = (
        "--cache",
        "cache",
        "--source",
        "pool",
        "ensure",
        "vm1/disk",
        "connect",
        "--parent",
        "install",
        "--timeout",
        "0.5",
    )
    assert message in run_statepool(*common, "--", *words, code=code).err
    assert states(root) == {"install"}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_command_does_not_outlive_us(root: Path, how: signal.Signals) -> None:
    (root / "build.sh").write_text(
        "sleep 60 & echo $! >>pids; sleep 60 & echo $! >>pids; echo $$ >>pids; wait"
    )
    common = (
        "--cache",
        "cache",
        "--source",
        "pool",
        "ensure",
        "vm1/disk",
        "connect",
        "--parent",
        "install",
    )
    with subprocess.Popen(
        [sys.executable, "-m", "statepool", *common, "--", "sh", "build.sh", "{image}"],
        stderr=subprocess.PIPE,
    ) as process:
        wait_for(
            lambda: (root / "pids").exists() and len((root / "pids").read_text().splitlines()) == 3
        )
        pids = [int(line) for line in (root / "pids").read_text().split()]
        process.send_signal(how)
        assert process.wait(timeout=60) == -how
        # Nobody is left who could write there.
        assert process.stderr is not None
        assert process.stderr.read() == b""
    if how is signal.SIGKILL:
        wait_for(lambda: not any(map(is_alive, pids)))
    else:
        assert not any(map(is_alive, pids))
        assert nothing_is_left(root)
    (root / "build.sh").write_text("true")
    assert disk(root).ensure("connect", partial(write, 7), parent="install", key="1").built


def test_a_signal_that_is_ignored_still_is(root: Path) -> None:
    """As by nohup, or where a shell runs something in the background."""
    command = 'trap "" HUP; exec "$@"'
    common = (
        "--cache",
        "cache",
        "--source",
        "pool",
        "ensure",
        "vm1/disk",
        "connect",
        "--parent",
        "install",
    )
    words = [
        "sh",
        "-c",
        command,
        "sh",
        sys.executable,
        "-m",
        "statepool",
        *common,
        "--",
        "sh",
        "-c",
        ": >begun; sleep 0.5",
        "x",
        "{image}",
    ]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        wait_for((root / "begun").exists)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 0


def test_what_a_command_leaves_behind_is_ended(root: Path, run_statepool: Any) -> None:
    common = (
        "--cache",
        "cache",
        "--source",
        "pool",
        "ensure",
        "vm1/disk",
        "connect",
        "--parent",
        "install",
    )
    run_statepool(
        *common, "--", "sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $! >pid", "x", "{image}"
    )
    wait_for(lambda: not is_alive(int((root / "pid").read_text())))


def test_words_that_are_no_files_to_read(root: Path, run_statepool: Any) -> None:
    """
    A script in one word, which is too long for a name, and files that cannot be read, are words
    like others.
    """
    common = (
        "--cache",
        "cache",
        "--source",
        "pool",
        "ensure",
        "vm1/disk",
        "connect",
        "--parent",
        "install",
        "--",
        "sh",
        "-c",
    )
    names = {
        run_statepool(*common, f": {'x' * length}", "/proc/self/mem", "{image}").out
        for length in (300, 301, 5000)
    }
    assert len(names) == 3
    (root / "closed").write_text("1")
    (root / "closed").chmod(0)
    with permissions_count():
        assert (
            fingerprint(["cat", str(root / "closed")])
            == fingerprint(["cat", str(root / "closed")])
            != fingerprint(["cat", str(root / "other")])
        )


def test_a_pipe_is_no_part_of_a_key(root: Path, run_statepool: Any) -> None:
    os.mkfifo(root / "pipe")
    common = ("--cache", "cache", "ensure", "vm1/disk", "connect", "--parent", "install")
    assert "pipe is a pipe, " in run_statepool(*common, "--", "sh", "pipe", "{image}", code=2).err
    assert (
        "ended with exit code 1"
        in run_statepool(
            *common, "--key", "1", "--", "test", "-f", "pipe", "-a", "{image}", code=1
        ).err
    )


@pytest.mark.parametrize("timeout", ["0", "-5", "nan", "inf", "1e300", "soon"])
def test_a_time_that_no_command_can_have(root: Path, run_statepool: Any, timeout: str) -> None:
    told = run_statepool(
        "--cache",
        "cache",
        "ensure",
        "vm1/disk",
        "connect",
        "--timeout",
        timeout,
        "--",
        "true",
        "{image}",
        code=2,
    )
    assert "--timeout" in told.err


def test_keys_of_one_name_stand_together_the_newest_first(root: Path, run_statepool: Any) -> None:
    keys = [
        disk(root).ensure("connect", partial(write, value), parent="install").name
        for value in (1, 2, 3)
    ]
    lines = run_statepool("--cache", "cache", "--source", "pool", "show").out.splitlines()[1:]
    assert [line.split()[1] for line in lines] == [*reversed(keys), "install"]
    assert ["a key of connect" in line for line in lines] == [True, True, True, False]


# -- old keys --------------------------------------------------------------------------------------


def test_old_keys_go_when_only_some_are_to_be_kept(root: Path, run_statepool: Any) -> None:
    names = [
        disk(root).ensure("connect", partial(write, value), parent="install").name
        for value in (1, 2, 3, 4)
    ]
    child = disk(root).ensure("login", partial(write, 9), parent=names[1]).name
    disk(root).get(names[2], to=root / "work.qcow2")
    pool = statepool.StatePool(root / "cache", [root / "pool"])
    planned = pool.gc(keep_keys=1, everywhere=True, dry_run=True)
    assert states(root) == {"install", child, *names}
    gone = pool.gc(keep_keys=1, everywhere=True)
    assert [thing.path for thing in gone if "key" in thing.what] == [
        thing.path for thing in planned if "key" in thing.what
    ]
    # The second has a child, a machine may run on the third, and the last is the newest; in the
    # pool, the third is not used.
    assert states(root) == {"install", child, names[1], names[2], names[3]}
    own = {
        listed.manifest.state
        for listed in statepool.StatePool(root / "none", [root / "pool"]).show()
    }
    assert own == {"install", child, names[1], names[3]}


def test_how_many_keys_are_kept_is_a_number(root: Path, run_statepool: Any) -> None:
    run_statepool("--cache", "cache", "gc", "--keep-keys", "0", code=2)
    with pytest.raises(statepool.UsageError):
        statepool.StatePool(root / "cache").gc(keep_keys=0)
    disk(root).ensure("connect", partial(write, 1), parent="install")
    assert "removed 0 files" in run_statepool("--cache", "cache", "gc", "--keep-keys", "2").out
