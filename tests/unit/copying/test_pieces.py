"""
States of several pieces: their lists come with them, tell what is damaged, and what of an
interrupted transfer is worth going on with.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import statepool
from statepool.cache.cache import Cache
from statepool.care.gc import gc_pool
from statepool.care.verify import verify
from statepool.copying.push import Push
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Manifest
from statepool.model.outcomes import Checked
from statepool.model.pieces import LENGTH, PIECE, ZEROS, Pieces, count
from statepool.pools import layout
from statepool.pools.pieces import is_list_wrong, read_list
from statepool.pools.pool import Pool
from statepool.testing.memory import MemoryStore, MemoryTransport
from statepool.transports.registry import open_transport

MIB = 1 << 20


@pytest.fixture
def made(tmp_path: Path, make_image: Callable[..., Path]) -> Manifest:
    """
    A state of six pieces and a bit, two of which are a hole, in the cache and the pool of ``lab``.
    """
    image = make_image(
        tmp_path / "work.qcow2", 64 * MIB, writes=[(0, 15 * MIB, 7), (15 * MIB, MIB, 8)]
    )
    os.truncate(image, 25 * MIB)
    statepool.init(tmp_path / "pool")
    states = statepool.StatePool(
        cache=tmp_path / "cache", sources=[Location("file", str(tmp_path / "pool"))]
    )
    states.image("vm1/disk").set("install", source=image)
    found = opened(tmp_path / "cache").find(statepool.StateId("vm1/disk", "install"))
    assert found is not None
    assert found.size == 25 * MIB
    return found


def opened(path: Path) -> Pool:
    return Pool(open_transport(Location("file", str(path))))


def list_in(root: Path, manifest: Manifest) -> Path:
    assert manifest.digest is not None
    return root / layout.list_of(layout.data(manifest.digest))


def bytes_in(root: Path, manifest: Manifest) -> Path:
    assert manifest.digest is not None
    return root / layout.data(manifest.digest)


def damage(path: Path, *offsets: int) -> None:
    path.chmod(0o644)
    with path.open("rb+") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(b"rot")


def only(pool: Pool, **options: Any) -> Checked:
    (found,) = verify(pool, None, None, **options)
    return found


# -- lists -----------------------------------------------------------------------------------------


def test_lists_come_with_the_bytes(lab: Any, tmp_path: Path, made: Manifest) -> None:
    assert made.digest is not None
    assert made.digest == Digest.of(bytes_in(tmp_path / "pool", made).read_bytes())
    lab.fetch(lab.cache("copy"), lab.pool(), "install")
    lab.fetch(lab.cache("link"), lab.pool(scheme="link"), "install")
    lab.pool("other")
    statepool.sync(tmp_path / "pool", tmp_path / "other")
    for name in ("cache", "pool", "copy", "link", "other"):
        found = read_list(opened(tmp_path / name).transport, made.digest, made.size)
        assert found is not None, name
        assert len(found) == count(made.size) == 7


def test_adopted_states_have_lists(tmp_path: Path, make_image: Callable[..., Path]) -> None:
    make_image(tmp_path / "pool/vm1/disk/install.qcow2", writes=[(0, 4 * MIB, 7)])
    statepool.init(tmp_path / "pool")
    (adopted,) = statepool.adopt(tmp_path / "pool")
    pool = opened(tmp_path / "pool")
    manifest = pool.find(statepool.StateId("vm1/disk", "install"))
    assert manifest is not None
    assert manifest.digest is not None
    assert str(manifest.digest) == adopted.digest
    assert read_list(pool.transport, manifest.digest, manifest.size) is not None


def test_a_list_goes_with_the_state(lab: Any, tmp_path: Path, made: Manifest) -> None:
    for name, scheme in (("copy", "file"), ("link", "link")):
        cache = lab.cache(name)
        lab.fetch(cache, lab.pool(scheme=scheme), "install")
        cache.pool.remove(made.id)
        assert made.digest is not None
        cache.drop({made.digest})
        assert list((tmp_path / name / layout.DATA).iterdir()) == []
    pool = lab.pool()
    pool.remove(made.id)
    gc_pool(pool)
    assert list((tmp_path / "pool" / layout.DATA).iterdir()) == []


def test_a_cache_makes_a_list_that_is_missing_or_wrong(
    lab: Any, tmp_path: Path, made: Manifest
) -> None:
    cache, path = lab.cache(), list_in(tmp_path / "cache", made)
    right = path.read_bytes()
    path.unlink()
    assert only(cache.pool, cache=cache) == Checked(
        str(cache.pool), "vm1/disk", "install", str(made.digest), made.size
    )
    assert path.read_bytes() == right
    for wrong in (b"", right[:-1], right + b"x", right[LENGTH:] + right[:LENGTH]):
        path.write_bytes(wrong)
        found = only(cache.pool, cache=cache)
        assert found.problem is None
        assert "has been made anew" in (found.note or "")
        assert path.read_bytes() == right


def test_a_wrong_list_of_a_source_is_told_of_and_ignored(
    lab: Any, tmp_path: Path, made: Manifest
) -> None:
    path = list_in(tmp_path / "pool", made)
    path.write_bytes(b"rot")
    found = only(lab.pool())
    assert found.problem is None
    assert "is ignored: remove it" in (found.note or "")
    assert path.read_bytes() == b"rot"
    fetched = lab.fetch(lab.cache("other"), lab.pool(), "install")
    assert fetched.chain[0].digest == made.digest


def test_a_list_that_is_no_file_is_ignored(lab: Any, tmp_path: Path, made: Manifest) -> None:
    assert made.digest is not None
    for number, make in enumerate(
        (os.mkdir, os.mkfifo, lambda path: path.symlink_to("/etc/passwd"))
    ):
        for name in ("pool", "cache"):
            path = list_in(tmp_path / name, made)
            (path.rmdir if path.is_dir() else path.unlink)()
            make(path)
            assert is_list_wrong(opened(tmp_path / name).transport, made.digest, made.size)
        assert only(lab.pool()).problem is None
        cache = lab.cache()
        assert only(cache.pool, cache=cache).problem is None
        lab.fetch(lab.cache(f"other{number}"), lab.pool(), "install")
        path = list_in(tmp_path / "cache", made)
        assert path.is_dir() or read_list(cache.pool.transport, made.digest, made.size) is not None


# -- damage ----------------------------------------------------------------------------------------


def test_damaged_pieces_are_named(lab: Any, tmp_path: Path, made: Manifest) -> None:
    damage(bytes_in(tmp_path / "pool", made), PIECE, 2 * PIECE + 5, 24 * MIB)
    found = only(lab.pool())
    assert found.damaged == ((PIECE, 2 * PIECE), (24 * MIB, MIB))
    assert (found.problem or "").endswith(
        f"; damaged are the bytes {PIECE} to {3 * PIECE - 1}, {24 * MIB} to {25 * MIB - 1}"
    )
    cache = lab.cache()
    assert only(cache.pool, cache=cache).damaged == ()
    damage(cache.data(made.digest), 0)
    assert only(cache.pool, cache=cache).damaged == ((0, PIECE),)
    list_in(tmp_path / "pool", made).unlink()
    assert only(lab.pool()).damaged == ()
    assert only(lab.pool(), beside=cache.pool).damaged == found.damaged, (
        "the list of another pool is as good"
    )


def test_the_only_piece_is_the_damaged_one(lab: Any, tmp_path: Path) -> None:
    (small,) = lab.chain(lab.pool(), "small")
    damage(bytes_in(tmp_path / "pool", small), 5000)
    found = only(lab.pool())
    assert found.damaged == ((0, small.size),)
    assert "damaged are" not in (found.problem or "")


def test_a_message_names_a_few_of_many_places(lab: Any, made: Manifest) -> None:
    size = 20 * PIECE
    wanted = Pieces((ZEROS + bytes(LENGTH)) * 10)
    digest, pool = Digest.of_pieces(wanted, size), lab.pool("large")
    staging = pool.stage([digest])
    pool.transport.create(staging.path(digest), bytes(size))
    staging.list_pieces(digest, size, wanted)
    pool.publish([evolve(made, size=size, digest=digest, extents=())], staging)
    staging.end()
    found = only(pool)
    assert found.damaged == tuple((number * PIECE, PIECE) for number in range(1, 20, 2))
    assert (found.problem or "").endswith(f"{9 * PIECE} to {10 * PIECE - 1} and 5 more places")


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_states_with_other_names_keep_them(
    lab: Any, tmp_path: Path, made: Manifest, algorithm: str
) -> None:
    content = bytes_in(tmp_path / "pool", made).read_bytes()
    old = evolve(made, digest=Digest.of(content, algorithm))
    assert old.digest is not None
    pool = lab.pool("old")
    staging = pool.stage([old.digest])
    pool.transport.create(staging.path(old.digest), content)
    pool.publish([old], staging)
    staging.end()
    cache = lab.cache("new")
    assert lab.fetch(cache, pool, "install").chain[0].digest == old.digest
    assert only(cache.pool, cache=cache).problem is None
    lab.pool("further")
    statepool.sync(tmp_path / "new", tmp_path / "further")
    assert lab.data(opened(tmp_path / "further")) == {old.digest}
    damage(cache.data(old.digest), 0)
    found = only(cache.pool, cache=cache)
    assert (found.damaged, f"not {old.digest}" in (found.problem or "")) == ((), True)


# -- going on --------------------------------------------------------------------------------------


@pytest.fixture
def far(lab: Any, made: Manifest) -> Pool:
    """A pool to and from which transfers can be resumed."""
    pool = Pool(MemoryTransport(MemoryStore(), resumes=True))
    pool.create()
    Push(lab.cache(), pool).run([made])
    return pool


def leave(cache: Cache, manifest: Manifest, content: bytes) -> None:
    assert manifest.digest is not None
    cache.pool.transport.create(layout.part("somebody", manifest.digest), content)


@pytest.mark.parametrize(
    ("length", "wrong", "resumed"),
    [
        (3 * PIECE, None, 3 * PIECE),
        (3 * PIECE + 99, None, 3 * PIECE),
        (3 * PIECE, PIECE + 1, 2 * PIECE),
        (3 * PIECE, 0, 2 * PIECE),
        (PIECE - 1, None, 0),
        (25 * MIB, None, 25 * MIB),
        (25 * MIB, 24 * MIB, 24 * MIB),
    ],
)
def test_a_get_goes_on_with_what_the_list_proves(
    lab: Any,
    tmp_path: Path,
    made: Manifest,
    far: Pool,
    length: int,
    wrong: int | None,
    resumed: int,
) -> None:
    beginning = bytearray(bytes_in(tmp_path / "pool", made).read_bytes()[:length])
    if wrong is not None:
        beginning[wrong] ^= 1
    cache = lab.cache("other")
    leave(cache, made, bytes(beginning))
    fetched = lab.fetch(cache, far, "install")
    assert (fetched.resumed, fetched.again) == (resumed, 0)
    assert cache.data(made.digest).read_bytes() == bytes_in(tmp_path / "pool", made).read_bytes()
    assert read_list(cache.pool.transport, made.digest, made.size) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [None, b"", b"rot" * 1000], ids=["none", "empty", "wrong"])
@pytest.mark.parametrize("wrong", [False, True])
def test_without_a_list_the_digest_tells_in_the_end(
    lab: Any, tmp_path: Path, made: Manifest, far: Pool, content: bytes | None, wrong: bool
) -> None:
    assert made.digest is not None
    far.transport.remove(layout.list_of(layout.data(made.digest)))
    if content is not None:
        far.transport.create(layout.list_of(layout.data(made.digest)), content)
    whole = bytes_in(tmp_path / "pool", made).read_bytes()
    cache = lab.cache("other")
    leave(cache, made, b"x" * 5000 if wrong else whole[:5000])
    fetched = lab.fetch(cache, far, "install")
    assert fetched.resumed == (0 if wrong else 5000)
    assert cache.data(made.digest).read_bytes() == whole
    assert read_list(cache.pool.transport, made.digest, made.size) is not None


def test_a_push_goes_on_with_the_pieces_that_are_there(
    lab: Any, tmp_path: Path, made: Manifest
) -> None:
    assert made.digest is not None
    whole = bytes_in(tmp_path / "pool", made).read_bytes()
    pool = Pool(MemoryTransport(MemoryStore(), resumes=True))
    pool.create()
    left = bytearray(whole[: 4 * PIECE])
    left[3 * PIECE] ^= 1
    pool.transport.create(layout.part("somebody", made.digest), bytes(left))
    stored = Push(lab.cache(), pool).run([made])
    assert stored.resumed == 3 * PIECE
    assert pool.transport.read(layout.data(made.digest)) == whole
    assert read_list(pool.transport, made.digest, made.size) is not None
