"""How much of a file is the same at the other end."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from statepool.model.digest import ALGORITHMS, Digest
from statepool.model.pieces import LENGTH, PIECE, Pieces
from statepool.testing.transport_names import pattern
from statepool.transports.base import Transfer
from statepool.transports.copying import hash_file
from statepool.transports.resuming import matching, same_beginning

DATA = pattern(3 * PIECE + 5)

Opened = Callable[..., int]


def pieces_of(fd: int) -> Pieces:
    pieces = Pieces()
    hash_file(fd, os.fstat(fd).st_size, pieces=pieces)
    return pieces


@pytest.mark.parametrize("length", [0, 1, PIECE, PIECE + 1, len(DATA)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_beginning_that_is_right(opened: Opened, algorithm: str, length: int) -> None:
    local, known, there = opened("a", DATA), Pieces(), Transfer(length, algorithm)
    digest = hash_file(opened("b", DATA[:length]), length, algorithm=algorithm, pieces=there.pieces)
    assert same_beginning(local, there, digest, known) == length
    assert len(known) == (length // PIECE if algorithm == "blake3p" else 0)


@pytest.mark.parametrize(
    ("at", "same"),
    [
        (0, 0),
        (PIECE - 1, 0),
        (PIECE, PIECE),
        (2 * PIECE + 7, 2 * PIECE),
        (3 * PIECE + 1, 3 * PIECE),
    ],
)
def test_pieces_tell_how_much_is_right(opened: Opened, at: int, same: int) -> None:
    wrong = bytearray(DATA)
    wrong[at] ^= 1
    local, known, there = opened("a", DATA), Pieces(), Transfer(len(DATA))
    digest = hash_file(opened("b", bytes(wrong)), len(wrong), pieces=there.pieces)
    assert same_beginning(local, there, digest, known) == same
    assert bytes(known) == bytes(pieces_of(local))[: same // PIECE * LENGTH]
    without = Transfer(len(DATA))
    assert same_beginning(local, without, digest, known) == 0, "without pieces it is all or nothing"


def test_what_is_known_is_not_read(opened: Opened) -> None:
    local = opened("a", DATA)
    wanted = pieces_of(local)
    known = Pieces(bytes(wanted)[: 2 * LENGTH])
    os.pwrite(local, b"x" * 2 * PIECE, 0)
    assert matching(local, len(DATA), wanted, known) == len(DATA)
    assert bytes(known) == bytes(wanted)[: 3 * LENGTH]
    assert matching(local, len(DATA), wanted, Pieces()) == 0


def test_more_is_known_than_is_asked_for(opened: Opened) -> None:
    local = opened("a", DATA)
    known = pieces_of(local)
    assert matching(local, PIECE + 5, pieces_of(opened("b", DATA[: PIECE + 5])), known) == PIECE + 5
    assert len(known) == 1


def test_a_local_file_that_is_shorter(opened: Opened) -> None:
    there = Transfer(len(DATA))
    digest = hash_file(opened("b", DATA), len(DATA), pieces=there.pieces)
    assert same_beginning(opened("a", DATA[: PIECE + 1]), there, digest, Pieces()) == PIECE
    assert digest == Digest.of(DATA)
