from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statepool.errors import LockTimeout
from statepool.pools import layout
from statepool.pools.locks import FileLocks, NoLocks, locks_of
from statepool.pools.pool import Pool
from statepool.testing.memory import MemoryTransport

HOLDER = """
import sys
from pathlib import Path
from statepool.pools.locks import FileLocks
with FileLocks(Path(sys.argv[1])).hold("name", 0):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def locks(tmp_path: Path) -> FileLocks:
    return FileLocks(tmp_path)


@pytest.fixture
def hold_elsewhere(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Another process holds the lock ``name``."""
    started: list[subprocess.Popen[bytes]] = []

    def hold() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def test_a_lock_can_be_had_again(locks: FileLocks) -> None:
    for _ in range(2):
        with locks.hold("name", 0):
            pass


def test_locks_of_other_names_are_others(locks: FileLocks) -> None:
    with locks.hold("one", 0), locks.hold("two", 0):
        pass


def test_whoever_does_not_want_to_wait_is_told(locks: FileLocks, tmp_path: Path, hold_elsewhere: Callable[[], object]) -> None:
    hold_elsewhere()
    with pytest.raises(LockTimeout, match="more than 0 s") as caught, locks.hold("name", 0):
        pass
    assert caught.value.path == str(tmp_path / "name.lock")
    assert caught.value.seconds == 0


def test_threads_exclude_each_other(locks: FileLocks) -> None:
    refused = []

    def try_it() -> None:
        try:
            with locks.hold("name", 0):
                pass
        except LockTimeout as error:
            refused.append(error)

    with locks.hold("name", 0):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert len(refused) == 1


def test_an_error_inside_lets_go(locks: FileLocks) -> None:
    with pytest.raises(KeyError), locks.hold("name", 0):
        raise KeyError
    with locks.hold("name", 0):
        pass


def test_a_holder_that_is_killed_holds_nothing(locks: FileLocks, hold_elsewhere: Callable[[], subprocess.Popen[bytes]]) -> None:
    holder = hold_elsewhere()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locks.hold("name", 0):
        pass


def test_whoever_waits_gets_it_when_the_holder_lets_go(locks: FileLocks, hold_elsewhere: Callable[[], subprocess.Popen[bytes]]) -> None:
    holder = hold_elsewhere()
    got = threading.Event()

    def wait() -> None:
        with locks.hold("name", 100):
            got.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not got.is_set()
    assert holder.stdin is not None
    holder.stdin.close()
    waiting.join(100)
    assert got.is_set()


def test_the_group_of_a_pool_can_open_lock_files(locks: FileLocks, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with locks.hold("name", 0):
            assert (tmp_path / "name.lock").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(old)


def test_a_local_pool_has_locks_and_one_in_memory_has_none(local_pool: Pool, transport: MemoryTransport) -> None:
    assert isinstance(locks_of(local_pool.transport), FileLocks)
    assert isinstance(locks_of(transport), NoLocks)
    with NoLocks().hold("name", 0), NoLocks().hold("name", 0):
        pass
    with local_pool.locks.hold("name", 0):
        path = local_pool.transport.local_path(f"{layout.LOCKS}/name.lock")
        assert path is not None
        assert path.exists()
