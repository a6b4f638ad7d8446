"""
Whatever happens to an archive of a pool: it is found, named by its member, and nothing is restored.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from statepool.archive.compress import compressing
from statepool.archive.definition import BackupType
from statepool.archive.pool_contents import Contents, Index, LogFile, Position
from statepool.archive.pool_reader import Opened, opened, read_index, restore_pool, verify_archive
from statepool.bundles.contents import BLOCK, END, member
from statepool.errors import IntegrityError, StatePoolError, UnsupportedFormat
from statepool.model.digest import Digest
from statepool.pools import layout
from statepool.testing.trees import photograph
from tests.support.pool_archives import Store

EXAMPLES = int(os.environ.get("EXAMPLES", "0"))
KINDS = ["tar", "tar.gz", "tar.zst"]


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A pool with two levels, in several forms; no test changes them."""
    store = Store(tmp_path_factory.mktemp("damage"))
    store.put("install", b"install" * 300)
    store.put("large", bytes(4 << 20) + b"large" * 900, extents=[(4 << 20, 4500)])
    store.archive()
    store.put("new", b"new" * 300, on="install")
    store.archive(1)
    for kind in KINDS[1:]:
        packed = store.archive_path(1, kind)
        with (
            open(packed, "wb") as file,
            compressing(BackupType(kind), file.write, threads=1) as compress,
        ):
            compress(store.archive_path(1).read_bytes())
    return store


def good(store: Store, kind: str) -> bytes:
    """:returns: level 1"""
    return store.archive_path(1, kind).read_bytes()


def refused(store: Store, content: bytes, kind: str = "tar") -> str:
    """
    :returns: what verify says; a restore is refused with the same, and has left nothing
    """
    path = store.root / "damaged"
    path.write_bytes(content)
    digests = [Digest.of(store.archive_path(0).read_bytes(), "blake3")]
    digests.append(Digest.of(good(store, kind), "blake3"))
    found = verify_archive(path, digests[1])
    assert found.problem is not None
    before = photograph(store.root)
    with pytest.raises(IntegrityError) as caught:
        restore_pool([store.archive_path(0), path], store.root / "back", digests=digests)
    assert caught.value.message
    assert caught.value.hint
    assert photograph(store.root) == before
    return found.problem


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_good_is_taken(lasting: Store, kind: str) -> None:
    path = lasting.root / "good"
    path.write_bytes(good(lasting, kind))
    assert verify_archive(path).problem is None
    restore_pool([lasting.archive_path(0), path], lasting.root / kind)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=EXAMPLES or 60)
def test_any_byte_that_differs(lasting: Store, kind: str, data: st.DataObject) -> None:
    content = bytearray(good(lasting, kind))
    at = data.draw(st.integers(0, len(content) - 1), "where")
    content[at] ^= data.draw(st.integers(1, 255), "how")
    problem = refused(lasting, bytes(content), kind)
    if kind == "tar":
        assert any(name in problem for name in (*_names(lasting), "index", "not an archive")), (
            problem
        )


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=EXAMPLES or 40)
def test_any_length_that_is_shorter(lasting: Store, kind: str, data: st.DataObject) -> None:
    content = good(lasting, kind)
    refused(lasting, content[: data.draw(st.integers(0, len(content) - 1), "length")], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [b"\0", bytes(BLOCK), b"something else"])
def test_whatever_follows(lasting: Store, kind: str, more: bytes) -> None:
    refused(lasting, good(lasting, kind) + more, kind)


def test_each_member_is_named(lasting: Store) -> None:
    content = good(lasting, "tar")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    assert {one.name for one in members} <= set(_names(lasting))
    for one in members:
        places = [one.offset] + ([one.offset_data] if one.isreg() else [])
        for at in places:
            damaged = bytearray(content)
            damaged[at] ^= 1
            problem = refused(lasting, bytes(damaged))
            if at == 0:
                assert "is not an archive of a pool" in problem
            elif at == one.offset_data and "archive-1.json" in one.name:
                assert "index" in problem
            else:
                assert one.name in problem


def test_a_level_below_that_is_damaged(lasting: Store) -> None:
    content = bytearray(lasting.archive_path(0).read_bytes())
    content[-3000] ^= 1
    path = lasting.root / "below"
    path.write_bytes(content)
    before = photograph(lasting.root)
    with pytest.raises(IntegrityError):
        restore_pool([path, lasting.archive_path(1)], lasting.root / "back")
    assert photograph(lasting.root) == before


def _names(store: Store) -> list[str]:
    contents = _contents(store.archive_path(1))
    members = [*contents.before_logs, *contents.log_members, *contents.after_data]
    return [name for name, _ in members] + [layout.data(digest) for digest in contents.index.data]


def _contents(path: Path) -> Contents:
    with opened(path) as stream:
        return Opened(stream).read_contents()


# -- archives that others have made ----------------------------------------------------------------


def forged(contents: Contents, **changes: object) -> bytes:
    """:returns: an archive whose index says other things, and is sealed"""
    logs = changes.pop("contents_of_logs", contents.logs)
    assert isinstance(logs, dict)
    index, head = evolve(contents.index, **changes).sealed()  # type: ignore[arg-type]
    made = Contents(index, head, logs, contents.parts)
    parts = [content for _, content in made.before_logs]
    parts += [member(log.path, logs[log.name]) for log in index.logs]
    return b"".join([*parts, END])


def _log(name: str, content: bytes = b"{}") -> tuple[LogFile, ...]:
    return (LogFile(name, len(content), Digest.of_text(content)),)


LIES: dict[str, Callable[[Contents], dict[str, object]]] = {
    "a log elsewhere": lambda one: {
        "logs": _log("../../../etc/passwd"),
        "contents_of_logs": {"../../../etc/passwd": b"{}"},
    },
    "a log with an absolute path": lambda one: {
        "logs": _log("/etc/passwd"),
        "contents_of_logs": {"/etc/passwd": b"{}"},
    },
    "a log that is none": lambda one: {
        "logs": _log("vm1/passwd"),
        "contents_of_logs": {"vm1/passwd": b"{}"},
    },
    "a machine elsewhere": lambda one: {
        "machines": {"../x": Position(1, "a")},
        "logs": (),
    },
    "a machine without a log": lambda one: {
        "machines": {**one.index.machines, "vm9": Position(1, "a")},
    },
    "another last record": lambda one: {"machines": {"vm1": Position(3, "a")}},
    "a later last record": lambda one: {
        "machines": {"vm1": evolve(one.index.machines["vm1"], number=4)}
    },
    "a record before the first": lambda one: {
        "machines": {"vm1": evolve(one.index.machines["vm1"], number=0)}
    },
    "an endless number": lambda one: {
        "machines": {"vm1": evolve(one.index.machines["vm1"], number=10**30)}
    },
    "bytes that no state needs": lambda one: {"data": (*one.index.data, Digest.of(b"x"))},
    "bytes twice": lambda one: {"data": one.index.data * 2},
    "no bytes": lambda one: {"data": ()},
    "a log twice": lambda one: {"logs": one.index.logs * 2},
    "a log of nothing": lambda one: {"logs": tuple(evolve(log, size=0) for log in one.index.logs)},
    "a log without end": lambda one: {
        "logs": tuple(evolve(log, size=1 << 40) for log in one.index.logs)
    },
    "another level": lambda one: {"level": 2},
    "a level below zero": lambda one: {"level": -1},
    "no base": lambda one: {"base": None},
    "another base": lambda one: {"base": "0" * 64},
    "another pool": lambda one: {"pool": evolve(one.index.pool, creator="another")},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies(lasting: Store, lie: str) -> None:
    contents = _contents(lasting.archive_path(1))
    path = lasting.root / "forged"
    path.write_bytes(forged(contents, **LIES[lie](contents)))
    before = photograph(lasting.root)
    with pytest.raises(IntegrityError) as caught:
        restore_pool([lasting.archive_path(0), path], lasting.root / "back")
    assert str(path) in caught.value.message
    assert photograph(lasting.root) == before


def test_the_forger_of_these_tests_can_also_tell_the_truth(lasting: Store) -> None:
    contents = _contents(lasting.archive_path(1))
    content = good(lasting, "tar")
    assert content.startswith(forged(contents)[: -len(END)])


def test_a_newer_format_is_said_to_be_one(lasting: Store) -> None:
    path = lasting.root / "newer"
    path.write_bytes(forged(_contents(lasting.archive_path(1)), format=2))
    with pytest.raises(UnsupportedFormat, match="format 2"):
        read_index(path)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/outside", ".statepool/../../outside", "vm1/../../outside"]
)
@pytest.mark.parametrize(
    "kind",
    [
        tarfile.REGTYPE,
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
    ],
)
@pytest.mark.parametrize("where", ["first", "before the data", "last"])
def test_members_that_lead_elsewhere(lasting: Store, name: str, kind: bytes, where: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else "../../x"
    strange = info.tobuf()
    content = good(lasting, "tar")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        first_data = next(one for one in tar.getmembers() if "/data/" in one.name).offset
    at = {"first": 0, "before the data": first_data, "last": len(content) - len(END)}[where]
    refused(lasting, content[:at] + strange + content[at:])


def test_endless_holes(lasting: Store) -> None:
    """A log can say that a state has exabytes of zeros, which nobody would read to their end."""
    contents = _contents(lasting.archive_path(1))
    (log,) = contents.index.logs
    text = contents.logs[log.name].decode()
    (size,) = re.findall(r'"size":(\d+)', text)
    content = text.replace(f'"size":{size}', f'"size":{1 << 60},"extents":[[0,512]]', 1).encode()
    changed = evolve(log, size=len(content), digest=Digest.of_text(content))
    path = lasting.root / "endless"
    path.write_bytes(forged(contents, logs=(changed,), contents_of_logs={log.name: content}))
    assert "holes" in (verify_archive(path).problem or "")


def test_what_is_no_archive(lasting: Store) -> None:
    for content in (b"", b"x", b"\x28\xb5\x2f\xfd", os.urandom(4096), bytes(1 << 20)):
        refused(lasting, content)


def test_a_bundle_is_no_archive(lasting: Store, tmp_path: Path) -> None:
    from tests.support.bundles import World

    refused(lasting, World(tmp_path).export(compress="none"))


def test_indexes_are_what_they_were(lasting: Store) -> None:
    index, head = read_index(lasting.archive_path(1)).sealed()
    assert Index.read(head, "x") == index
    for at in range(len(head)):
        damaged = bytearray(head)
        damaged[at] ^= 1
        with pytest.raises(StatePoolError):
            Index.read(bytes(damaged), "x")
