"""A shell on another host: what it is found to be, the locks of its kernel, and digests made there."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from statepool.beneath import Tree
from statepool.errors import AccessDenied, LockTimeout, TransportError
from statepool.model.digest import Digest
from statepool.pools.locks import FileLocks
from statepool.testing.sshd import Sshd, run_sshd, sshd_program
from statepool.transports.ssh import shell as module
from statepool.transports.ssh.connection import connection_to
from statepool.transports.ssh.shell import Shell

pytestmark = pytest.mark.skipif(sshd_program() is None, reason="sshd is not installed (Debian: openssh-server)")

NASTY = 'it\'s a $(touch pwned) `touch pwned` "pool"; touch pwned #'
"""Part of the path of a pool that a person has chosen, for reasons of their own."""


@pytest.fixture(scope="module")
def sshd() -> Iterator[Sshd]:
    with run_sshd() as server:
        yield server


@pytest.fixture
def place(sshd: Sshd) -> Path:
    return sshd.directory_for(f"{NASTY} {os.urandom(4).hex()}")


@pytest.fixture
def shell(sshd: Sshd) -> Shell:
    """A look of its own at the account: what others found is not used."""
    return Shell(connection_to(sshd.location("/"), sshd.settings()))


@pytest.fixture
def server() -> Iterator[Callable[..., Shell]]:
    """``server(ForceCommand="...")``: the shell of an account of a server that is configured so."""
    with ExitStack() as stack:

        def start(chrooted: bool = False, **options: str) -> Shell:
            started = stack.enter_context(run_sshd(chrooted=chrooted, options=options))
            return Shell(connection_to(started.location("/"), started.settings(timeout=2.0)))

        yield start


# -- is there one? -----------------------------------------------------------------------------------------------------------------------------------


def test_a_shell_says_what_there_is(shell: Shell) -> None:
    assert {"sh", "flock", "sha256sum", "timeout"} <= shell.programs


@pytest.mark.parametrize(
    "command",
    [
        "internal-sftp",
        "echo This account is for transfers only.",
        "exit 7",
        "sleep 60",
        "yes nothing of what you asked for",
    ],
)
def test_what_runs_something_else_is_no_shell(server: Callable[..., Shell], command: str) -> None:
    shell = server(ForceCommand=command)
    assert shell.programs == frozenset()
    assert shell.modules == frozenset()
    assert shell.hold("/tmp/name.lock", 0) is None
    assert shell.digest("/etc/hostname", 5, "sha256") is None
    assert shell._connection.is_open, "whoever has no shell is not cut off"


@pytest.mark.skipif(os.geteuid() != 0, reason="a chroot needs root")
def test_a_chrooted_account_has_none(server: Callable[..., Shell]) -> None:
    assert server(chrooted=True).programs == frozenset()


def test_a_shell_that_greets_everybody_is_one(server: Callable[..., Shell], tmp_path: Path) -> None:
    greeting = tmp_path / "greeting"
    greeting.write_text("#!/bin/sh\necho 'Welcome!'; printf 'no end of line '; eval \"$SSH_ORIGINAL_COMMAND\"\n")
    greeting.chmod(0o755)
    assert {"sh", "flock"} <= server(ForceCommand=str(greeting)).programs


# -- locks -------------------------------------------------------------------------------------------------------------------------------------------


def held(shell: Shell, path: Path, timeout: float = 0) -> ExitStack:
    lock = shell.hold(str(path), timeout)
    assert lock is not None
    stack = ExitStack()
    stack.enter_context(lock)
    return stack


def test_a_lock_meets_that_of_local_users(shell: Shell, place: Path) -> None:
    here, there = FileLocks(Tree(place), ""), place / "name.lock"
    with held(shell, there):
        with pytest.raises(LockTimeout), here.hold("name", 0):
            pass
        with pytest.raises(LockTimeout, match=r"held .*name\.lock on ") as caught:
            held(shell, there)
        assert caught.value.seconds == 0
        with held(shell, place / "another.lock"):
            pass
    with here.hold("name", 0):
        with pytest.raises(LockTimeout):
            held(shell, there)
        with pytest.raises(LockTimeout):
            held(shell, there, 0.2)
    with held(shell, there):
        pass
    assert sorted(os.listdir(place)) == ["another.lock", "name.lock"], "nothing in its path was run"


def test_whoever_waits_gets_it_when_the_holder_lets_go(shell: Shell, place: Path) -> None:
    got = threading.Event()

    def wait() -> None:
        with held(shell, place / "name.lock", 100):
            got.set()

    with FileLocks(Tree(place), "").hold("name", 0):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(0.3)
    waiting.join(100)
    assert got.is_set()


def test_the_group_of_a_pool_can_open_its_lock_files(shell: Shell, place: Path) -> None:
    with held(shell, place / "name.lock"):
        assert (place / "name.lock").stat().st_mode & 0o777 == 0o664


def test_the_kernel_lets_go_when_the_connection_dies(sshd: Sshd, shell: Shell, place: Path) -> None:
    with held(shell, place / "name.lock"):
        sshd.kill_sessions()
        with FileLocks(Tree(place), "").hold("name", 60):
            pass
    with held(shell, place / "name.lock"):
        pass


def test_a_lock_of_a_host_that_has_gone_silent_is_let_go(shell: Shell, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lost its power, or its network, closes no connection."""
    monkeypatch.setattr(module, "PATIENCE", 1)
    with held(shell, place / "name.lock"), FileLocks(Tree(place), "").hold("name", 60):
        pass


def test_a_lock_of_a_host_that_is_alive_is_not(shell: Shell, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 4)
    monkeypatch.setattr(module, "BEAT", 0.2)
    with held(shell, place / "name.lock"), pytest.raises(LockTimeout), FileLocks(Tree(place), "").hold("name", 6):
        pass


def test_a_lock_that_cannot_be_made(shell: Shell, place: Path) -> None:
    with pytest.raises(AccessDenied, match=r"nowhere/name\.lock"):
        held(shell, place / "nowhere" / "name.lock")


def test_a_server_that_runs_no_further_command_gives_no_help(server: Callable[..., Shell], tmp_path: Path) -> None:
    shell = server(MaxSessions="1")
    (tmp_path / "file").write_bytes(b"12345")
    assert "flock" in shell.programs
    # The server ends a session a moment after its command has ended.
    while (lock := shell.hold(str(tmp_path / "name.lock"), 0)) is None:
        time.sleep(0.01)
    with lock:
        assert shell.hold(str(tmp_path / "other.lock"), 0) is None
        assert shell.digest(str(tmp_path / "file"), 5, "sha256") is None


def test_a_connection_that_dies_while_a_lock_is_waited_for_is_told(sshd: Sshd, shell: Shell, place: Path) -> None:
    with FileLocks(Tree(place), "").hold("name", 0):
        lock = shell.hold(str(place / "name.lock"), 100)
        assert lock is not None
        killer = threading.Timer(0.5, sshd.kill_sessions)
        killer.start()
        with pytest.raises(TransportError) as caught, lock:
            pass
        killer.join()
    assert caught.value.transient


def test_a_path_that_no_shell_is_told_of_has_no_lock(shell: Shell, place: Path) -> None:
    assert shell.hold(f"{place}/new\nline.lock", 0) is None
    assert shell.digest(f"{place}/new\nline", 0, "sha256") is None
    assert os.listdir(place) == []


# -- digests -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "-n", "$(touch pwned)", "two words", "it's"])
def test_a_digest_made_there(shell: Shell, place: Path, name: str) -> None:
    data = os.urandom(100_000)
    (place / name).write_bytes(data)
    assert shell.digest(f"{place}/{name}", len(data), "sha256") == Digest.of(data, "sha256")
    assert os.listdir(place) == [name]


def test_what_is_not_as_it_should_be_has_none(shell: Shell, place: Path) -> None:
    (place / "file").write_bytes(b"12345")
    (place / "link").symlink_to("file")
    (place / "directory").mkdir()
    os.mkfifo(place / "pipe")
    for name, size in [("file", 4), ("file", 6), ("link", 5), ("directory", 4096), ("pipe", 0), ("nothing", 0)]:
        assert shell.digest(f"{place}/{name}", size, "sha256") is None, name


B3SUM = """#!/bin/sh
test "$1 $2" = "--no-names --" && printf %s "$3" >{place}/asked && echo {answer}
"""


@pytest.mark.parametrize("answer", ["", "not a digest", "ab" * 32])
def test_blake3_is_made_there_by_whatever_makes_it(server: Callable[..., Shell], place: Path, answer: str) -> None:
    """The program is believed as far as its answer can be a digest: bytes are checked again by whoever uses them."""
    tools = Path(os.path.realpath(place)).parent.parent / f"tools-{os.urandom(4).hex()}"
    tools.mkdir()
    (tools / "b3sum").write_text(B3SUM.format(place=tools, answer=answer))
    (tools / "b3sum").chmod(0o755)
    (tools / "command").write_text(f'#!/bin/sh\nPATH={tools}:$PATH\neval "$SSH_ORIGINAL_COMMAND"\n')
    (tools / "command").chmod(0o755)
    shell = server(ForceCommand=str(tools / "command"))
    assert "b3sum" in shell.programs
    (place / "file").write_bytes(b"12345")
    found = shell.digest(f"{place}/file", 5, "blake3")
    assert found == (Digest("blake3", answer) if len(answer) == 64 else None)
    assert (tools / "asked").read_text() == f"{place}/file"
