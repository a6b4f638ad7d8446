"""
The lists of pieces beside the bytes of a pool: they come and go with them, and nothing depends on
them.
"""

from __future__ import annotations

import pytest

from statepool.errors import NoSpace
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest
from statepool.model.pieces import LENGTH, PIECE, Pieces, count
from statepool.pools import layout
from statepool.pools.collect import Collector
from statepool.pools.pieces import is_list_wrong, mend_list, read_list
from statepool.pools.pool import Pool
from statepool.pools.staging import restore
from statepool.testing.faults import FaultyTransport, Full, on
from statepool.testing.memory import MemoryStore, MemoryTransport

SIZE = 3 * PIECE + 1


def pieces_of(tag: str, size: int = SIZE) -> Pieces:
    return Pieces(
        b"".join(
            Digest.of_text(f"{tag}{number}").hex.encode()[:LENGTH] for number in range(count(size))
        )
    )


PIECES = pieces_of("large")
DIGEST = Digest.of_pieces(PIECES, SIZE)
LIST = layout.list_of(layout.data(DIGEST))
BYTES = bytes(PIECE + 1)
LARGE = Manifest("vm1/disk", "large", size=SIZE, digest=DIGEST)


def publish(pool: Pool, *, pieces: Pieces = PIECES) -> None:
    """Nobody looks at the bytes here: they are only so long that they have a list."""
    staging = pool.stage([DIGEST])
    try:
        pool.transport.create(staging.path(DIGEST), BYTES)
        staging.list_pieces(DIGEST, SIZE, pieces)
        pool.publish([LARGE], staging)
    finally:
        staging.end()


def files(pool: Pool, directory: str) -> set[str]:
    return {entry.name for entry in pool.transport.scan(directory)}


def test_a_list_is_beside_the_bytes_before_the_record(pool: Pool) -> None:
    publish(pool)
    found = read_list(pool.transport, DIGEST, SIZE)
    assert found is not None
    assert bytes(found) == bytes(PIECES)
    broken = Pool(
        FaultyTransport(MemoryTransport(MemoryStore()), Full(matches=on("create", path="*.pieces")))
    )
    broken.create()
    with pytest.raises(NoSpace):
        publish(broken)
    assert broken.find(LARGE.id) is None


@pytest.mark.parametrize(
    "pieces",
    [Pieces(), Pieces(bytes(PIECES)[:LENGTH]), pieces_of("other")],
    ids=["none", "some", "others"],
)
def test_a_list_that_is_not_proven_is_left_out(pool: Pool, pieces: Pieces) -> None:
    publish(pool, pieces=pieces)
    assert files(pool, layout.DATA) == {DIGEST.file_name}
    assert read_list(pool.transport, DIGEST, SIZE) is None


def test_of_one_piece_or_another_algorithm_there_is_none(pool: Pool) -> None:
    staging = pool.stage([])
    one = Pieces(bytes(PIECES)[:LENGTH])
    for digest, size, pieces in (
        (Digest.of_pieces(one, PIECE), PIECE, one),
        (Digest("blake3", "0" * 64), SIZE, PIECES),
    ):
        pool.transport.create(layout.data(digest), b"")
        staging.list_pieces(digest, size, pieces)
        staging.settle([digest])
        assert read_list(pool.transport, digest, size) is None
    assert not [name for name in files(pool, layout.DATA) if name.endswith(".pieces")]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(PIECES)[:-1],
        bytes(PIECES) + b"x",
        bytes(PIECES)[:-LENGTH],
        bytes(pieces_of("other")),
        b"x" * (1 << 20),
    ],
)
def test_a_wrong_list_counts_for_nothing_and_is_replaced(pool: Pool, content: bytes) -> None:
    pool.transport.create(LIST, content)
    publish(pool)  # the writer leaves it alone
    assert pool.transport.read(LIST) == content
    assert read_list(pool.transport, DIGEST, SIZE) is None
    assert is_list_wrong(pool.transport, DIGEST, SIZE)
    mend_list(pool.transport, DIGEST, SIZE, pieces_of("other"))  # what is not proven is not written
    assert pool.transport.read(LIST) == content
    mend_list(pool.transport, DIGEST, SIZE, PIECES)
    assert read_list(pool.transport, DIGEST, SIZE) is not None
    assert not is_list_wrong(pool.transport, DIGEST, SIZE)


def test_a_list_goes_with_its_bytes(pool: Pool) -> None:
    publish(pool)
    assert Collector(pool).sweep() == []
    pool.remove(LARGE.id)
    (gone,) = Collector(pool).sweep(dry_run=True)
    assert files(pool, layout.DATA) == {DIGEST.file_name, f"{DIGEST.file_name}.pieces"}
    assert Collector(pool).collect([DIGEST]) == [gone]
    assert files(pool, layout.DATA) == files(pool, layout.TRASH) == set()


def test_bytes_that_are_needed_after_all_get_their_list_back(pool: Pool) -> None:
    publish(pool)
    path = layout.trash("dead", DIGEST)
    pool.transport.rename(LIST, layout.list_of(path))  # a collector died between the two
    Collector(pool).sweep()
    assert read_list(pool.transport, DIGEST, SIZE) is not None
    pool.transport.rename(LIST, layout.list_of(path))
    pool.transport.rename(layout.data(DIGEST), path)
    # a reader fetches the bytes, and leaves the list to the collector
    assert restore(pool.transport, DIGEST)
    assert pool.transport.read(layout.data(DIGEST)) == BYTES
    Collector(pool).sweep()
    assert read_list(pool.transport, DIGEST, SIZE) is not None
    assert files(pool, layout.TRASH) == set()


def test_a_list_alone_is_no_bytes(pool: Pool) -> None:
    pool.transport.create(layout.list_of(layout.trash("dead", DIGEST)), bytes(PIECES))
    assert not restore(pool.transport, DIGEST)


def test_a_list_whose_bytes_are_gone_is_collected_unless_a_record_needs_them(pool: Pool) -> None:
    publish(pool)
    pool.transport.remove(layout.data(DIGEST))  # as damaged bytes of a cache are
    assert Collector(pool).sweep() == []
    pool.remove(LARGE.id)
    (gone,) = Collector(pool).sweep()
    assert (gone.path, gone.bytes) == (LIST, len(bytes(PIECES)))
    assert files(pool, layout.DATA) == files(pool, layout.TRASH) == set()
