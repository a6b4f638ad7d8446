"""What errors say that can be done, typed as it stands: the commands in them do what is said."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import statepool

Make = Callable[..., Path]

FILL = {"FILE": "passphrase", "BACKING": "base.qcow2", "NAME.qcow2": "base.qcow2", "SIZE": "1M"}
"""What a person has to put in."""


def tool(*words: str | Path) -> None:
    subprocess.run(list(words), check=True, capture_output=True, timeout=60)


def create(path: Path, *options: str) -> Path:
    tool("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M")
    return path


def with_bit(path: Path, bit: int) -> Path:
    with open(path, "r+b") as file:
        file.seek(79)
        file.write(bytes([1 << bit]))
    return path


def encrypted(path: Path) -> Path:
    secret = f"secret,id=s,file={(path.parent / 'passphrase').as_posix().replace(',', ',,')}"
    options = (
        "--object",
        secret,
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    )
    # it measures how fast this machine derives keys, which fails now and then where time is counted
    # in coarse ticks
    for _ in range(50):
        done = subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M"],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    return path


def without_format(path: Path) -> Path:
    create(path, "-b", str(path.parent / "base.qcow2"), "-F", "qcow2")
    data = path.read_bytes()
    # the extension that gives the format
    path.write_bytes(data.replace(b"\xe2\x79\x2a\xca", b"\x00\x00\x00\x07", 1))
    return path


def over_raw(path: Path) -> Path:
    (path.parent / "base.raw").write_bytes(bytes(1 << 20))
    return create(path, "-b", str(path.parent / "base.raw"), "-F", "raw")


def raw(path: Path) -> Path:
    path.write_bytes(bytes(1 << 20))
    return path


IMAGES: dict[str, Callable[[Path], Path]] = {
    "dirty": lambda path: with_bit(create(path), 0),
    "corrupt": lambda path: with_bit(create(path), 1),
    "data-file": lambda path: create(
        path, "-o", f"data_file={(path.parent / 'data').as_posix().replace(',', ',,')}"
    ),
    "encryption": encrypted,
    "backing-format-false": over_raw,
    "backing-relative": lambda path: create(path, "-b", "base.qcow2", "-F", "qcow2"),
    "backing-json": lambda path: create(
        path,
        "-u",
        "-F",
        "qcow2",
        "-b",
        'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}}',
    ),
    "magic": raw,
}


@pytest.mark.parametrize("check", IMAGES)
def test_the_cure_of_an_image_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    place = tmp_path / "a place, of images"
    place.mkdir()
    monkeypatch.chdir(place)
    create(place / "base.qcow2")
    (place / "passphrase").write_text("secret")
    image = IMAGES[check](place / "my work, today.qcow2")
    disk = statepool.StatePool(tmp_path / "cache").image("vm1/disk")
    with pytest.raises(statepool.UnsafeImage) as refused:
        disk.set("install", source=image)
    assert refused.value.check == check
    cure = (refused.value.hint or "").rpartition(": ")[2]
    for word, value in FILL.items():
        cure = re.sub(rf"(?<![\w./-]){re.escape(word)}\b", value, cure)
    tool("sh", "-ec", cure)
    disk.set("install", source=place / "NEW.qcow2")


def test_what_backs_an_image_has_no_format(tmp_path: Path) -> None:
    disk = statepool.StatePool(tmp_path / "cache").image("vm1/disk")
    disk.set("install", source=create(tmp_path / "base.qcow2"))
    backing = tmp_path / "cache/vm1/disk/install.qcow2"
    image = create(tmp_path / "my work.qcow2", "-u", "-b", str(backing), "-F", "qcow2")
    data = image.read_bytes()
    # the extension that gives the format
    image.write_bytes(data.replace(b"\xe2\x79\x2a\xca", b"\x00\x00\x00\x07", 1))
    with pytest.raises(statepool.UnsafeImage) as refused:
        disk.set("customize", source=image)
    assert refused.value.check == "backing-format-missing"
    tool(
        "sh",
        "-ec",
        (refused.value.hint or "")
        .rpartition(": ")[2]
        .replace("BACKING", shlex.quote(str(backing))),
    )
    assert disk.set("customize", source=image).complete


def test_a_cure_is_for_the_pools_that_were_asked(tmp_path: Path, make_image: Make) -> None:
    for name in ("pool", "my cache"):
        disk = statepool.StatePool(tmp_path / name).image("vm1/disk")
        disk.set("install", source=make_image(tmp_path / f"{name}.qcow2", 1 << 20))
    words = [
        sys.executable,
        "-m",
        "statepool",
        "--cache",
        str(tmp_path / "my cache"),
        "--source",
        str(tmp_path / "pool"),
    ]
    tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 0 64k", tmp_path / "pool.qcow2")
    statepool.StatePool(tmp_path / "pool").image("vm1/disk").set(
        "install", source=tmp_path / "pool.qcow2", replace=True, squash=True
    )

    def said(*more: str) -> tuple[int, str]:
        done = subprocess.run(
            [*words, *more],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"HOME": str(tmp_path)},
        )
        return done.returncode, done.stderr

    code, text = said("get", "vm1/disk", "nothing")
    assert (
        code,
        f"(statepool --cache '{tmp_path}/my cache' --source {tmp_path}/pool show lists what"
        " there is" in text,
    ) == (3, True)
    code, text = said("get", "vm1/disk", "install")
    assert code == 4, text
    cure = re.search(r"give it up with: (statepool .*)\)$", text, re.MULTILINE)
    assert cure is not None, text
    tool(sys.executable, "-m", *shlex.split(cure[1]))
    assert said("get", "vm1/disk", "install")[0] == 0
