"""What the bytes of a bundle are: the same for ever, and what tar takes for an archive."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

import statepool
from statepool import Digest, Kind, Manifest, Parent
from statepool.bundles.contents import MOST_RECORD, Contents, data_header, padding
from statepool.bundles.holes import BLOCK, data_of
from statepool.bundles.place import made
from statepool.transports.failures import A_FILE

ROOT = b"R" * 1000
TIP = b"T" * BLOCK + bytes(3 * BLOCK) + b"T" * 100 + bytes(BLOCK)


def named(data: bytes) -> Digest:
    """:returns: the digest of it, by an algorithm that stays, whatever writers use one day"""
    return Digest.of(data, "blake3")


def chain(*names: str) -> tuple[Manifest, ...]:
    """:returns: a state on another one, tip first"""
    image, root, tip = names or ("vm1/disk", "install", "customize")
    below = Manifest(
        image,
        root,
        size=len(ROOT),
        digest=named(ROOT),
        created=1795182437.25,
        labels={"b": "1", "a": "ä"},
    )
    parent = Parent(root, named(ROOT))
    extents = ((0, BLOCK), (4 * BLOCK, BLOCK))
    return Manifest(
        image,
        tip,
        size=len(TIP),
        digest=named(TIP),
        parent=parent,
        created=1795182438.5,
        extents=extents,
    ), below


def archive(contents: Contents) -> bytes:
    """:returns: a bundle that is not compressed"""
    parts = [contents.beginning]
    for manifest in contents.files:
        data = ROOT if manifest.digest == named(ROOT) else TIP
        packed = b"".join(
            data[start : start + length] for start, length in manifest.extents or ((0, len(data)),)
        )
        parts += [data_header(manifest), packed, padding(len(packed))]
    return b"".join([*parts, contents.closing])


def test_the_bytes_stay_what_they_are() -> None:
    """Bundles are kept for years: whoever has to change this sum needs another format."""
    assert (
        hashlib.sha256(archive(Contents.of(chain()))).hexdigest()
        == "8ebca0b4f2dcb4b83d4d0cf614150a417fd70b09a088db37286f0b829a2152d4"
    )


def test_what_does_not_matter_changes_nothing() -> None:
    tip, root = chain()
    other = Manifest(
        **{
            **vars_of(root),
            "labels": {"a": "ä", "b": "1"},
            "origin": Digest.of(b"x"),
            "extents": ((0, len(ROOT)),),
        }
    )
    assert Contents.of((tip, other)) == Contents.of((tip, root))


def vars_of(manifest: Manifest) -> dict[str, object]:
    return {
        name: getattr(manifest, name) for name in ("object", "state", "size", "digest", "created")
    }


def test_as_tar_sees_it() -> None:
    with tarfile.open(fileobj=io.BytesIO(archive(Contents.of(chain())))) as opened:
        members = opened.getmembers()
        names = [member.name for member in members]
        assert names[:9] == [
            ".statepool",
            *(
                f".statepool/{name}"
                for name in ("data", "log", "incoming", "trash", "locks", "uses", "pool.json")
            ),
            ".statepool/log/vm1/00000000000000000001.json",
        ]
        assert names[9:11] == [f".statepool/data/{named(data).file_name}" for data in (ROOT, TIP)]
        assert names[11:] == ["vm1/disk/install.qcow2", "vm1/disk/customize.qcow2"]
        assert {
            (member.uid, member.gid, member.uname, member.gname, member.mtime) for member in members
        } == {(0, 0, "", "", 0)}
        for member, data in zip(members[9:11], (ROOT, TIP), strict=True):
            file = opened.extractfile(member)
            assert file is not None
            assert file.read() == data
        assert members[10].sparse == [(0, BLOCK), (4 * BLOCK, BLOCK), (len(TIP), 0)]


@pytest.mark.parametrize("length", [1, 30, 100, 128])
def test_names_of_any_length(length: int, tmp_path: Path) -> None:
    machine, image, root, tip = (letter * length for letter in "midt")
    contents = Contents.of(chain(f"{machine}/{image}", root, tip))
    assert Contents.read(contents.record, "the bundle") == contents
    with tarfile.open(fileobj=io.BytesIO(archive(contents))) as opened:
        names = opened.getnames()
    assert names[-1] == f"{machine}/{image}/{tip}.qcow2"
    assert contents.record_path in names


def test_files_larger_than_the_old_header_has_room_for() -> None:
    large = Manifest("vm1/disk", "a", size=1 << 40, digest=Digest.of(b""))
    info = tarfile.TarFile.open(fileobj=io.BytesIO(data_header(large) + bytes(1024))).next()
    assert info is not None
    assert (info.name, info.size) == (f".statepool/data/{Digest.of(b'').file_name}", 1 << 40)


def test_a_digest_that_two_states_have_is_there_once() -> None:
    first = Manifest("vm1/a", "on", size=len(ROOT), digest=named(ROOT))
    second = Manifest("vm1/b", "on", size=len(ROOT), digest=named(ROOT))
    members = {"vm1/a": named(ROOT), "vm1/b": named(ROOT)}
    contents = Contents.of((Manifest("vm1", "on", Kind.MACHINE, members=members), first, second))
    assert [manifest.object for manifest in contents.files] == ["vm1/a"]
    assert Contents.read(contents.record, "the bundle") == contents


def test_more_texts_than_a_reader_takes() -> None:
    labels = {f"{number:04096}": "x" * 4096 for number in range(64)}
    state = Manifest("vm1/disk", "s0", size=1, digest=Digest.of(b"0"), labels=labels)
    parts = [state]
    for number in range(1, 40):
        digest = Digest.of(str(number).encode())
        assert parts[0].digest is not None
        parent = Parent(parts[0].state, parts[0].digest)
        parts.insert(
            0,
            Manifest("vm1/disk", f"s{number}", size=1, digest=digest, labels=labels, parent=parent),
        )
    with pytest.raises(statepool.IntegrityError, match=f"more than the {MOST_RECORD}"):
        Contents.of(parts)


# -- holes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ()),
        (b"x", ()),
        (bytes(10), ()),
        (b"x" * BLOCK, ()),
        (b"x" * (2 * BLOCK), ()),
        (b"x" + bytes(2 * BLOCK), ((0, BLOCK),)),
        (bytes(BLOCK) + b"x", ((BLOCK, 1),)),
        (bytes(BLOCK - 1) + b"x" + bytes(BLOCK), ((0, BLOCK),)),
        (bytes(BLOCK) + b"x" * BLOCK + bytes(BLOCK) + b"x", ((BLOCK, BLOCK), (3 * BLOCK, 1))),
        (bytes(BLOCK) + b"x" * (BLOCK + 1) + bytes(3 * BLOCK), ((BLOCK, 2 * BLOCK),)),
    ],
)
def test_where_a_file_has_data(
    tmp_path: Path, content: bytes, expected: tuple[tuple[int, int], ...]
) -> None:
    """However the file was written."""
    (tmp_path / "dense").write_bytes(content)
    with open(tmp_path / "sparse", "wb") as file:
        for start in range(0, len(content), 4096):
            part = content[start : start + 4096]
            if part.strip(b"\0"):
                os.pwrite(file.fileno(), part, start)
        file.truncate(len(content))
    for name in ("dense", "sparse"):
        with open(tmp_path / name, "rb") as file:
            assert data_of(file.fileno(), len(content), A_FILE) == expected


def test_not_more_places_than_a_manifest_has(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb+") as file:
        for number in range(2500):
            os.pwrite(file.fileno(), b"x", number * 2 * BLOCK)
        found = data_of(file.fileno(), 5000 * BLOCK, A_FILE)
    assert len(found) == 1000


# -- the file that is made -------------------------------------------------------------------------


def test_a_file_that_fails_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("old")

    def fail(name: str, *, overwrite: bool) -> None:
        with made(tmp_path / name, overwrite=overwrite) as (descriptor, temporary):
            os.write(descriptor, b"half")
            assert temporary.read_bytes() == b"half"
            raise KeyboardInterrupt

    for name, overwrite in (("new", False), ("there", True)):
        with pytest.raises(KeyboardInterrupt):
            fail(name, overwrite=overwrite)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there", "old")]


def test_a_file_of_another_process_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(statepool.FileInTheWay),
        made(tmp_path / "file", overwrite=False) as (descriptor, _),
    ):
        os.write(descriptor, b"ours")
        (tmp_path / "file").write_text("theirs")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "theirs")]
    with made(tmp_path / "file", overwrite=True) as (descriptor, _):
        os.write(descriptor, b"ours")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "ours")]
