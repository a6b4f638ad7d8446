"""Copies are whole, checked, as sparse as their source, and leave nothing behind when they fail."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from statepool.errors import IntegrityError, NoSpace, TransportError, UnsafeImage
from statepool.model.digest import ALGORITHMS, Digest
from statepool.model.pieces import ZEROS, Pieces
from statepool.testing.transport_names import pattern
from statepool.testing.transports import Counter, Stopping
from statepool.transports import copying
from statepool.transports.base import Transfer
from statepool.transports.copying import copy, data_extents, hash_file

MIB = 1 << 20
BLOCK = 64 << 10


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


@pytest.fixture(autouse=True)
def no_thread_is_left_behind() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert threading.enumerate() == before


@pytest.fixture(params=["as it is", "blocks cannot be asked for", "short writes"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """
    What the file system is like: also one that has blocks only for what is written, and one that
    takes less at a time than it is given.
    """
    write = os.pwrite

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "in a test")

    if request.param == "blocks cannot be asked for":
        monkeypatch.setattr(fcntl, "ioctl", refuse)
    elif request.param == "short writes":
        monkeypatch.setattr(
            os,
            "pwrite",
            lambda fd, data, offset: write(fd, data[: max(1, len(data) // 2 - 1)], offset),
        )
    return str(request.param)


@pytest.mark.parametrize("size", [0, 1, 4096, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 23 * MIB + 77])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_copy_is_the_same(
    opened: Callable[..., int], way: str, size: int, algorithm: str
) -> None:
    data = pattern(size)
    source, target, counter = opened("a", data), opened("b"), Counter()
    moved = copy(
        source, target, Transfer(size, algorithm=algorithm, progress=counter), reflink=False
    )
    assert (moved.digest, moved.how, moved.sent) == (Digest.of(data, algorithm), "copy", size)
    assert content(target) == data
    assert counter.done == size


@hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 10)  # each is long
@hypothesis.given(
    data=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 4, 8, 12]),
            st.sampled_from([-BLOCK, 0, BLOCK]),
            st.sampled_from([1, BLOCK, 5 * MIB]),
        ),
        max_size=3,
    ),
    tail=st.sampled_from([0, 1, BLOCK]),
    patch=st.lists(
        st.tuples(st.sampled_from([0, 4 * MIB - 1, 9 * MIB]), st.sampled_from([1, 4 * MIB])),
        max_size=2,
    ),
)
def test_pieces_with_holes_between_them(
    tmp_path: Path, data: list[tuple[int, int, int]], tail: int, patch: list[tuple[int, int]]
) -> None:
    size = 16 * MIB + tail
    with (tmp_path / "a").open("wb+") as file, (tmp_path / "b").open("wb+") as other:
        file.truncate(size)
        for start, shift, length in data:
            os.pwrite(file.fileno(), pattern(length), max(start * MIB + shift, 0))
        whole, pieces, progress = bytearray(content(file.fileno())), Pieces(), Counter()
        assert hash_file(file.fileno(), len(whole), pieces=pieces, progress=progress) == Digest.of(
            bytes(whole)
        )
        assert Digest.of_pieces(pieces, len(whole)) == Digest.of(bytes(whole))
        transfer = Transfer(len(whole))
        assert copy(file.fileno(), other.fileno(), transfer, reflink=False).digest == Digest.of(
            bytes(whole)
        )
        assert bytes(transfer.pieces) == bytes(pieces)
        assert progress.done == len(whole)
        for offset, length in patch:
            whole[offset : offset + length] = b"\xee" * length
        overlay = [(offset, b"\xee" * length) for offset, length in patch]
        assert hash_file(file.fileno(), len(whole), overlay=overlay) == Digest.of(bytes(whole))


def test_holes_are_not_read(opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = opened("a"), list[int]()
    os.ftruncate(source, 1 << 30)
    os.pwrite(source, pattern(BLOCK), 512 * MIB)
    size = sum(length for _, length in data_extents(source, 1 << 30, limit=10))
    preadv = os.preadv

    def counting(*arguments: Any) -> int:
        read.append(preadv(*arguments))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    pieces = Pieces()
    hash_file(source, 1 << 30, pieces=pieces)
    assert sum(read) == size < MIB
    assert bytes(pieces).count(ZEROS) == len(pieces) - 1


def test_pieces_are_read_and_hashed_by_several_threads(
    opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pattern(13 * MIB)
    source, together, preadv, calls = (
        opened("a", data),
        threading.Barrier(2),
        os.preadv,
        iter(range(100)),
    )

    def waiting(*arguments: Any) -> int:
        if next(calls) < 2:
            together.wait(timeout=60)  # passes when two threads are here at a time
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", waiting)
    assert hash_file(source, len(data)) == Digest.of(data)


def test_what_was_in_the_target_is_gone(opened: Callable[..., int]) -> None:
    source, target = opened("a", bytes(0)), opened("b", b"x" * MIB)
    os.ftruncate(source, 3 * BLOCK)
    assert copy(source, target, Transfer(3 * BLOCK)).digest == Digest.of(bytes(3 * BLOCK))
    assert content(target) == bytes(3 * BLOCK)


def test_offsets_of_the_caller_do_not_matter(opened: Callable[..., int]) -> None:
    source, target = opened("a", pattern(BLOCK)), opened("b")
    os.lseek(source, 100, os.SEEK_SET)
    os.lseek(target, 100, os.SEEK_SET)
    assert copy(source, target, Transfer(BLOCK)).digest == Digest.of(pattern(BLOCK))


# each is a hundred times as long as others
@hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 3)
@hypothesis.given(
    blocks=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), max_size=12),
    tail=st.integers(0, BLOCK),
    patch=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3 * BLOCK)), max_size=3),
)
def test_holes_stay_holes(
    tmp_path: Path, blocks: list[tuple[int, int]], tail: int, patch: list[tuple[float, int]]
) -> None:
    size = 200 * BLOCK + tail
    with (tmp_path / "a").open("wb+") as a, (tmp_path / "b").open("wb+") as b:
        a.truncate(size)
        for start, count in blocks:
            os.pwrite(
                a.fileno(), pattern(count * BLOCK)[: max(size - start * BLOCK, 0)], start * BLOCK
            )
        data = content(a.fileno())
        moved = copy(a.fileno(), b.fileno(), Transfer(size), reflink=False)
        assert moved.digest == Digest.of(data)
        assert content(b.fileno()) == data
        # But for the blocks in which a file system remembers many extents, as it does when its free
        # space is in pieces.
        assert abs(os.fstat(b.fileno()).st_blocks - os.fstat(a.fileno()).st_blocks) <= 64
        extents = data_extents(b.fileno(), size, limit=1000)
        assert extents == data_extents(a.fileno(), size, limit=1000)
        assert moved.sent == sum(length for _, length in extents)
        # What is hashed with an overlay is what the file would be with it.
        overlay = [
            (int(at * (size - min(length, size))), b"\xee" * min(length, size))
            for at, length in patch
        ]
        patched = bytearray(data)
        for offset, new in overlay:
            patched[offset : offset + len(new)] = new
        assert hash_file(a.fileno(), size, overlay=overlay) == Digest.of(bytes(patched))
        assert content(a.fileno()) == data


@pytest.mark.parametrize(
    "shape", ["xxx.xxx", "x.x.x.x.x.x", "xxx...xxxx.xx", "...xxx.x.xxx", "xxxxxxxxxxxx"]
)
def test_a_disk_that_is_slower_than_hashing(
    opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """What waits to be written is not read over, whatever holes are between."""
    size = copying.SLICE * len(shape)
    source, target = opened("a"), opened("b")
    os.ftruncate(source, size)
    for number, one in enumerate(shape):
        if one == "x":
            os.pwrite(source, bytes([number + 1]) * copying.SLICE, number * copying.SLICE)
    write = os.pwrite

    def slow(*arguments: Any) -> int:
        time.sleep(0.002)
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", slow)
    moved = copy(source, target, Transfer(size), reflink=False)
    assert content(target) == content(source)
    assert moved.digest == Digest.of(content(target))


def test_a_file_of_another_length_is_refused(opened: Callable[..., int], way: str) -> None:
    source, target = opened("a", pattern(5 * MIB)), opened("b")
    for size in (0, 5 * MIB - 1, 5 * MIB + 1):
        with pytest.raises(IntegrityError, match=f"should have {size} bytes, and has {5 * MIB}"):
            copy(source, target, Transfer(size))
        with pytest.raises(IntegrityError):
            hash_file(source, size)


class Cutting(Counter):
    """A progress that changes the length of a file while it is being read."""

    def __init__(self, fd: int, length: int) -> None:
        super().__init__()
        self._fd, self._length = fd, length

    def advance(self, count: int) -> None:
        super().advance(count)
        if self.done > 4 * MIB:
            os.ftruncate(self._fd, self._length)


@pytest.mark.parametrize("length", [5 * MIB, 0, 41 * MIB])
def test_a_source_that_changes_its_length_meanwhile(
    opened: Callable[..., int], way: str, length: int
) -> None:
    source, target = opened("a", pattern(40 * MIB)), opened("b")
    with pytest.raises(IntegrityError, match="bytes"):
        copy(source, target, Transfer(40 * MIB, progress=Cutting(source, length)), reflink=False)


def test_what_is_hashed_is_what_is_in_the_copy(opened: Callable[..., int]) -> None:
    """Whatever others write to the source meanwhile: each byte of it is read once."""
    size = 40 * MIB
    source, target = opened("a", pattern(size)), opened("b")

    class Writing(Counter):
        def advance(self, count: int) -> None:
            super().advance(count)
            os.pwrite(source, os.urandom(size), 0)

    moved = copy(source, target, Transfer(size, progress=Writing()), reflink=False)
    assert moved.digest == Digest.of(content(target))
    assert content(target) not in (pattern(size), content(source)), "the test shows nothing"


def test_a_file_that_is_cut_while_it_is_hashed(opened: Callable[..., int]) -> None:
    source = opened("a", pattern(40 * MIB))
    with pytest.raises(IntegrityError):
        hash_file(source, 40 * MIB, progress=Cutting(source, 5 * MIB))


@pytest.mark.parametrize("limit", [1, 3 * MIB, 30 * MIB])
def test_a_progress_that_raises_ends_it(opened: Callable[..., int], limit: int) -> None:
    source, target = opened("a", pattern(40 * MIB)), opened("b")
    for work in (
        lambda progress: copy(source, target, Transfer(40 * MIB, progress=progress), reflink=False),
        lambda progress: hash_file(source, 40 * MIB, progress=progress),
    ):
        progress = Stopping(limit)
        with pytest.raises(Stopping.Enough):
            work(progress)
        assert progress.done < limit + 3 * MIB, "it went on after it had been told to stop"


def test_an_error_of_the_progress_is_left_as_it_is(opened: Callable[..., int]) -> None:
    """Also one that looks like an error of the file: the terminal may be gone."""

    class Gone(Counter):
        def advance(self, count: int) -> None:
            raise BrokenPipeError(errno.EPIPE, "in a test")

    with pytest.raises(BrokenPipeError):
        copy(opened("a", pattern(3 * MIB)), opened("b"), Transfer(3 * MIB, progress=Gone()))


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_a_disk_that_fails(
    opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    source, target = opened("a", pattern(40 * MIB)), opened("b")
    real, calls = getattr(os, call), []

    def fail(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 5:
            raise OSError(errno.EIO, "in a test")
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(TransportError, match="Input/output error") as caught:
        copy(source, target, Transfer(40 * MIB), reflink=False)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(calls) < 5 + (copying.BEHIND + 1) * copying.SLICE // copying.WRITE, (
        "it went on after the failure"
    )


def test_no_space(opened: Callable[..., int], small: Path, way: str) -> None:
    source, target = opened("a", pattern(20 * MIB)), opened("b", b"", small)
    with pytest.raises(NoSpace) as caught:
        copy(source, target, Transfer(20 * MIB))
    assert caught.value.needed == 20 * MIB
    assert caught.value.available < 20 * MIB
    assert caught.value.hint


def test_between_file_systems(opened: Callable[..., int], small: Path) -> None:
    data = pattern(3 * MIB) + bytes(90 * MIB) + b"end"
    source, target = opened("a"), opened("b", b"", small)
    os.ftruncate(source, len(data))
    os.pwrite(source, data[: 3 * MIB], 0)
    os.pwrite(source, b"end", len(data) - 3)
    assert copy(source, target, Transfer(len(data))).digest == Digest.of(data)
    assert os.fstat(target).st_blocks * 512 < 4 * MIB


def test_what_is_no_file(opened: Callable[..., int]) -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(UnsafeImage) as caught:
            copy(reading, opened("b"), Transfer(0))
        assert caught.value.check == "regular-file"
        with pytest.raises(UnsafeImage):
            hash_file(reading, 0)
    finally:
        os.close(reading)
        os.close(writing)


# -- shared blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4096, 100_000, 30 * MIB + 5])
def test_blocks_are_shared_where_they_can_be(
    opened: Callable[..., int], reflinks: Path, size: int
) -> None:
    data = pattern(size)
    source, target, counter = opened("a", data, reflinks), opened("b", b"x", reflinks), Counter()
    moved = copy(source, target, Transfer(size, progress=counter))
    assert (moved.digest, moved.how, moved.sent) == (Digest.of(data), "reflink", 0)
    assert content(target) == data
    assert counter.done == size
    moved = copy(source, target, Transfer(size), reflink=False)
    assert (moved.digest, moved.how, moved.sent) == (Digest.of(data), "copy", size)


def test_shared_blocks_take_no_room(opened: Callable[..., int], reflinks: Path) -> None:
    """Nine files of 50 MiB where there is room for less than eight."""
    source = opened("a", os.urandom(MIB) * 50, reflinks)
    for name in "bcdefghi":
        assert copy(source, opened(name, b"", reflinks), Transfer(50 * MIB)).how == "reflink"


def test_holes_among_shared_blocks(opened: Callable[..., int], reflinks: Path) -> None:
    source, target = opened("a", b"", reflinks), opened("b", b"", reflinks)
    size = 40 * MIB + 3
    os.ftruncate(source, size)
    for offset in (0, 7 * MIB + BLOCK, 30 * MIB):
        os.pwrite(source, pattern(BLOCK), offset)
    assert (
        copy(source, target, Transfer(size)).digest
        == Digest.of(content(source))
        == hash_file(target, size)
    )
    assert os.fstat(target).st_blocks == os.fstat(source).st_blocks


def test_a_clone_is_hashed_even_where_the_page_cache_cannot_be_gone_round(
    opened: Callable[..., int], reflinks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pattern(9 * MIB + 5)
    source = opened("a", data, reflinks)
    real_open = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "in a test")
        return real_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    assert copy(source, opened("b", b"", reflinks), Transfer(len(data))).digest == Digest.of(data)


# -- extents ---------------------------------------------------------------------------------------


def test_a_file_without_holes_is_one_extent(opened: Callable[..., int]) -> None:
    assert data_extents(opened("a", pattern(3 * BLOCK)), 3 * BLOCK, limit=1000) == ((0, 3 * BLOCK),)


def test_a_file_of_one_hole_has_no_extents(opened: Callable[..., int]) -> None:
    fd = opened("a")
    os.ftruncate(fd, MIB)
    assert data_extents(fd, MIB, limit=1000) == ()
    assert data_extents(opened("b"), 0, limit=1000) == ()


def test_the_smallest_gaps_are_closed_first(opened: Callable[..., int]) -> None:
    fd = opened("a")
    os.ftruncate(fd, 100 * BLOCK)
    for block in (0, 2, 6, 7, 17):  # gaps of 1, 3 and 9 blocks
        os.pwrite(fd, b"x" * BLOCK, block * BLOCK)
    in_blocks = [
        [
            (offset // BLOCK, length // BLOCK)
            for offset, length in data_extents(fd, 100 * BLOCK, limit=limit)
        ]
        for limit in (1000, 4, 3, 2, 1)
    ]
    assert in_blocks == [
        [(0, 1), (2, 1), (6, 2), (17, 1)],
        [(0, 1), (2, 1), (6, 2), (17, 1)],
        [(0, 3), (6, 2), (17, 1)],
        [(0, 8), (17, 1)],
        [(0, 18)],
    ]


def test_many_extents_become_few_without_losing_data(opened: Callable[..., int]) -> None:
    fd = opened("a")
    size = 2000 * 8192
    os.ftruncate(fd, size)
    offsets = [number * 8192 for number in range(2000) if number % 250 not in (100, 101, 102)]
    for offset in offsets:
        os.pwrite(fd, b"x" * 4096, offset)
    extents = data_extents(fd, size, limit=9)
    # Eight wide gaps, so nine extents, wherever the rounds of merging fell.
    assert extents == tuple(
        (first * 8192, (last - first) * 8192 + 4096)
        for first, last in [
            (0, 99),
            *((n * 250 + 103, n * 250 + 349) for n in range(7)),
            (1853, 1999),
        ]
    )


# -- memory ----------------------------------------------------------------------------------------

_MEASURE = """
import os, resource, sys
from statepool.transports.copying import copy, hash_file
from statepool.transports.base import Transfer
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = 512 << 20
source = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(source, size)
for offset in range(0, size if sys.argv[3] == "full" else size // 16, 1 << 20):
    os.pwrite(source, offset.to_bytes(8, "big") * (1 << 17), offset)
target = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
assert copy(source, target, Transfer(size)).digest == hash_file(target, size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("how", ["full", "sparse"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", _MEASURE, tmp_path / "a", tmp_path / "b", how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32 << 10, "KiB"


# -- processes -------------------------------------------------------------------------------------

_FORK = """
import os, signal, sys
from statepool.transports.copying import hash_file
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(fd).st_size
before = hash_file(fd, size)
child = os.fork()
if not child:
    signal.alarm(60)
    os._exit(hash_file(fd, size) != before)
sys.exit(os.waitpid(child, 0)[1])
"""


def test_a_process_can_hash_after_a_fork(tmp_path: Path) -> None:
    """The threads that hash are nobody's but the hasher's: those of the parent are not missed."""
    (tmp_path / "a").write_bytes(pattern(8 * MIB))
    subprocess.run([sys.executable, "-W", "ignore", "-c", _FORK, tmp_path / "a"], check=True)
