"""
One connection for each account of a host, shared by all that this process does there.

It is opened when it is first needed, kept open, and opened again when it has ended. After a fork
the child opens its own: two processes on one connection would garble it.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from statepool.errors import StatePoolError
from statepool.model.location import Location
from statepool.model.settings import Settings
from statepool.transports.failures import Subject
from statepool.transports.ssh.carrier import Carrier, Endpoint, LinkGone, Stream
from statepool.transports.ssh.carriers import carrier_for
from statepool.transports.ssh.failures import translating


class Connection:
    """
    A connection to one account of a host. It can be used from several threads.

    :param endpoint: the host and account
    :param settings: the settings of the connection
    """

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self.epoch = 0
        """Increases with every new connection: objects of an older one are useless."""
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        """For a connection that the process shares: the users that have not released it."""
        self._lock = threading.RLock()
        self._carrier: Carrier | None = None
        self._attempts = 0
        self._failure: StatePoolError | None = None
        _connections.add(self)

    def __str__(self) -> str:
        return str(self.endpoint)

    @property
    def carrier(self) -> Carrier:
        """
        The carrier, connected and logged in.

        :raises TransportError: the connection fails
        :raises AccessDenied: the host's key is not known, or it rejects the login
        """
        asked = self._attempts
        with self._lock:
            if self._carrier is None:
                self._carrier = carrier_for(self.endpoint, self.settings)
            if not self._carrier.is_open:
                if self._failure is not None and self._attempts != asked:
                    # the error of an attempt that this thread waited for: another attempt would
                    # take as long
                    raise copy.copy(self._failure) from self._failure
                self._connect(self._carrier)
            return self._carrier

    def _connect(self, carrier: Carrier) -> None:
        self._failure = None
        try:
            carrier.connect()
        except StatePoolError as error:
            self._failure = error
            raise
        finally:
            self._attempts += 1
        self.epoch += 1

    @property
    def is_open(self) -> bool:
        """Whether there is a connection now. Does not connect."""
        return self._carrier is not None and self._carrier.is_open

    def open(self, command: str | None = None, *, window: int = 4 << 20) -> Stream:
        """
        Open a stream as :meth:`~statepool.transports.ssh.carrier.Carrier.open`; connect first if
        necessary.
        """
        doing = "start SFTP on" if command is None else "run a command on"
        carrier = self.carrier
        # The connection has ended since it was seen to be open.
        with self.answering(doing), contextlib.suppress(LinkGone):
            return carrier.open(command, window=window)
        carrier = self.carrier
        with self.answering(doing):
            return carrier.open(command, window=window)

    @contextlib.contextmanager
    def expecting(self, *, hard: bool = False) -> Iterator[None]:
        """Watch a wait as :meth:`~statepool.transports.ssh.carrier.Carrier.expecting`."""
        if self._carrier is None:
            yield
            return
        with self._carrier.expecting(hard=hard):
            yield

    @contextlib.contextmanager
    def answering(self, doing: str, subject: Subject | None = None) -> Iterator[None]:
        """
        Translate errors as :meth:`translating`, for requests for which a carrier has no timeout:
        something has to be received within the timeout, and the answer within twice the timeout,
        whatever else arrives.
        """
        with self.translating(doing, subject), self.expecting(), self.expecting(hard=True):
            yield

    @contextlib.contextmanager
    def translating(self, doing: str, subject: Subject | None = None) -> Iterator[None]:
        """
        Translate errors as :func:`~statepool.transports.ssh.failures.translating`; the error of the
        link below is raised instead of an error that only follows from it.
        """
        named = subject or Subject(str(self), f"ssh://{self}")
        explaining = (
            self._carrier.explaining() if self._carrier is not None else contextlib.nullcontext()
        )
        with translating(doing, named, self.settings.timeout), explaining:
            yield

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        with self._lock:
            if self._carrier is not None:
                self._carrier.close()

    def _after_fork(self) -> None:
        """
        Reset the connection in the child of a fork. The locks may be held by threads that do not
        exist there.
        """
        if self._carrier is not None:
            self._carrier.after_fork()
        self._lock = threading.RLock()
        self.epoch += 1


# -- the connections of this process ---------------------------------------------------------------

_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_shared: dict[tuple[object, ...], list[Connection]] = {}
"""
The shared connections, by the endpoint and by the settings that matter for a connection. There are
several for one key if different functions supply secrets.
"""

_shared_lock = threading.Lock()


def connection_to(location: Location, settings: Settings, user: object = None) -> Connection:
    """
    :param location: where a pool is
    :param settings: of the connection
    :param user: the object that calls :func:`release` when it does not need the connection any more
    :returns: the connection of this process to that account, which may not be open yet
    """
    endpoint = Endpoint.of(location)
    with _shared_lock:
        alike = _shared.setdefault(_key(endpoint, settings), [])
        found = next(
            (connection for connection in alike if connection.settings.secrets == settings.secrets),
            None,
        )
        if found is None:
            found = Connection(endpoint, settings)
            alike.append(found)
        if user is not None:
            found.users.add(user)
        return found


def release(connection: Connection, user: object) -> None:
    """
    Release a connection. It stays open for later users, unless it was opened with a function that
    supplies secrets: then no other user may have it.

    :param user: as for :func:`connection_to`; if it uses the connection again, that is opened again
    """
    with _shared_lock:
        connection.users.discard(user)
        if connection.settings.secrets is None or connection.users:
            return
        alike = _shared.get(_key(connection.endpoint, connection.settings), [])
        if connection in alike:
            alike.remove(connection)
    connection.close()


def _key(endpoint: Endpoint, settings: Settings) -> tuple[object, ...]:
    return (
        endpoint,
        settings.timeout,
        settings.connect_timeout,
        settings.ssh_config,
        settings.known_hosts,
        settings.carrier,
    )


def _in_the_child() -> None:
    global _shared_lock  # noqa: PLW0603  a thread that is not there any more may hold the old one
    _shared_lock = threading.Lock()
    for connection in list(_connections):
        connection._after_fork()


os.register_at_fork(after_in_child=_in_the_child)
