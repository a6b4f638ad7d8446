"""
Operations that an older version was killed in, as it left them: they are rolled forward, or back.

``old/journals.tar.xz`` was made by commit 9192e687, which had a journal for one image (``intent`` =
``set``), and another one for a machine (``set-machine``). It has the directory
``/tmp/journal-00000000`` after each kill: a cache in which ``vm1/disk`` has the state ``install``,
and the files of the machine. The names of its directories say where the process ended; "changed" is
before the record, "published" after it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import statepool
from statepool.cache.cache import Cache
from statepool.capture.capture_journal import recover
from statepool.model.digest import Digest
from statepool.model.location import Location
from statepool.model.manifest import Kind, StateId
from statepool.model.settings import Settings
from statepool.pools import layout
from statepool.pools.pool import Pool
from statepool.pools.writer import Writer
from statepool.qcow2.header import is_empty_overlay, read_header_fd, reader
from statepool.transports.registry import open_transport

OLD = Path(__file__).parent / "old/journals.tar.xz"
THERE = b"/tmp/journal-00000000"
RAM = b"a stream of pages" * 99

Unpack = Callable[[str], Path]


@pytest.fixture
def unpack() -> Iterator[Unpack]:
    """
    ``unpack(name)``: a directory as it was left. Backing names are absolute, so it gets a name as
    long as the one it had.
    """
    root = Path(tempfile.mkdtemp(prefix="journal-", dir="/tmp"))
    assert len(str(root)) == len(THERE)

    def do(name: str) -> Path:
        with tarfile.open(OLD) as tar:
            # as it is: it is our own, and modes and links matter
            tar.extraction_filter = lambda member, _: member
            for member in tar:
                if member.name.startswith(f"{name}/"):
                    member.name = member.name.removeprefix(f"{name}/")
                    member.linkname = (
                        member.linkname.removeprefix(f"{name}/")
                        if member.islnk()
                        else member.linkname
                    )
                    tar.extract(member, root, numeric_owner=True)
        for path in [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]:
            rename(path, str(root).encode())
        for path in (root / "cache" / layout.INCOMING).glob("*.json"):
            come_home(path)
        return root

    yield do
    shutil.rmtree(root)


def rename(path: Path, root: bytes) -> None:
    status, content = path.stat(), path.read_bytes()
    if THERE in content:
        path.chmod(0o600)
        path.write_bytes(content.replace(THERE, root))
        path.chmod(status.st_mode & 0o777)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def come_home(path: Path) -> None:
    """
    A marker is now one of a process of this host, whose account owned the files, and the copied
    ones of these are the same as they were.
    """
    marker = json.loads(path.read_bytes())
    marker["writer"] = {**Writer.current().to_json(), "start": 1}
    if "owner" in marker["facts"]:
        marker["facts"]["owner"] = str(os.geteuid())
    if "parts" in marker["facts"]:
        parts = json.loads(marker["facts"]["parts"])
        for part in parts:
            status = os.stat(part["source"])
            part["owner"] = os.geteuid()
            if part["stamp"].split("-")[1] == str(status.st_size):
                part["stamp"] = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
        marker["facts"]["parts"] = json.dumps(parts)
    path.write_text(json.dumps(marker))


def opened(root: Path) -> Cache:
    return Cache.open(Pool(open_transport(Location("file", str(root / "cache")))), Settings())


def leftovers(root: Path) -> list[str]:
    cache = root / "cache" / layout.OURS
    return [
        str(path) for place in (cache / "incoming", cache / "trash") for path in place.iterdir()
    ] + [str(path) for path in root.rglob(".statepool-*")]


def require_fresh(cache: Cache, path: Path, state: StateId) -> None:
    """A file is an unwritten working image of a state, as open as it was."""
    with open(path, "rb") as file:
        header = read_header_fd(file.fileno(), str(path))
        assert is_empty_overlay(reader(file.fileno()), header)
    assert header.backing_name == os.fsencode(cache.chains.path(cache.pool.chain(state)))
    assert path.stat().st_mode & 0o777 == 0o640


def require_good(cache: Cache, state: StateId) -> None:
    manifest = cache.pool.find(state)
    assert manifest is not None
    assert manifest.digest is not None
    data = cache.data(manifest.digest)
    assert Digest.of(data.read_bytes(), manifest.digest.algorithm) == manifest.digest
    assert data.stat().st_mode & 0o777 == 0o444


MACHINES = [
    "machine-half-changed",
    "machine-changed",
    "machine-with-ram-and-a-copy",
    "machine-published",
    "machine-with-ram-published",
]


@pytest.mark.parametrize("name", ["image-gathered", "image-changed", "image-published"])
def test_image_forward(unpack: Unpack, name: str) -> None:
    root = unpack(name)
    cache, state = opened(root), StateId("vm1/disk", "customize")
    recover(cache)
    require_good(cache, state)
    require_fresh(cache, root / "vm/disk.qcow2", state)
    assert cache.pool.chain(state)[0].labels == {"made": "before"}
    assert leftovers(root) == []


@pytest.mark.parametrize("name", MACHINES)
def test_machine_forward(unpack: Unpack, name: str) -> None:
    root = unpack(name)
    cache, images = (
        opened(root),
        [StateId("vm1/disk", "customize"), StateId("vm1/data", "customize")],
    )
    recover(cache)
    machine = cache.pool.find(StateId("vm1", "customize", Kind.MACHINE))
    assert machine is not None
    assert set(machine.members) == {"vm1/disk", "vm1/data", *(["ram"] if "ram" in name else [])}
    for state in images:
        require_good(cache, state)
        require_fresh(cache, root / f"vm/{state.object.partition('/')[2]}.qcow2", state)
    if "ram" in name:
        require_good(cache, StateId("vm1", "customize", Kind.RAM))
        assert (root / "cache/vm1/customize.state").read_bytes() == RAM
    assert (root / "vm/ram").exists() == ("ram" not in name)
    assert leftovers(root) == []


@pytest.mark.parametrize("name", ["image-gathered", "image-changed", *MACHINES[:3]])
def test_back(unpack: Unpack, name: str) -> None:
    """The bytes are not what they should be any more: all is given back, and can be set again."""
    root = unpack(name)
    disk, data, ram = (root / "vm" / file for file in ("disk.qcow2", "data.qcow2", "ram"))
    with open(disk, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    expected = {path: path.read_bytes() for path in (data, ram)}
    cache = opened(root)
    recover(cache)
    assert {path: path.read_bytes() for path in expected} == expected
    with open(disk, "rb") as file:
        header = read_header_fd(file.fileno(), str(disk))
    assert header.backing_name == os.fsencode(
        cache.chains.path(cache.pool.chain(StateId("vm1/disk", "install")))
    )
    assert (
        disk.stat().st_mode & 0o777,
        data.stat().st_mode & 0o777,
        ram.stat().st_mode & 0o777,
    ) == (0o640, 0o640, 0o644)
    assert set(cache.pool.fold("vm1").states) == {StateId("vm1/disk", "install")}
    assert leftovers(root) == []


def test_working_images_forward(unpack: Unpack) -> None:
    root = unpack("working-images-half-put")
    cache = opened(root)
    recover(cache)
    for image in ("disk", "data"):
        path = root / f"vm/new-{image}.qcow2"
        header: Any = None
        with open(path, "rb") as file:
            header = read_header_fd(file.fileno(), str(path))
        assert header.backing_name == os.fsencode(
            cache.chains.path(cache.pool.chain(StateId(f"vm1/{image}", "customize")))
        )
    assert leftovers(root) == []


@pytest.mark.parametrize("name", ["image-changed", "machine-changed"])
def test_other_digests(unpack: Unpack, name: str) -> None:
    """A journal that names bytes by another algorithm is ended by that one."""
    root = unpack(name)
    incoming = root / "cache" / layout.INCOMING
    (path,) = incoming.glob("*.json")
    content = path.read_text()
    for gathered in incoming.glob("*-blake3-*"):
        old = Digest.of(gathered.read_bytes(), "blake3")
        new = Digest.of(gathered.read_bytes(), "sha256")
        content = content.replace(str(old), str(new))
        gathered.rename(incoming / f"{path.stem}-{new.file_name}")
    path.write_text(content)
    statepool.StatePool(cache=root / "cache").image("vm1/disk").get("install")
    cache, state = opened(root), StateId("vm1/disk", "customize")
    manifest = cache.pool.find(state)
    assert manifest is not None
    assert str(manifest.digest).startswith("sha256:")
    require_fresh(cache, root / "vm/disk.qcow2", state)
    assert leftovers(root) == []


def test_a_machine_that_runs_on_a_copied_image_is_waited_for(unpack: Unpack) -> None:
    """
    The image was left alone, so that a machine can have been started on it: its name must not go to
    another file.
    """
    root = unpack("machine-with-ram-and-a-copy")
    disk, data = statepool.StatePool(cache=root / "cache").image("vm1/disk"), root / "vm/data.qcow2"
    before = data.stat().st_ino
    with open(data, "r+b") as file, subprocess.Popen(["sleep", "600"], stdin=file) as machine:
        try:
            disk.get("install")
            assert data.stat().st_ino == before
            assert not disk.check("customize")
        finally:
            machine.kill()
    disk.get("install")
    assert disk.check("customize")
    require_fresh(opened(root), data, StateId("vm1/data", "customize"))
    assert leftovers(root) == []
