"""
A shell on another host: what it is found to be, the locks of its kernel, and digests made there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import blake3
import pytest

from statepool.beneath import Tree
from statepool.errors import AccessDenied, LockTimeout, TransportError
from statepool.model.digest import Digest
from statepool.model.pieces import LENGTH, PIECE, Pieces, count
from statepool.pools.locks import FileLocks
from statepool.transports.ssh import shell as module
from statepool.transports.ssh.connection import connection_to
from statepool.transports.ssh.shell import Shell
from tests.support.sshd import Sshd, run_sshd, sshd_program

pytestmark = pytest.mark.skipif(
    sshd_program() is None, reason="sshd is not installed (Debian: openssh-server)"
)

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

        def start(chrooted: bool = False, timeout: float = 2.0, **options: str) -> Shell:
            started = stack.enter_context(run_sshd(chrooted=chrooted, options=options))
            return Shell(connection_to(started.location("/"), started.settings(timeout=timeout)))

        yield start


# -- is there one? ---------------------------------------------------------------------------------


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
    greeting.write_text(
        "#!/bin/sh\necho 'Welcome!'; printf 'no end of line '; eval \"$SSH_ORIGINAL_COMMAND\"\n"
    )
    greeting.chmod(0o755)
    assert {"sh", "flock"} <= server(ForceCommand=str(greeting)).programs


# -- locks -----------------------------------------------------------------------------------------


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
    while shell._connection.is_open:  # what the server knows, the host hears a moment later
        time.sleep(0.01)
    with held(shell, place / "name.lock"):
        pass


def test_a_lock_of_a_host_that_has_gone_silent_is_let_go(
    shell: Shell, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that lost its power, or its network, closes no connection."""
    monkeypatch.setattr(module, "PATIENCE", 1)
    with held(shell, place / "name.lock"), FileLocks(Tree(place), "").hold("name", 60):
        pass


def test_a_lock_of_a_host_that_is_alive_is_not(
    shell: Shell, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 4)
    monkeypatch.setattr(module, "BEAT", 0.2)
    with (
        held(shell, place / "name.lock"),
        pytest.raises(LockTimeout),
        FileLocks(Tree(place), "").hold("name", 6),
    ):
        pass


def test_a_lock_that_cannot_be_made(shell: Shell, place: Path) -> None:
    with pytest.raises(AccessDenied, match=r"nowhere/name\.lock"):
        held(shell, place / "nowhere" / "name.lock")


def test_a_server_that_runs_no_further_command_gives_no_help(
    server: Callable[..., Shell], tmp_path: Path
) -> None:
    shell = server(MaxSessions="1")
    (tmp_path / "file").write_bytes(b"12345")
    assert "flock" in shell.programs
    # The server ends a session a moment after its command has ended.
    while (lock := shell.hold(str(tmp_path / "name.lock"), 0)) is None:
        time.sleep(0.01)
    with lock:
        assert shell.hold(str(tmp_path / "other.lock"), 0) is None
        assert shell.digest(str(tmp_path / "file"), 5, "sha256") is None


def test_a_connection_that_dies_while_a_lock_is_waited_for_is_told(
    sshd: Sshd, shell: Shell, place: Path
) -> None:
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


# -- digests ---------------------------------------------------------------------------------------


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
    for name, size in [
        ("file", 4),
        ("file", 6),
        ("link", 5),
        ("directory", 4096),
        ("pipe", 0),
        ("nothing", 0),
    ]:
        assert shell.digest(f"{place}/{name}", size, "sha256") is None, name


@pytest.fixture
def with_tools(server: Callable[..., Shell], place: Path) -> Callable[..., Shell]:
    """``with_tools(b3sum=script)``: the shell of an account that finds these programs first."""

    def make(**scripts: str) -> Shell:
        tools = Path(os.path.realpath(place)).parent.parent / f"tools-{os.urandom(4).hex()}"
        tools.mkdir()
        for name, script in {
            **scripts,
            "command": f'PATH={tools}:$PATH\neval "$SSH_ORIGINAL_COMMAND"',
        }.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)
        # some of them have to start Python
        return server(timeout=60.0, ForceCommand=str(tools / "command"))

    return make


@pytest.mark.parametrize("answer", ["", "not a digest", "ab" * 32])
def test_blake3_is_made_there_by_whatever_makes_it(
    with_tools: Callable[..., Shell], place: Path, answer: str
) -> None:
    """
    The program is believed as far as its answer can be a digest: bytes are checked again by whoever
    uses them.
    """
    asked = Path(os.path.realpath(place)).parent.parent / f"asked-{os.urandom(4).hex()}"
    shell = with_tools(
        b3sum=f'test "$1 $2" = "--no-names --" && printf %s "$3" >{asked} && echo {answer}'
    )
    assert "b3sum" in shell.programs
    (place / "file").write_bytes(b"12345")
    found = shell.digest(f"{place}/file", 5, "blake3")
    assert found == (Digest("blake3", answer) if len(answer) == 64 else None)
    assert asked.read_text() == f"{place}/file"


_HASH_INPUT = "import sys, blake3; print(blake3.blake3(sys.stdin.buffer.read()).hexdigest())"

MAKES_BLAKE3 = {
    "b3sum": f'test "$*" = --no-names || exit; exec {sys.executable} -c "{_HASH_INPUT}"',
    "python3": f'exec {sys.executable} "$@"',
}


@pytest.mark.parametrize("tool", MAKES_BLAKE3)
def test_digests_of_pieces_are_made_there_by_programs_that_know_none(
    with_tools: Callable[..., Shell], place: Path, tool: str
) -> None:
    shell = with_tools(**{tool: MAKES_BLAKE3[tool]})
    for size in (1, PIECE, 2 * PIECE + 5):
        data, pieces = os.urandom(size), Pieces(b"x" * LENGTH)
        (place / "it's").write_bytes(data)
        assert shell.digest(f"{place}/it's", size, "blake3p", pieces) == Digest.of(data)
        assert len(pieces) == count(size)
        assert shell.digest(f"{place}/it's", size + 1, "blake3p", pieces) is None
        assert len(pieces) == 0
    (place / "empty").touch()
    assert shell.digest(f"{place}/empty", 0, "blake3p") is None  # not worth a program


ANSWERS = {
    "nothing": "cat >/dev/null",
    "no digest": "cat >/dev/null; echo not a digest",
    "a digest that is too short": "cat >/dev/null; echo abcd",
    "nothing in the end": f'{sys.executable} -c "{_HASH_INPUT}" | grep -v ^0a',
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_pieces_that_nobody_could_make_there(
    with_tools: Callable[..., Shell], place: Path, answer: str
) -> None:
    shell = with_tools(b3sum=ANSWERS[answer])
    data = next(
        data
        for number in range(10_000)
        if blake3.blake3(data := b"%d" % number).hexdigest().startswith("0a")
    )
    (place / "file").write_bytes(bytes(PIECE) + data)
    assert shell.digest(f"{place}/file", PIECE + len(data), "blake3p") is None


def test_a_piece_that_cannot_be_read_there_is_not_hashed_as_far_as_it_was(
    with_tools: Callable[..., Shell], place: Path
) -> None:
    shell = with_tools(
        dd="case $* in if=/dev/null*) exit 0;; esac; head -c 100; exit 1",
        b3sum=MAKES_BLAKE3["b3sum"],
    )
    (place / "file").write_bytes(bytes(PIECE))
    assert shell.digest(f"{place}/file", PIECE, "blake3p") is None


@pytest.mark.parametrize("program", ["openssl", "sha256sum"])
def test_digests_by_each_program(
    server: Callable[..., Shell], place: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    shell = server()
    assert program in shell.programs
    monkeypatch.setattr(shell, "_programs", frozenset({program}))
    assert shell.quick_algorithm == "sha256"
    (place / "one").write_bytes(b"12345")
    (place / "*stdin").write_bytes(b"a name that a shell would put in place of an asterisk")
    expected = Digest("sha256", hashlib.sha256(b"12345").hexdigest())
    assert shell.digests({f"{place}/one": 5, f"{place}/none": 5}) == [expected, None]


def test_a_file_that_cannot_be_hashed_there_stands_for_itself(
    with_tools: Callable[..., Shell], place: Path
) -> None:
    """The digests after it are still those of their files."""
    answer = "ab" * 32
    shell = with_tools(b3sum=f'test "$(cat)" != bad && echo {answer}')
    for name, content in {"one": b"x", "two": b"bad", "three": b"y"}.items():
        (place / name).write_bytes(content)
    found = shell.digests({f"{place}/one": 1, f"{place}/two": 3, f"{place}/three": 1})
    assert found == [Digest("blake3", answer), None, Digest("blake3", answer)]
