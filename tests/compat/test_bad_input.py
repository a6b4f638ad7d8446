"""
What people come up with, names, states and working images that cannot be: each gives one clear line
and its exit code, and changes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.qcow2.header import read_header_file

KIB = 1 << 10
SIZE = 1 << 20
PATTERN = 64 << 10

USAGE, NOT_FOUND, REFUSED, INTEGRITY, TRANSPORT = 2, 3, 4, 5, 7

Make = Callable[..., Path]
Tool = Callable[..., str]


# -- names -----------------------------------------------------------------------------------------

BAD_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "-x",
    "+x",
    "_x",
    "a b",
    "a/b",
    "../x",
    "/x",
    "a\\b",
    "ä",
    "a\n",
    "a\tb",
    "a:b",
    "a,b",
    "a*",
    "a\x7f",
    "x" * 129,
]
BAD_NAMES += [f"a{ending}" for ending in (".qcow2", ".state", ".json", ".lock", ".QCOW2")]
RESERVED = ["0root", "boot", "0boot"]


@pytest.mark.parametrize("path", ["new/", "work.qcow2/", "new/.", ""])
def test_a_directory_where_a_working_image_should_be_named(place: Any, path: str) -> None:
    for words in (
        ("get", "vm1/disk", "install", "--to"),
        ("pop", "vm1/disk", "install", "--to"),
        ("set", "vm1/disk", "new", "--from"),
    ):
        assert "name a file" in place.refused(USAGE, *words, path)
    place.refused(USAGE, "push", "vm1/disk", "new", "--from", path)
    place.refused(USAGE, "set", "vm1", "new", "--from", f"disk={path}")


@pytest.mark.parametrize("name", [*BAD_NAMES, *RESERVED])
def test_names_that_no_state_can_have(place: Any, name: str) -> None:
    for words in (("check",), ("get",), ("unset",), ("set", "--from", "work.qcow2")):
        if words == ("unset",) and "*" in name:
            continue  # this is a pattern
        line = place.refused(USAGE, *words, "--", "vm1/disk", name)
        assert ("reserved" in line) == (name in RESERVED or name[:2].lower() == "a.")


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if name != "" and "/" not in name])
def test_names_that_no_machine_or_image_can_have(place: Any, name: str) -> None:
    place.refused(USAGE, "get", "--", f"{name}/disk", "install")
    place.refused(USAGE, "get", "--", f"vm1/{name}", "install")
    place.refused(USAGE, "set", "--from", "work.qcow2", "--", f"vm1/{name}", "new")
    place.refused(USAGE, "show", "--", name)


@pytest.mark.parametrize("name", ["", "/", "vm1/", "/disk", "vm1/disk/more", "vm1//disk"])
def test_an_object_that_is_no_image(place: Any, name: str) -> None:
    place.refused(USAGE, "get", "--", name, "install")
    place.refused(USAGE, "set", "--from", "work.qcow2", "--", name, "new")


def test_the_longest_name_can_be_used(place: Any) -> None:
    assert place.shell("set", "vm1/disk", "x" * 128, "--from", "work.qcow2")[0] == 0
    assert place.shell("get", "vm1/disk", "x" * 128, cache=place.root / "c2")[0] == 0


# -- states ----------------------------------------------------------------------------------------


def test_a_state_that_is_not_there(place: Any) -> None:
    assert place.shell("check", "vm1/disk", "nothing")[0] == NOT_FOUND
    assert "nothing" in place.refused(NOT_FOUND, "get", "vm1/disk", "nothing")
    place.refused(NOT_FOUND, "get", "vm1/disk", "nothing", "--to", "new.qcow2")
    place.refused(NOT_FOUND, "get", "vm2/disk", "install")
    place.refused(NOT_FOUND, "unset", "vm1/disk", "nothing")
    place.refused(NOT_FOUND, "unset", "vm1/disk", "nothing", "--everywhere", "--cascade")
    place.refused(NOT_FOUND, "verify", "vm1/disk", "nothing")


def test_a_name_that_exists_with_other_content(place: Any, make_image: Make) -> None:
    make_image(place.root / "other.qcow2", SIZE, writes=[(0, PATTERN, 9)])
    line = place.refused(REFUSED, "set", "vm1/disk", "customize", "--from", "other.qcow2")
    assert "customize" in line
    assert "other content" in line
    # written to since
    place.refused(REFUSED, "set", "vm1/disk", "customize", "--from", "work.qcow2")


def test_a_name_that_exists_with_other_content_in_the_pool_only(
    place: Any, make_image: Make
) -> None:
    make_image(place.root / "other.qcow2", SIZE, writes=[(0, PATTERN, 9)])
    for more in ((), ("--dry-run",)):
        line = place.refused(
            REFUSED,
            "set",
            "vm1/disk",
            "customize",
            "--from",
            "other.qcow2",
            *more,
            cache=place.root / "c2",
        )
        assert "vm1/disk customize exists in " in line
        assert "with other content" in line
    # Who asked for the cache alone has it, and is told of the pool.
    code, _, err = place.shell(
        "set",
        "vm1/disk",
        "customize",
        "--from",
        "other.qcow2",
        "--wait-for",
        "own",
        "--dry-run",
        cache=place.root / "c2",
    )
    assert code == 0
    assert "other content" in err


def test_the_same_content_in_the_pool_only(place: Any) -> None:
    shutil.copy(place.work, place.root / "same.qcow2")
    assert place.shell("set", "vm1/disk", "again", "--from", "work.qcow2")[0] == 0
    assert place.shell("unset", "vm1/disk", "again")[0] == 0
    assert place.shell("set", "vm1/disk", "again", "--from", "same.qcow2")[0] == 0


def test_removing_what_others_stand_on(place: Any) -> None:
    for everywhere in ([], ["--everywhere"]):
        line = place.refused(REFUSED, "unset", "vm1/disk", "install", *everywhere)
        assert "customize" in line
        assert "--cascade" in line


def test_replacing_what_others_stand_on(place: Any, make_image: Make) -> None:
    make_image(place.root / "other.qcow2", SIZE, writes=[(0, PATTERN, 9)])
    assert "customize" in place.refused(
        REFUSED, "set", "vm1/disk", "install", "--from", "other.qcow2", "--replace"
    )


def test_a_working_image_where_there_is_a_file(place: Any) -> None:
    path = place.root / "to.qcow2"
    os.mkfifo(path)
    for words in ((), ("--overwrite",)):
        assert "a FIFO" in place.refused(
            REFUSED, "get", "vm1/disk", "install", "--to", path, *words
        )
    path.unlink()
    for make in (lambda path: path.write_text("mine"), lambda path: os.symlink("nowhere", path)):
        make(path)
        assert "--overwrite" in place.refused(REFUSED, "get", "vm1/disk", "install", "--to", path)
        path.unlink()
    place.refused(REFUSED, "get", "vm1/disk", "install", "--to", place.pool)
    place.refused(REFUSED, "get", "vm1/disk", "install", "--to", place.pool, "--overwrite")
    place.refused(NOT_FOUND, "get", "vm1/disk", "install", "--to", "no/such/directory.qcow2")


def test_a_working_image_inside_of_a_pool(place: Any) -> None:
    for to in (
        place.pool / "vm1/disk/install.qcow2",
        place.pool / "vm1/disk/mine.qcow2",
        place.cache / ".statepool/data/mine.qcow2",
    ):
        told = place.refused(REFUSED, "get", "vm1/disk", "install", "--to", to, "--overwrite")
        assert (
            f"it is inside the {'pool file://' if place.pool in to.parents else 'cache '}" in told
        )
        assert "choose a place outside of it" in told


def test_a_working_image_in_place_of_one_that_is_open(place: Any) -> None:
    with held(place.work):
        assert "open in another process" in place.refused(
            REFUSED, "get", "vm1/disk", "install", "--to", place.work, "--overwrite"
        )


# -- working images --------------------------------------------------------------------------------


class held:  # noqa: N801 - it reads as what it is
    """A file that another process has open for as long as the block lasts."""

    def __init__(self, path: Path, mode: str = "r+b") -> None:
        program = (
            "import sys; file = open(sys.argv[1], sys.argv[2]); print('open', flush=True);"
            " sys.stdin.read()"
        )
        self._command = [sys.executable, "-c", program, str(path), mode]

    def __enter__(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"open\n"
        return self._process

    def __exit__(self, *details: object) -> None:
        self._process.communicate(timeout=60)


def test_a_working_image_that_is_raw(place: Any) -> None:
    (place.root / "disk.raw").write_bytes(bytes(SIZE))
    line = place.refused(INTEGRITY, "set", "vm1/disk", "new", "--from", "disk.raw")
    assert "qemu-img convert -f raw -O qcow2" in line
    (place.root / "empty.img").touch()
    place.refused(INTEGRITY, "set", "vm1/disk", "new", "--from", "empty.img")


def test_a_working_image_that_is_encrypted(place: Any, qemu_img: Tool) -> None:
    path = place.root / "secret.qcow2"
    options = "encrypt.format=aes,encrypt.key-secret=key"
    qemu_img(
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        "secret,id=key,data=secret",
        "-o",
        options,
        path,
        "1M",
    )
    assert "encrypted" in place.refused(INTEGRITY, "set", "vm1/disk", "new", "--from", path)


@pytest.mark.parametrize(
    "length", [0, 1, 3, 71, 100, 4 * KIB, 64 * KIB, 200 * KIB, 256 * KIB, -64 * KIB, -65 * KIB]
)
def test_a_working_image_that_is_truncated(place: Any, make_image: Make, length: int) -> None:
    path = make_image(place.root / "cut.qcow2", SIZE, writes=[(0, SIZE, 9)])
    os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    place.refused(INTEGRITY, "set", "vm1/disk", "new", "--from", path)


def test_a_working_image_that_is_no_file(place: Any, make_image: Make) -> None:
    os.mkfifo("fifo")
    os.mkdir("directory")
    make_image(place.root / "real.qcow2", SIZE)
    os.symlink("real.qcow2", "link")
    os.symlink("nothing", "dead-link")
    for path in ("fifo", "directory", "link", "dead-link", "/dev/null", "/dev/zero"):
        line = place.refused(INTEGRITY, "set", "vm1/disk", "new", "--from", path)
        assert "regular" in line
        assert ("it is a symbolic link (name the file that it leads to)" in line) == (
            "link" in path
        )
    place.refused(NOT_FOUND, "set", "vm1/disk", "new", "--from", "not-there.qcow2")
    place.refused(NOT_FOUND, "set", "vm1/disk", "new", "--from", "not/there.qcow2")


@pytest.mark.parametrize("mode", ["rb", "r+b"])
def test_a_working_image_that_is_open(place: Any, mode: str) -> None:
    with held(place.work, mode) as process:
        line = place.refused(REFUSED, "set", "vm1/disk", "new", "--from", place.work)
        assert f"process {process.pid}" in line
    assert place.shell("set", "vm1/disk", "new", "--from", place.work)[0] == 0


def test_a_working_image_that_a_real_qemu_has_open(place: Any) -> None:
    if shutil.which("qemu-nbd") is None:
        pytest.skip("qemu-nbd is not installed (Debian: qemu-utils)")
    socket = place.root / "nbd.socket"
    server = subprocess.Popen(
        [
            "qemu-nbd",
            "-f",
            "qcow2",
            "-k",
            socket,
            "-t",
            "--fork",
            "--pid-file",
            place.root / "pid",
            place.work,
        ]
    )
    assert server.wait(timeout=60) == 0
    try:
        assert "open in" in place.refused(REFUSED, "set", "vm1/disk", "new", "--from", place.work)
        place.refused(REFUSED, "get", "vm1/disk", "install", "--to", place.work, "--overwrite")
    finally:
        os.kill(int((place.root / "pid").read_text()), 15)


def test_a_working_image_that_stands_on_something_else(
    place: Any, make_image: Make, qemu_img: Tool
) -> None:
    make_image(place.root / "base.qcow2", SIZE)
    above = make_image(place.root / "above.qcow2", SIZE, backing=place.root / "base.qcow2")
    line = place.refused(INTEGRITY, "set", "vm1/disk", "new", "--from", above)
    assert "backing-outside-cache" not in line or "base.qcow2" in line
    assert str(place.cache) in line
    # Neither is the view of another cache, or a chain that it has otherwise.
    backing = (read_header_file(place.work).backing_name or b"").decode()
    other = backing.replace("cache", "cache-of-others")
    for name in (
        place.root / "cache-of-others/vm1/disk/customize.qcow2",
        Path("/etc/hostname"),
        other.replace("customize", "install"),
    ):
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name, above)
        place.refused(INTEGRITY, "set", "vm1/disk", "new", "--from", above)
    for name in ("base.qcow2", "../base.qcow2", "json:{}", "nbd:localhost:1"):
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", name, above)
        place.refused(INTEGRITY, "set", "vm1/disk", "new", "--from", above)


def test_a_working_image_whose_state_is_gone(place: Any) -> None:
    disk = statepool.StatePool(place.cache, [place.pool]).image("vm1/disk")
    disk.unset("install", cascade=True, scope="all")
    line = place.refused(REFUSED, "set", "vm1/disk", "new", "--from", place.work)
    assert "customize" in line


def test_a_working_image_of_another_object(place: Any) -> None:
    assert "vm2/disk" in place.refused(REFUSED, "set", "vm2/disk", "new", "--from", place.work)


def test_internal_snapshots_are_a_warning(place: Any, make_image: Make, qemu_img: Tool) -> None:
    path = make_image(place.root / "snapshots.qcow2", SIZE, writes=[(0, PATTERN, 1)])
    qemu_img("snapshot", "-c", "before", path)
    code, _, err = place.shell("set", "vm1/disk", "new", "--from", path)
    assert code == 0
    assert err == "statepool: warning: it has 1 internal snapshot, which its children do not see\n"
    assert statepool.StatePool(place.cache).image("vm1/disk").check("new")


def test_bitmaps_are_a_warning(place: Any, make_image: Make, qemu_img: Tool) -> None:
    path = make_image(place.root / "bitmaps.qcow2", SIZE, writes=[(0, PATTERN, 1)])
    qemu_img("bitmap", "--add", path, "since-backup")
    code, _, err = place.shell("set", "vm1/disk", "new", "--from", path)
    assert code == 0
    assert err == "statepool: warning: it has 1 persistent bitmap, which its children do not see\n"


@pytest.mark.parametrize("scheme", ["", "link://"])
def test_paths_that_are_no_text(
    run_statepool: Callable[..., Any], make_image: Make, tmp_path: Path, scheme: str
) -> None:
    """They are names of files like any other, here and in what is read back."""
    cache, pool, work = (tmp_path / name for name in ("c\udcffx", "p\udcfe", "w\udcfd.qcow2"))
    run_statepool("init", pool)
    make_image(tmp_path / "work.qcow2", SIZE, writes=[(0, PATTERN, 1)])
    stored = run_statepool(
        "--cache",
        tmp_path / "one",
        "--source",
        pool,
        "set",
        "vm1/disk",
        "install",
        "--from",
        "work.qcow2",
        "--json",
    )
    location = f"{scheme or 'file://'}{tmp_path}/p%FE"
    assert f"file://{tmp_path}/p%FE" in [
        one["pool"] for one in json.loads(stored.out)["stored"]["pools"]
    ]
    there = ("--cache", cache, "--source", f"{scheme}{pool}")
    got = json.loads(
        run_statepool(*there, "get", "vm1/disk", "install", "--to", work, "--json").out
    )["got"]
    assert (got["source"], got["working"]) == (location, str(work))
    assert "install" in run_statepool("--cache", cache, "--source", location, "show").out
    assert "vm1/disk" in run_statepool(*there, "verify", "vm1/disk", "install").out
    assert (
        "no%FDne is not a pool"
        in run_statepool(
            "--cache", cache, "--source", tmp_path / "no\udcfdne", "show", code=None
        ).err
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "one",
        "work.qcow2",
        cache.name,
        pool.name,
        work.name,
    }
