"""
kill -9, and long pauses, at random moments of anything at all: two hosts of one name, and a
container that shares a cache with one of them, on real file systems.

KILLS says how many in all (20 if not given, spread over the file systems); SEED, with which seed:
it is printed, for another time.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import statepool
from tests.support.crash import missing_tool

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount file systems"),
]

KILLS = int(os.environ.get("KILLS", "20"))
SEED = int(os.environ.get("SEED", random.randrange(1 << 30) if "KILLS" in os.environ else 1))
PROGRAM = Path(__file__).with_name("campaign.py")
STOPPED = 0.3
"""Part of the processes that is stopped for a while before it is killed."""

TRACED = 0.1
"""Part of the processes that is killed at a system call."""

LONGEST = 0.6
"""Seconds that one works until the next one is stopped or killed."""

CALLS = (
    "link",
    "linkat",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "symlinkat",
    "write",
    "pwrite64",
    "openat",
    "openat2",
    "fsync",
)
HOSTS = {
    "a": ("here", ["unshare", "-u"]),
    "b": ("there", ["unshare", "-u"]),
    "c": ("here", ["unshare", "-u", "-p", "-f", "--mount-proc", "--kill-child"]),
}
"""
By their names here: their caches, and what they are started by. All call themselves the same; one
is in a process id namespace of its own.
"""


def must(*words: str | Path) -> None:
    """
    Run a program, or skip the test with what it says: it is not installed, or this host cannot
    mount.
    """
    if shutil.which(str(words[0]), path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
        pytest.skip(f"{words[0]} is not installed (tools/setup test installs it)")
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{words[0]} fails here: {(done.stderr or done.stdout).strip()}")


def on_disk(*make: str) -> Callable[[Path, Path], None]:
    def prepare(scratch: Path, place: Path) -> None:
        image = scratch / "disk.img"
        with open(image, "wb") as file:
            file.truncate(1 << 30)
        must(*make, image)
        must("mount", "-o", "loop", image, place)

    return prepare


def tmpfs(scratch: Path, place: Path) -> None:
    must("mount", "-t", "tmpfs", "tmpfs", place)


def overlayfs(scratch: Path, place: Path) -> None:
    for name in ("lower", "upper", "work"):
        (scratch / name).mkdir()
    must(
        "mount",
        "-t",
        "overlay",
        "-o",
        f"lowerdir={scratch}/lower,upperdir={scratch}/upper,workdir={scratch}/work",
        "overlay",
        place,
    )


FILE_SYSTEMS: dict[str, Callable[[Path, Path], None]] = {
    "ext4": on_disk("mkfs.ext4", "-q"),
    "xfs": on_disk("mkfs.xfs", "-q"),
    "btrfs": on_disk("mkfs.btrfs", "-q"),
    "tmpfs": tmpfs,
    "overlayfs": overlayfs,
}


@pytest.fixture(params=list(FILE_SYSTEMS))
def lab(
    request: pytest.FixtureRequest, tmp_path: Path, make_image: Callable[..., Path]
) -> Iterator[Path]:
    """:returns: a directory with a pool, on a file system of its own"""
    if (reason := missing_tool()) is not None:
        pytest.skip(reason)
    must("unshare", "-u", "-p", "-f", "--mount-proc", "true")
    (scratch := tmp_path / "scratch").mkdir()
    (place := tmp_path / "mounted").mkdir()
    FILE_SYSTEMS[request.param](scratch, place)
    try:
        lab = place / "lab"
        lab.mkdir()
        for name in ("pool", "here", "there"):
            statepool.init(lab / name)
        make_image(lab / "base.qcow2", 1 << 20, writes=[(0, 65536, 1)])
        yield lab
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


class Host:
    """A nursery of :mod:`campaign`, under the name that all others have."""

    def __init__(self, name: str, lab: Path) -> None:
        self.name = name
        cache, words = HOSTS[name]
        command = [
            *words,
            "sh",
            "-c",
            'hostname lab && exec "$@"',
            "sh",
            sys.executable,
            "-B",
            str(PROGRAM),
            "work",
            cache,
        ]
        self._process = subprocess.Popen(
            command, cwd=lab, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.free = [f"{name}{number}" for number in range(4)]

    def ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


class Campaign:
    """Processes that are begun, stopped, continued and killed, as a seed has it."""

    def __init__(self, lab: Path, chance: random.Random, hosts: list[Host]) -> None:
        self._lab, self._chance, self._hosts = lab, chance, hosts
        self._stopped: list[tuple[int, Host, int, str]] = []
        self.kills = self.stops = self.rounds = 0

    def round(self) -> None:
        self.rounds += 1
        working = [self._begin(host) for host in self._hosts]
        for _, host, pid, slot in [one for one in self._stopped if one[0] <= self.rounds]:
            self._stopped = [one for one in self._stopped if one[1:] != (host, pid, slot)]
            host.ask("signal", pid, signal.SIGCONT)
            working.append((host, pid, slot))
        self._chance.shuffle(working)
        for host, pid, slot in working:
            time.sleep(self._chance.uniform(0.0, LONGEST))  # the moment at which it is ended
            if host.free and self._chance.random() < STOPPED:
                host.ask("signal", pid, signal.SIGSTOP)
                self._stopped.append((self.rounds + self._chance.randrange(1, 7), host, pid, slot))
                self.stops += 1
            else:
                self._kill(host, pid, slot)

    def _begin(self, host: Host) -> tuple[Host, int, str]:
        slot = host.free.pop(0)
        traced = self._chance.random() < TRACED
        call = (
            f"{self._chance.choice(CALLS)}:signal=KILL:when={self._chance.randrange(1, 150)}"
            if traced
            else None
        )
        return host, host.ask("begin", self._chance.randrange(1 << 30), slot, call), slot

    def _kill(self, host: Host, pid: int, slot: str) -> None:
        host.ask("signal", pid, signal.SIGKILL)
        host.free.append(slot)
        self.kills += 1

    def end(self) -> None:
        for _, host, pid, slot in self._stopped:
            self._kill(host, pid, slot)
        self._stopped = []

    def require(self, *words: str) -> None:
        done = subprocess.run(
            [sys.executable, "-B", PROGRAM, "check", *words],
            cwd=self._lab,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            left = self._lab.parents[1] / "left"
            shutil.copytree(self._lab, left, symlinks=True)
            pytest.fail(
                f"SEED={SEED}, round {self.rounds}, for a look in"
                f" {left}:\n{done.stdout}{done.stderr}"
            )


def test_anything_at_all(lab: Path) -> None:
    print(f"SEED={SEED}")  # noqa: T201  for who wants the same once more
    hosts = [Host(name, lab) for name in HOSTS]
    campaign = Campaign(lab, random.Random(f"{SEED} {lab.parent.name}"), hosts)
    try:
        while campaign.kills < KILLS / len(FILE_SYSTEMS):
            campaign.round()
            if campaign.rounds % 10 == 0:
                campaign.require()
        campaign.end()
        campaign.require()
        for path in lab.glob("*/.statepool/**/*tmp*"):
            # a few do not say whose they are, and are left alone for an hour
            os.utime(path, (0, 0), follow_symlinks=False)
        for host in (*hosts, *hosts):
            assert host.ask("gc") is None
        campaign.require("clean")
    finally:
        campaign.end()
        for host in hosts:
            host.end()
    deeds = (lab / "said").read_text().count("\n")
    print(f"{campaign.kills} kills, {campaign.stops} stops, {deeds} lines in {lab / 'said'}")  # noqa: T201


def tear(lab: Path) -> None:
    for path in (lab / "pool/.statepool/data").glob("*[0-9a-f]"):
        path.chmod(0o644)
        with open(path, "ab") as file:
            file.write(b"x")


def lose_bytes(lab: Path) -> None:
    for path in (lab / "pool/.statepool/data").glob("*[0-9a-f]"):
        path.unlink()


def lose_a_promise(lab: Path) -> None:
    statepool.StatePool(lab / "here", [lab / "pool"]).image("vm1/disk").unset("one", scope="all")


def leave_something(lab: Path) -> None:
    (lab / "pool/.statepool/trash/x").touch()


def lose_an_image(lab: Path) -> None:
    (lab / "work.qcow2").unlink()


def see_something_else(lab: Path) -> None:
    words = (lab / "said").read_text().splitlines()
    (lab / "said").write_text(
        "\n".join([*words, json.dumps(["image", "work.qcow2", "else"])]) + "\n"
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (tear, "is torn"),
        (lose_bytes, "the bytes of .* are gone"),
        (lose_a_promise, "was set for certain"),
        (leave_something, "is left over"),
        (lose_an_image, "work.qcow2 is gone"),
        (see_something_else, "in work.qcow2 is"),
    ],
)
def test_what_must_not_be_is_noticed(
    tmp_path: Path, make_image: Callable[..., Path], harm: Callable[[Path], None], message: str
) -> None:
    statepool.init(tmp_path / "pool")
    work = make_image(tmp_path / "work.qcow2", 1 << 20, writes=[(0, 65536, 1)])
    make_image(tmp_path / "same.qcow2", 1 << 20, writes=[(0, 65536, 1)])
    seen = subprocess.run(
        [sys.executable, "-B", PROGRAM, "see", "same.qcow2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    stored = (
        statepool.StatePool(tmp_path / "here", [tmp_path / "pool"])
        .image("vm1/disk")
        .set("one", source=work)
    )
    said = [
        ["begin", "1", "set", [["vm1/disk", "one"]], [seen]],
        ["done", "1", [stored.digest]],
        ["image", "work.qcow2", seen],
    ]
    (tmp_path / "said").write_text("".join(json.dumps(line) + "\n" for line in said))
    command = [sys.executable, "-B", PROGRAM, "check", "clean"]
    assert (
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
        == ""
    )
    harm(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr), done
