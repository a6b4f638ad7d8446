"""
A clone's bytes are read from its source while they are in memory there and certainly the same;
whatever happens, the digest is the clone's.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from statepool.leases import held_lease, try_lease
from statepool.model.digest import Digest
from statepool.testing.transport_names import pattern
from statepool.testing.transports import Counter
from statepool.transports import reading
from statepool.transports.base import Transfer
from statepool.transports.copying import copy
from statepool.transports.reading import SLICE, Unchanging

SIZE = 5 * SLICE + 777
DATA = pattern(SIZE)


@pytest.fixture
def path(reflinks: Path) -> Path:
    """A file on a file system that shares blocks, all of it in memory."""
    path = reflinks / "a"
    path.write_bytes(DATA)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # a page that is being written may not be at hand for a moment
        file.read()
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that were read from."""
    found: list[int] = []
    real = os.preadv

    def preadv(fd: int, *rest: object) -> int:
        count = real(fd, *rest)  # type: ignore[arg-type]
        found.append(fd)
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    return found


@contextmanager
def pair(path: Path, flags: int = os.O_RDONLY) -> Iterator[tuple[int, int]]:
    """:returns: descriptors of the file, and of a new one beside it"""
    source = os.open(path, flags)
    target = os.open(path.with_name("b"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        yield source, target
    finally:
        os.close(source)
        os.close(target)


def clone(path: Path, progress: Counter | None = None) -> tuple[Digest, int]:
    """
    :returns: the digest of a clone, and the descriptor that its source had. What it says is what
        the clone has.
    """
    with pair(path) as (source, target):
        counter = progress or Counter()
        moved = copy(source, target, Transfer(SIZE, progress=counter))
        assert moved.how == "reflink"
        assert counter.done == SIZE
        assert held_lease(source) == fcntl.F_UNLCK
        assert moved.digest == Digest.of(os.pread(target, SIZE + 1, 0))
        return moved.digest, source


def test_what_is_in_memory_is_read_there(path: Path, reads: list[int]) -> None:
    digest, source = clone(path)
    assert digest == Digest.of(DATA)
    assert set(reads) == {source}


def test_what_is_not_in_memory_is_read_from_the_clone(path: Path, reads: list[int]) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), SLICE, 0, os.POSIX_FADV_DONTNEED)
    digest, source = clone(path)
    assert digest == Digest.of(DATA)
    assert reads[0] == source
    assert set(reads) > {source}


def test_holes_are_not_read(path: Path, reads: list[int]) -> None:
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(SIZE)
        for offset in (0, SLICE + 65536, SIZE - 10):
            os.pwrite(file.fileno(), b"something", offset)
    digest, source = clone(path)
    assert digest == Digest.of(path.read_bytes())
    assert reads == [source] * 3


@pytest.mark.parametrize("writer", ["descriptor", "mapping"])
def test_who_can_write_already_keeps_us_from_the_source(
    path: Path, reads: list[int], writer: str
) -> None:
    class Storing(Counter):
        def advance(self, count: int) -> None:
            super().advance(count)
            mapping[:] = b"\xee" * SIZE

    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), SIZE)
        if writer == "mapping":
            file.close()
        digest, source = clone(path, Storing())
    mapping.close()
    assert digest == Digest.of(DATA)
    assert source not in reads


@pytest.mark.parametrize(
    "act",
    [lambda path: path.write_bytes(b"\xee" * SIZE), lambda path: os.truncate(path, 100)],
    ids=["write", "truncate"],
)
def test_who_comes_to_write_need_not_wait_for_the_end(
    path: Path, reads: list[int], act: Callable[[Path], object]
) -> None:
    class Disturbed(Counter):
        """
        Somebody opens the source when some of the first two slices was read, by another thread, and
        has changed it before the fourth one is.
        """

        def advance(self, count: int) -> None:
            super().advance(count)
            if self.done == 2 * SLICE:
                while seen[0] not in reads:  # a read gives no event
                    time.sleep(0.01)
                thread.start()
                while held_lease(seen[0]) != fcntl.F_UNLCK:
                    thread.join(0.01)
            elif self.done == 3 * SLICE:
                thread.join()
                seen.append(len(reads))

    seen: list[int] = []
    thread = threading.Thread(target=act, args=(path,))
    with pair(path) as (source, target):
        seen.append(source)
        digest = copy(source, target, Transfer(SIZE, progress=Disturbed())).digest
        assert digest == Digest.of(DATA) == Digest.of(os.pread(target, SIZE + 1, 0))
        assert reads[seen[1] :]
        assert source not in reads[seen[1] :]
    assert path.read_bytes() != DATA


def test_what_changes_while_it_is_being_read_does_not_count(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if somebody came between the reading and the question after it."""
    real = reading._InMemory.read

    def read(self: reading.Reader, part: reading.Slice, into: memoryview) -> memoryview:
        content = real(self, part, into)  # type: ignore[arg-type]
        if part.start == SLICE:
            content[:] = b"\xee" * len(content)
            os.utime(path)
        return content

    monkeypatch.setattr(reading._InMemory, "read", read)
    assert clone(path)[0] == Digest.of(DATA)


def test_without_leases_only_the_clone_is_read(
    path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "try_lease", lambda *_: None)
    digest, source = clone(path)
    assert digest == Digest.of(DATA)
    assert source not in reads


@pytest.mark.parametrize(
    ("flags", "kind"),
    [(os.O_RDONLY, fcntl.F_RDLCK), (os.O_RDWR, fcntl.F_WRLCK)],
    ids=["read", "write"],
)
def test_a_lease_of_the_caller_is_as_good_and_stays(
    path: Path, reads: list[int], flags: int, kind: int
) -> None:
    with pair(path, flags) as (source, target):
        assert try_lease(source, kind)
        assert copy(source, target, Transfer(SIZE)).digest == Digest.of(DATA)
        assert held_lease(source) == kind
        assert set(reads) == {source}


def test_once_it_is_not_certain_it_stays_so(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    with path.open("rb") as file, Unchanging(file.fileno()) as unchanging:
        assert unchanging.holds()
        before = path.stat()
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert not unchanging.holds()
        assert held_lease(file.fileno()) == fcntl.F_UNLCK
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert not unchanging.holds()
        path.write_bytes(b"2")  # nobody keeps us waiting
