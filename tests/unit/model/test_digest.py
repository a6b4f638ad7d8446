"""Digests: their two written forms, and what is refused."""

from __future__ import annotations

import hashlib
import pickle

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statepool.errors import BadRecord
from statepool.model.digest import Digest, check_algorithm, new_hasher

HEX = "0123456789abcdef" * 4

BAD = [
    "",
    "blake3",
    ":",
    "blake3:",
    f":{HEX}",
    HEX,
    f"blake3:{HEX[1:]}",
    f"blake3:{HEX}0",
    f"blake3:{HEX.upper()}",
    f"blake3:{HEX[1:]}g",
    f"blake3:{HEX}\n",
    f"blake3:{HEX[1:]}\n",
    f"BLAKE3:{HEX}",
    f"md5:{HEX[:32]}",
    f"blake3-{HEX}",
    f"blake3::{HEX}",
    f"blake3:{'٣' * 64}",
    "sha256:" + "x" * 100_000,
]


@pytest.mark.parametrize("text", BAD)
def test_bad_digests_are_refused(text: str) -> None:
    with pytest.raises(BadRecord) as caught:
        Digest.parse(text)
    assert len(str(caught.value)) < 300


def test_digests_are_those_of_the_libraries() -> None:
    assert (
        Digest.of_text(b"pool")
        == Digest.of(b"pool", "blake3")
        == Digest("blake3", blake3.blake3(b"pool").hexdigest())
    )
    assert Digest.of(b"pool", "sha256") == Digest("sha256", hashlib.sha256(b"pool").hexdigest())
    # The first test vector of BLAKE3's own repository: no input.
    assert (
        Digest.of_text("").hex == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    )


@pytest.mark.parametrize("algorithm", ["blake3p", "blake3", "sha256"])
def test_hasher_takes_pieces(algorithm: str) -> None:
    hasher = new_hasher(algorithm)
    for piece in (b"po", bytearray(b"o"), memoryview(b"l")):
        hasher.update(piece)
    hasher.zeros(3)
    assert Digest(algorithm, hasher.hexdigest()) == Digest.of(b"pool\0\0\0", algorithm)


@given(st.data())
def test_what_is_printed_is_read_back(some, data: st.DataObject) -> None:
    digest = data.draw(some.digests)
    assert Digest.parse(str(digest)) == digest
    assert Digest.from_file_name(digest.file_name) == digest
    assert pickle.loads(pickle.dumps(digest)) == digest
    assert digest.hex.startswith(digest.short)
    assert ":" not in digest.file_name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "pool.json",
        "blake3-",
        f"blake3-{HEX}.tmp",
        f".blake3-{HEX}",
        f"md5-{HEX[:32]}",
        f"blake3--{HEX}",
        f"blake3:{HEX}",
    ],
)
def test_other_files_are_no_digests(name: str) -> None:
    assert Digest.from_file_name(name) is None


@pytest.mark.parametrize("algorithm", ["", "md5", "BLAKE3", "x" * 1000])
def test_unknown_algorithms_are_refused(algorithm: str) -> None:
    for question in (check_algorithm, new_hasher):
        with pytest.raises(BadRecord, match="unknown digest algorithm") as caught:
            question(algorithm)
        assert "blake3" in str(caught.value.hint)
