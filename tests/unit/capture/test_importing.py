"""Disk images of others become states, and stay as they are; by the real qemu-img."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner, Result

from statepool import StatePool
from statepool.cli.main import cli
from statepool.errors import (
    Conflict,
    DigestMismatch,
    IntegrityError,
    InUse,
    NotFound,
    UnsafeImage,
    UsageError,
)
from statepool.model.progress import SILENT

DISK = "vm1/disk"
SIZE = 1 << 22

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def convert(source: Path, driver: str, *options: str) -> Path:
    made = source.with_name("-".join(["image", *options, "of"]) + f".{driver}")
    given = [word for option in options for word in ("-o", option)]
    command = ["qemu-img", "convert", "-f", "raw", "-O", driver, *given, source, made]
    subprocess.run(command, check=True, timeout=60)
    return made


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw disk with a boot sector, some data and many zeros."""
    path = tmp_path / "disk.raw"
    content = bytearray(SIZE)
    content[510:512] = b"\x55\xaa"
    content[1 << 20 : (1 << 20) + 9] = b"some data"
    path.write_bytes(content)
    return path


@pytest.fixture
def pool(tmp_path: Path) -> StatePool:
    return StatePool(cache=tmp_path / "cache")


def content_of(pool: StatePool, state: str, directory: Path) -> bytes:
    """What a guest sees; images of some formats are a bit longer than their raw content."""
    work = directory / f"{state}.work"
    pool.image(DISK).get(state, to=work)
    flat = directory / f"{state}.flat"
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", work, flat]
    subprocess.run(command, check=True, timeout=60)
    content = flat.read_bytes()
    assert not any(content[SIZE:])
    return content[:SIZE]


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache/.statepool/working").glob("*"))


@pytest.mark.parametrize(
    ("driver", "options"),
    [
        ("raw", []),
        ("qcow2", []),
        ("vmdk", []),
        ("vmdk", ["subformat=streamOptimized"]),
        ("vdi", []),
        ("vpc", []),
        ("vpc", ["subformat=fixed"]),
        ("vhdx", []),
        ("qed", []),
    ],
)
def test_each_format_becomes_a_state(
    raw: Path, pool: StatePool, tmp_path: Path, driver: str, options: list[str]
) -> None:
    file = convert(raw, driver, *options)
    file.chmod(0o444)
    before = (file.read_bytes(), file.stat())
    disk = pool.image(DISK)
    stored = disk.import_file("install", file, labels={"os": "debian"})
    assert stored.complete
    assert content_of(pool, "install", tmp_path) == raw.read_bytes()
    after = file.stat()
    assert (file.read_bytes(), after.st_mtime_ns, after.st_ino, after.st_nlink, after.st_mode) == (
        before[0],
        before[1].st_mtime_ns,
        before[1].st_ino,
        before[1].st_nlink,
        before[1].st_mode,
    )
    assert disk.show()[0].manifest.parent is None
    assert disk.show()[0].manifest.labels == {"os": "debian"}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("inside", ["raw", "qcow2", "vdi"])
@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_files_are_read_through(
    raw: Path, pool: StatePool, tmp_path: Path, ending: str, inside: str
) -> None:
    image = convert(raw, inside)
    file = tmp_path / f"image.{ending}"
    half = len(image.read_bytes()) // 2
    parts = image.read_bytes()[:half], image.read_bytes()[half:]
    file.write_bytes(b"".join(map(PACKERS[ending], parts)))  # as two streams, one behind the other
    pool.image(DISK).import_file("install", file)
    assert content_of(pool, "install", tmp_path) == raw.read_bytes()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("ending", PACKERS)
def test_what_is_cut_short_or_damaged_is_refused(
    raw: Path, pool: StatePool, tmp_path: Path, ending: str
) -> None:
    packed = PACKERS[ending](raw.read_bytes())
    file = tmp_path / f"image.{ending}"
    file.write_bytes(packed[: len(packed) * 2 // 3])
    with pytest.raises(IntegrityError, match="damaged or cut short") as caught:
        pool.image(DISK).import_file("install", file)
    assert "nothing was imported" in str(caught.value.hint)
    assert list(pool.image(DISK).show()) == []
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["sha256", "sha512"])
def test_a_checksum_decides(raw: Path, pool: StatePool, tmp_path: Path, name: str) -> None:
    disk, right = pool.image(DISK), hashlib.new(name, raw.read_bytes()).hexdigest()
    with pytest.raises(DigestMismatch) as caught:
        disk.import_file("install", raw, **{name: right[::-1]})
    assert (caught.value.actual, caught.value.expected) == (
        f"{name}:{right}",
        f"{name}:{right[::-1]}",
    )
    assert list(disk.show()) == []
    assert leftovers(tmp_path) == []
    assert disk.import_file("install", raw, **{name: right.upper()}).complete


@pytest.mark.parametrize("text", ["", "12", "z" * 64, "0" * 128])
def test_a_checksum_of_another_kind_is_refused(raw: Path, pool: StatePool, text: str) -> None:
    with pytest.raises(UsageError, match="no SHA256 checksum"):
        pool.image(DISK).import_file("install", raw, sha256=text)


def test_what_is_no_image_is_refused(raw: Path, pool: StatePool, tmp_path: Path) -> None:
    disk, file = pool.image(DISK), tmp_path / "file"
    file.write_bytes(b"hello" * 1000)
    with pytest.raises(UnsafeImage, match="nothing in it shows") as caught:
        disk.import_file("install", file)
    assert "--raw" in str(caught.value.hint)
    packed = tmp_path / "file.xz"
    packed.write_bytes(lzma.compress(file.read_bytes()))
    with pytest.raises(UnsafeImage, match=r"unpacked, is refused.*nothing in it shows"):
        disk.import_file("install", packed)
    packed.write_bytes(lzma.compress(gzip.compress(raw.read_bytes())))
    with pytest.raises(UnsafeImage, match="once more"):
        disk.import_file("install", packed)
    file.write_bytes(b"")
    with pytest.raises(UnsafeImage, match="it is empty"):
        disk.import_file("install", file)
    with pytest.raises(NotFound, match="no file"):
        disk.import_file("install", tmp_path / "nothing")
    with pytest.raises(UnsafeImage, match="not a regular file"):
        disk.import_file("install", tmp_path)
    assert list(disk.show()) == []
    assert leftovers(tmp_path) == []


def test_raw_must_be_said_where_nothing_shows_it(
    raw: Path, pool: StatePool, tmp_path: Path
) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"hello".ljust(SIZE, b"\0"))
    pool.image(DISK).import_file("data", file, raw=True)
    assert content_of(pool, "data", tmp_path) == file.read_bytes()
    with pytest.raises(UsageError, match="is a VDI image, not raw"):
        pool.image(DISK).import_file("install", convert(raw, "vdi"), raw=True)


def test_what_other_files_belong_to_is_refused(raw: Path, pool: StatePool, tmp_path: Path) -> None:
    disk = pool.image(DISK)
    base = convert(raw, "qcow2")
    overlay = tmp_path / "overlay.qcow2"
    made = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay]
    subprocess.run(made, check=True, timeout=60)
    with pytest.raises(UnsafeImage, match="only whole with"):
        disk.import_file("install", overlay)
    for driver in ("qed", "vmdk"):
        below, above = convert(raw, driver), tmp_path / f"above.{driver}"
        made = ["qemu-img", "create", "-q", "-f", driver, "-b", below, "-F", driver, above]
        subprocess.run(made, check=True, timeout=60)
        with pytest.raises(UnsafeImage, match="only whole with"):
            disk.import_file("install", above)
    with pytest.raises(UnsafeImage, match="the description of a VMDK image"):
        disk.import_file("install", convert(raw, "vmdk", "subformat=monolithicFlat"))
    listing = bytearray(convert(raw, "vmdk").read_bytes())
    listing[12:20] = bytes(8)  # QEMU takes it for a list of extents then, in any files
    hostile = tmp_path / "hostile.vmdk"
    hostile.write_bytes(listing)
    with pytest.raises(UnsafeImage, match="the files that it lists"):
        disk.import_file("install", hostile)
    assert list(disk.show()) == []


def test_a_file_that_is_written_to_is_refused(raw: Path, pool: StatePool) -> None:
    with open(raw, "r+b"), pytest.raises(InUse):
        pool.image(DISK).import_file("install", raw)
    assert list(pool.image(DISK).show()) == []


def test_the_same_once_more_is_present_and_other_content_a_conflict(
    raw: Path, pool: StatePool
) -> None:
    disk = pool.image(DISK)
    disk.import_file("install", raw)
    assert [str(at.result) for at in disk.import_file("install", raw).pools] == ["present"]
    content = raw.read_bytes()
    raw.write_bytes(content[:-1] + b"x")
    with pytest.raises(Conflict):
        disk.import_file("install", raw)
    assert disk.import_file("install", raw, replace=True).complete


def test_a_dry_run_changes_nothing(raw: Path, pool: StatePool, tmp_path: Path) -> None:
    disk = pool.image(DISK)
    assert disk.import_file("install", raw, dry_run=True).complete
    assert list(disk.show()) == []
    assert leftovers(tmp_path) == []


def test_a_link_may_lead_to_the_file(raw: Path, pool: StatePool, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(raw)
    assert pool.image(DISK).import_file("install", tmp_path / "latest").complete


class Told:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.done = [0]

    def begin(self, what: str, total: int) -> None:
        self.begun.append((what, total))
        self.done.append(0)

    def advance(self, count: int) -> None:
        self.done[-1] += count

    def end(self) -> None:
        SILENT.end()


def test_progress_is_told_while_it_is_converted(raw: Path, tmp_path: Path) -> None:
    told = Told()
    pool = StatePool(cache=tmp_path / "cache", progress=told)
    pool.image(DISK).import_file(
        "install", raw, sha256=hashlib.sha256(raw.read_bytes()).hexdigest()
    )
    begun = dict(zip([what for what, _ in told.begun], told.done[1:], strict=True))
    assert begun[f"sha256 of {raw}"] == SIZE
    assert begun[f"convert {raw}"] == SIZE


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Result]:
    cache = str(tmp_path / "cache")
    return lambda *words: CliRunner().invoke(cli, ["--cache", cache, *map(str, words)])


def test_the_command_imports(raw: Path, run: Callable[..., Result]) -> None:
    done = run("import", DISK, "install", raw, "--label", "os=debian")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{DISK} install: stored in ")
    assert run("check", DISK, "install").exit_code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["DISK", "FILE"], "name a bundle alone"),
        (["FILE", "--sha256", "00"], "--sha256 is for a disk image"),
        (["FILE", "--label", "a=b"], "--label is for a disk image"),
        (["DISK", "install", "FILE", "--to", "x"], "--to is for a bundle"),
        (["vm1", "install", "FILE"], "vm1 is a machine"),
        (["FILE", "--replace"], "--replace needs --to"),
    ],
)
def test_words_that_do_not_fit_are_told(
    raw: Path, run: Callable[..., Result], words: list[str], says: str
) -> None:
    spelled = [{"DISK": DISK, "FILE": str(raw)}.get(word, word) for word in words]
    done = run("import", *spelled)
    assert done.exit_code == 2
    assert says in done.stderr


@pytest.mark.parametrize("driver", ["vmdk", "raw"])
def test_set_hints_at_the_import(raw: Path, run: Callable[..., Result], driver: str) -> None:
    file = convert(raw, driver)
    done = run("set", DISK, "install", "--from", file)
    assert done.exit_code == 5
    assert f"import {DISK} install {file}" in done.stderr
    assert run("import", DISK, "install", file).exit_code == 0


@pytest.mark.parametrize(
    ("name", "mode", "told"),
    [
        ("debian-12-generic-amd64.qcow2", 0o644, True),
        ("work.qcow2", 0o444, True),
        ("work.qcow2", 0o644, False),
    ],
)
def test_set_says_what_happens_to_a_download(
    raw: Path, run: Callable[..., Result], name: str, mode: int, told: bool
) -> None:
    file = convert(raw, "qcow2").rename(raw.with_name(name))
    file.chmod(mode)
    done = run("set", DISK, "install", "--from", file)
    assert (f"import {DISK} install {file}" in done.stderr) is told
    if told:
        assert "itself becomes the state" in done.stderr or done.exit_code == 4
