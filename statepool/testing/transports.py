"""
The contract of transports: the tests that every transport must pass.

A test file for a new transport::

    from statepool.testing.transports import TransportContract

    class TestMyTransport(TransportContract):
        @pytest.fixture
        def transport(self, tmp_path):
            with my_server(tmp_path) as location:
                transport = MyTransport(location)
                yield transport
                transport.close()

The directory that the fixture's transport leads to exists and is empty. If it is a directory of
this host, ``in_directory = True`` in the class adds the tests that put special files there.
Attributes of the class say what a transport cannot do, as its capabilities do, and omit the tests
of that: ``writes``, ``renames``, ``symlinks``, ``directories``. If nothing can be written, the
method ``put`` of the class puts the files there that are to be read. ``deaths`` says at how many
moments of each command a process is killed; if each call takes long, fewer suffice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from statepool.errors import (
    AccessDenied,
    FileExists,
    IntegrityError,
    MissingFile,
    StatePoolError,
    TransportError,
)
from statepool.model.digest import ALGORITHMS, Digest
from statepool.model.pieces import PIECE, Pieces
from statepool.model.progress import NoProgress
from statepool.testing.contracts import only_if
from statepool.testing.journeys import JourneyContract
from statepool.testing.transport_names import MIB, RACERS, NamesContract, local, names, pattern
from statepool.transports import base
from statepool.transports.base import Transfer, Transport
from statepool.transports.copying import data_extents

Maker = Callable[[bytes], int]
"""A function that makes a local file of these bytes, and returns its descriptor."""


class Counter(NoProgress):
    """A progress that counts bytes."""

    done = 0

    def advance(self, count: int) -> None:
        """Add them."""
        self.done += count


class Stopping(Counter):
    """A progress that raises after some bytes."""

    class Enough(BaseException):
        """The end of the transfer: no error, like an interruption by the user."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def advance(self, count: int) -> None:
        """Add them, and raise if the limit is reached."""
        super().advance(count)
        if self.done >= self._limit:
            raise Stopping.Enough


class TransportContract(NamesContract, JourneyContract):
    """The contract tests of transports. Derive from it and give it a fixture ``transport``."""

    @pytest.fixture
    def transport(self) -> Transport:
        """A transport to an empty directory that exists."""
        raise NotImplementedError(
            "derive from TransportContract and define the fixture `transport`"
        )

    def without_privileges(self) -> AbstractContextManager[None]:
        """
        :returns: a block in which permissions take effect. Everything is permitted to root: unless
            this is overridden, root skips the test of permissions.
        """
        if os.geteuid() == 0:
            pytest.skip("root is permitted everything")
        return nullcontext()

    @pytest.fixture
    def target(self, tmp_path: Path) -> Iterator[int]:
        """An empty local file to fetch into."""
        fd = os.open(tmp_path / "fetched-here", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        yield fd
        os.close(fd)

    @pytest.fixture
    def source(self, tmp_path: Path) -> Iterator[Maker]:
        """
        A maker of local files to store from, with the given bytes; blocks of zeros become holes.
        """
        opened: list[int] = []

        def make(data: bytes) -> int:
            fd = os.open(
                tmp_path / f"stored-from-{len(opened)}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600
            )
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

    # -- small files -------------------------------------------------------------------------------

    def test_small_files_are_not_read_without_end(
        self, transport: Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(base, "MOST_TOGETHER", 100)
        for name in "abc":
            self.put(transport, name, bytes(40))
        assert transport.read_many(["a", "b", "d"], 50) == [bytes(40), bytes(40), None]
        assert transport.read_many(["a", "b", "c"], 30) == [bytes(30)] * 3
        with pytest.raises(IntegrityError, match=r"c in .* has more than"):
            transport.read_many(["a", "b", "c"], 50)

    # -- bytes -------------------------------------------------------------------------------------

    @only_if("writes")
    @pytest.mark.parametrize("size", [0, 1, 4095, 70_000, 5 * MIB + 13])
    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_a_file_there_and_back(
        self, transport: Transport, source: Maker, target: int, size: int, algorithm: str
    ) -> None:
        data = pattern(size)
        expected = Digest.of(data, algorithm)
        there, back, again = Counter(), Counter(), Counter()
        transfers = [
            Transfer(size, algorithm, progress=progress) for progress in (there, back, again)
        ]
        assert transport.store(source(data), "a", transfers[0]).digest == expected
        assert transport.read("a") == data
        assert transport.fetch("a", target, transfers[1]).digest == expected
        assert os.pread(target, size + 1, 0) == data
        assert transport.digest("a", transfers[2]) == expected
        assert (there.done, back.done, again.done) == (size, size, size)
        for pieces in (transfer.pieces for transfer in transfers if len(transfer.pieces)):
            assert Digest.of_pieces(pieces, size) == expected, (
                "digests of pieces are left out, or all of them are right"
            )

    @only_if("writes")
    def test_pieces_become_a_file_that_appears_whole_and_once(self, transport: Transport) -> None:
        data = pattern(2 * MIB + 13)
        seen: list[set[str]] = []

        def pieces(end: Exception | None = None) -> Iterator[bytes]:
            for offset in range(0, len(data), MIB):
                yield data[offset : offset + MIB]
                seen.append(names(transport))
            if end is not None:
                raise end

        with pytest.raises(MissingFile):
            transport.assemble("a", pieces(MissingFile("the source is gone")))
        assert names(transport) == set()
        transport.assemble("a", pieces())
        assert transport.read("a") == data
        assert "a" not in set().union(*seen)
        with pytest.raises(FileExists):
            transport.assemble("a", [b"other"])
        assert transport.read("a") == data

    @only_if("writes")
    def test_holes_stay_holes(self, transport: Transport, source: Maker, target: int) -> None:
        data = bytes(3 * MIB) + pattern(128 << 10) + bytes(9 * MIB) + b"end"
        origin = source(data)
        assert transport.store(origin, "a", Transfer(len(data))).digest == Digest.of(data)
        extents = data_extents(origin, len(data), limit=100)
        moved = transport.fetch("a", target, Transfer(len(data), extents=extents))
        assert moved.digest == Digest.of(data)
        assert moved.sent < MIB
        assert os.pread(target, len(data) + 1, 0) == data
        # A file system may need some extra blocks for the metadata of a file's extents.
        assert os.fstat(target).st_blocks <= os.fstat(origin).st_blocks + 64
        if (path := transport.local_path("a")) is not None:
            assert path.stat().st_blocks <= os.fstat(origin).st_blocks

    @only_if("writes")
    @pytest.mark.parametrize("size", [0, 99_999, 100_001])
    def test_a_file_of_another_length_is_refused(
        self, transport: Transport, source: Maker, target: int, size: int
    ) -> None:
        transport.store(source(pattern(100_000)), "a", Transfer(100_000))
        with pytest.raises(IntegrityError):
            transport.fetch("a", target, Transfer(size))
        with pytest.raises(IntegrityError):
            transport.digest("a", Transfer(size))
        with pytest.raises(IntegrityError):
            transport.store(source(pattern(100_000)), "b", Transfer(size))
        assert names(transport) == {"a"}

    @pytest.mark.parametrize("size", [0, 70_000, 5 * MIB + 13])
    def test_a_file_that_is_there(self, transport: Transport, target: int, size: int) -> None:
        data = pattern(size)
        self.put(transport, "d/a", data)
        back, again = Counter(), Counter()
        assert transport.fetch(
            "d/a", target, Transfer(size, "sha256", progress=back)
        ).digest == Digest.of(data, "sha256")
        assert os.pread(target, size + 1, 0) == data
        assert transport.digest("d/a", Transfer(size, progress=again)) == Digest.of(data)
        assert (back.done, again.done) == (size, size)
        for use in (
            lambda: transport.fetch("d/a", target, Transfer(size + 1)),
            lambda: transport.digest("d/a", Transfer(size + 1)),
        ):
            with pytest.raises(IntegrityError):
                use()

    def test_parts_of_a_file_in_any_order(self, transport: Transport, target: int) -> None:
        data = pattern(2 * PIECE) + bytes(PIECE) + pattern(MIB + 13)
        self.put(transport, "d/a", data)
        os.ftruncate(target, len(data))
        extents = ((0, 2 * PIECE), (3 * PIECE, MIB + 13))
        for start, end in ((3 * PIECE, len(data)), (PIECE, 3 * PIECE)):
            counter, pieces = Counter(), Pieces()
            transfer = Transfer(len(data), extents=extents, progress=counter, pieces=pieces)
            moved = transport.fetch_part("d/a", target, transfer, (start, end - start))
            assert moved.digest == Digest.of(data[start:end])
            assert moved.digest == Digest.of_pieces(pieces, end - start)
            assert (counter.done, moved.sent) == (
                end - start,
                MIB + 13 if end > 3 * PIECE else PIECE,
            )
        assert os.pread(target, len(data) + 1, 0) == bytes(PIECE) + data[PIECE:]
        with pytest.raises(IntegrityError):
            transport.fetch_part("d/a", target, Transfer(len(data) + 1), (0, PIECE))
        with pytest.raises(MissingFile):
            transport.fetch_part("d/b", target, Transfer(len(data)), (0, PIECE))

    def test_bytes_that_are_not_there(self, transport: Transport, target: int) -> None:
        with pytest.raises(MissingFile):
            transport.fetch("a", target, Transfer(1))
        with pytest.raises(MissingFile):
            transport.digest("a", Transfer(1))

    @only_if("writes")
    def test_store_replaces_and_needs_the_directory(
        self, transport: Transport, source: Maker
    ) -> None:
        transport.store(source(b"first"), "a", Transfer(5))
        transport.store(source(b"second"), "a", Transfer(6))
        assert transport.read("a") == b"second"
        if self.directories:
            with pytest.raises(MissingFile):
                transport.store(source(b"third"), "no/where", Transfer(5))

    @only_if("writes")
    def test_what_is_stored_can_be_linked_and_is_read_only(
        self, transport: Transport, source: Maker
    ) -> None:
        transport.make_directory("incoming")
        transport.make_directory("data")
        transport.store(source(b"bytes"), "incoming/n", Transfer(5))
        transport.link("incoming/n", "data/d")
        transport.remove("incoming/n")
        assert transport.read("data/d") == b"bytes"
        if (path := transport.local_path("data/d")) is not None:
            assert path.stat().st_mode & 0o777 == 0o444

    @only_if("writes")
    def test_what_is_there_already_need_not_be_moved_again(
        self, transport: Transport, source: Maker, target: int
    ) -> None:
        data, done = pattern(3 * MIB) + bytes(MIB) + pattern(13), 2 * MIB + 5
        there, back = Counter(), Counter()
        transport.create("a", data[:done] + b"x" * (len(data) - done))
        stored = transport.store(source(data), "a", Transfer(len(data), progress=there, done=done))
        assert stored.digest == Digest.of(data)
        assert transport.read("a") == data
        os.pwrite(target, data[:done], 0)
        fetched = transport.fetch("a", target, Transfer(len(data), progress=back, done=done))
        assert fetched.digest == Digest.of(data)
        assert os.pread(target, len(data) + 1, 0) == data
        assert (there.done, back.done) == (len(data), len(data))
        if transport.capabilities.resumes:
            assert stored.sent == len(data) - MIB - done
            assert fetched.sent == len(data) - done

    @only_if("writes")
    def test_a_progress_that_raises_ends_the_transfer(
        self, transport: Transport, source: Maker, target: int
    ) -> None:
        data = pattern(12 * MIB)
        threads = threading.active_count()
        with pytest.raises(Stopping.Enough):
            transport.store(source(data), "a", Transfer(len(data), progress=Stopping(4 * MIB)))
        assert transport.stat("a") is None
        transport.store(source(data), "a", Transfer(len(data)))
        with pytest.raises(Stopping.Enough):
            transport.fetch("a", target, Transfer(len(data), progress=Stopping(4 * MIB)))
        assert transport.read("a", 0, 16) == data[:16]
        if transport.capabilities.local:
            assert threading.active_count() == threads

    # -- the rest ----------------------------------------------------------------------------------

    def test_free_space(self, transport: Transport) -> None:
        free = transport.free_space()
        assert free is None or free >= 0

    def test_errors_are_ours_and_name_the_pool(self, transport: Transport) -> None:
        for use in (
            lambda: transport.read("a"),
            lambda: transport.link("a", "b"),
            lambda: transport.rename("a", "b"),
        ):
            with pytest.raises(StatePoolError) as caught:
                use()
            assert caught.value.pool == str(transport.location)
            assert caught.value.hint is None or caught.value.hint

    def test_what_it_cannot_do_is_known_beforehand_and_refused(self, transport: Transport) -> None:
        able = transport.capabilities
        assert (able.writes, able.renames, able.symlinks, able.directories) == (
            self.writes,
            self.renames,
            self.symlinks,
            self.directories,
        )
        self.put(transport, "a", b"1")
        missing: list[Callable[[], object]] = []
        if not able.writes:
            missing += [
                lambda: transport.create("b", b""),
                lambda: transport.remove("a"),
                lambda: transport.link("a", "b"),
            ]
            missing += [
                lambda: transport.make_directory("d"),
                lambda: transport.remove_directory("d"),
            ]
        if not able.renames:
            missing.append(lambda: transport.rename("a", "b"))
        if not able.symlinks:
            missing += [lambda: transport.symlink("a", "b"), lambda: transport.readlink("a")]
        for use in missing:
            with pytest.raises(TransportError if able.writes else AccessDenied) as caught:
                use()
            assert str(transport.location) in str(caught.value)
            assert caught.value.hint
        assert names(transport) == {"a"}

    @only_if("in_directory")
    def test_what_is_not_permitted(self, transport: Transport) -> None:
        here = local(transport, "")
        (here / "secret").write_bytes(b"")
        (here / "secret").chmod(0)
        (here / "closed").mkdir(0o500)
        with self.without_privileges():
            with pytest.raises(AccessDenied):
                transport.read("secret")
            with pytest.raises(AccessDenied):
                transport.create("closed/a", b"")
        assert transport.scan("closed") == []

    def test_it_can_be_closed_and_used_again(self, transport: Transport) -> None:
        self.put(transport, "a", b"1")
        transport.close()
        transport.close()
        assert transport.read("a") == b"1"

    @only_if("writes")
    def test_threads_may_share_it(self, transport: Transport) -> None:
        def work(number: int) -> bytes:
            transport.make_directory(f"d/{number}")
            transport.create(f"d/{number}/a", b"%d" % number, flush=False)
            return transport.read(f"d/{number}/a")

        with ThreadPoolExecutor(RACERS) as pool:
            assert list(pool.map(work, range(100))) == [b"%d" % number for number in range(100)]
