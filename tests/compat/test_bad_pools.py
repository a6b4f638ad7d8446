"""
Pools that are damaged, foreign, full or closed, and records that lie: each gives one clear line and
its exit code, and changes nothing.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import statepool
from statepool.errors import Conflict, DigestMismatch, NoSpace
from statepool.model.digest import Digest
from statepool.model.manifest import Manifest, Parent
from statepool.pools import layout
from statepool.testing.trees import photograph
from tests.support.images import CHILD

KIB = 1 << 10
MIB = 1 << 20

REFUSED, INTEGRITY, TRANSPORT, NO_SPACE = 4, 5, 7, 8

Make = Callable[..., Path]
Write = Callable[[Path, Iterable[tuple[int, int, int]]], None]


# -- parents ---------------------------------------------------------------------------------------


def test_a_child_whose_parent_is_not_in_the_log(place: Any) -> None:
    """A record that only another implementation could have written."""
    with pytest.raises(Conflict, match="is not there"):
        place.forge(
            place.pool, "orphan", CHILD.build(), parent=Parent("parent", Digest.of(b"lost"))
        )
    with pytest.raises(Conflict, match="is there with the digest"):
        place.forge(
            place.pool, "orphan", CHILD.build(), parent=Parent("install", Digest.of(b"other"))
        )


def test_a_parent_whose_bytes_are_gone(place: Any) -> None:
    install = place.data_file(place.pool, "install")
    install.unlink()
    cache = place.other_cache()
    place.refused(TRANSPORT, "get", "vm1/disk", "customize", cache=cache)


def test_a_parent_with_another_digest(place: Any) -> None:
    install = place.data_file(place.pool, "install")
    flip(install, 128 * KIB)
    cache = place.other_cache()
    line = place.refused(INTEGRITY, "get", "vm1/disk", "customize", cache=cache)
    assert install.name.replace("-", ":") in line  # what was promised ...
    assert str(Digest.of(install.read_bytes())) in line  # ... and what is there


def test_a_child_that_names_another_parent_than_its_manifest(place: Any) -> None:
    parent = Manifest("vm1/disk", "install", digest=None).state
    digest = Digest.from_file_name(place.data_file(place.pool, "install").name)
    assert digest is not None
    place.forge(
        place.pool,
        "child",
        evolve(CHILD, backing=b"other.qcow2").build(),
        parent=Parent(parent, digest),
    )
    place.forge(place.pool, "alone", CHILD.build())
    cache = place.other_cache()
    statepool.StatePool(cache, [place.pool]).image("vm1/disk").get("install")
    assert "'parent'" in place.refused(INTEGRITY, "get", "vm1/disk", "child", cache=cache)
    assert "'parent'" in place.refused(INTEGRITY, "get", "vm1/disk", "alone", cache=cache)


def flip(path: Path, offset: int) -> None:
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o444)


# -- pools -----------------------------------------------------------------------------------------


def test_a_pool_that_is_an_empty_directory(place: Any) -> None:
    (place.root / "mount").mkdir()
    for words in (
        ("show",),
        ("tree",),
        ("get", "vm1/disk", "nothing"),
        ("check", "vm1/disk", "nothing"),
        ("verify",),
        ("gc", "--everywhere"),
    ):
        line = place.refused(TRANSPORT, *words, source=place.root / "mount")
        assert "is not a pool" in line
        assert "statepool init" in line


def test_storing_in_an_empty_directory(place: Any) -> None:
    (place.root / "mount").mkdir()
    code, _, err = place.shell(
        "set", "vm1/disk", "new", "--from", place.work, source=place.root / "mount"
    )
    assert (code, err.count("\n")) == (TRANSPORT, 1)
    assert "is not a pool" in err
    assert list((place.root / "mount").iterdir()) == []


def test_a_pool_that_is_not_there(place: Any) -> None:
    place.refused(TRANSPORT, "show", source=place.root / "nowhere")
    place.refused(TRANSPORT, "get", "vm1/disk", "nothing", source=place.root / "nowhere")
    place.refused(TRANSPORT, "show", source=place.work)


def test_a_pool_of_a_newer_format(place: Any) -> None:
    file = place.pool / layout.POOL_FILE
    file.chmod(0o644)
    file.write_text(json.dumps({"format": 3}))
    cache = place.other_cache()
    for words in (
        ("show",),
        ("get", "vm1/disk", "install"),
        ("unset", "vm1/disk", "customize", "--everywhere"),
        ("verify",),
        ("gc", "--everywhere"),
    ):
        assert "newer" in place.refused(INTEGRITY, *words, cache=cache)
    place.refused(INTEGRITY, "init", place.pool)
    place.refused(INTEGRITY, "adopt", place.pool)
    assert "newer" in place.refused(INTEGRITY, "show", cache=place.pool, source=cache)


def test_a_machine_log_of_a_newer_format(place: Any) -> None:
    change_record(place.pool, 2, lambda record: {**record, "format": 2})
    assert "newer" in place.refused(
        INTEGRITY, "get", "vm1/disk", "install", cache=place.other_cache()
    )


STRANGER = 65534
"""Whose files they are in tests of permissions."""


@pytest.fixture
def powerless() -> list[str]:
    """What runs a command as an account that may do no more than any other one."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files to somebody else")
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not installed (Debian: util-linux)")
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def give_away(directory: Path) -> None:
    os.chown(directory, STRANGER, STRANGER)
    for path in directory.rglob("*"):
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def refused_to(powerless: list[str], place: Any, *words: str | Path, code: int = TRANSPORT) -> str:
    """As :meth:`Place.refused`, for an account that may not. :returns: the line"""
    before = photograph(place.root)
    command = [
        *powerless,
        sys.executable,
        "-m",
        "statepool",
        "--cache",
        "cache",
        "--source",
        "pool",
        *map(str, words),
    ]
    done = subprocess.run(
        command, cwd=place.root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("statepool: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert photograph(place.root) == before
    return done.stderr


def test_a_cache_that_may_not_be_written(place: Any, powerless: list[str]) -> None:
    give_away(place.cache)
    refused_to(powerless, place, "set", "vm1/disk", "new", "--from", "work.qcow2")
    refused_to(powerless, place, "unset", "vm1/disk", "customize")
    refused_to(powerless, place, "get", "vm1/disk", "install", "--to", "to.qcow2")


def test_a_cache_that_may_not_be_written_is_verified(place: Any, powerless: list[str]) -> None:
    give_away(place.cache)
    command = [*powerless, sys.executable, "-m", "statepool", "--cache", "cache", "verify"]
    done = subprocess.run(
        command, cwd=place.root, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("whole") == 2


def test_a_pool_that_may_not_be_written(place: Any, powerless: list[str]) -> None:
    give_away(place.pool)
    refused_to(powerless, place, "unset", "vm1/disk", "customize", "--everywhere")
    refused_to(powerless, place, "init", "pool/more")


def test_a_pool_that_may_not_be_read(place: Any, powerless: list[str]) -> None:
    give_away(place.pool)
    (place.pool / ".statepool/log").chmod(0o700)
    for words in (("show",), ("get", "vm1/disk", "nothing"), ("check", "vm1/disk", "nothing")):
        refused_to(powerless, place, *words)


def test_a_working_image_that_may_not_be_read_or_written(place: Any, powerless: list[str]) -> None:
    os.chown(place.work, STRANGER, STRANGER)
    for mode in (0o600, 0o644):
        place.work.chmod(mode)
        assert "work.qcow2" in refused_to(
            powerless, place, "set", "vm1/disk", "new", "--from", "work.qcow2", code=REFUSED
        )


def test_a_place_for_a_working_image_that_may_not_be_written(
    place: Any, powerless: list[str]
) -> None:
    (place.root / "theirs").mkdir()
    give_away(place.root / "theirs")
    refused_to(
        powerless, place, "get", "vm1/disk", "install", "--to", "theirs/work.qcow2", code=REFUSED
    )


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """``mounted("name", "size=1m")``: a small file system of its own."""
    made: list[Path] = []

    def mount(name: str, options: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", path],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"cannot mount here: {done.stderr.strip()}")
        made.append(path)
        return path

    yield mount
    for path in made:
        gc.collect()  # a pool that an error refers to has its directory open
        subprocess.run(["umount", path], check=True)


def test_no_space(place: Any, mounted: Callable[..., Path], make_image: Make) -> None:
    small = mounted("small", "size=2m")
    statepool.init(small / "pool")
    place.made_cache(small / "cache")
    big = make_image(place.root / "big.qcow2", 8 * MIB, writes=[(0, 8 * MIB, 5)])
    assert "do not fit" in place.refused(
        NO_SPACE, "set", "vm1/disk", "big", "--from", big, cache=small / "cache"
    )
    assert place.shell("set", "vm1/disk", "big", "--from", big)[0] == 0
    place.refused(NO_SPACE, "get", "vm1/disk", "big", cache=small / "cache")
    with pytest.raises(NoSpace) as caught:
        statepool.StatePool(small / "cache", [place.pool]).image("vm1/disk").get("big")
    assert caught.value.needed > 8 * MIB > caught.value.available > 0
    before = photograph(small)
    code, _, err = place.shell("set", "vm1/disk", "big", "--from", big, source=small / "pool")
    assert (code, err.count("\n")) == (TRANSPORT, 1)
    assert "do not fit" in err
    assert photograph(small) == before


def test_a_read_only_pool(place: Any, mounted: Callable[..., Path]) -> None:
    there = mounted("there", "size=16m")
    shutil.copytree(place.pool, there / "pool", symlinks=True)
    subprocess.run(["mount", "-o", "remount,ro", there], check=True)
    pool = there / "pool"
    # reading is fine ...
    assert place.shell("get", "vm1/disk", "customize", cache=place.root / "c2", source=pool)[0] == 0
    assert place.shell("verify", cache=place.root / "c2", source=pool)[0] == 0
    # ... writing is not
    assert (
        "read-only"
        in place.refused(
            TRANSPORT, "unset", "vm1/disk", "customize", "--everywhere", source=pool
        ).lower()
    )
    code, _, err = place.shell("set", "vm1/disk", "new", "--from", place.work, source=pool)
    assert (code, err.count("\n")) == (TRANSPORT, 1)
    assert "read-only" in err.lower()
    place.refused(TRANSPORT, "init", there / "new")
    code, _, err = place.shell("--source", place.pool, "gc", "--everywhere", source=pool)
    assert (code, err.count("\n")) == (TRANSPORT, 1)
    assert "was left alone" in err
    assert "read-only" in err.lower()
    answer = json.loads(place.shell("--json", "gc", "--everywhere", source=pool)[1])
    assert ["read-only" in one["problem"] for one in answer["collected"]] == [True]
    # a read-only cache serves what is in it, but no working images
    assert place.shell("get", "vm1/disk", "install", cache=pool, source=place.pool)[0] == TRANSPORT


def record_file(pool: Path, number: int) -> Path:
    return pool / layout.record("vm1", number)


def change_record(pool: Path, number: int, change: Callable[[dict[str, Any]], Any]) -> None:
    path = record_file(pool, number)
    path.write_text(json.dumps(change(json.loads(path.read_bytes()))))


# -- records ---------------------------------------------------------------------------------------


def change_manifest(**lies: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(record: dict[str, Any]) -> dict[str, Any]:
        manifest = {
            key: value
            for key, value in (record["changes"][0]["publish"] | lies).items()
            if value is not None
        }
        return record | {"changes": [{"publish": manifest}]}

    return change


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"{",
        b"null",
        b"[]",
        b"7",
        b"{}",
        b'{"format": 1}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"format": "1"}',
    ],
)
def test_a_record_that_is_no_record(place: Any, content: bytes) -> None:
    record_file(place.pool, 2).write_bytes(content)
    cache = place.other_cache()
    line = place.refused(INTEGRITY, "get", "vm1/disk", "install", cache=cache)
    assert layout.record("vm1", 2) in line
    for words in (
        ("show", "vm1"),
        ("check", "vm1/disk", "install"),
        ("unset", "vm1/disk", "customize", "--everywhere"),
        ("log",),
    ):
        place.refused(INTEGRITY, *words, cache=cache)
    place.refused(INTEGRITY, "gc", "--everywhere", cache=cache)


DIGEST = f"blake3:{'1' * 64}"

LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no changes": lambda record: record | {"changes": []},
    "strange change": lambda record: record | {"changes": [{"forget": {}}]},
    "twice": lambda record: record | {"changes": record["changes"] * 2},
    "another machine": change_manifest(object="vm2/disk"),
    "a bad machine": change_manifest(object="../disk"),
    "a bad state": change_manifest(state="../../etc/passwd"),
    "a reserved state": change_manifest(state="boot"),
    "a size below zero": change_manifest(size=-1),
    "a size that is no number": change_manifest(size="big"),
    "an endless size": change_manifest(size=1 << 70),
    "no digest": change_manifest(digest=None),
    "a digest that is a path": change_manifest(digest="blake3:../../../etc/passwd"),
    "an unknown digest": change_manifest(digest="md5:" + "0" * 32),
    "a parent that is not there": change_manifest(parent={"state": "nothing", "digest": DIGEST}),
    "a parent with another digest": change_manifest(parent={"state": "install", "digest": DIGEST}),
    "a parent that is no name": change_manifest(parent={"state": "../install", "digest": DIGEST}),
    "itself as parent": lambda record: change_manifest(
        parent={"state": "customize", "digest": record["changes"][0]["publish"]["digest"]}
    )(record),
    "extents out of the file": change_manifest(extents=[[0, 1 << 60]]),
    "an unknown kind": change_manifest(kind="spell"),
    "removing what is not there": lambda record: (
        record
        | {"changes": [{"remove": {"object": "vm1/disk", "state": "nothing", "digest": DIGEST}}]}
    ),
    "removing a parent": lambda record: (
        record
        | {
            "changes": [
                *record["changes"],
                {
                    "remove": {
                        "object": "vm1/disk",
                        "state": "install",
                        "digest": record["changes"][0]["publish"]["parent"]["digest"],
                    }
                },
            ]
        }
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_cannot_be_true(place: Any, lie: str) -> None:
    change_record(place.pool, 2, LIES[lie])
    cache = place.other_cache()
    assert layout.record("vm1", 2) in place.refused(
        INTEGRITY, "get", "vm1/disk", "install", cache=cache
    )
    place.refused(INTEGRITY, "get", "vm1/disk", "customize", "--to", "to.qcow2", cache=cache)


def promised(place: Any, state: str) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(
        record_file(place.pool, {"install": 1, "customize": 2}[state]).read_bytes()
    )["changes"][0]["publish"]
    return manifest


@pytest.mark.parametrize("difference", [1, -1, 65536, 1 << 40])
def test_a_record_that_lies_about_the_size(place: Any, difference: int) -> None:
    size = promised(place, "customize")["size"]
    change_record(place.pool, 2, change_manifest(size=size + difference, extents=None))
    cache = place.other_cache()
    statepool.StatePool(cache, [place.pool]).image("vm1/disk").get("install")
    code = NO_SPACE if difference == 1 << 40 else INTEGRITY
    place.refused(code, "get", "vm1/disk", "customize", cache=cache)


def test_a_record_that_lies_about_the_digest(place: Any) -> None:
    """The bytes are there under the name that the record says, but they are others."""
    digest = Digest.of(b"a lie")
    shutil.copyfile(place.data_file(place.pool, "customize"), place.pool / layout.data(digest))
    change_record(place.pool, 2, change_manifest(digest=str(digest)))
    cache = place.other_cache()
    pool = statepool.StatePool(cache, [place.pool])
    pool.image("vm1/disk").get("install")
    with pytest.raises(DigestMismatch) as caught:
        pool.image("vm1/disk").get("customize")
    assert caught.value.expected == str(digest)
    assert caught.value.actual == str(
        Digest.of(place.data_file(place.pool, "customize").read_bytes())
    )
    place.refused(INTEGRITY, "get", "vm1/disk", "customize", cache=cache)
    assert place.shell("verify", cache=cache)[0] == INTEGRITY


def test_a_record_that_lies_about_the_parent(place: Any) -> None:
    change_record(place.pool, 2, change_manifest(parent=None))
    cache = place.other_cache()
    assert "'parent'" in place.refused(INTEGRITY, "get", "vm1/disk", "customize", cache=cache)


@pytest.mark.parametrize("gone", [1, 2])
def test_a_gap_in_the_log(place: Any, write_to_image: Write, gone: int) -> None:
    disk = statepool.StatePool(place.cache, [place.pool]).image("vm1/disk")
    disk.set("more", source=place.work)
    record_file(place.pool, gone).unlink()
    cache = place.other_cache()
    for words in (
        ("get", "vm1/disk", "install"),
        ("show", "vm1/disk"),
        ("unset", "vm1/disk", "more", "--everywhere"),
        ("gc", "--everywhere"),
    ):
        assert "gap" in place.refused(INTEGRITY, *words, cache=cache)
