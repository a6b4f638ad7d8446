"""
Bytes that are compressed on their way to and from another host arrive as they are, whatever the
programs there do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from statepool.errors import NoSpace, TransportError
from statepool.model.digest import Digest
from statepool.testing.transports import Counter, Stopping
from statepool.transports.base import Transfer
from statepool.transports.ssh import SSHTransport, compressed
from tests.support.sshd import SFTP_SERVER, Sshd, run_sshd, sshd_program

pytestmark = pytest.mark.skipif(
    sshd_program() is None or shutil.which("zstd") is None,
    reason="sshd or zstd is not installed (Debian: openssh-server)",
)

MIB = 1 << 20
TEXT = b"".join(b"%08d the same words, again and again\n" % number for number in range(100_000))
DATA = b"".join(TEXT[n * 9973 :][: 64 << 10] if n % 2 else os.urandom(64 << 10) for n in range(96))
"""6 MiB, half of which compresses well."""

Opened = Callable[..., int]


@pytest.fixture(scope="module")
def sshd() -> Iterator[Sshd]:
    with run_sshd() as server:
        yield server


@frozen
class Place:
    """A directory there, and a transport to it."""

    directory: Path
    transport: SSHTransport

    def put(self, data: bytes = DATA) -> Path:
        path = self.directory / "a"
        path.write_bytes(data)
        return path


def place(sshd: Sshd, **knobs: object) -> Place:
    directory = sshd.directory_for(f"pool $(touch pwned) 'of' {os.urandom(4).hex()}")
    return Place(
        directory,
        SSHTransport(sshd.location(directory), sshd.settings(**{"compress": "on", **knobs})),
    )


@pytest.fixture
def there(sshd: Sshd) -> Iterator[Place]:
    found = place(sshd)
    yield found
    found.transport.close()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opened]:
    """``opened(data)``: a descriptor of a new local file."""
    with ExitStack() as stack:

        def make(data: bytes = b"") -> int:
            file = stack.enter_context(open(tmp_path / os.urandom(4).hex(), "x+b", buffering=0))
            file.write(data)
            return file.fileno()

        yield make


@pytest.fixture
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Place]]:
    """
    ``programs(zstd="...")``: a place where that script is the program of that name; an empty one is
    not there at all.
    """
    with ExitStack() as stack:

        def start(timeout: float = 20.0, **scripts: str) -> Place:
            tools = tmp_path_factory.mktemp("tools")
            for name in ("sh", "dd", "sleep", "head", "cat", "wc", "zstd"):
                if name not in scripts:
                    (tools / name).symlink_to(shutil.which(name) or "")
            for name, script in scripts.items():
                if script:
                    (tools / name).write_text(f"#!/bin/sh\n{script}\n")
                    (tools / name).chmod(0o755)
            # Whatever the account's own files make of PATH: this comes after them.
            command = tmp_path_factory.mktemp("command") / "command"
            command.write_text(f'#!/bin/sh\nPATH={tools}\neval "$SSH_ORIGINAL_COMMAND"\n')
            command.chmod(0o755)
            server = stack.enter_context(
                run_sshd(sftp=SFTP_SERVER, options={"ForceCommand": str(command)})
            )
            return place(server, timeout=timeout)

        yield start


def fetched(place: Place, target: int, data: bytes = DATA, **how: Any) -> int:
    """Fetch, and look at everything. :returns: how many bytes were sent"""
    progress = Counter()
    moved = place.transport.fetch("a", target, Transfer(len(data), progress=progress, **how))
    assert os.pread(target, len(data) + 1, 0) == data
    assert moved.digest == Digest.of(data)
    assert progress.done == len(data)
    return moved.sent


def stored(place: Place, source: int, data: bytes = DATA, **how: Any) -> int:
    """Store, and look at everything. :returns: how many bytes were sent"""
    progress = Counter()
    moved = place.transport.store(source, "a", Transfer(len(data), progress=progress, **how))
    assert (place.directory / "a").read_bytes() == data
    assert (place.directory / "a").stat().st_mode & 0o777 == 0o444
    assert moved.digest == Digest.of(data)
    assert progress.done == len(data)
    return moved.sent


# -- as it should be -------------------------------------------------------------------------------


def test_less_is_sent(there: Place, opened: Opened) -> None:
    there.put()
    assert fetched(there, opened()) < 0.6 * len(DATA)
    assert stored(there, opened(DATA)) < 0.6 * len(DATA)
    assert os.listdir(there.directory) == ["a"], "nothing in its path was run"


@pytest.mark.parametrize("size", [1, MIB - 1, MIB, MIB + 1, 3 * MIB + 4097])
def test_sizes(there: Place, opened: Opened, size: int) -> None:
    there.put(DATA[:size])
    fetched(there, opened(), DATA[:size])
    stored(there, opened(DATA[:size]), DATA[:size])


def test_holes_are_not_sent_and_stay(there: Place, opened: Opened) -> None:
    data = DATA[:MIB] + bytes(20 * MIB) + DATA[MIB : 2 * MIB] + bytes(9 * MIB)
    path = there.put(b"")
    with path.open("r+b") as file:
        file.write(DATA[:MIB])
        file.seek(20 * MIB, os.SEEK_CUR)
        file.write(DATA[MIB : 2 * MIB])
        file.truncate(len(data))
    for extents in ((), ((0, MIB), (21 * MIB, MIB))):
        target = opened()
        assert fetched(there, target, data, extents=extents) < 2 * MIB
        assert os.fstat(target).st_blocks * 512 <= 3 * MIB
    assert stored(there, target, data) < 2 * MIB
    assert path.stat().st_blocks * 512 <= 3 * MIB


def test_a_transfer_goes_on_where_another_one_stopped(there: Place, opened: Opened) -> None:
    there.put()
    done = 2 * MIB + 12345
    assert fetched(there, opened(DATA[:done]), done=done) < 0.6 * (len(DATA) - done)
    path = there.put(DATA[:done])
    path.chmod(0o600)
    assert stored(there, opened(DATA), done=done) < 0.6 * (len(DATA) - done)


def test_python_does_where_there_is_no_zstd(programs: Callable[..., Place], opened: Opened) -> None:
    place = programs(zstd="", python3=f'exec {sys.executable} "$@"')
    place.put()
    assert fetched(place, opened()) < 0.6 * len(DATA)
    assert stored(place, opened(DATA)) < 0.6 * len(DATA)


@pytest.mark.parametrize("how", ["off", "auto"])
def test_it_is_not_done_unless_it_pays(sshd: Sshd, opened: Opened, how: str) -> None:
    there = place(sshd, compress=how)
    there.put()
    assert fetched(there, opened()) == len(DATA)
    assert stored(there, opened(DATA)) == len(DATA)


@pytest.mark.parametrize(
    ("fast", "share"), [(1e12, 0.7), (0.0, 1.0)], ids=["slow link", "fast link"]
)
def test_auto_measures(
    sshd: Sshd, opened: Opened, monkeypatch: pytest.MonkeyPatch, fast: float, share: float
) -> None:
    """
    On a link that counts as slow it is tried; whether it goes on then is up to the machine, so no
    beat is missed here.
    """
    monkeypatch.setattr(compressed, "FAST", fast)
    monkeypatch.setattr(compressed, "WARM_UP", 64 << 10)
    monkeypatch.setattr(compressed, "MEASURED", 256 << 10)
    monkeypatch.setattr(compressed, "BETTER", 0.0)
    there = place(sshd, compress="auto")
    there.put()
    assert fetched(there, opened()) <= share * len(DATA)
    assert stored(there, opened(DATA)) <= share * len(DATA)


def test_auto_gives_up_what_is_slower(
    sshd: Sshd, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "FAST", 1e12)
    monkeypatch.setattr(compressed, "WARM_UP", 64 << 10)
    monkeypatch.setattr(compressed, "MEASURED", 256 << 10)
    monkeypatch.setattr(compressed, "BETTER", 1e9)
    there = place(sshd, compress="auto")
    there.put()
    assert fetched(there, opened()) > 0.7 * len(DATA)
    assert stored(there, opened(DATA)) > 0.7 * len(DATA)


# -- programs that fail ----------------------------------------------------------------------------

REAL = shutil.which("zstd")

FAILING = {
    "it fails at once": "exit 1",
    "it ends at once": "exit 0",
    "it is something else": "echo this is not what you asked for",
    "it says something else": "cat",
    "it stops in the middle": f"{REAL} $* | head -c 1000000",
    "it fails in the middle": f"{REAL} $* | head -c 1000000; exit 3",
    "it fails at the end": f"{REAL} $*; exit 3",
    "it says more": f"{REAL} $*; echo more",
}


@pytest.mark.parametrize("script", FAILING.values(), ids=FAILING.keys())
def test_whatever_a_program_does_the_bytes_arrive(
    programs: Callable[..., Place], opened: Opened, script: str
) -> None:
    place = programs(zstd=script)
    place.put()
    fetched(place, opened())
    stored(place, opened(DATA))


def test_a_dd_that_fails_is_noticed(programs: Callable[..., Place], opened: Opened) -> None:
    place = programs(dd="cat >/dev/null; exit 1")
    place.put()
    fetched(place, opened())
    stored(place, opened(DATA))


def test_a_dd_that_lies_is_found_out_by_the_digest(
    programs: Callable[..., Place], opened: Opened
) -> None:
    """
    Nothing that fails: bytes that are wrong. Whoever fetches has the digest to hold against it.
    """
    place = programs(dd="head -c 6291456 /dev/zero")
    place.put()
    moved = place.transport.fetch("a", opened(), Transfer(len(DATA)))
    assert moved.digest == Digest.of(bytes(len(DATA)))
    assert moved.digest != Digest.of(DATA)


def test_a_program_that_falls_silent_ends_by_the_timeout(
    programs: Callable[..., Place], opened: Opened
) -> None:
    place = programs(zstd="sleep 100", timeout=1.0)
    place.put()
    with pytest.raises(TransportError) as caught:
        place.transport.fetch("a", opened(), Transfer(len(DATA)))
    assert caught.value.transient


# -- on the way ------------------------------------------------------------------------------------


class Then(Counter):
    """Does something, once, when enough has been moved."""

    def __init__(self, after: int, do: Callable[[], object]) -> None:
        super().__init__()
        self._after = after
        self._do = do

    def advance(self, count: int) -> None:
        super().advance(count)
        if self.done >= self._after:
            self._after = 1 << 62
            self._do()


def test_a_connection_that_breaks_is_told_and_the_rest_can_be_had(
    sshd: Sshd, there: Place, opened: Opened
) -> None:
    data = DATA * 8
    there.put(data)
    target = opened()
    with pytest.raises(TransportError) as caught:
        there.transport.fetch(
            "a", target, Transfer(len(data), progress=Then(MIB, sshd.kill_sessions))
        )
    assert caught.value.transient
    done = os.fstat(target).st_size
    assert os.pread(target, done, 0) == data[:done]
    fetched(there, target, data, done=done)

    source = opened(data)
    with pytest.raises(TransportError) as caught:
        there.transport.store(
            source, "a", Transfer(len(data), progress=Then(8 * MIB, sshd.kill_sessions))
        )
    assert caught.value.transient
    left = (there.directory / "a").read_bytes()
    assert left == data[: len(left)]
    stored(there, source, data, done=len(left))


def test_a_progress_that_raises_ends_it(there: Place, opened: Opened) -> None:
    data = DATA * 4
    there.put(data)
    with pytest.raises(Stopping.Enough):
        there.transport.fetch("a", opened(), Transfer(len(data), progress=Stopping(4 * MIB)))
    with pytest.raises(Stopping.Enough):
        there.transport.store(opened(data), "b", Transfer(len(data), progress=Stopping(4 * MIB)))
    assert there.transport.stat("b") is None
    fetched(there, opened(), data)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system needs root")
@pytest.mark.parametrize("how", ["on", "off"])
def test_a_full_disk_is_one(sshd: Sshd, opened: Opened, how: str) -> None:
    there = place(sshd, compress=how)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", there.directory], check=True)
    try:
        with pytest.raises(NoSpace):
            there.transport.store(opened(DATA), "a", Transfer(len(DATA)))
        assert there.transport.scan("") == []
    finally:
        subprocess.run(["umount", "-l", there.directory], check=True)
