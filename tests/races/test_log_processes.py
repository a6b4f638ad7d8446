"""
Real processes on one pool in a file system, killed at any moment: what is shown by single steps,
once more where nothing is modelled.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.locks import NoLocks
from statepool.pools.log import KEEP_RECORDS
from statepool.pools.pool import Pool
from statepool.transports.base import Transfer
from statepool.transports.local import LocalTransport

APPENDERS = 16
RECORDS = 10
"""By each of them."""

CHAOTIC = 8
KILLS = 24

COMMON = """
import random, sys
from statepool.errors import RefusedError, NotFound
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest, Parent
from statepool.pools.collect import Collector
from statepool.pools.fold import Publish
from statepool.pools.locks import NoLocks
from statepool.pools.pool import Pool
from statepool.transports.local import LocalTransport

path, locks, me = sys.argv[1:]
pool = Pool(LocalTransport(Location("file", path)), locks=NoLocks() if locks == "NoLocks" else None)
"""

APPEND = (
    COMMON
    + """
print("ready", flush=True)
sys.stdin.readline()
for number in range(10):
    manifest = Manifest("vm1/disk", f"s{me}-{number}", size=1, digest=Digest.of(b"x"))
    with pool.locks.hold("log-vm1", 300):
        log = pool.log("vm1")
        new = [Publish(manifest)]
        fold, written = log.append(lambda fold: [] if manifest.id in fold.states else new)
        assert manifest.id in fold.states
        if log.is_checkpoint_due(fold):
            log.compact()
"""
)

CHAOS = (
    COMMON
    + """
dice = random.Random(me)
names = [f"s{number}" for number in range(6)]

def publish(fold):
    parent = dice.choice([None, *fold.states.values()])
    name = dice.choice(names)
    data = f"{name} on {parent and parent.state}, {dice.randrange(3)}".encode()
    below = Parent(parent.state, parent.digest) if parent else None
    manifest = Manifest("vm1/disk", name, size=len(data), digest=Digest.of(data), parent=below)
    staging = pool.stage([manifest.digest])
    try:
        if dice.randrange(2) or not pool.has_bytes(manifest.digest):
            pool.transport.create(staging.path(manifest.digest), data)
        pool.publish([manifest], staging, replace=bool(dice.randrange(2)))
    finally:
        staging.end()

print("ready", flush=True)
while True:
    fold = pool.fold("vm1")
    try:
        match dice.randrange(6):
            case 0 | 1 | 2:
                publish(fold)
            case 3:
                if fold.states:
                    for gone in pool.remove(dice.choice(list(fold.states)), cascade=True):
                        Collector(pool).collect([gone.digest])
            case 4:
                Collector(pool).sweep()
            case 5:
                for manifest in fold.manifests:
                    if not pool.has_bytes(manifest.digest):
                        is_kept = manifest.digest in pool.fold("vm1").digests
                        assert not is_kept or pool.has_bytes(manifest.digest), manifest
    except (RefusedError, NotFound):
        continue
"""
)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    pool = Pool(LocalTransport(Location("file", str(tmp_path))), locks=NoLocks())
    pool.create()
    return pool


def start(program: str, pool: Pool, locks: str, me: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", program, pool.location.path, locks, str(me)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def say_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"


@pytest.mark.parametrize("locks", ["FileLocks", "NoLocks"])
def test_every_change_is_there_once_in_one_order(pool: Pool, locks: str) -> None:
    processes = [start(APPEND, pool, locks, number) for number in range(APPENDERS)]
    for process in processes:
        say_ready(process)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        _, complaint = process.communicate()
        assert process.returncode == 0, complaint.decode()
    fold = pool.fold("vm1")
    assert fold.number == APPENDERS * RECORDS
    assert {state.state for state in fold.states} == {
        f"s{number}-{count}" for number in range(APPENDERS) for count in range(RECORDS)
    }
    checkpoints, records = pool.log("vm1").entries()
    assert checkpoints
    assert records == list(range(records[0], fold.number + 1))
    assert records[0] > max(checkpoints) - KEEP_RECORDS
    told = [change.id.state for record in pool.log("vm1").records() for change in record.changes]
    assert len(told) == len(set(told)) == len(records)


@pytest.mark.parametrize("locks", ["FileLocks", "NoLocks"])
def test_a_pool_is_whole_after_killings(pool: Pool, locks: str) -> None:
    dice = random.Random(locks)
    processes = {number: start(CHAOS, pool, locks, number) for number in range(CHAOTIC)}
    for process in processes.values():
        say_ready(process)
    for kill in range(KILLS):
        victim = dice.choice(list(processes))
        number = CHAOTIC + kill
        # The next one starts while the victim works, so that the time of its death depends on
        # nothing that either does.
        processes[number] = start(CHAOS, pool, locks, number)
        say_ready(processes[number])
        end(processes.pop(victim))
    for process in processes.values():
        end(process)
    assert_whole(pool)


def end(process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    _, complaint = process.communicate()
    assert process.returncode == -signal.SIGKILL, complaint.decode()


def assert_whole(pool: Pool) -> None:
    fold = pool.fold("vm1")
    assert fold.number > KILLS
    Collector(pool).sweep()
    assert dict(pool.fold("vm1").states) == dict(fold.states)
    for manifest in fold.manifests:
        assert manifest.digest is not None
        assert (
            pool.transport.digest(layout.data(manifest.digest), Transfer(manifest.size))
            == manifest.digest
        )
        assert fold.chain(manifest)[-1].parent is None
    names = {entry.name for entry in pool.transport.scan(layout.DATA)}
    assert names == {digest.file_name for digest in fold.digests}
    assert {Digest.from_file_name(name) for name in names} == fold.digests
    # What is left are temporary files without a marker, which a sweep takes when they are old
    # enough.
    assert [entry.name for entry in pool.transport.scan(layout.TRASH)] == []
    assert [
        entry.name for entry in pool.transport.scan(layout.INCOMING) if entry.name.endswith(".json")
    ] == []
    for state, manifest in fold.states.items():
        assert manifest.digest is not None
        assert pool.transport.readlink(layout.view(state)) == layout.view_target(
            state, manifest.digest
        )
