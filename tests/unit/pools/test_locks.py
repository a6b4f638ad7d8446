from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from statepool.beneath import Tree
from statepool.cli.report import warnings_shown
from statepool.errors import AccessDenied, LockTimeout, NoSpace, TransportError
from statepool.pools import layout
from statepool.pools.locks import FileLocks, NoLocks, locks_of
from statepool.pools.pool import Pool
from statepool.testing.memory import MemoryStore, MemoryTransport

HOLDER = """
import sys
from statepool.beneath import Tree
from statepool.pools.locks import FileLocks
with FileLocks(Tree(sys.argv[1]), "").hold("name", 0):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def locks(tmp_path: Path) -> FileLocks:
    return FileLocks(Tree(tmp_path), "")


@pytest.fixture
def hold_elsewhere(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Another process holds the lock ``name``."""
    started: list[subprocess.Popen[bytes]] = []

    def hold() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
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


def test_whoever_does_not_want_to_wait_is_told(
    locks: FileLocks, tmp_path: Path, hold_elsewhere: Callable[[], object]
) -> None:
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


def test_a_holder_that_is_killed_holds_nothing(
    locks: FileLocks, hold_elsewhere: Callable[[], subprocess.Popen[bytes]]
) -> None:
    holder = hold_elsewhere()
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locks.hold("name", 0):
        pass


def test_whoever_waits_gets_it_when_the_holder_lets_go(
    locks: FileLocks, hold_elsewhere: Callable[[], subprocess.Popen[bytes]]
) -> None:
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


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EROFS, AccessDenied),
        (errno.EACCES, AccessDenied),
        (errno.ENOSPC, NoSpace),
        (errno.EMFILE, TransportError),
    ],
)
def test_a_lock_that_cannot_be(
    locks: FileLocks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    kind: type[Exception],
) -> None:
    def refuse(tree: Tree, path: str, *rest: Any) -> int:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(Tree, "open", refuse)
    with pytest.raises(kind, match=r"lock .*name\.lock") as caught, locks.hold("name", 0):
        pass
    assert isinstance(caught.value.__cause__, OSError)


def test_a_local_pool_has_the_locks_of_its_kernel(local_pool: Pool) -> None:
    assert isinstance(locks_of(local_pool.transport), FileLocks)
    assert isinstance(local_pool.log_locks, FileLocks)
    with local_pool.locks.hold("name", 0):
        path = local_pool.transport.local_path(f"{layout.LOCKS}/name.lock")
        assert path is not None
        assert path.exists()


def test_a_place_elsewhere_has_claims(pool: Pool) -> None:
    locks = locks_of(pool.transport)
    with locks.hold("store-a", 0), pytest.raises(LockTimeout), locks.hold("store-a", 0):
        pass
    assert [entry.name for entry in pool.transport.scan(layout.LOCKS)] == ["store-a.1.end"]


def test_a_place_elsewhere_with_a_kernel_has_its_locks() -> None:
    class Lock(MemoryTransport):
        def hold(self, path: str, timeout: float) -> contextlib.AbstractContextManager[None]:
            return held(path, timeout)

    @contextlib.contextmanager
    def held(path: str, timeout: float) -> Iterator[None]:
        done.append(("take", path, timeout))
        yield
        done.append(("free", path, timeout))

    done: list[tuple[str, str, float]] = []
    pool = Pool(Lock(MemoryStore()))
    pool.create()
    with pool.locks.hold("store-a", 7):
        done.append(("work", "", 0))
    path = ".statepool/locks/store-a.lock"
    assert done == [("take", path, 7), ("work", "", 0), ("free", path, 7)]
    assert pool.transport.scan(layout.LOCKS) == []


def test_a_change_of_a_log_pays_for_no_claim(
    pool: Pool, put: Callable[..., object], state: Callable[..., object]
) -> None:
    unlocked = Pool(pool.transport)
    assert isinstance(unlocked.log_locks, NoLocks)
    put(unlocked, state("install"))
    assert pool.transport.scan(layout.LOCKS) == []


def test_no_locks_hold_nobody_up() -> None:
    with NoLocks().hold("name", 0), NoLocks().hold("name", 0):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_work_goes_on_and_it_is_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    number: int,
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "locks").mkdir()
    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):
        locks = FileLocks(Tree(tmp_path), "locks")
        with locks.hold("name", 0), locks.hold("name", 0), locks.hold("other", 0):
            pass
        assert locks.tidy("") == []
    assert [
        record.levelname for record in caplog.records if record.name.startswith("statepool")
    ] == ["WARNING"]
    assert "has no file locks" in caplog.text
    assert [str(one.message) for one in recwarn] == []


def test_the_command_says_it_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    (tmp_path / "locks").mkdir()
    monkeypatch.setattr("fcntl.flock", refuse)
    with warnings_shown(), FileLocks(Tree(tmp_path), "locks").hold("name", 0):
        pass
    assert (
        capsys.readouterr().err
        == f"statepool: warning: {tmp_path}/locks has no file locks (flock: Function not"
        " implemented): processes may do the same work twice there\n"
    )
