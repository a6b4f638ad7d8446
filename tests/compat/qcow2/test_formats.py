"""Files that are no qcow2 images: what messages call them, and what they say is to be done."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import statepool
from statepool.errors import UnsafeImage

SIZE = 4 << 20


def write(*arguments: str) -> None:
    """Have qemu-img write an image; skip the test where it is built without that format."""
    done = subprocess.run(["qemu-img", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this qemu-img does not write it: {done.stderr.strip()}")


def refusal(path: Path) -> UnsafeImage:
    with pytest.raises(UnsafeImage) as caught:
        statepool.StatePool(path.parent / "cache").image("vm1/disk").set("install", source=path)
    return caught.value


@pytest.fixture
def raw(tmp_path: Path, qemu_img: Callable[..., str]) -> Path:
    """A disk with a pattern on it."""
    path = tmp_path / "it is raw"
    path.write_bytes(bytes(65536) + b"\x07" * 65536 + bytes(SIZE - 131072))
    return path


def same_disk(path: Path, raw: Path) -> bool:
    command = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(path), str(raw)]
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("driver", "options", "name"),
    [
        ("vmdk", "", "a VMDK image"),
        ("vmdk", "subformat=streamOptimized", "a VMDK image"),
        ("vmdk", "subformat=monolithicFlat", "the description of a VMDK image"),
        ("vdi", "", "a VDI image"),
        ("vpc", "", "a VHD image"),
        ("vpc", "subformat=fixed", "a VHD image"),
        ("vhdx", "", "a VHDX image"),
        ("qed", "", "a QED image"),
        ("qcow", "", "of version 1"),
        ("parallels", "", "a Parallels image"),
        ("raw", "", "does not begin as a qcow2 image does"),
    ],
)
def test_an_image_of_another_format_and_the_command_that_converts_it(
    tmp_path: Path, raw: Path, qemu_img: Callable[..., str], driver: str, options: str, name: str
) -> None:
    path = tmp_path / f"an image.{driver}"
    write(
        "convert",
        "-f",
        "raw",
        "-O",
        driver,
        *(["-o", options] if options else []),
        str(raw),
        str(path),
    )
    error = refusal(path)
    assert name in error.message
    command = (error.hint or "").partition(": ")[2]
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False).returncode == 0, command
    # the last one of which counts in cylinders
    assert same_disk(tmp_path / "NEW.qcow2", raw) or driver == "vpc"


def test_an_encrypted_volume(tmp_path: Path, raw: Path, qemu_img: Callable[..., str]) -> None:
    path = tmp_path / "v.luks"
    (tmp_path / "FILE").write_text("word")
    secret = ["--object", f"secret,id=key,file={tmp_path / 'FILE'}"]
    write(
        "create",
        "-q",
        *secret,
        "-f",
        "luks",
        "-o",
        "key-secret=key,iter-time=10",
        str(path),
        str(SIZE),
    )
    error = refusal(path)
    assert "an encrypted LUKS volume" in error.message
    command = (error.hint or "").partition("FILE: ")[2]
    assert subprocess.run(shlex.split(command), cwd=tmp_path, check=False).returncode == 0, command
    assert (tmp_path / "NEW.qcow2").exists()


@pytest.mark.parametrize(
    ("program", "name"),
    [("gzip", "gzip"), ("xz", "xz"), ("zstd", "zstd"), ("bzip2", "bzip2"), ("lz4", "lz4")],
)
def test_a_compressed_image(tmp_path: Path, raw: Path, program: str, name: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    image = tmp_path / "d.qcow2"
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)], check=True
    )
    subprocess.run([program, "-q", "-m" if program == "lz4" else "-k", str(image)], check=True)
    packed = next(tmp_path.glob("d.qcow2.*"))
    image.unlink()
    error = refusal(packed)
    assert f"it is compressed by {name}" in error.message
    assert (
        subprocess.run(
            ["sh", "-c", (error.hint or "").partition("in it: ")[2]], cwd=tmp_path, check=False
        ).returncode
        == 0
    )
    assert same_disk(image, raw)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"PK\3\4" + bytes(600), "a zip archive"),
        (bytes(257) + b"ustar" + bytes(600), "a tar archive"),
        (bytes(32769) + b"CD001" + bytes(3000), "an ISO 9660 image"),
        (bytes(4096) + b"koly" + bytes(508), "a DMG image"),
        (b"Bochs Virtual HD Image" + bytes(600), "a Bochs image"),
        (b"conec", "does not begin"),
        (bytes(32769) + b"CD0", "does not begin"),
    ],
)
def test_what_its_bytes_say(tmp_path: Path, data: bytes, name: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    error = refusal(path)
    assert error.check == "magic"
    assert name in error.message


def test_a_version_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"QFI\xfb\0\0\0\7" + bytes(600))
    error = refusal(path)
    assert "version 7" in error.message
    assert "convert" not in (error.hint or "")
