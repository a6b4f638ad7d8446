"""The service with a directory of files, as its users have it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.carts import CartServer, FakeInterface, run_interface, run_server

pytest.importorskip("flask", reason="the service is not installed: pip install statepool[serve]")
if shutil.which("curl") is None:
    pytest.skip("curl is not installed (Debian: curl)", allow_module_level=True)

FILES = {
    "foo.txt": b"hello\n",
    "data/bar.csv": b"a,b\n" * 50_000,
    "empty": b"",
    "baz.ini": b"[x]\n",
}


def start(
    stack: ExitStack, directory: Path, *arguments: str, settings: str = "", **more: Any
) -> CartServer:
    """:returns: a server whose files are those above, in the archive ``lab``"""
    for name, data in FILES.items():
        path = directory / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    lab = f'archives.lab = {{ type = "directory", path = "{directory / "files"}" }}'
    pools, mark, own = settings.rpartition("[serve]")
    assert mark or not pools
    text = f'{pools}[serve]\narchive = "lab"\n{lab}\n{own}'
    return stack.enter_context(run_server(directory, *arguments, settings=text, **more))


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")


@contextmanager
def mounted(where: Path, *options: str | Path) -> Iterator[Path]:
    """A mounted file system, or a skipped test."""
    where.mkdir()
    command = ["mount", *options, where]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(tmp_path: Path, stack: ExitStack) -> Callable[..., CartServer]:
    """``serve("--address", "127.0.0.1", settings="…")``: a server of one's own."""
    return lambda *arguments, **more: start(stack, tmp_path, *arguments, **more)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CartServer]:
    """One for all tests of a file, each of which has carts of its own."""
    with ExitStack() as stack:
        yield start(stack, tmp_path_factory.mktemp("server"))


@pytest.fixture
def uid(request: pytest.FixtureRequest) -> str:
    """A cart that no other test has."""
    return f"cart-{abs(hash(request.node.nodeid))}"


@pytest.fixture
def interface(stack: ExitStack) -> FakeInterface:
    """An archive interface with the same files."""
    return stack.enter_context(run_interface(FILES))
