"""Digests by pieces: against the few lines that define them, whatever the bytes come as."""

from __future__ import annotations

import blake3
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statepool.model.digest import Digest, new_hasher
from statepool.model.pieces import LENGTH, PIECE, ZEROS, PieceHasher, Pieces, count

MIB = 1 << 20


def defined(data: bytes) -> tuple[str, bytes]:
    """:returns: the digest and the list, as docs/formats.rst defines them"""
    pieces = b"".join(
        blake3.blake3(data[start : start + (4 << 20)]).digest()
        for start in range(0, len(data), 4 << 20)
    )
    whole = blake3.blake3(
        pieces + len(data).to_bytes(8, "little"), derive_key_context="statepool pieces 1"
    )
    return whole.hexdigest(), pieces


def test_a_known_digest() -> None:
    assert (
        Digest.of(b"pool")
        == "blake3p:7183fc615452b396a868f73c21d26cb0d966fbe0bcdb605887669c5c796f0ae5"
    )
    assert defined(b"pool")[0] == Digest.of(b"pool").hex


def test_the_piece_of_zeros() -> None:
    assert blake3.blake3(bytes(PIECE)).digest() == ZEROS


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 5])
def test_sizes(size: int) -> None:
    data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    pieces = Pieces()
    hasher = new_hasher(pieces=pieces)
    hasher.update(data)
    assert (hasher.hexdigest(), bytes(pieces)) == defined(data)
    assert len(pieces) == count(size)
    assert Digest.of_pieces(pieces, size) == Digest.of(data)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from([0, 1, 7, MIB, 2 * MIB, 3 * MIB, PIECE, PIECE + 1, 9 * MIB]),
        ),
        max_size=5,
    )
)
def test_zeros_are_zeros_wherever_they_are(parts: list[tuple[bool, int]]) -> None:
    pieces = Pieces()
    hasher = new_hasher(pieces=pieces)
    for is_hole, size in parts:
        hasher.zeros(size) if is_hole else hasher.update(b"x" * size)
    assert (hasher.hexdigest(), bytes(pieces)) == defined(
        b"".join((b"\0" if is_hole else b"x") * size for is_hole, size in parts)
    )


def test_a_huge_hole_is_not_hashed() -> None:
    pieces = Pieces()
    hasher = new_hasher(pieces=pieces)
    hasher.zeros(1 << 40)
    assert hasher.hexdigest() == Pieces(ZEROS * (1 << 18)).hexdigest(1 << 40)


def test_the_size_is_part_of_the_digest() -> None:
    pieces = Pieces(ZEROS)
    assert pieces.hexdigest(PIECE) != pieces.hexdigest(PIECE - 1)


def test_an_attempt_goes_on_with_what_an_earlier_one_hashed() -> None:
    data = b"abcd" * (11 * MIB // 4)
    pieces = Pieces()
    PieceHasher(pieces).update(data[: 9 * MIB])
    assert len(pieces) == 2
    again = PieceHasher(pieces, done=7 * MIB)  # less is there than was hashed
    assert (again.hashed, len(pieces)) == (PIECE, 1)
    again.update(data[PIECE:])
    assert (again.hexdigest(), bytes(pieces)) == defined(data)
    assert PieceHasher(pieces).hashed == len(pieces) == 0


def test_what_differs_is_told_in_extents() -> None:
    size = 5 * PIECE + 9
    right = Pieces(b"".join(bytes([number]) * LENGTH for number in range(6)))
    wrong = Pieces(bytes(right))
    assert right.differing(wrong, size) == ()
    wrong = Pieces(
        b"".join(bytes([99 if number in (1, 2, 5) else number]) * LENGTH for number in range(6))
    )
    assert right.differing(wrong, size) == ((PIECE, 2 * PIECE), (5 * PIECE, 9))
    assert right.differing(Pieces(), size) == ((0, size),)
