"""
The disk on the far side is full, or fails: that is always reported, and nothing is visible that is
not whole.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from attrs import evolve

import statepool
from statepool.copying.push import Push
from statepool.errors import NoSpace, TransportError
from statepool.model.location import Location
from statepool.model.outcomes import Presence
from statepool.model.settings import Settings
from statepool.testing.transports import Counter
from statepool.transports import flushing
from statepool.transports.base import Transfer
from statepool.transports.registry import open_transport
from statepool.transports.ssh import SSHTransport
from statepool.transports.ssh import transport as transport_module
from statepool.transports.ssh.connection import connection_to
from tests.support.sshd import SFTP_SERVER, Sshd, run_sshd, sshd_program

if TYPE_CHECKING:
    from conftest import Lab

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * MIB + 77


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """A local file."""
    (tmp_path / "source").write_bytes(os.urandom(SIZE))
    descriptor = os.open(tmp_path / "source", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


# -- it fails --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing() -> Iterator[Callable[..., Sshd]]:
    """
    ``failing("write:error=EIO:when=3")``: from now on, this happens to files named ``target`` in
    each session of the server, or in one only.
    """
    if shutil.which("strace") is None or sshd_program() is None or not os.path.exists(SFTP_SERVER):
        pytest.skip("strace or sshd is not installed (Debian: strace, openssh-server)")
    with run_sshd(sftp="/proc/self/cwd/none") as server:
        place = server.directory_for("failing")
        wrapper = server.directory / "sftp-server"
        server.kill()
        config = server.directory / "sshd_config"
        config.write_text(config.read_text().replace("/proc/self/cwd/none", str(wrapper)))

        def fail(how: str, *, once: bool = False) -> Sshd:
            calls = how.partition(":")[0]
            command = (
                f"strace -f -qq -o /dev/null -P {place}/target -e trace={calls} -e inject={how}"
                f" {SFTP_SERVER}"
            )
            condition = (
                f"mkdir {os.fspath(place)}.{os.urandom(4).hex()}"
                if once
                else "true"
                if how
                else "false"
            )
            wrapper.write_text(
                f"#!/bin/sh\nif {condition} 2>/dev/null; then exec {command}; else exec"
                f" {SFTP_SERVER}; fi\n"
            )
            wrapper.chmod(0o755)
            return server

        fail("")
        server.restart()
        yield fail


def reach(server: Sshd) -> SSHTransport:
    """:returns: a transport on a new connection"""
    location, settings = (
        server.location(server.directory / "pools/failing"),
        server.settings(retries=0, timeout=30.0),
    )
    connection_to(location, settings).close()
    return SSHTransport(location, settings)


@pytest.mark.parametrize(
    "call",
    [
        "write:error=EIO:when=1",
        "write:error=EIO:when=7",
        "write:error=ENOSPC:when=13",
        "fsync:error=EIO:when=1",
    ],
)
def test_a_failed_call_at_the_far_side_is_reported(
    failing: Callable[..., Sshd], source: int, call: str
) -> None:
    server = failing(call)
    transport = reach(server)
    with pytest.raises((TransportError, NoSpace)):
        transport.store(source, "target", Transfer(SIZE))
    assert not (server.directory / "pools/failing/target").exists()
    failing("")
    transport = reach(server)
    assert transport.store(source, "target", Transfer(SIZE)).digest == transport.digest(
        "target", Transfer(SIZE)
    )


@pytest.fixture
def often_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written there is flushed there five times on the way, by a second channel."""
    for module in (flushing, transport_module):
        monkeypatch.setattr(module, "STEP", MIB // 2)
    monkeypatch.setattr(flushing, "LEAD", MIB // 2)


@pytest.mark.usefixtures("often_flushed")
def test_a_flush_that_fails_on_the_way_is_reported(
    failing: Callable[..., Sshd], source: int
) -> None:
    """
    The second one, which only the second channel comes to: what the first one asks for in the end
    would find nothing wrong.
    """
    server = failing("fsync:error=EIO:when=2")
    with pytest.raises(TransportError):
        reach(server).store(source, "target", Transfer(SIZE))
    assert not (server.directory / "pools/failing/target").exists()


def failing_too_late(failing: Callable[..., Sshd]) -> tuple[Location, Settings]:
    """
    :returns: a pool where the first flush fails after the connection was lost; each one after that
        finds nothing wrong
    """
    server = failing("fsync:error=EIO:delay_enter=30000000:when=1", once=True)
    location = server.location(server.directory / "pools/failing")
    return location, server.settings(timeout=8.0, retry_pause=0.01, compress="off")


def test_a_flush_whose_failure_nobody_heard_is_made_up_for(
    failing: Callable[..., Sshd], source: int
) -> None:
    """
    The bytes are written again: another flush of what is there would not tell that it is lost.
    """
    location, settings = failing_too_late(failing)
    transport = open_transport(location, evolve(settings, retries=2))
    moved = transport.store(source, "target", Transfer(SIZE))
    assert (moved.sent, moved.again) == (2 * SIZE, SIZE)
    assert transport.digest("target", Transfer(SIZE)) == moved.digest


@pytest.mark.usefixtures("often_flushed")
def test_a_flush_on_the_way_whose_failure_nobody_heard_is_made_up_for(
    failing: Callable[..., Sshd], source: int
) -> None:
    """By the next command too, which goes on under another name."""
    location, settings = failing_too_late(failing)
    transport = SSHTransport(location, settings)
    with pytest.raises(TransportError, match="no answer"):
        transport.store(source, "target", Transfer(SIZE))
    found = transport.stat("target")
    assert found is not None
    assert found.size
    transport.rename("target", "other")
    moved = SSHTransport(location, settings).store(source, "other", Transfer(SIZE, done=found.size))
    assert (moved.sent, moved.again) == (SIZE, found.size)
    assert transport.digest("other", Transfer(SIZE)) == moved.digest


def test_a_file_that_another_process_had_begun_to_flush_is_written_again(
    source: int, sshd: Sshd, tmp_path: Path
) -> None:
    shutil.copy(f"/proc/self/fd/{source}", tmp_path / "target")
    (tmp_path / "target").chmod(0o444)
    moved = SSHTransport(sshd.location(tmp_path), sshd.settings()).store(
        source, "target", Transfer(SIZE, done=SIZE)
    )
    assert (moved.sent, moved.again) == (SIZE, SIZE)
    assert (tmp_path / "target").read_bytes() == os.pread(source, SIZE, 0)


@pytest.mark.usefixtures("often_flushed")
def test_a_server_without_room_for_a_second_channel(source: int, tmp_path: Path) -> None:
    with run_sshd(options={"MaxSessions": "1"}) as server:
        transport = SSHTransport(
            server.location(tmp_path), server.settings(retries=0, compress="off")
        )
        assert transport.store(source, "target", Transfer(SIZE)).digest == transport.digest(
            "target", Transfer(SIZE)
        )


class Impatient(Counter):
    """Is interrupted by an error of the caller's own."""

    def advance(self, count: int) -> None:
        raise ArithmeticError("in a test")


def test_a_store_that_fails_on_the_only_channel(source: int, tmp_path: Path) -> None:
    """
    What is left of it is removed when the channel has been given back: nobody waits for themselves.
    """
    with run_sshd(options={"MaxSessions": "1"}) as server:
        transport = SSHTransport(
            server.location(tmp_path), server.settings(retries=0, compress="off")
        )
        with pytest.raises(ArithmeticError):
            transport.store(source, "target", Transfer(SIZE, progress=Impatient()))


def test_a_write_that_does_less_than_it_should_is_noticed(
    failing: Callable[..., Sshd], source: int
) -> None:
    server = failing("write:retval=100:when=5")
    with pytest.raises(TransportError):
        reach(server).store(source, "target", Transfer(SIZE))


# -- it is full ------------------------------------------------------------------------------------


@pytest.fixture
def small(lab: Lab) -> Iterator[Path]:
    """The pool is in a file system of a few MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    shutil.rmtree(lab.there)
    lab.there.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m,mode=755", "tmpfs", str(lab.there)], check=True
    )
    try:
        statepool.init(lab.there)
        yield lab.there
    finally:
        subprocess.run(["umount", "-l", str(lab.there)], check=True)


def test_what_does_not_fit_is_refused_before_it_is_sent(filled: Lab, small: Path) -> None:
    before = filled.proxy.moved["up"]
    with pytest.raises(NoSpace):
        Push(filled.cache("cache"), filled.pool()).run(filled.chain("cache", "install"))
    assert filled.proxy.moved["up"] - before < MIB
    assert filled.states(small) == set()


def test_a_full_disk_is_told_from_other_failures(filled: Lab, small: Path, source: int) -> None:
    with open(small / "filler", "wb") as filler:
        filler.write(bytes(os.statvfs(small).f_bavail * 4096 - MIB))
    with pytest.raises(NoSpace) as caught:
        filled.pool().transport.store(source, "target", Transfer(SIZE))
    assert caught.value.available < MIB
    assert not (small / "target").exists()


def test_a_full_disk_behind_the_only_channel(small: Path, source: int) -> None:
    with open(small / "filler", "wb") as filler:
        filler.write(bytes(os.statvfs(small).f_bavail * 4096 - MIB))
    with run_sshd(options={"MaxSessions": "1"}) as server:
        transport = SSHTransport(server.location(small), server.settings(retries=0, compress="off"))
        with pytest.raises(NoSpace):
            transport.store(source, "target", Transfer(SIZE))
    assert not (small / "target").exists()


def test_a_disk_that_is_full_at_any_stage(
    lab: Lab,
    small: Path,
    make_image: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    From no room at all to enough of it, a few KiB at a time: markers, bytes, records and names each
    meet the end of it.
    """
    # another process takes the room after the space was checked
    monkeypatch.setattr(SSHTransport, "free_space", lambda self: None)
    work = make_image(tmp_path / "work.qcow2", MIB, writes=[(0, 64 * KIB, 1)])
    assert lab.image("cache", alone=True).set("install", source=work).complete
    chain = lab.chain("cache", "install")
    need = chain[0].data_size
    filler = small / "filler"
    results = []
    for left in (0, 8 * KIB, need, need + 8 * KIB, need + 256 * KIB):
        filler.write_bytes(bytes(max(os.statvfs(small).f_bavail * 4096 - left, 0)))
        outcome = Push(lab.cache("cache"), lab.pool()).attempt(chain)
        results.append(outcome.result)
        assert lab.states(small) <= {"install"}
        assert outcome.result is Presence.FAILED or lab.states(small) == {"install"}
        filler.unlink()
        assert Push(lab.cache("cache"), lab.pool()).attempt(chain).result in (
            Presence.STORED,
            Presence.PRESENT,
        )
        assert lab.states(small) == {"install"}
        lab.image("cache").unset("install", scope="shared")
        statepool.StatePool(cache=lab.root / "cache", sources=[small]).gc()
    assert results[0] is Presence.FAILED
    assert results[-1] is Presence.STORED
