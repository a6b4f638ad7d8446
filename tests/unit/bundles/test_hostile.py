"""Bundles that were made to do harm: each is refused for what it is, early, and changes nothing."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from attrs import evolve, field, frozen

from statepool import IntegrityError, NoSpace, StatePoolError, UnsafeImage, UnsupportedFormat
from statepool.bundles import contents as layouts
from statepool.bundles.contents import BLOCK, END, PRELUDE, Contents, data_header, padding
from statepool.model.digest import Digest
from statepool.pools.records import encode
from tests.support.bundles import DISK, World, names
from tests.support.images import GOOD, hostile_images

MIB = 1 << 20


@frozen
class Parts:
    """
    A bundle, in parts that can be exchanged.

    :ivar contents: what it says to have
    :ivar data: the bytes of its files, in their order
    """

    contents: Contents
    data: tuple[bytes, ...]
    prelude: bytes = PRELUDE
    record: bytes | None = None
    headers: dict[int, bytes] = field(factory=dict)
    closing: bytes | None = None

    def built(self) -> bytes:
        record = self.contents.record_file if self.record is None else self.record
        closing = self.contents.closing if self.closing is None else self.closing
        return b"".join([self.prelude, record, *self._files(), closing])

    def _files(self) -> Iterator[bytes]:
        for number, (manifest, data) in enumerate(zip(self.contents.files, self.data, strict=True)):
            places = manifest.extents or ((0, len(data)),)
            packed = b"".join(data[offset : offset + length] for offset, length in places)
            yield self.headers.get(number) or data_header(manifest)
            yield packed + padding(len(packed))

    def with_record(self, **changed: Any) -> Parts:
        """:returns: the same with another record, whose checksum is right"""
        told = {**json.loads(self.contents.record), **changed, "nonce": layouts._NO_NONCE}
        record = encode(told)
        nonce = layouts._checksum(record)
        record = record.replace(layouts._NO_NONCE.encode(), nonce.encode(), 1)
        return evolve(self, contents=Contents(self.contents.manifests, record))

    def with_manifest(self, number: int, **changed: Any) -> Parts:
        """:returns: the same with something else in one manifest"""
        changes = json.loads(self.contents.record)["changes"]
        changes[number]["publish"] |= changed
        return self.with_record(changes=changes)

    @property
    def manifests(self) -> list[dict[str, Any]]:
        return [change["publish"] for change in json.loads(self.contents.record)["changes"]]


def member(
    name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, target: str = "", **how: Any
) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, target
    for key, value in how.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.fixture(scope="module")
def good(lasting: World) -> Parts:
    contents = lasting.contents()
    data = lasting.data()
    return Parts(contents, tuple(data[str(manifest.digest)] for manifest in contents.files))


def refused(
    world: World,
    bundle: bytes,
    kind: type[StatePoolError] = IntegrityError,
    *,
    most: int = 64 * MIB,
) -> StatePoolError:
    """:returns: why it was, at the price of little memory; the cache has not changed"""
    before = world.photograph()
    (world.root / "hostile").write_bytes(bundle)
    tracemalloc.start()
    try:
        with pytest.raises(kind) as caught:
            world.away.import_bundle(world.root / "hostile")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most
    assert world.photograph() == before
    assert caught.value.hint or isinstance(caught.value, UnsafeImage)
    return caught.value


def test_the_one_they_are_made_of_is_good(world: World, good: Parts) -> None:
    world.bring(good.built())
    assert names(world.away) == [f"{DISK} customize", f"{DISK} install"]


ANYTHING: list[tuple[str, Callable[[Parts], bytes]]] = [
    ("a file '../../etc/cron.d/x'", lambda parts: member("../../etc/cron.d/x", size=5)),
    ("a file '/etc/shadow'", lambda parts: member("/etc/shadow")),
    (
        "a symbolic link '.statepool/data'",
        lambda parts: member(".statepool/data", tarfile.SYMTYPE, target="/etc"),
    ),
    ("a hard link 'x'", lambda parts: member("x", tarfile.LNKTYPE, target="/etc/shadow")),
    ("a device 'sda'", lambda parts: member("sda", tarfile.BLKTYPE, devmajor=8)),
    ("a device 'mem'", lambda parts: member("mem", tarfile.CHRTYPE, devmajor=1)),
    ("a FIFO 'wait'", lambda parts: member("wait", tarfile.FIFOTYPE)),
    ("a directory 'more'", lambda parts: member("more", tarfile.DIRTYPE)),
    ("an extended header", lambda parts: member("x", tarfile.XHDTYPE, size=1 << 32)),
    ("something 'x'", lambda parts: member("x", tarfile.XGLTYPE, size=1 << 32)),
    (
        "something '././@LongLink'",
        lambda parts: member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=1 << 40),
    ),
    ("something 'sparse'", lambda parts: member("sparse", tarfile.GNUTYPE_SPARSE, size=1 << 40)),
    (
        "a file '.statepool/data/blake3p-",
        lambda parts: member(data_header(parts.contents.files[0])[:87].decode(), mode=0o4777),
    ),
    (
        "a file",
        lambda parts: member(data_header(parts.contents.files[0])[:87].decode(), size=1 << 50),
    ),
    ("an extended header", lambda parts: data_header(parts.contents.files[1])),
    ("something else", lambda parts: b"\xff" * BLOCK),
    ("something else", lambda parts: bytes(BLOCK)),
]


@pytest.mark.parametrize(("told", "header"), ANYTHING)
@pytest.mark.parametrize("place", ["prelude", "record", "data", "view", "end"])
def test_anything_where_it_has_no_place(
    lasting: World, good: Parts, place: str, told: str, header: Callable[[Parts], bytes]
) -> None:
    strange = header(good)
    built = {
        "prelude": evolve(good, prelude=PRELUDE[:BLOCK] + strange + PRELUDE[BLOCK:]),
        "record": evolve(good, record=strange + good.contents.record_file),
        "data": evolve(good, headers={0: strange}),
        "view": evolve(good, closing=strange + good.contents.closing),
        "end": evolve(good, closing=good.contents.closing[: -len(END)] + strange + END),
    }[place].built()
    if place == "end" and strange == bytes(BLOCK):
        told = "does not end where it should"
    error = refused(lasting, built)
    assert told in error.message or place == "record", error.message


def test_a_file_twice(lasting: World, good: Parts) -> None:
    first = good.contents.files[0]
    twice = data_header(first) + good.data[0] + padding(len(good.data[0]))
    refused(lasting, evolve(good, closing=twice + good.contents.closing).built())
    refused(lasting, evolve(good, headers={1: twice + data_header(good.contents.files[1])}).built())


def test_many_members(lasting: World, good: Parts) -> None:
    many = io.BytesIO()
    for number in range(100):
        many.write(member(f"vm1/disk/{number}.qcow2", tarfile.SYMTYPE, target="x"))
    packed = zstandard.compress(evolve(good, closing=many.getvalue() * 100 + END).built())
    error = refused(lasting, packed)
    assert "vm1/disk/0.qcow2" in error.message


def test_a_record_that_is_too_long(lasting: World, good: Parts) -> None:
    for size in (layouts.MOST_RECORD + 1, (1 << 33) - 1, 1 << 40):
        error = refused(
            lasting, evolve(good, record=member(good.contents.record_path, size=size)).built()
        )
        assert "has no record" in error.message


@pytest.mark.parametrize(
    "content",
    [
        b"{" * layouts.MOST_RECORD,
        b"[" * layouts.MOST_RECORD,
        b'{"format": 1' + b"0" * (layouts.MOST_RECORD - 13) + b"}",
        b"\xff" * 1000,
        b"null",
        b"",
    ],
    ids=["objects", "arrays", "a number", "no text", "null", "nothing"],
)
def test_a_record_that_is_none(lasting: World, good: Parts, content: bytes) -> None:
    refused(
        lasting, evolve(good, record=layouts.member(good.contents.record_path, content)).built()
    )


RAM = {"object": "vm1", "state": "x", "kind": "ram", "digest": str(Digest.of(b""))}

LIES: list[tuple[str, Callable[[Parts], Parts]]] = [
    ("is not a time", lambda parts: parts.with_manifest(0, created=-1)),
    ("no time", lambda parts: parts.with_record(time=1e300)),
    ("has a bad name", lambda parts: parts.with_manifest(0, state="../../x")),
    ("has a bad name", lambda parts: parts.with_manifest(0, object="../vm1/disk")),
    ("not a blake3 digest", lambda parts: parts.with_manifest(0, digest="blake3:../../../x")),
    ("unknown digest algorithm", lambda parts: parts.with_manifest(0, digest="md5:00")),
    ("has no digest", lambda parts: parts.with_manifest(0, digest=None)),
    ("kind ram to vm1/disk", lambda parts: parts.with_manifest(0, kind="ram")),
    ("size", lambda parts: parts.with_manifest(0, size=-1)),
    ("extents", lambda parts: parts.with_manifest(0, extents=[[0, 1024], [512, 1024]])),
    ("extents", lambda parts: parts.with_manifest(0, extents=[[1024, 512], [0, 512]])),
    ("extents", lambda parts: parts.with_manifest(0, extents=[[0, 1 << 40]])),
    (
        "extents",
        lambda parts: parts.with_manifest(
            0, extents=[[1024 * number, 512] for number in range(1001)]
        ),
    ),
    ("that is no blocks of tar", lambda parts: parts.with_manifest(0, extents=[[1, 512]])),
    ("that is no blocks of tar", lambda parts: parts.with_manifest(0, extents=[[0, 511]])),
    ("bytes of holes", lambda parts: parts.with_manifest(0, size=1 << 62, extents=[[0, 512]])),
    ("not only publish", lambda parts: parts.with_record(changes=[{"remove": parts.manifests[0]}])),
    (
        "not only publish",
        lambda parts: parts.with_record(
            changes=[{"publish": parts.manifests[0], "supersedes": "blake3:" + "0" * 64}]
        ),
    ),
    ("changes nothing", lambda parts: parts.with_record(changes=[])),
    (
        "other states",
        lambda parts: parts.with_record(
            changes=[
                {"publish": parts.manifests[1] | {"parent": None}},
                {"publish": parts.manifests[0]},
            ]
        ),
    ),
    (
        "other states",
        lambda parts: parts.with_record(
            changes=[
                {"publish": one} for one in (parts.manifests[0] | {"state": "x"}, *parts.manifests)
            ]
        ),
    ),
    ("install", lambda parts: parts.with_record(changes=[{"publish": parts.manifests[1]}])),
    (
        "other states",
        lambda parts: parts.with_record(
            changes=[{"publish": one} for one in reversed(parts.manifests)]
        ),
    ),
    (
        "over what is there",
        lambda parts: parts.with_record(
            changes=[{"publish": one} for one in (parts.manifests[0], *parts.manifests)]
        ),
    ),
    ("the same bytes", lambda parts: parts.with_manifest(1, digest=parts.manifests[0]["digest"])),
    ("without its machine", lambda parts: parts.with_record(changes=[{"publish": RAM}])),
]


@pytest.mark.parametrize(("told", "lie"), LIES)
def test_a_record_that_lies_about_the_states(
    lasting: World, good: Parts, told: str, lie: Callable[[Parts], Parts]
) -> None:
    error = refused(lasting, lie(good).built())
    assert told in error.message
    assert str(lasting.root / "hostile") in error.message


def test_a_chain_that_is_too_deep(lasting: World, good: Parts) -> None:
    below, changes = None, []
    for number in range(2000):
        digest = str(Digest.of(str(number).encode()))
        state = {
            "object": DISK,
            "state": f"s{number}",
            "size": 1,
            "digest": digest,
            "parent": below,
        }
        changes.append({"publish": state})
        below = {"state": f"s{number}", "digest": digest}
    error = refused(lasting, good.with_record(changes=changes).built(), UnsafeImage)
    assert "has 2000 states, more than 256" in error.message


def test_a_record_of_as_many_places_as_fit(lasting: World, good: Parts) -> None:
    """What is made of a record takes many times its length, and no more than that."""
    extents = [[1024 * number, 512] for number in range(1000)]
    changes = [
        {
            "publish": {
                "object": DISK,
                "state": f"s{number}",
                "size": 1 << 20,
                "digest": str(Digest.of(str(number).encode())),
                "extents": extents,
            }
        }
        for number in range(layouts.MOST_RECORD // 14_500)
    ]
    bundle = good.with_record(changes=changes)
    assert layouts.MOST_RECORD * 3 // 4 < len(bundle.contents.record) <= layouts.MOST_RECORD
    refused(lasting, bundle.built(), most=256 * MIB)


def test_a_record_of_a_newer_format(lasting: World, good: Parts) -> None:
    error = refused(lasting, good.with_record(format=2).built(), UnsupportedFormat)
    assert error.hint == "install a newer statepool"


def test_lies_about_the_bytes(lasting: World, good: Parts) -> None:
    root = good.manifests[0]
    longer = good.with_manifest(0, size=root["size"] + BLOCK)
    shorter = good.with_manifest(0, size=root["size"] - BLOCK)
    another = good.with_manifest(1, digest=str(Digest.of(b"another")))
    for lying in (longer, shorter, another):
        bundle = evolve(lying, contents=Contents.read(lying.contents.record, "the bundle")).built()
        refused(lasting, bundle)
    swapped = bytes([good.data[0][0] ^ 1]) + good.data[0][1:]
    error = refused(lasting, evolve(good, data=(swapped, good.data[1])).built())
    assert "not blake3" in error.message


def test_what_does_not_fit(lasting: World, good: Parts) -> None:
    lying = good.with_manifest(0, size=1 << 60, extents=None)
    bundle = evolve(lying, contents=Contents.read(lying.contents.record, "the bundle")).built()
    refused(lasting, bundle, NoSpace)


def test_an_image_far_longer_than_its_disk(lasting: World, good: Parts) -> None:
    """Known from its header, before the hole behind it is hashed."""
    image = GOOD.build()
    image += bytes(-len(image) % BLOCK)
    lying = good.with_manifest(0, size=1 << 39, extents=[[0, len(image)]])
    contents = Contents.read(lying.contents.record, "the bundle")
    error = refused(
        lasting, evolve(lying, contents=contents, data=(image, good.data[1])).built(), UnsafeImage
    )
    assert isinstance(error, UnsafeImage)
    assert error.check == "proportion"


def test_hostile_images(lasting: World, good: Parts, tmp_path: Path) -> None:
    """
    Each is refused by the check that would refuse it in any other pool, but for absolute backing
    names: of these the directory is ignored, and what is left is not the name of its parent.
    """
    (tmp_path / "images").mkdir()
    refusals = {}
    for image in hostile_images(tmp_path / "images"):
        if image.walk or image.check == "regular-file":
            continue  # there are only regular files in a bundle, and their chain is in the record
        content = image.path.read_bytes()
        manifest = {
            "object": DISK,
            "state": "x",
            "size": len(content),
            "digest": str(Digest.of(content)),
        }
        lying = good.with_record(changes=[{"publish": manifest}])
        contents = Contents.read(lying.contents.record, "the bundle")
        error = refused(
            lasting, evolve(lying, contents=contents, data=(content,)).built(), UnsafeImage
        )
        assert isinstance(error, UnsafeImage)
        refusals[image.name] = (image.check, error.check)
    others = {name for name, (expected, check) in refusals.items() if expected != check}
    assert others == {
        name for name, (expected, _) in refusals.items() if expected == "backing-absolute"
    }
    assert len(refusals) > 50


def test_a_holed_map_of_its_own(lasting: World, good: Parts) -> None:
    """What the map of tar says is not asked: it must be that of the record."""
    manifest = evolve(good.contents.files[0], extents=((0, BLOCK), (2 * BLOCK, BLOCK)))
    refused(lasting, evolve(good, headers={0: data_header(manifest)}).built())


def test_a_zstd_bomb(lasting: World, good: Parts) -> None:
    zeros = zstandard.ZstdCompressor(level=1).compressobj()
    bomb = b"".join(zeros.compress(bytes(16 * MIB)) for _ in range(128)) + zeros.flush()
    assert len(bomb) < MIB // 4
    for beginning in (good.built(), PRELUDE, good.built()[: len(PRELUDE) + 3 * BLOCK]):
        refused(lasting, zstandard.compress(beginning) + bomb)


def test_a_frame_that_wants_much_memory(lasting: World, good: Parts) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    error = refused(lasting, packed.compress(good.built()) + packed.flush())
    assert "zstd" in error.message
