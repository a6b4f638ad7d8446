"""Whatever happens to a bundle on its way: it is refused, and the cache is as it was."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from statepool import IntegrityError
from statepool.bundles.contents import BLOCK, PRELUDE
from tests.support.bundles import World

COMPRESSIONS = ["zstd", "none"]


@pytest.fixture(scope="module")
def bundles(lasting: World) -> dict[str, bytes]:
    """A bundle of a machine with its RAM: it has holes, several files, and links."""
    lasting.log_in()
    return {compress: lasting.export("loggedin", compress=compress) for compress in COMPRESSIONS}


def refused(world: World, bundle: bytes) -> IntegrityError:
    """:returns: why it was; the cache has not changed"""
    before = world.photograph()
    with pytest.raises(IntegrityError) as caught:
        world.bring(bundle)
    assert world.photograph() == before
    assert caught.value.hint
    assert str(world.root / "brought") in caught.value.message
    return caught.value


@pytest.mark.parametrize("compress", COMPRESSIONS)
@hypothesis.given(data=st.data())
def test_any_byte_that_differs(
    lasting: World, bundles: dict[str, bytes], compress: str, data: st.DataObject
) -> None:
    bundle = bytearray(bundles[compress])
    bundle[data.draw(st.integers(0, len(bundle) - 1), "where")] ^= data.draw(
        st.integers(1, 255), "how"
    )
    refused(lasting, bytes(bundle))


@pytest.mark.parametrize("compress", COMPRESSIONS)
@hypothesis.given(data=st.data())
def test_any_length_that_is_shorter(
    lasting: World, bundles: dict[str, bytes], compress: str, data: st.DataObject
) -> None:
    refused(
        lasting,
        bundles[compress][: data.draw(st.integers(0, len(bundles[compress]) - 1), "length")],
    )


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("more", [b"\0", bytes(BLOCK), b"something else", b"\x28\xb5\x2f\xfd"])
def test_whatever_follows(
    lasting: World, bundles: dict[str, bytes], compress: str, more: bytes
) -> None:
    refused(lasting, bundles[compress] + more)


def test_all_parts_of_an_archive_count(lasting: World, bundles: dict[str, bytes]) -> None:
    chosen = random.Random(1)
    bundle = bundles["none"]
    for start in range(0, len(bundle), 4 * BLOCK):
        damaged = bytearray(bundle)
        damaged[start + chosen.randrange(BLOCK)] ^= 1 << chosen.randrange(8)
        refused(lasting, bytes(damaged))


def test_two_frames_with_the_same_content(lasting: World, bundles: dict[str, bytes]) -> None:
    """What zstd itself does not find: another level, another frame, the same content."""
    done = subprocess.run(
        ["zstd", "-19", "-c"], input=bundles["none"], capture_output=True, check=True
    )
    trailer = bundles["zstd"][-12:]
    assert "its checksum is another one" in refused(lasting, done.stdout + trailer).message


def test_the_end_is_read_although_all_is_there(world: World) -> None:
    bundle = world.export(compress="none")
    world.bring(bundle)
    for damaged in (bundle[:-1], bundle[:-1] + b"x", bundle[:-BLOCK]):
        refused(world, damaged)


def test_what_is_no_bundle(lasting: World, tmp_path: Path) -> None:
    for content in (
        b"",
        b"x",
        b"\x28\xb5\x2f\xfd",
        os.urandom(4096),
        bytes(1 << 20),
        PRELUDE[:-BLOCK],
    ):
        refused(lasting, content)
    (tmp_path / "file").write_text("x")
    subprocess.run(["tar", "-C", tmp_path, "-cf", tmp_path / "tar", "file"], check=True)
    error = refused(lasting, (tmp_path / "tar").read_bytes())
    assert "is not a bundle" in error.message
    assert "statepool export" in (error.hint or "")
