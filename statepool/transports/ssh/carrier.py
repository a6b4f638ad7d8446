"""
The interface of carriers of SSH. A carrier is a connection to one account of a host, with byte
streams of SFTP and of commands on it.

This package implements the protocol on these streams (``sftp.py``, ``shell.py``); a carrier only
opens them. There are two: the installed program ``ssh`` (``openssh.py``), and the library paramiko
(``library.py``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

from attrs import frozen

from statepool.errors import InvalidLocation
from statepool.model.location import Location
from statepool.model.settings import CarrierName, Settings
from statepool.transports.failures import Subject

CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
)
"""
The preferred ciphers, the fastest first on a processor with AES instructions:
docs/measurements.rst.
"""

SSH_PORT = 22


@frozen
class Endpoint:
    """
    A host as a location names it, before the configuration of ssh is applied.

    :param host: a name, an alias, or an address
    :param port: the TCP port, or None if the location does not give it
    :param user: the account, or None if the location does not give it
    """

    host: str
    port: int | None = None
    user: str | None = None

    @classmethod
    def of(cls, location: Location) -> Endpoint:
        """
        :returns: the endpoint of a location
        :raises InvalidLocation: its path begins with ``~``, which an SFTP server does not expand
        """
        if location.path.startswith("/~"):
            raise InvalidLocation(
                f"{location} has no absolute path: nothing expands the ~ there",
                hint="write the path as that host sees it",
            )
        return cls(location.host or "localhost", location.port, location.user)

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user is not None else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{user}{host}" + (f":{self.port}" if self.port is not None else "")


class Stream(Protocol):
    """
    A stream of bytes to and from a subsystem or a command of the far side. A channel of paramiko is
    one.

    Its methods raise :class:`OSError` or :class:`EOFError`; a :class:`TimeoutError` where a wait
    takes longer than its timeout.
    """

    def send(self, data: bytes, /) -> int:
        """Send some of the data. Return how many bytes; 0 if the far side takes no more."""

    def sendall(self, data: bytes, /) -> object:
        """Send all of the data."""

    def recv(self, count: int, /) -> bytes:
        """:returns: at most ``count`` bytes; none at the end"""

    def send_ready(self) -> bool:
        """Return whether something can be sent without a wait."""

    def recv_ready(self) -> bool:
        """Return whether something can be received without a wait."""

    def settimeout(self, seconds: float, /) -> object:
        """Set how long each wait may take."""

    def shutdown_write(self) -> object:
        """Close the input of the far side."""

    def close(self) -> object:
        """Close the stream without waiting."""


@frozen
class Facts:
    """
    Facts that a carrier knows of its connection.

    :param server: the server software, as it names itself
    :param cipher: the cipher of the bytes from the server
    """

    server: str
    cipher: str


class LinkGone(ConnectionError):
    """
    An error: the connection had ended before anything was sent on it, so the operation can be
    repeated on another connection.
    """


class Carrier(ABC):
    """
    A connection to one account of a host. Several threads can use it, but only one at a time may
    connect or close it.

    :param endpoint: the host and account
    :param settings: the settings of the connection
    """

    name: ClassVar[CarrierName]

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self.endpoint = endpoint
        self.settings = settings

    @property
    def subject(self) -> Subject:
        """The connection itself, in messages."""
        return Subject(str(self.endpoint), f"ssh://{self.endpoint}")

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether there is a connection now. Does not connect."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """The facts of the present connection."""

    @abstractmethod
    def connect(self) -> None:
        """
        Connect. An existing connection is replaced.

        :raises TransportError: the host cannot be reached
        :raises AccessDenied: its key is not known, or it rejects the login
        :raises ConfigError: the configuration of ssh cannot be used
        """

    @abstractmethod
    def open(self, command: str | None = None, *, window: int = 4 << 20) -> Stream:
        """
        Start a command or the SFTP subsystem on the far side.

        :param command: for the shell there, quoted by the caller. None: the subsystem ``sftp``
        :param window: how many bytes the far side may send ahead, if the carrier can set that
        :returns: its input and output, with the timeout set
        :raises TransportError: the server opens no further channel
        :raises EOFError: the server does not start it
        :raises LinkGone: the connection has ended
        """

    @abstractmethod
    def exit_status(self, stream: Stream, seconds: float) -> int:
        """
        :param seconds: how long to wait for it
        :returns: the exit status of a command whose output has ended; -1 if it has none
        :raises TimeoutError: the command has not ended
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection, unless other processes use it too."""

    @abstractmethod
    def after_fork(self) -> None:
        """
        Forget the connection in the child of a fork, since it belongs to the parent. Nothing is
        sent, and no lock is taken.
        """

    def said(self, stream: Stream) -> str:
        """:returns: the output of an ended stream on standard error"""
        return ""

    @contextmanager
    def expecting(self, *, hard: bool = False) -> Iterator[None]:
        """
        Close the connection if nothing at all is received for the timeout inside a ``with`` block.
        This is for waits for which the carrier has no timeout.

        :param hard: close it also if the awaited answer has not come within twice the timeout,
            whatever else is received
        """
        yield

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """
        Raise the error of the link below instead of errors inside the block that only follow from
        it.
        """
        yield
