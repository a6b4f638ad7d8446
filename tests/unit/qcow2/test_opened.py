"""Who has a file open, seen with real second processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from statepool.errors import AccessDenied, InUse, MissingFile, UnsafeImage
from statepool.qcow2 import opened
from statepool.qcow2.header import read_header_file
from statepool.qcow2.opened import exclusive, is_open, shared
from tests.support.images import GOOD
from tests.support.privileges import permissions_count

Hold = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "work.qcow2"
    path.write_bytes(GOOD.build())
    return path


@pytest.fixture(
    params=["leases", "no leases, as of another user", "no leases, as of the file system"]
)
def leases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the kernel grants leases; else what it says instead."""
    if request.param == "leases":
        return True
    refusal = errno.EACCES if "user" in request.param else errno.EINVAL
    real = fcntl.fcntl

    def without_leases(descriptor: int, command: int, argument: Any = 0) -> Any:
        if command == fcntl.F_SETLEASE:
            raise OSError(refusal, os.strerror(refusal))
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without_leases)
    return False


@pytest.mark.usefixtures("leases")
def test_nobody_has_it(path: Path) -> None:
    assert not is_open(path)
    with exclusive(path) as descriptor:
        assert os.pread(descriptor, 4, 0) == b"QFI\xfb"
        os.pwrite(descriptor, b"X", 100)
    with shared(str(path)) as descriptor:
        assert os.pread(descriptor, 1, 100) == b"X"
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(descriptor, b"Y", 100)
    assert not is_open(path)


@pytest.mark.usefixtures("leases")
@pytest.mark.parametrize("mode", ["r", "w", "rw", "dup"])
def test_another_process_has_it(path: Path, mode: str, held_open: Hold) -> None:
    with held_open(path, mode) as pid:
        assert is_open(path)
        with (
            pytest.raises(
                InUse, match=rf"work\.qcow2 is open in python\S* \(process {pid}\)"
            ) as caught,
            exclusive(path),
        ):
            pass
        assert caught.value.path == str(path)
        if mode == "r":
            with shared(path):
                pass
        else:
            with pytest.raises(InUse, match=str(pid)), shared(path):
                pass
    assert not is_open(path)
    with exclusive(path):
        pass


@pytest.mark.usefixtures("leases")
def test_another_name_is_the_same_file(path: Path, tmp_path: Path, held_open: Hold) -> None:
    os.link(path, tmp_path / "second.qcow2")
    with held_open(tmp_path / "second.qcow2", "rw"):
        assert is_open(path)
        with pytest.raises(InUse), exclusive(path):
            pass


@pytest.mark.usefixtures("leases")
def test_our_own_descriptors_count_for_claims_but_not_as_others(
    path: Path, held_open: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = opened._openers
    # whatever else runs on this machine
    monkeypatch.setattr(opened, "_openers", lambda descriptor: (look(descriptor)[0], True))
    with path.open("r+b"):
        assert not is_open(path)
        with pytest.raises(InUse, match=str(os.getpid())), exclusive(path):
            pass
        with pytest.raises(InUse), shared(path):
            pass
        with held_open(path, "r"):
            assert is_open(path)
    with path.open("rb"), shared(path):
        pass


@pytest.mark.parametrize(
    ("lock", "writing"), [(100, False), (101, True), (103, True), (201, False), (203, False)]
)
def test_the_bytes_that_qemu_locks_are_seen_where_there_are_no_leases(
    path: Path, monkeypatch: pytest.MonkeyPatch, held_open: Hold, lock: int, writing: bool
) -> None:
    monkeypatch.setattr(opened, "try_lease", lambda *_: None)
    # as if it were a process that we may not look at
    monkeypatch.setattr(opened, "_openers", lambda _: ([], False))
    with held_open(path, "rw", lock):
        assert is_open(path)
        with pytest.raises(InUse, match="another process"), exclusive(path):
            pass
        if writing:
            with pytest.raises(InUse), shared(path):
                pass
        else:
            with shared(path):
                pass
    assert not is_open(path)


def test_who_is_not_seen_is_believed_to_be_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, held_open: Hold
) -> None:
    with held_open(path, "rw"):
        for all_seen in (True, False):
            monkeypatch.setattr(opened, "_openers", lambda _, seen=all_seen: ([], seen))
            assert is_open(path)
            with pytest.raises(InUse, match="another process"), exclusive(path):
                pass
            with pytest.raises(InUse, match="another process"), shared(path):
                pass


def test_what_cannot_be_told_from_our_own_descriptor_is_believed_to_be_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = opened._openers
    monkeypatch.setattr(opened, "_openers", lambda descriptor: (look(descriptor)[0], False))
    with path.open("rb"):
        assert is_open(path)
    assert not is_open(path)


def test_who_looked_in_passing_is_no_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, True, False, True, False, True])
    monkeypatch.setattr(opened, "try_lease", lambda *_: next(answers))
    monkeypatch.setattr(opened, "_openers", lambda _: ([], False))
    with exclusive(path):
        pass
    with shared(path):
        pass
    assert not is_open(path)


OPENER = """
import os, sys
print("ready", flush=True)
fd = os.open(sys.argv[1], os.O_RDWR)
print("opened", os.pread(fd, 1, 100), flush=True)
"""


@pytest.fixture
def is_asked_for() -> Iterator[Callable[[], bool]]:
    """
    :returns: tells, within a minute, whether the kernel has said that somebody wants a file of ours
    """
    asked: list[int] = []
    before = signal.signal(signal.SIGURG, lambda number, _: asked.append(number))

    def wait() -> bool:
        deadline = time.monotonic() + 60
        # Python handles it in its main thread, which does not wake up for a signal that another
        # thread was given.
        while not asked and time.monotonic() < deadline:
            time.sleep(0.01)
        return bool(asked)

    yield wait
    signal.signal(signal.SIGURG, before)


@pytest.mark.parametrize("claim", [exclusive, shared])
def test_who_opens_it_meanwhile_waits_and_nothing_happens_to_us(
    path: Path, claim: Callable[[Path], Any], is_asked_for: Callable[[], bool]
) -> None:
    with claim(path) as descriptor:
        process = subprocess.Popen(
            [sys.executable, "-c", OPENER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert is_asked_for()
        assert process.poll() is None
        assert os.pread(descriptor, 4, 0) == b"QFI\xfb"
    with process:
        assert process.stdout.read().startswith("opened")
    assert process.returncode == 0


BREAKER = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from statepool.qcow2.opened import exclusive
with exclusive(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.readline()
print("done", flush=True)
"""


def test_a_process_without_handlers_survives_that_somebody_opens_its_file(path: Path) -> None:
    root = str(Path(opened.__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", BREAKER, str(path), root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        assert is_open(path)
        with pytest.raises(InUse), exclusive(path):
            pass
        assert process.communicate("go on\n")[0] == "done\n"
    assert process.returncode == 0
    assert not is_open(path)


def test_a_reader_of_headers_waits_for_who_has_it_to_itself(
    path: Path, is_asked_for: Callable[[], bool]
) -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(read_header_file(path)))
    with exclusive(path):
        thread.start()
        assert is_asked_for()
        assert found == []
    thread.join()
    assert found[0].version == 3


def test_claims_work_from_any_thread(path: Path) -> None:
    results = []

    def claim() -> None:
        with exclusive(path) as descriptor:
            results.append(os.pread(descriptor, 4, 0))

    thread = threading.Thread(target=claim)
    thread.start()
    thread.join()
    assert results == [b"QFI\xfb"]


def test_a_lease_that_the_kernel_has_ended_is_no_error(path: Path) -> None:
    with exclusive(path) as descriptor:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    assert not is_open(path)


def test_an_error_inside_lets_go(path: Path) -> None:
    with pytest.raises(KeyError), exclusive(path):
        raise KeyError
    assert not is_open(path)
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.close(descriptor)


@pytest.mark.parametrize("claim", [exclusive, shared, is_open])
def test_only_regular_files_that_are_there(
    tmp_path: Path, path: Path, claim: Callable[[Path], Any]
) -> None:
    def use(name: str) -> None:
        value = claim(tmp_path / name)
        if not isinstance(value, bool):
            with value:
                pass

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to(path)
    for name in ("fifo", "directory", "link"):
        with pytest.raises(UnsafeImage) as caught:
            use(name)
        assert caught.value.check == "regular-file"
    with pytest.raises(MissingFile):
        use("nothing")


@pytest.fixture
def first_pause(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """``first_pause(work)``: something happens while we wait for the first time."""

    def set_up(work: Callable[[], object]) -> None:
        def pause(seconds: float) -> None:
            monkeypatch.undo()
            work()

        monkeypatch.setattr(opened.time, "sleep", pause)  # type: ignore[attr-defined]

    return set_up


@pytest.mark.parametrize("lease", [None, fcntl.F_WRLCK])
@pytest.mark.parametrize("claim", [exclusive, shared])
def test_who_only_looks_is_waited_for(
    path: Path, first_pause: Any, claim: Any, lease: int | None
) -> None:
    """
    As another command does that asks what each working image stands on, or whether it is open.
    """
    descriptor = os.open(path, os.O_RDONLY)
    if lease is not None:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, lease)
    first_pause(lambda: os.close(descriptor))
    with claim(path):
        if claim is shared and lease is None:
            os.close(descriptor)  # it does not matter, and was not waited for


def test_another_process_that_only_looks_does_not_have_it_open(
    path: Path, first_pause: Any, held_open: Hold
) -> None:
    with ExitStack() as stack:
        stack.enter_context(held_open(path, "r"))
        first_pause(stack.close)
        assert not is_open(path)


@pytest.mark.parametrize("lock", [None, 201])
def test_who_uses_it_is_not_waited_for(
    path: Path, first_pause: Any, held_open: Hold, lock: int | None
) -> None:
    """Who can write, and a QEMU that only reads."""
    first_pause(lambda: pytest.fail("it waited"))
    with held_open(path, "rw" if lock is None else "r", lock):
        assert is_open(path)
        with pytest.raises(InUse), exclusive(path):
            pass


def test_a_file_that_may_not_be_written_to(path: Path) -> None:
    path.chmod(0o444)
    with permissions_count():
        with shared(path):
            pass
        with pytest.raises(AccessDenied), exclusive(path):
            pass
