"""One table of what errors mean, tried without a server."""

from __future__ import annotations

import errno
import pickle
import socket

import pytest
from paramiko.sftp import SFTPError
from paramiko.ssh_exception import AuthenticationException, ChannelException, SSHException

from statepool.errors import AccessDenied, MissingFile, NotAPool, StatePoolError, TransportError
from statepool.transports.failures import Subject
from statepool.transports.ssh.failures import (
    is_lost,
    is_transient,
    translated,
    translating,
    understanding,
    unreached,
)
from statepool.transports.ssh.wire import LinkSilent

FILE = Subject("'data/x' in ssh://store/pool", "ssh://store/pool", "data/x")


@pytest.mark.parametrize(
    ("error", "kind", "transient", "words"),
    [
        (TimeoutError(), TransportError, True, "no answer for 7 seconds"),
        (LinkSilent(3), TransportError, True, "no answer for 3 seconds"),
        (
            ConnectionResetError(errno.ECONNRESET, "x"),
            TransportError,
            True,
            "the connection was lost (Connection reset by peer)",
        ),
        (
            BrokenPipeError(errno.EPIPE, "x"),
            TransportError,
            True,
            "the connection was lost (Broken pipe)",
        ),
        (OSError("Socket is closed"), TransportError, True, "the connection was lost"),
        (EOFError(), TransportError, True, "the connection was lost (EOFError)"),
        (
            SSHException("Server connection\ndropped"),
            TransportError,
            True,
            "the connection was lost (Server connection dropped)",
        ),
        (AuthenticationException("gone"), TransportError, True, "the connection was lost (gone)"),
        (ChannelException(1, "no"), TransportError, False, "opens no further channel (no)"),
        (ChannelException(2, "full"), TransportError, True, "opens no further channel (full)"),
        (FileNotFoundError(errno.ENOENT, "x"), MissingFile, False, "No such file or directory"),
        (PermissionError(errno.EACCES, "x"), AccessDenied, False, "Permission denied"),
        (OSError("Failure"), TransportError, False, "Failure"),
        (
            SFTPError("Garbage packet received"),
            TransportError,
            False,
            "does not keep to the protocol (Garbage packet received)",
        ),
    ],
)
def test_table(error: Exception, kind: type[StatePoolError], transient: bool, words: str) -> None:
    with pytest.raises(StatePoolError) as caught, translating("read", FILE, 7):
        raise error
    found = caught.value
    assert type(found) is kind
    assert words in found.message
    assert found.message.startswith("cannot read 'data/x' in ssh://store/pool: ")
    assert (found.pool, found.path) == ("ssh://store/pool", "data/x")
    assert is_transient(found) is transient
    assert found.__cause__ is error
    again = pickle.loads(pickle.dumps(found))
    assert is_transient(again) is transient


@pytest.mark.parametrize(
    ("error", "transient", "words"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), True, "Connection refused"),
        (OSError(errno.EHOSTUNREACH, "x"), True, "No route to host"),
        (OSError(errno.ENETUNREACH, "x"), True, "Network is unreachable"),
        (TimeoutError(), True, "no answer for 5 seconds"),
        (OSError(errno.EADDRNOTAVAIL, "x"), False, "Cannot assign requested address"),
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            False,
            "there is no address for store",
        ),
        (socket.gaierror(socket.EAI_AGAIN, "x"), True, "there is no address for store"),
    ],
)
def test_hosts_that_are_not_reached(error: OSError, transient: bool, words: str) -> None:
    found = unreached(error, "store", 5, FILE)
    assert words in found.message
    assert found.transient is transient
    assert found.exit_code == 7


def test_errors_of_ours_pass_as_they_are() -> None:
    error = NotAPool("nothing there")
    with pytest.raises(NotAPool) as caught, translating("read", FILE, 7):
        raise error
    assert caught.value is error
    assert translated(error, "read", FILE, 7) is error


def test_faults_of_ours_pass_as_they_are() -> None:
    with pytest.raises(ZeroDivisionError), translating("read", FILE, 7):
        _ = 1 / 0


class Thread:
    """Stands for that of paramiko."""

    def __init__(self, *, alive: bool) -> None:
        self.is_active = lambda: alive


def test_whatever_ended_the_thread_is_what_the_server_said() -> None:
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    with (
        pytest.raises(TransportError, match="does not keep to the protocol") as caught,
        understanding(Thread(alive=False), "connect to", FILE),
    ):
        raise error
    assert caught.value.__cause__ is error
    with pytest.raises(UnicodeDecodeError), understanding(Thread(alive=True), "connect to", FILE):
        raise error
    with pytest.raises(EOFError), understanding(Thread(alive=False), "connect to", FILE):
        raise EOFError


def test_a_failure_of_the_server_is_no_loss_of_the_link() -> None:
    assert is_lost(OSError("Socket is closed"))
    assert not is_lost(OSError("Failure"))


def test_nothing_is_transient_unless_it_says_so() -> None:
    assert not is_transient(TransportError("x"))
    assert not is_transient(TimeoutError())
    assert is_transient(TransportError("x", transient=True))


def test_a_server_that_says_too_much_is_not_told_on_in_full() -> None:
    with pytest.raises(TransportError) as caught, translating("read", FILE, 7):
        raise OSError("no " * 100_000)
    assert len(caught.value.message) < 1000
    assert caught.value.message.endswith("…")
