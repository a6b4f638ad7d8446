"""What the face of transports makes of the primitives alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import pytest

from statepool.errors import AccessDenied, FileExists, IntegrityError, TransportError
from statepool.model.digest import Digest
from statepool.model.progress import NoProgress
from statepool.testing.transport_names import pattern
from statepool.transports.base import Capabilities, Transfer
from statepool.transports.reading import SLICE
from tests.support.primitives import Shelf, Store

Opened = Callable[..., int]

DATA = pattern(SLICE) + bytes(SLICE) + pattern(SLICE // 2)
EXTENTS = ((0, SLICE), (2 * SLICE, SLICE // 2))


class Watched(Shelf):
    """Notes what is read."""

    def __init__(self, data: bytes) -> None:
        super().__init__({"a": data})
        self.asked: list[tuple[int, int | None]] = []

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        self.asked.append((offset, size))
        return super().read(path, offset, size)


def test_only_the_extents_are_asked_for(opened: Opened) -> None:
    transport, target = Watched(DATA), opened("target")
    moved = transport.fetch("a", target, Transfer(len(DATA), extents=EXTENTS))
    assert transport.asked == list(EXTENTS)
    assert moved.digest == Digest.of(DATA)
    assert moved.sent == sum(length for _, length in EXTENTS)
    assert os.pread(target, len(DATA) + 1, 0) == DATA


def test_extents_that_leave_data_out_have_another_digest(opened: Opened) -> None:
    moved = Watched(DATA).fetch("a", opened("target"), Transfer(len(DATA), extents=EXTENTS[:1]))
    assert moved.digest == Digest.of(DATA[:SLICE] + bytes(len(DATA) - SLICE))


def test_all_of_a_file_is_read_for_its_digest() -> None:
    assert Watched(DATA).digest("a", Transfer(len(DATA), extents=EXTENTS[:1])) == Digest.of(DATA)


def test_what_could_not_be_fetched_leaves_no_length_behind(opened: Opened) -> None:
    target = opened("target")
    with pytest.raises(IntegrityError):
        Watched(DATA).fetch("a", target, Transfer(len(DATA) + 1))
    assert os.fstat(target).st_size == 0


def test_a_hole_at_the_end(opened: Opened) -> None:
    target, data = opened("target"), b"x" + bytes(2 * SLICE)
    assert Watched(data).fetch(
        "a", target, Transfer(len(data), extents=((0, 1),))
    ).digest == Digest.of(data)
    assert os.pread(target, len(data) + 1, 0) == data


@pytest.mark.parametrize("extents", [EXTENTS[::-1], ((0, 0),), ((0, 9), (8, 9))])
def test_extents_that_cannot_be_true_are_not_believed(
    opened: Opened, extents: tuple[tuple[int, int], ...]
) -> None:
    assert Watched(DATA).fetch(
        "a", opened("target"), Transfer(len(DATA), extents=extents)
    ).digest == Digest.of(DATA)


def test_what_was_in_the_local_file_goes(opened: Opened) -> None:
    target = opened("target", b"x" * len(DATA) * 2)
    Watched(DATA).fetch("a", target, Transfer(len(DATA), done=5))
    assert os.pread(target, 2 * len(DATA), 0) == DATA


def test_an_answer_that_is_too_short_is_an_error(opened: Opened) -> None:
    class Short(Shelf):
        def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
            return super().read(path, offset, size)[:-1]

    with pytest.raises(IntegrityError, match="should have"):
        Short({"a": DATA}).fetch("a", opened("target"), Transfer(len(DATA)))


class Pieces(Store):
    """Can be sent one piece after the other, as a place that takes parts."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        data = super().read(path, offset, size)
        self.longest = max(self.longest, len(data))
        return data

    def assemble(self, path: str, pieces: Iterable[bytes]) -> None:
        parts = list(pieces)
        self.longest = max(self.longest, *map(len, parts))
        super().create(path, b"".join(parts))


def test_a_piece_is_moved_at_a_time(opened: Opened) -> None:
    transport = Pieces()
    moved = transport.store(opened("source", DATA), "a", Transfer(len(DATA)))
    assert (moved.digest, moved.sent) == (Digest.of(DATA), len(DATA))
    transport.link("a", "b")
    assert transport.files == {"a": DATA, "b": DATA}
    assert transport.longest == SLICE


def test_a_copy_is_not_read_if_its_name_is_taken() -> None:
    transport = Pieces()
    transport.files = {"a": DATA, "b": b""}
    with pytest.raises(FileExists, match="cannot create 'b' in shelf:///pool: it exists"):
        transport.link("a", "b")
    assert transport.longest == 0
    assert transport.files["b"] == b""


def test_a_local_file_that_shrinks_while_it_is_sent_is_not_stored(opened: Opened) -> None:
    source = opened("source", DATA)

    class Cutting(NoProgress):
        def advance(self, count: int) -> None:
            os.ftruncate(source, SLICE)

    transport = Pieces()
    with pytest.raises(IntegrityError, match="the local file for 'a'"):
        transport.store(source, "a", Transfer(len(DATA), progress=Cutting()))
    assert transport.files == {}


def test_what_is_no_file_of_that_length_is_not_stored(opened: Opened) -> None:
    transport, (reading, writing) = Store(), os.pipe()
    for source, size in ((opened("source", b"12345"), 6), (reading, 0)):
        with pytest.raises(IntegrityError, match="the local file for 'a' in shelf:///pool"):
            transport.store(source, "a", Transfer(size))
    os.close(reading)
    os.close(writing)
    assert transport.files == {}


def test_what_can_only_be_read_is_not_stored_to(opened: Opened) -> None:
    with pytest.raises(
        AccessDenied, match="cannot create 'a' in shelf:///pool: it can only be read"
    ):
        Shelf({}).store(opened("source", b"12345"), "a", Transfer(5))


def test_capabilities_say_what_was_written() -> None:
    store = Store().capabilities
    assert store == Capabilities(
        symlinks=False, durable=False, renames=False, directories=False, copies=True
    )
    assert store.writes
    assert not Shelf({}).capabilities.writes


def test_what_cannot_be_done_says_so_and_names_the_pool() -> None:
    with pytest.raises(
        TransportError, match="cannot rename 'a' in shelf:///pool: that cannot be done there"
    ) as caught:
        Store().rename("a", "b")
    assert (caught.value.pool, caught.value.path) == ("shelf:///pool", "a")
    assert not isinstance(caught.value, AccessDenied)
