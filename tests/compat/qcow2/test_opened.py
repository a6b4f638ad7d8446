"""Whether we see that a real QEMU program has an image open."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from statepool.errors import InUse
from statepool.qcow2 import opened
from statepool.qcow2.opened import exclusive, is_open, shared

MakeImage = Callable[..., Path]


@contextmanager
def qemu_io(*arguments: str | Path) -> Iterator[int]:
    with subprocess.Popen(
        ["qemu-io", *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        assert process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.communicate("quit\n")


UNLOCKED = "driver=qcow2,file.driver=file,file.locking=off,file.filename="


@pytest.mark.parametrize("locking", [True, False], ids=["locked", "not locked"])
def test_a_writer(tmp_path: Path, make_image: MakeImage, locking: bool) -> None:
    path = make_image(tmp_path / "x.qcow2")
    with qemu_io(
        *(["-f", "qcow2", path] if locking else ["--image-opts", f"{UNLOCKED}{path}"])
    ) as pid:
        assert is_open(path)
        for claim in (exclusive, shared):
            with pytest.raises(InUse, match=rf"qemu-io \(process {pid}\)"), claim(path):
                pass
    assert not is_open(path)
    with exclusive(path):
        pass


def test_a_reader(tmp_path: Path, make_image: MakeImage) -> None:
    path = make_image(tmp_path / "x.qcow2")
    with qemu_io("-r", "-f", "qcow2", path):
        assert is_open(path)
        with pytest.raises(InUse), exclusive(path):
            pass
        with shared(path):
            pass


def test_what_backs_an_image_in_use_is_in_use(tmp_path: Path, make_image: MakeImage) -> None:
    parent = make_image(tmp_path / "parent.qcow2")
    path = make_image(tmp_path / "x.qcow2", None, backing="parent.qcow2")
    with qemu_io("-f", "qcow2", path):
        assert is_open(parent)
        with shared(parent):
            pass


@pytest.mark.parametrize("writes", [True, False], ids=["writer", "reader"])
def test_its_locks_alone_give_it_away(
    tmp_path: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    monkeypatch.setattr(opened, "try_lease", lambda *_: None)
    monkeypatch.setattr(opened, "_openers", lambda _: ([], False))
    path = make_image(tmp_path / "x.qcow2")
    with qemu_io(*([] if writes else ["-r"]), "-f", "qcow2", path):
        assert is_open(path)
        with pytest.raises(InUse), exclusive(path):
            pass
        if writes:
            with pytest.raises(InUse), shared(path):
                pass
        else:
            with shared(path):
                pass
    assert not is_open(path)
