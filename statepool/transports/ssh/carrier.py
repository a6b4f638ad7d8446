"""
What carries SSH: a connection to one account of a host, with byte streams of SFTP and of commands
on it.

The protocol on these streams is ours (``sftp.py``, ``shell.py``); how they come about is a
carrier's business. There are two: the installed program ``ssh`` (``openssh.py``), and the library
paramiko (``library.py``).
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
"""The fastest first, where the processor helps with AES: docs/measurements.rst."""

SSH_PORT = 22


@frozen
class Endpoint:
    """
    A host as a location names it, before a configuration of ssh is applied.

    :param host: a name, an alias, or an address
    :param port: the TCP port, or None where the location does not say it
    :param user: the account, or None where the location does not say it
    """

    host: str
    port: int | None = None
    user: str | None = None

    @classmethod
    def of(cls, location: Location) -> Endpoint:
        """
        :returns: where a location is
        :raises InvalidLocation: its path begins with ``~``, which nobody expands there
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
    Bytes to and from a subsystem or a command of the far side. A channel of paramiko is one.

    Its methods raise :class:`OSError` or :class:`EOFError`; a :class:`TimeoutError` where a wait
    takes longer than its timeout.
    """

    def send(self, data: bytes, /) -> int:
        """Send some of the data. :returns: how many bytes; 0 if the far side takes no more"""

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
        """End the input of the far side."""

    def close(self) -> object:
        """End it; nothing is waited for."""


@frozen
class Facts:
    """
    What a carrier knows of its connection.

    :param server: the software there, as it names itself
    :param cipher: what encrypts the bytes from there
    """

    server: str
    cipher: str


class LinkGone(ConnectionError):
    """
    The connection had ended before anything was sent on it: the same can be done on another one.
    """


class Carrier(ABC):
    """
    A connection to one account of a host. Several threads can use it, but only one at a time may
    connect or close it.

    :param endpoint: where
    :param settings: how
    """

    name: ClassVar[CarrierName]

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self.endpoint = endpoint
        self.settings = settings

    @property
    def subject(self) -> Subject:
        """What messages say of the connection itself."""
        return Subject(str(self.endpoint), f"ssh://{self.endpoint}")

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether there is a connection now. Makes none."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Of the present connection."""

    @abstractmethod
    def connect(self) -> None:
        """
        Make the connection, in place of one that there may be.

        :raises TransportError: the host cannot be reached
        :raises AccessDenied: its key is not known, or it does not let us in
        :raises ConfigError: a configuration of ssh cannot be used
        """

    @abstractmethod
    def open(self, command: str | None = None, *, window: int = 4 << 20) -> Stream:
        """
        Start a command on the far side, or its SFTP.

        :param command: for the shell there; the caller quotes what is in it. None: the subsystem
            ``sftp``
        :param window: how many bytes the far side may send ahead, where the carrier has a say in it
        :returns: its input and output, with the timeout set
        :raises TransportError: the server opens no further channel
        :raises EOFError: it does not start that
        :raises LinkGone: there is no connection any more
        """

    @abstractmethod
    def exit_status(self, stream: Stream, seconds: float) -> int:
        """
        :param seconds: how long to wait for it
        :returns: that of a command whose output has ended; -1 if it has none
        :raises TimeoutError: it has not ended
        """

    @abstractmethod
    def close(self) -> None:
        """End the connection, unless other processes use it as well."""

    @abstractmethod
    def after_fork(self) -> None:
        """
        Forget the connection, in the child: it is the parent's. Nothing is sent, and no lock is
        taken.
        """

    def said(self, stream: Stream) -> str:
        """:returns: what a stream that has ended has printed on standard error"""
        return ""

    @contextmanager
    def expecting(self, *, hard: bool = False) -> Iterator[None]:
        """
        Within, the connection is given up if nothing at all is heard for the timeout: for waits
        that the carrier would not end.

        :param hard: if what is waited for has not come within twice the timeout, whatever else is
            heard
        """
        yield

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Raise what became of the link below, within, instead of what only follows from it."""
        yield
