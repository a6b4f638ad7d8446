"""
The translation of errors of paramiko, of sockets and of SFTP servers.

The original error stays as ``__cause__``. An error of this package is *transient* if the operation
may succeed on a new connection. No error that a server reports about a file is transient.

An SFTP server (draft-ietf-secsh-filexfer-02, the version that all servers support) has codes only
for "no such file" and "permission denied". An existing name, a full or broken disk, a directory
that is not empty: all of these are "Failure". A caller that needs the cause has to look at the
file.
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
"""The connection was lost; the next one may work."""

_UNREACHED = frozenset(
    {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
)
"""The connection cannot be opened now."""

LONGEST_SAID = 500
"""
The most characters of a server's text that go into messages: an answer can have hundreds of
thousands.
"""

_CLOSED_CHANNEL = "Socket is closed"
"""The message of paramiko for a channel that has ended; the error has no errno."""


def is_transient(error: BaseException) -> bool:
    """:returns: whether a retry may succeed: it is an error of this package that says so"""
    return isinstance(error, TransportError) and error.transient


def is_lost(error: BaseException) -> bool:
    """:returns: whether the error says that the connection, or a channel of it, has ended"""
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
    Translate what paramiko raises inside the block into errors of this package. The block must not
    call back into the caller's code.

    :param doing: what is attempted on the subject: ``read``, ``create``
    :param timeout: how long an answer is waited for, in seconds
    """
    try:
        yield
    except StatePoolError:
        raise
    except _known() as error:
        raise translated(error, doing, subject, timeout) from error


def _known() -> tuple[type[Exception], ...]:
    """:returns: the kinds of errors that paramiko and sockets raise on purpose"""
    return (
        OSError,
        EOFError,
        *_of_paramiko("ssh_exception", "SSHException"),
        *_of_paramiko("sftp", "SFTPError"),
    )


def _of_paramiko(module: str, name: str) -> tuple[type[Exception], ...]:
    """
    :returns: a class of paramiko's errors; nothing if paramiko has not been loaded, since then none
        can have been raised
    """
    found = sys.modules.get(f"paramiko.{module}")
    return (getattr(found, name),) if found is not None else ()


def is_refused_channel(error: BaseException) -> bool:
    """:returns: whether the error says that the server opens no further channel"""
    return isinstance(error, _of_paramiko("ssh_exception", "ChannelException"))


@contextmanager
def understanding(transport: Any, doing: str, subject: Subject) -> Iterator[None]:
    """
    Translate an exception that ended paramiko's own thread into an error of this package. A
    server's message can make a parser in that thread raise, and the waiting thread gets the
    exception. An exception that did not end the thread is the caller's, and passes unchanged.

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
    :param error: what paramiko or a socket raised
    :param doing: what was attempted on the subject
    :param timeout: how long an answer is waited for, in seconds
    :returns: the error of this package to raise from it
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
    """:returns: the error for an invalid answer"""
    hint = "look at what answers there: it may be no SSH server, or a faulty one"
    return TransportError(
        f"{what}: the server does not keep to the protocol ({said(error)})",
        hint=hint,
        pool=subject.pool,
        path=subject.path,
    )


def unreached(error: OSError, host: str, seconds: float, subject: Subject) -> TransportError:
    """
    :param error: why the connection to a host failed
    :param host: the host and port, as messages show them
    :param seconds: how long the attempt lasted
    :returns: the error of this package to raise from it
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
    """:returns: the error if both sides have no cipher, key exchange or kind of key in common"""
    hint = "its SSH is too old, or configured to take nothing that we have"
    return TransportError(
        f"{host} and we have no way in common to encrypt: {why}", hint=hint, pool=pool
    )


def no_greeting(host: str, why: str, pool: str | None) -> TransportError:
    """
    :returns: the error if something other than SSH answers, or if the greeting does not continue
    """
    hint = (
        "check the port; if it is right, a firewall may be in between, or too many log in there at"
        " once (MaxStartups in sshd_config(5))"
    )
    return TransportError(
        f"{host} did not greet us as SSH does: {why}", hint=hint, transient=True, pool=pool
    )


def denied(host: str, takes: str, tried: list[str], pool: str | None) -> AccessDenied:
    """
    :param takes: the authentication methods that the server still permits
    :param tried: the keys that were offered, or could not be offered
    :returns: the error for a login that failed with all of them
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
    """:returns: the error for a server that ends the connection after too many keys"""
    return TransportError(
        f"{host} ended the connection while we logged in. Tried: {'; '.join(tried)}",
        hint=(
            "MaxAuthTries there may be exceeded: name the right key in ~/.ssh/config, with"
            " IdentitiesOnly yes"
        ),
        pool=pool,
    )


def said(error: BaseException) -> str:
    """:returns: the text of an error, in one line; its class if there is no text"""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return in_short(str(error)) or type(error).__name__


def in_short(text: str) -> str:
    """:returns: a server's text in one line, shortened to what a person reads"""
    line = " ".join(text[: 2 * LONGEST_SAID].split())
    return line if len(line) <= LONGEST_SAID else f"{line[:LONGEST_SAID]}…"


def refused_channel(code: int, message: str, subject: Subject) -> TransportError:
    """
    Return the error for a refused channel. RFC 4254, section 5.1: code 1 is "prohibited"; servers
    that have too many sessions already answer with 2 or 4.
    """
    hint = (
        "the account may not do this there"
        if code == 1
        else "MaxSessions in sshd_config(5) says how many there can be on one connection"
    )
    return TransportError(
        message, hint=hint, transient=code != 1, pool=subject.pool, path=subject.path
    )
