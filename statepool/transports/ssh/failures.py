"""
What the errors of paramiko, of sockets and of SFTP servers mean here.

The original error stays as ``__cause__``. An error of ours is *transient* if the same may succeed
on a new connection; of what a server says about a file, nothing is.

An SFTP server (draft-ietf-secsh-filexfer-02, the version that all speak) has words for "no such
file" and "permission denied" only. That a name exists, that the disk is full or broken, that a
directory is not empty: all of this is "Failure". Whoever needs to know which has to look.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from statepool.errors import AccessDenied, MissingFile, StatePoolError, TransportError
from statepool.transports.failures import Subject
from statepool.transports.ssh.wire import LinkSilent

_LOST = frozenset(
    {
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ESHUTDOWN,
        errno.ENOTCONN,
        errno.EBADF,
        errno.ETIMEDOUT,
        errno.ENETRESET,
    }
)
"""The connection is gone; the next one may hold."""

_UNREACHED = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
)
"""There is none to be had now."""

LONGEST_SAID = 500
"""Characters of what a server says that are told on: an answer can have hundreds of thousands."""

_CLOSED_CHANNEL = "Socket is closed"
"""What paramiko says of a channel that has ended; it has no errno."""


def is_transient(error: BaseException) -> bool:
    """:returns: whether it is worth another try: the error is one of ours that says so"""
    return isinstance(error, TransportError) and error.transient


def is_failure(error: BaseException) -> bool:
    """
    :returns: whether it is the "Failure" of an SFTP server, which can mean anything about the file
    """
    return (
        isinstance(error, OSError)
        and not isinstance(error, StatePoolError | TimeoutError)
        and error.errno is None
        and not is_lost(error)
    )


def is_lost(error: BaseException) -> bool:
    """:returns: whether it says that the connection, or a channel of it, has ended"""
    if is_refused_channel(error):
        return False
    if isinstance(
        error, (EOFError, ConnectionError, *_of_paramiko("ssh_exception", "SSHException"))
    ):
        return True
    return isinstance(error, OSError) and (
        error.errno in _LOST or (error.errno is None and str(error) == _CLOSED_CHANNEL)
    )


@contextmanager
def translating(doing: str, subject: Subject, timeout: float) -> Iterator[None]:
    """
    Turn what paramiko raises within into errors of ours. Nothing that calls back into a caller's
    code belongs in it.

    :param doing: what is done with the subject: ``read``, ``create``
    :param timeout: how long an answer is waited for, in seconds
    """
    try:
        yield
    except StatePoolError:
        raise
    except _known() as error:
        raise translated(error, doing, subject, timeout) from error


def _known() -> tuple[type[Exception], ...]:
    """:returns: the kinds of errors that paramiko and sockets mean to raise"""
    return (
        OSError,
        EOFError,
        *_of_paramiko("ssh_exception", "SSHException"),
        *_of_paramiko("sftp", "SFTPError"),
    )


def _of_paramiko(module: str, name: str) -> tuple[type[Exception], ...]:
    """
    :returns: a kind of its errors; none where it has not been loaded, and nothing of it can have
        been raised
    """
    found = sys.modules.get(f"paramiko.{module}")
    return (getattr(found, name),) if found is not None else ()


def is_refused_channel(error: BaseException) -> bool:
    """:returns: whether it says that the server opens no further channel"""
    return isinstance(error, _of_paramiko("ssh_exception", "ChannelException"))


@contextmanager
def understanding(transport: Any, doing: str, subject: Subject) -> Iterator[None]:
    """
    Turn what ended paramiko's own thread into an error of ours. What a server says can be too much
    for any parser there, whose exception is handed to whoever waits. One that did not end the
    thread is a caller's, and passes.

    :param transport: paramiko's
    :param doing: what is done with the subject
    """
    try:
        yield
    except Exception as error:
        if (transport is not None and transport.is_active()) or isinstance(
            error, (StatePoolError, *_known())
        ):
            raise
        raise garbled(error, f"cannot {doing} {subject.text}", subject) from error


def translated(
    error: BaseException, doing: str, subject: Subject, timeout: float
) -> StatePoolError:
    """
    :param error: what paramiko raised, or a socket
    :param doing: what was to be done with the subject
    :param timeout: how long an answer is waited for, in seconds
    :returns: the error of ours to raise from it
    """
    if isinstance(error, StatePoolError):
        return error
    what = f"cannot {doing} {subject.text}"
    if isinstance(error, TimeoutError | LinkSilent):
        seconds = error.seconds if isinstance(error, LinkSilent) else timeout
        hint = (
            "look at the network and at the load of that host; the setting timeout says how long to"
            " wait"
        )
        return TransportError(
            f"{what}: no answer for {round(seconds, 1):g} seconds",
            hint=hint,
            transient=True,
            pool=subject.pool,
            path=subject.path,
        )
    if is_lost(error):
        return TransportError(
            f"{what}: the connection was lost ({said(error)})",
            hint="try again",
            transient=True,
            pool=subject.pool,
            path=subject.path,
        )
    if is_refused_channel(error):
        refused: Any = error
        return refused_channel(
            refused.code, f"{what}: the server opens no further channel ({refused.text})", subject
        )
    if isinstance(error, OSError) and error.errno == errno.ENOENT:
        return MissingFile(
            f"{what}: {os.strerror(errno.ENOENT)}", pool=subject.pool, path=subject.path
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        hint = (
            "look at the owner and the mode of the file and of the directories above it, on that"
            " host"
        )
        return AccessDenied(
            f"{what}: {os.strerror(errno.EACCES)}", hint=hint, pool=subject.pool, path=subject.path
        )
    if isinstance(error, OSError):
        return TransportError(f"{what}: {said(error)}", pool=subject.pool, path=subject.path)
    return garbled(error, what, subject)


def garbled(error: BaseException, what: str, subject: Subject) -> TransportError:
    """:returns: the error where an answer is none"""
    hint = "look at what answers there: it may be no SSH server, or a faulty one"
    return TransportError(
        f"{what}: the server does not keep to the protocol ({said(error)})",
        hint=hint,
        pool=subject.pool,
        path=subject.path,
    )


def unreached(error: OSError, host: str, seconds: float, subject: Subject) -> TransportError:
    """
    :param error: why there is no connection to a host
    :param host: the host and port, for people
    :param seconds: how long it was tried
    :returns: the error of ours to raise from it
    """
    if isinstance(error, socket.gaierror):
        busy = error.errno == socket.EAI_AGAIN
        hint = (
            "the name server does not answer"
            if busy
            else "check the name; ~/.ssh/config is looked at for aliases"
        )
        return TransportError(
            f"there is no address for {host}: {error.strerror}",
            hint=hint,
            transient=busy,
            pool=subject.pool,
            path=subject.path,
        )
    if isinstance(error, TimeoutError):
        hint = (
            "check that the host is up, and that no firewall is between; the setting"
            " connect-timeout says how long to wait"
        )
        return TransportError(
            f"cannot connect to {host}: no answer for {seconds:g} seconds",
            hint=hint,
            transient=True,
            pool=subject.pool,
            path=subject.path,
        )
    hints = {
        errno.ECONNREFUSED: "nothing listens there: check the port, and that sshd runs",
        errno.EHOSTUNREACH: "the host is down, or there is no route to it",
        errno.ENETUNREACH: "there is no route to its network",
    }
    transient = error.errno in _LOST | _UNREACHED
    return TransportError(
        f"cannot connect to {host}: {said(error)}",
        hint=hints.get(error.errno or 0),
        transient=transient,
        pool=subject.pool,
        path=subject.path,
    )


def no_common_way(host: str, why: str, pool: str | None) -> TransportError:
    """:returns: the error where both sides know no cipher, key exchange or kind of key in common"""
    hint = "its SSH is too old, or configured to take nothing that we have"
    return TransportError(
        f"{host} and we have no way in common to encrypt: {why}", hint=hint, pool=pool
    )


def no_greeting(host: str, why: str, pool: str | None) -> TransportError:
    """:returns: the error where something else than SSH answers, or nothing that goes on"""
    hint = (
        "check the port; if it is right, a firewall may be in between, or too many log in there at"
        " once (MaxStartups in sshd_config(5))"
    )
    return TransportError(
        f"{host} did not greet us as SSH does: {why}", hint=hint, transient=True, pool=pool
    )


def denied(host: str, takes: str, tried: list[str], pool: str | None) -> AccessDenied:
    """
    :param takes: the ways to log in that the server has left
    :param tried: what was offered or could not be
    :returns: the error where nothing of that would do
    """
    return AccessDenied(
        f"{host} does not let us in. It takes {takes}. Tried:"
        f" {'; '.join(tried) or 'there was nothing to offer'}",
        hint=(
            "add a key to the agent (ssh-add), or name one in ~/.ssh/config;"
            " STATEPOOL_SSH_PASSPHRASE and STATEPOOL_SSH_PASSWORD are used, too"
        ),
        pool=pool,
    )


def cut_off(host: str, tried: list[str], pool: str | None) -> TransportError:
    """:returns: the error where a server has heard enough of keys"""
    return TransportError(
        f"{host} ended the connection while we logged in. Tried: {'; '.join(tried)}",
        hint=(
            "MaxAuthTries there may be exceeded: name the right key in ~/.ssh/config, with"
            " IdentitiesOnly yes"
        ),
        pool=pool,
    )


def said(error: BaseException) -> str:
    """:returns: what an error says, in one line; its kind where it says nothing"""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return in_short(str(error)) or type(error).__name__


def in_short(text: str) -> str:
    """:returns: what a server says, in one line, and no more of it than a person reads"""
    line = " ".join(text[: 2 * LONGEST_SAID].split())
    return line if len(line) <= LONGEST_SAID else f"{line[:LONGEST_SAID]}…"


def refused_channel(code: int, message: str, subject: Subject) -> TransportError:
    """
    RFC 4254, section 5.1: 1 is "prohibited"; 2 and 4 are what servers say that have too many
    sessions already.
    """
    hint = (
        "the account may not do this there"
        if code == 1
        else "MaxSessions in sshd_config(5) says how many there can be on one connection"
    )
    return TransportError(
        message, hint=hint, transient=code != 1, pool=subject.pool, path=subject.path
    )
