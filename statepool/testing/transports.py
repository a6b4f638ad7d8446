"""
What every transport must do.

A test file for a new one::

    from statepool.testing.transports import TransportContract

    class TestMyTransport(TransportContract):
        @pytest.fixture
        def transport(self, tmp_path):
            with my_server(tmp_path) as location:
                transport = MyTransport(location)
                yield transport
                transport.close()

The directory that the fixture's transport leads to exists and is empty. Tests of what only some transports can do look at its capabilities. If it is
a directory of this host, ``in_directory = True`` in the class brings the tests that put strange files there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from statepool.errors import AccessDenied, IntegrityError, MissingFile, StatePoolError
from statepool.model.digest import Digest
from statepool.testing.contracts import only_if
from statepool.testing.privileges import permissions_count
from statepool.testing.transport_names import MIB, RACERS, NamesContract, local, pattern
from statepool.transports import base
from statepool.transports.base import Transport
from statepool.transports.copying import data_extents


class Counter:
    """A progress that adds up."""

    def __init__(self) -> None:
        self.done = 0

    def begin(self, what: str, total: int) -> None:
        """Nothing is counted here."""

    def advance(self, count: int) -> None:
        """Add them."""
        self.done += count

    def end(self) -> None:
        """Nothing is counted here."""


class Stopping(Counter):
    """A progress that has had enough after some bytes."""

    class Enough(BaseException):
        """Not an error of anybody's; as an interruption by the user is none."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def advance(self, count: int) -> None:
        """Add them, and raise if there were enough."""
        super().advance(count)
        if self.done >= self._limit:
            raise Stopping.Enough


class TransportContract(NamesContract):
    """The tests. Derive from it and give it a fixture ``transport``."""

    @pytest.fixture
    def transport(self) -> Transport:
        """A transport to an empty directory that exists."""
        raise NotImplementedError("derive from TransportContract and define the fixture `transport`")

    @pytest.fixture
    def target(self, tmp_path: Path) -> Iterator[int]:
        """An empty local file to fetch into."""
        fd = os.open(tmp_path / "fetched-here", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        yield fd
        os.close(fd)

    @pytest.fixture
    def source(self, tmp_path: Path) -> Iterator[Callable[[bytes], int]]:
        """Makes local files to store from, with the given bytes; those that are zeros in multiples of a block are holes."""
        opened: list[int] = []

        def make(data: bytes) -> int:
            fd = os.open(tmp_path / f"stored-from-{len(opened)}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            opened.append(fd)
            os.ftruncate(fd, len(data))
            block = 64 << 10
            for offset in range(0, len(data), block):
                if data[offset : offset + block].strip(b"\0"):
                    os.pwrite(fd, data[offset : offset + block], offset)
            return fd

        yield make
        for fd in opened:
            os.close(fd)

    # -- small files -----------------------------------------------------------------------------------------------------------------------------

    def test_small_files_are_not_read_without_end(self, transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(base, "MOST_TOGETHER", 100)
        for name in "abc":
            transport.create(name, bytes(40))
        assert transport.read_many(["a", "b", "d"], 50) == [bytes(40), bytes(40), None]
        assert transport.read_many(["a", "b", "c"], 30) == [bytes(30)] * 3
        with pytest.raises(IntegrityError, match=r"c in .* has more than"):
            transport.read_many(["a", "b", "c"], 50)

    # -- bytes -----------------------------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [0, 1, 4095, 70_000, 5 * MIB + 13])
    @pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
    def test_a_file_there_and_back(self, transport: Transport, source: Callable[[bytes], int], target: int, size: int, algorithm: str) -> None:
        data = pattern(size)
        expected = Digest.of(data, algorithm)
        there, back, again = Counter(), Counter(), Counter()
        assert transport.store(source(data), "a", size, algorithm=algorithm, progress=there).digest == expected
        assert transport.read("a") == data
        assert transport.fetch("a", target, size, algorithm=algorithm, progress=back).digest == expected
        assert os.pread(target, size + 1, 0) == data
        assert transport.digest("a", size, algorithm=algorithm, progress=again) == expected
        assert (there.done, back.done, again.done) == (size, size, size)

    def test_holes_stay_holes(self, transport: Transport, source: Callable[[bytes], int], target: int) -> None:
        data = bytes(3 * MIB) + pattern(128 << 10) + bytes(9 * MIB) + b"end"
        origin = source(data)
        assert transport.store(origin, "a", len(data)).digest == Digest.of(data)
        extents = data_extents(origin, len(data), limit=100)
        moved = transport.fetch("a", target, len(data), extents=extents)
        assert moved.digest == Digest.of(data)
        assert moved.sent < MIB
        assert os.pread(target, len(data) + 1, 0) == data
        # A file system may need some blocks more to remember where the pieces of a file are.
        assert os.fstat(target).st_blocks <= os.fstat(origin).st_blocks + 64
        if (path := transport.local_path("a")) is not None:
            assert path.stat().st_blocks <= os.fstat(origin).st_blocks

    @pytest.mark.parametrize("size", [0, 99_999, 100_001])
    def test_a_file_of_another_length_is_refused(self, transport: Transport, source: Callable[[bytes], int], target: int, size: int) -> None:
        transport.store(source(pattern(100_000)), "a", 100_000)
        with pytest.raises(IntegrityError):
            transport.fetch("a", target, size)
        with pytest.raises(IntegrityError):
            transport.digest("a", size)
        with pytest.raises(IntegrityError):
            transport.store(source(pattern(100_000)), "b", size)
        assert [entry.name for entry in transport.scan("")] == ["a"]

    def test_bytes_that_are_not_there(self, transport: Transport, target: int) -> None:
        with pytest.raises(MissingFile):
            transport.fetch("a", target, 1)
        with pytest.raises(MissingFile):
            transport.digest("a", 1)

    def test_store_replaces_and_needs_the_directory(self, transport: Transport, source: Callable[[bytes], int]) -> None:
        transport.store(source(b"first"), "a", 5)
        transport.store(source(b"second"), "a", 6)
        assert transport.read("a") == b"second"
        with pytest.raises(MissingFile):
            transport.store(source(b"third"), "no/where", 5)

    def test_what_is_stored_can_be_linked_and_is_read_only(self, transport: Transport, source: Callable[[bytes], int]) -> None:
        transport.make_directory("incoming")
        transport.make_directory("data")
        transport.store(source(b"bytes"), "incoming/n", 5)
        transport.link("incoming/n", "data/d")
        transport.remove("incoming/n")
        assert transport.read("data/d") == b"bytes"
        if (path := transport.local_path("data/d")) is not None:
            assert path.stat().st_mode & 0o777 == 0o444

    def test_what_is_there_already_need_not_be_moved_again(self, transport: Transport, source: Callable[[bytes], int], target: int) -> None:
        data, done = pattern(3 * MIB + 13), 2 * MIB + 5
        there, back = Counter(), Counter()
        transport.create("a", data[:done])
        stored = transport.store(source(data), "a", len(data), done=done, progress=there)
        assert stored.digest == Digest.of(data)
        assert transport.read("a") == data
        os.pwrite(target, data[:done], 0)
        fetched = transport.fetch("a", target, len(data), done=done, progress=back)
        assert fetched.digest == Digest.of(data)
        assert os.pread(target, len(data) + 1, 0) == data
        assert (there.done, back.done) == (len(data), len(data))
        if transport.capabilities.resumes:
            assert stored.sent == fetched.sent == len(data) - done

    def test_a_progress_that_raises_ends_the_transfer(self, transport: Transport, source: Callable[[bytes], int], target: int) -> None:
        data = pattern(12 * MIB)
        threads = threading.active_count()
        with pytest.raises(Stopping.Enough):
            transport.store(source(data), "a", len(data), progress=Stopping(4 * MIB))
        assert transport.stat("a") is None
        transport.store(source(data), "a", len(data))
        with pytest.raises(Stopping.Enough):
            transport.fetch("a", target, len(data), progress=Stopping(4 * MIB))
        assert transport.read("a", 0, 16) == data[:16]
        if transport.capabilities.local:
            assert threading.active_count() == threads

    # -- the rest --------------------------------------------------------------------------------------------------------------------------------

    def test_free_space(self, transport: Transport) -> None:
        free = transport.free_space()
        assert free is None or free >= 0

    def test_errors_are_ours_and_name_the_pool(self, transport: Transport) -> None:
        for use in (lambda: transport.read("a"), lambda: transport.link("a", "b"), lambda: transport.rename("a", "b")):
            with pytest.raises(StatePoolError) as caught:
                use()
            assert caught.value.pool == str(transport.location)
            assert caught.value.hint is None or caught.value.hint

    @only_if("in_directory")
    def test_what_is_not_permitted(self, transport: Transport) -> None:
        here = local(transport, "")
        (here / "secret").write_bytes(b"")
        (here / "secret").chmod(0)
        (here / "closed").mkdir(0o500)
        with permissions_count():
            with pytest.raises(AccessDenied):
                transport.read("secret")
            with pytest.raises(AccessDenied):
                transport.create("closed/a", b"")
        assert transport.scan("closed") == []

    def test_it_can_be_closed_and_used_again(self, transport: Transport) -> None:
        transport.create("a", b"1")
        transport.close()
        transport.close()
        assert transport.read("a") == b"1"

    def test_threads_may_share_it(self, transport: Transport) -> None:
        def work(number: int) -> bytes:
            transport.make_directory(f"d/{number}")
            transport.create(f"d/{number}/a", b"%d" % number, flush=False)
            return transport.read(f"d/{number}/a")

        with ThreadPoolExecutor(RACERS) as pool:
            assert list(pool.map(work, range(100))) == [b"%d" % number for number in range(100)]
