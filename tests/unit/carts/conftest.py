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

import statepool
from statepool.cache.cache import Cache
from statepool.capture.capture import Capture, files_of
from statepool.model.manifest import Kind, StateId
from statepool.sources.pool_source import open_pool

pytest.importorskip("flask", reason="the service is not installed: pip install statepool[serve]")
if shutil.which("curl") is None:
    pytest.skip("curl is not installed (Debian: curl)", allow_module_level=True)

FILES = {
    "foo.txt": b"hello\n",
    "data/bar.csv": b"a,b\n" * 50_000,
    "empty": b"",
    "baz.ini": b"[x]\n",
}


RAM = b"a stream of pages" * 9999

LABELS = {"os": "debian-12", "note": "<script>alert(1)</script>"}


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


def qemu(*command: str | Path) -> None:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed (Debian: qemu-utils)")
    subprocess.run(command, check=True, capture_output=True)


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


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool with a chain of two, and a machine with RAM."""
    lab = tmp_path_factory.mktemp("lab")
    work, settings = lab / "work.qcow2", statepool.Settings()
    statepool.init(lab / "pool")
    disk = statepool.StatePool(lab / "made", [lab / "pool"]).image("vm1/disk")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", work, "16M")
    for number, state in enumerate(("install", "customize")):
        qemu("qemu-io", "-c", f"write -P {number + 1} {number << 20} 1M", work)
        disk.set(state, source=work, labels=LABELS if number else None)
    (lab / "ram").write_bytes(RAM)
    cache = Cache.open(open_pool(lab / "made", settings), settings)
    on = StateId("vm1", "on", Kind.MACHINE)
    Capture(cache, on, files_of(on, {"disk": work}, lab / "ram"), fingerprint={"cpu": "max"}).run()
    machine = statepool.StatePool(lab / "made", [lab / "pool"]).machine("vm1")
    assert machine.store("on", to=lab / "pool").complete
    shutil.rmtree(lab / "made")
    return lab / "pool"
