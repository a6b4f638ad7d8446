"""Images in memory and in directories, and processes that hold files open."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from statepool.qcow2.files import open_regular
from statepool.qcow2.header import Read, reader


@pytest.fixture
def open_in() -> Callable[..., object]:
    """
    ``with open_in(directory) as open_image``: opens the images of states by their names, as a walk
    wants it.
    """

    @contextmanager
    def opener(directory: Path) -> Iterator[Callable[[str], tuple[Read, int]]]:
        with ExitStack() as stack:

            def open_image(state: str) -> tuple[Read, int]:
                file = stack.enter_context(open_regular(directory / f"{state}.qcow2"))
                return reader(file), os.fstat(file).st_size

            yield open_image

    return opener


HOLDER = """
import fcntl, os, struct, sys
path, mode, lock = sys.argv[1:]
if mode == "dup":
    fd = os.open(path, os.O_RDWR)
    os.dup(fd)
else:
    fd = os.open(path, {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}[mode])
if lock:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", fcntl.F_RDLCK, 0, int(lock), 1, 0))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held_open() -> Callable[..., object]:
    """
    ``with held_open(path, "r") as pid``: a real second process has the file open (``r``, ``w``,
    ``rw``, ``dup``), and perhaps a byte locked.
    """

    @contextmanager
    def hold(path: Path, mode: str, lock: int | None = None) -> Iterator[int]:
        command = [sys.executable, "-c", HOLDER, str(path), mode, "" if lock is None else str(lock)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            try:
                yield process.pid
            finally:
                process.communicate()

    return hold
