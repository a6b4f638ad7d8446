"""
The missing pieces of a file come from several sources at once, or from one, and each is proven.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.copying import fetch as fetch_module
from statepool.copying.fetch import Fetch, Fetched
from statepool.copying.missing import Origin, PieceFetch, joined, missing_runs
from statepool.copying.supply import Supply
from statepool.errors import DigestMismatch, IntegrityError, TransportError
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest, StateId
from statepool.model.pieces import PIECE, Pieces
from statepool.model.progress import NoProgress
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.sources.mirrors import Mirrors
from statepool.sources.pool_source import PoolSource
from statepool.sources.source_stats import SourceStats
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.base import Moved, Transfer
from statepool.transports.registry import open_transport

MIB = 1 << 20
COUNT = 24
SIZE = (COUNT - 1) * PIECE + MIB
WANTED = StateId("vm1/disk", "install")


def content() -> bytes:
    """Bytes of 24 pieces, each another; two are zeros, and the last one is shorter."""
    pieces = [
        bytes(PIECE) if index in (5, 6) else bytes([index + 1]) * PIECE for index in range(COUNT)
    ]
    return b"".join(pieces)[:SIZE]


@pytest.fixture(scope="module")
def whole() -> bytes:
    return content()


@pytest.fixture(scope="module")
def wanted(whole: bytes) -> Pieces:
    found = Pieces()
    for start in range(0, SIZE, PIECE):
        found.append(bytes.fromhex(Digest.of(whole[start : start + PIECE], "blake3").hex))
    return found


class Source(MemoryTransport):
    """
    A source in memory.

    :ivar parts: the parts that were fetched from it
    """

    def __init__(self, data: bytes = b"", *, meet: threading.Barrier | None = None) -> None:
        super().__init__(MemoryStore(), resumes=True)
        if data:
            self.create("f", data)
        self.parts: list[tuple[int, int]] = []
        self.meet = meet
        self.fails_after = 1 << 60

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        if offset >= self.fails_after:
            raise TransportError("the line is cut", pool=str(self.location))
        return super().read(path, offset, size)

    def fetch_part(
        self, path: str, target: int, transfer: Transfer, part: tuple[int, int]
    ) -> Moved:
        self.parts.append(part)
        if self.meet is not None and len(self.parts) == 1:
            self.meet.wait(600)
        return super().fetch_part(path, target, transfer, part)


def origins(*transports: Source) -> list[Origin]:
    return [
        Origin(PoolSource(Pool(one), f"source{number}"), "f")
        for number, one in enumerate(transports)
    ]


def damaged(data: bytes, *indexes: int) -> bytes:
    changed = bytearray(data)
    for index in indexes:
        changed[index * PIECE + 77] ^= 1
    return bytes(changed)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


def fetching(
    target: int, wanted: Pieces, *transports: Source, progress: Any = None
) -> tuple[PieceFetch, Pieces]:
    pieces = Pieces()
    transfer = Transfer(SIZE, progress=progress or NoProgress(), pieces=pieces)
    return (
        PieceFetch(
            origins(*transports), target, transfer, wanted, missing_runs(target, SIZE, wanted)
        ),
        pieces,
    )


def in_file(target: int) -> bytes:
    return os.pread(target, SIZE + 1, 0)


# -- what is missing -------------------------------------------------------------------------------


def test_runs_are_joined() -> None:
    assert joined([(4, 6), (0, 2), (2, 3), (9, 10)]) == [(0, 3), (4, 6), (9, 10)]
    assert joined([]) == []


def test_an_empty_file_misses_everything(target: int, wanted: Pieces) -> None:
    assert missing_runs(target, SIZE, wanted) == [(0, COUNT)]
    assert os.fstat(target).st_size == SIZE


def test_what_is_wrong_or_a_hole_is_missing(target: int, whole: bytes, wanted: Pieces) -> None:
    os.pwrite(target, damaged(whole, 3, 23), 0)
    os.pwrite(target, bytes(PIECE), 9 * PIECE)
    assert missing_runs(target, SIZE, wanted) == [(3, 4), (9, 10), (23, 24)]
    assert os.pread(target, PIECE, 3 * PIECE) == bytes(PIECE)


# -- one source ------------------------------------------------------------------------------------


def test_only_the_missing_pieces_are_fetched(target: int, whole: bytes, wanted: Pieces) -> None:
    os.pwrite(target, damaged(whole, 3, 23), 0)
    source = Source(whole)
    fetch, pieces = fetching(target, wanted, source)
    moved = fetch.run()
    assert in_file(target) == whole
    assert moved.digest == Digest.of(whole)
    assert bytes(pieces) == bytes(wanted)
    assert source.parts == [(3 * PIECE, PIECE), (23 * PIECE, MIB)]
    assert (moved.sent, moved.again) == (PIECE + MIB, 0)


def test_pieces_of_zeros_are_not_fetched(target: int, whole: bytes, wanted: Pieces) -> None:
    source = Source(whole)
    fetch, _ = fetching(target, wanted, source)
    assert fetch.run().sent == SIZE - 2 * PIECE
    assert source.parts == [(0, 5 * PIECE), (7 * PIECE, SIZE - 7 * PIECE)]
    assert in_file(target) == whole


@pytest.mark.parametrize("several", [False, True])
def test_the_progress_tells_of_each_byte_once(
    target: int, whole: bytes, wanted: Pieces, several: bool
) -> None:
    class Counter(NoProgress):
        done = 0

        def advance(self, count: int) -> None:
            self.done += count

    counter = Counter()
    bad = [Source(damaged(whole, 2, 11))] if several else []
    fetching(target, wanted, *bad, Source(whole), progress=counter)[0].run()
    assert counter.done == SIZE


# -- several ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 5])
def test_all_sources_deliver_at_once(target: int, whole: bytes, wanted: Pieces, count: int) -> None:
    meet = threading.Barrier(count)
    sources = [Source(whole, meet=meet) for _ in range(count)]
    fetch, _ = fetching(target, wanted, *sources)
    moved = fetch.run()
    assert in_file(target) == whole
    assert all(source.parts for source in sources)
    assert moved.sent == SIZE - 2 * PIECE == sum(one.bytes for one in fetch.deliveries)
    starts = [part[0] for source in sources for part in source.parts]
    assert len(starts) == len(set(starts)), "no part came twice"


def test_a_source_that_fails_leaves_the_rest_to_the_others(
    target: int, whole: bytes, wanted: Pieces
) -> None:
    meet = threading.Barrier(2)
    bad, good = Source(whole, meet=meet), Source(whole, meet=meet)
    bad.fails_after = 2 * PIECE
    fetch, _ = fetching(target, wanted, bad, good)
    fetch.run()
    assert in_file(target) == whole
    assert "the line is cut" in str(fetch.deliveries[0].error)
    assert fetch.deliveries[1].error is None


def test_a_source_that_stands_still_gives_its_rest_away(
    target: int, whole: bytes, wanted: Pieces
) -> None:
    """The fast source takes all that the other one has not begun."""
    free = threading.Event()
    meet = threading.Barrier(2)

    class Slow(Source):
        def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
            if self.parts and offset > self.parts[0][0] + MIB:
                free.wait(600)
            return super().read(path, offset, size)

    class Fast(Source):
        def fetch_part(self, *arguments: Any) -> Moved:
            moved = super().fetch_part(*arguments)
            if sum(length for _, length in self.parts) >= SIZE // 2:
                free.set()
            return moved

    slow, fast = Slow(whole, meet=meet), Fast(whole, meet=meet)
    fetch, _ = fetching(target, wanted, slow, fast)
    fetch.run()
    assert in_file(target) == whole
    assert fetch.deliveries[1].bytes > fetch.deliveries[0].bytes


def test_copies_that_are_all_damaged_are_put_together(
    target: int, whole: bytes, wanted: Pieces
) -> None:
    sources = [Source(damaged(whole, 0, 10)), Source(damaged(whole, 1, 11))]
    fetch, _ = fetching(target, wanted, *sources)
    moved = fetch.run()
    assert in_file(target) == whole
    assert moved.digest == Digest.of(whole)


def test_a_source_with_many_damaged_pieces_is_asked_no_more(
    target: int, whole: bytes, wanted: Pieces
) -> None:
    meet = threading.Barrier(2)
    bad = Source(damaged(whole, *(index for index in range(COUNT) if index not in (5, 6))))
    bad.meet = meet
    fetch, _ = fetching(target, wanted, bad, Source(whole, meet=meet))
    fetch.run()
    assert in_file(target) == whole
    error = fetch.deliveries[0].error
    assert isinstance(error, DigestMismatch)
    assert "are damaged" in str(error)
    assert len(bad.parts) <= 3


def test_a_piece_that_no_source_has_is_an_error(target: int, whole: bytes, wanted: Pieces) -> None:
    sources = [Source(damaged(whole, 20)), Source(damaged(whole, 20))]
    fetch, _ = fetching(target, wanted, *sources)
    with pytest.raises(DigestMismatch, match=f"the bytes {20 * PIECE} to {21 * PIECE - 1} of"):
        fetch.run()
    assert missing_runs(target, SIZE, wanted) == [(20, 21)], "all others are here"


def test_when_it_is_interrupted_all_threads_end(target: int, whole: bytes, wanted: Pieces) -> None:
    class Stop(NoProgress):
        done = 0

        def advance(self, count: int) -> None:
            self.done += count
            if self.done > SIZE // 2:
                raise KeyboardInterrupt

    threads = threading.active_count()
    fetch, _ = fetching(target, wanted, Source(whole), Source(whole), progress=Stop())
    with pytest.raises(KeyboardInterrupt):
        fetch.run()
    assert threading.active_count() == threads
    missing = missing_runs(target, SIZE, wanted)
    assert sum(last - first for first, last in missing) < COUNT
    fetching(target, wanted, Source(whole))[0].run()
    assert in_file(target) == whole


# -- a get -----------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, make_image: Callable[..., Path]) -> Manifest:
    """A state of seven pieces, two of which are a hole."""
    image = make_image(
        tmp_path / "work.qcow2", 64 * MIB, writes=[(0, 15 * MIB, 7), (15 * MIB, MIB, 8)]
    )
    os.truncate(image, 25 * MIB)
    statepool.init(tmp_path / "pool")
    statepool.StatePool(
        cache=tmp_path / "cache", sources=[Location("file", str(tmp_path / "pool"))]
    ).image("vm1/disk").set("install", source=image)
    found = Pool(open_transport(Location("file", str(tmp_path / "pool")))).find(WANTED)
    assert found is not None
    return found


def mirrors(lab: Any, made: Manifest, *transports: Source) -> list[PoolSource]:
    """:returns: sources that have the state, in memory"""
    from statepool.copying.push import Push

    found = []
    for number, transport in enumerate(transports):
        pool = Pool(transport)
        pool.create()
        Push(lab.cache(), pool).run([made])
        found.append(PoolSource(pool, f"mirror{number}"))
    return found


def supply(lab: Any, sources: Sequence[PoolSource], name: str = "other") -> Supply:
    cache = lab.cache(name)
    return Supply(cache, Mirrors(tuple(sources), SourceStats(cache.notes), cache.settings))


def bring(supplied: Supply) -> Any:
    return supplied.bring(WANTED, supplied.look(WANTED).offers)


def test_a_large_state_comes_from_all_mirrors(
    lab: Any, made: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetch_module, "SEVERAL", MIB)
    meet = threading.Barrier(2)
    sources = [Source(meet=meet), Source(meet=meet)]
    supplied = supply(lab, mirrors(lab, made, *sources))
    brought = bring(supplied)
    assert all(source.parts for source in sources)
    assert brought.fetched.bytes >= 16 * MIB
    assert made.digest is not None
    assert Digest.of(supplied.cache.data(made.digest).read_bytes()) == made.digest
    assert brought.warnings == ()


def test_a_small_state_comes_from_one(lab: Any, made: Manifest) -> None:
    sources = [Source(), Source()]
    bring(supply(lab, mirrors(lab, made, *sources)))
    assert [source.parts for source in sources] == [[], []]


def test_a_mirror_with_damage_is_told_and_rests(
    lab: Any, made: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "SEVERAL", MIB)
    meet = threading.Barrier(2)
    sources = [Source(meet=meet), Source(meet=meet)]
    names = mirrors(lab, made, *sources)
    assert made.digest is not None
    path = layout.data(made.digest)
    whole = sources[1].read(path)
    sources[1].remove(path)
    sources[1].create(path, damaged(whole, 0, 1, 2, 3))
    supplied = supply(lab, names)
    brought = bring(supplied)
    assert Digest.of(supplied.cache.data(made.digest).read_bytes()) == made.digest
    (warning,) = brought.warnings
    assert "is corrupt" in warning
    assert supplied.mirrors.stats.of(names[1]).corrupt
    assert not supplied.mirrors.stats.of(names[0]).corrupt


def test_only_the_damaged_piece_of_a_cached_state_is_fetched_again(
    lab: Any, made: Manifest
) -> None:
    (source,) = mirrors(lab, made, transport := Source())
    cache = lab.cache("other")
    offer = source.resolve(WANTED)
    assert offer is not None
    assert made.digest is not None
    Fetch(cache, offer).run()
    path = cache.data(made.digest)
    right = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(damaged(right, 2))
    again: Fetched = Fetch(cache, offer).run()
    assert path.read_bytes() == right
    assert transport.parts == [(2 * PIECE, PIECE)]
    assert (again.bytes, again.resumed) == (PIECE, made.size - PIECE)
    assert "had been changed" in again.warnings[0]
    assert lab.leftovers(cache.pool) == []


def test_a_cached_file_that_was_cut_short_is_completed(lab: Any, made: Manifest) -> None:
    (source,) = mirrors(lab, made, Source())
    cache = lab.cache("other")
    offer = source.resolve(WANTED)
    assert offer is not None
    assert made.digest is not None
    Fetch(cache, offer).run()
    path = cache.data(made.digest)
    right = path.read_bytes()
    path.chmod(0o644)
    os.truncate(path, 3 * PIECE)
    again = Fetch(cache, offer).run()
    assert path.read_bytes() == right
    assert again.resumed == 3 * PIECE


def test_an_offer_that_lies_about_its_list_is_refused(
    lab: Any, made: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that the digest does not prove is none, so the state comes from one source."""
    monkeypatch.setattr(fetch_module, "SEVERAL", MIB)
    sources = [Source(), Source()]
    names = mirrors(lab, made, *sources)
    assert made.digest is not None
    for source in sources:
        path = layout.list_of(layout.data(made.digest))
        source.remove(path)
        source.create(path, bytes(32 * 7))
    supplied = supply(lab, names)
    bring(supplied)
    assert [source.parts for source in sources] == [[], []]
    assert Digest.of(supplied.cache.data(made.digest).read_bytes()) == made.digest


def test_a_fetch_without_any_good_source_keeps_what_is_proven(
    lab: Any, made: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "SEVERAL", MIB)
    sources = [Source(), Source()]
    names = mirrors(lab, made, *sources)
    assert made.digest is not None
    path = layout.data(made.digest)
    whole = sources[0].read(path)
    for source in sources:
        source.remove(path)
        source.create(path, damaged(whole, 3))
    supplied = supply(lab, names)
    with pytest.raises(IntegrityError):
        bring(supplied)
    good = Source()
    (source,) = mirrors(lab, made, good)
    offer = source.resolve(WANTED)
    assert offer is not None
    assert Fetch(supplied.cache, offer).run().bytes == PIECE
    assert good.parts == [(3 * PIECE, PIECE)]
