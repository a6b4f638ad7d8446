"""Staging: the same backup by statepool and by Debian's cedar-backup3, from peers over SSH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from benchmarks.bench import Bench
from benchmarks.measure import Fact, Figure, Limit, Table, Unit, Work, rounds, timed
from statepool.staging.files import FRESH_NS
from tests.support.sshd import run_sshd, sshd_program
from tests.support.staging import CBACK, Backup, PeerDirectory, tree

FILES = 200
"""Files of all remote peers together."""

REMOTE, LOCAL = 3, 2
"""Peers that are reached by SSH on loopback, and peers of this host."""

SEVEN_TENTHS = Limit(Unit.RATIO, 0.7)
TWENTIETH = Limit(Unit.RATIO, 0.05)
"""The promised times, each as the largest ratio of our time to the other one."""

COPIERS = (("scp -B -q -C", "-B -q -C"), ("scp -B -q", "-B -q"))
"""Copy commands in the options of the configuration: that of its examples, and without -C."""


@frozen
class _Sides:
    """One backup for each program, with peers of its own, since an indicator is left with them."""

    ours: Backup
    theirs: Backup

    def clear(self) -> None:
        """Have no day staged, and no peer marked."""
        for backup in (self.ours, self.theirs):
            shutil.rmtree(backup.staging)
            backup.staging.mkdir()
            for peer in backup.peers:
                (peer.directory / "cback.stage").unlink(missing_ok=True)


def table(bench: Bench) -> Table:
    """:returns: the cost of staging"""
    title = f"staging: {FILES} files of three peers over SSH"
    if CBACK is None:
        return Table(title, notes=["Not measured: cback3 is not installed (cedar-backup3)."])
    if sshd_program() is None:
        return Table(title, notes=["Not measured: sshd is not installed (openssh-server)."])
    figures, facts = [], []
    for name, words in COPIERS:
        with _backups(bench, words) as sides:
            facts.append(_same_tree(name, sides))
            ours, theirs = rounds(
                [_first(sides, sides.ours), _first(sides, sides.theirs)],
                max(1, bench.scale.pairs // 3),
            )
            what = "first run of the day"
            figures.append(Figure(what, f"cback3, {name}", ours, theirs, SEVEN_TENTHS))
    with _backups(bench, COPIERS[0][1]) as sides:
        first, again = rounds(
            [_first(sides, sides.ours), _again(sides.ours)], max(1, bench.scale.pairs // 3)
        )
        what = "second run of the day"
        figures.append(Figure(what, "our first run", again, first, TWENTIETH))
    return Table(
        title,
        figures,
        facts,
        notes=[
            f"{bench.scale.root >> 20} MiB of random bytes; the two peers of this host are empty.",
            "We flush each file, and compare it with the digest that the peer makes of it.",
            "A second run of cback3 copies everything again, and fails for remote peers.",
        ],
    )


@contextmanager
def _backups(bench: Bench, words: str) -> Iterator[_Sides]:
    with bench.directory() as place, run_sshd() as server:
        sides = [
            Backup(place / name, _peers(bench, place / name / "peers"), server, words)
            for name in ("ours", "theirs")
        ]
        # So the times of the files tell whether they are changed.
        time.sleep(FRESH_NS / 1e9)
        yield _Sides(*sides)


def _peers(bench: Bench, place: Path) -> list[PeerDirectory]:
    peers = [
        PeerDirectory(
            f"{'far' if number < REMOTE else 'near'}{number}", place / str(number), number < REMOTE
        )
        for number in range(REMOTE + LOCAL)
    ]
    data = bench.pattern.read_bytes()
    size = bench.scale.root // FILES
    for number in range(FILES):
        peer = peers[number % REMOTE]
        peer.directory.mkdir(parents=True, exist_ok=True)
        at = number * 4099 % max(1, len(data) - size)
        (peer.directory / f"{number}.tar.gz").write_bytes(data[at : at + size])
    for peer in peers:
        peer.fill({})
    return peers


def _run(backup: Backup) -> None:
    if backup.place.name == "ours":
        words = [sys.executable, "-m", "statepool", "-q", "stage", "--cback"]
        subprocess.run([*words, str(backup.config())], check=True, env=_environment(backup))
    else:
        assert CBACK is not None
        log = ["-l", str(backup.place / "log"), "-q"]
        subprocess.run([CBACK, "-c", str(backup.config()), *log, "stage"], check=True)


def _environment(backup: Backup) -> dict[str, str]:
    return {**os.environ, "HOME": str(backup.place)}


def _first(sides: _Sides, backup: Backup) -> Work:
    def work() -> float:
        sides.clear()
        return timed(lambda: _run(backup))

    return work


def _again(backup: Backup) -> Work:
    return lambda: timed(lambda: _run(backup))


def _same_tree(name: str, sides: _Sides) -> Fact:
    for backup in (sides.ours, sides.theirs):
        _run(backup)
    ours, theirs = tree(sides.ours.day()), tree(sides.theirs.day())
    differing = sum(ours.get(path) != theirs.get(path) for path in ours.keys() | theirs.keys())
    return Fact(
        f"files that differ from those of cback3, {name}",
        f"{differing} of {len(ours)}",
        "0",
        not differing and len(ours) > FILES,
    )
