"""
One connection for each account of a host, shared by all that this process does there.

It is made when it is first needed, kept, made again when it has died, and made anew after a fork:
two processes on one connection would garble it.
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

    :param endpoint: where
    :param settings: how
    """

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self.epoch = 0
        """Rises with every new connection: what belongs to an older one is gone."""
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        """Of those that the process shares: who has not released it."""
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
        What carries it, connected and logged in.

        :raises TransportError: there is no connection to be had
        :raises AccessDenied: the host's key is not known, or it does not let us in
        """
        asked = self._attempts
        with self._lock:
            if self._carrier is None:
                self._carrier = carrier_for(self.endpoint, self.settings)
            if not self._carrier.is_open:
                if self._failure is not None and self._attempts != asked:
                    # of an attempt that we have waited for: the next one would take as long
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
        """Whether there is a connection now. Makes none."""
        return self._carrier is not None and self._carrier.is_open

    def open(self, command: str | None = None, *, window: int = 4 << 20) -> Stream:
        """
        As :meth:`~statepool.transports.ssh.carrier.Carrier.open`, on a connection that is made
        where there is none.
        """
        doing = "start SFTP on" if command is None else "run a command on"
        carrier = self.carrier
        # it has ended since it was seen to be open
        with self.answering(doing), contextlib.suppress(LinkGone):
            return carrier.open(command, window=window)
        carrier = self.carrier
        with self.answering(doing):
            return carrier.open(command, window=window)

    @contextlib.contextmanager
    def expecting(self, *, hard: bool = False) -> Iterator[None]:
        """As :meth:`~statepool.transports.ssh.carrier.Carrier.expecting`."""
        if self._carrier is None:
            yield
            return
        with self._carrier.expecting(hard=hard):
            yield

    @contextlib.contextmanager
    def answering(self, doing: str, subject: Subject | None = None) -> Iterator[None]:
        """
        As :meth:`translating`, for requests whose answer a carrier waits for without end: something
        has to be heard within the timeout, and the answer within twice that, whatever else arrives.
        """
        with self.translating(doing, subject), self.expecting(), self.expecting(hard=True):
            yield

    @contextlib.contextmanager
    def translating(self, doing: str, subject: Subject | None = None) -> Iterator[None]:
        """
        As :func:`~statepool.transports.ssh.failures.translating`; what became of the link below
        explains what a carrier only suspects.
        """
        named = subject or Subject(str(self), f"ssh://{self}")
        explaining = (
            self._carrier.explaining() if self._carrier is not None else contextlib.nullcontext()
        )
        with translating(doing, named, self.settings.timeout), explaining:
            yield

    def close(self) -> None:
        """End the connection; the next use makes it again."""
        with self._lock:
            if self._carrier is not None:
                self._carrier.close()

    def _after_fork(self) -> None:
        """In the child. The locks may be held by threads that are not there any more."""
        if self._carrier is not None:
            self._carrier.after_fork()
        self._lock = threading.RLock()
        self.epoch += 1


# -- the connections of this process ---------------------------------------------------------------

_connections: weakref.WeakSet[Connection] = weakref.WeakSet()
_shared: dict[tuple[object, ...], list[Connection]] = {}
"""
By the endpoint, and by the settings that matter for a connection; several where different functions
are asked for secrets.
"""

_shared_lock = threading.Lock()


def connection_to(location: Location, settings: Settings, user: object = None) -> Connection:
    """
    :param location: where a pool is
    :param settings: how to connect
    :param user: who tells by :func:`release` when the connection is not needed any more
    :returns: the connection of this process to that account, which may have to be made yet
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
    Release a connection. It stays open for later users, unless it was made with a function that
    gives secrets: then no other user may have it.

    :param user: as for :func:`connection_to`; who uses it once more all the same makes it again
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
