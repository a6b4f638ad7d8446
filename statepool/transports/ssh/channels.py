"""
The SFTP channels of one connection. There are a few, and each is lent to one thread at a time, so
that threads do not wait for each other.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from statepool.errors import TransportError
from statepool.transports.ssh.connection import Connection
from statepool.transports.ssh.failures import said
from statepool.transports.ssh.packets import Garbled
from statepool.transports.ssh.sftp import Sftp

MOST = 6
"""
The most SFTP channels on one connection. OpenSSH permits ten sessions by default (``MaxSessions``),
and commands need some too.
"""

GRACE = 1.0
"""
Seconds by which the timeout of a channel is longer than that of the connection below it: the
connection knows better why no answer comes.
"""


class Channels:
    """
    The SFTP clients on one connection, which are lent to threads.

    :param connection: the connection
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._epoch = self._connection.epoch
        self._changed = threading.Condition()
        self._idle: list[Sftp] = []
        self._count = 0
        self._most = MOST

    @contextmanager
    def lent(self) -> Iterator[Sftp]:
        """
        :returns: a client for this thread, for the duration of a ``with`` block. Its errors are not
            translated.
        :raises TransportError: the connection fails, or the server has no SFTP
        """
        if os.getpid() != self._pid:
            self._begin()  # the others belong to the parent
        sftp, epoch = self._take()
        sftp.begin()
        try:
            yield sftp
        finally:
            self._give_back(sftp, epoch)

    @contextmanager
    def spared(self) -> Iterator[Sftp | None]:
        """
        Lend a client as :meth:`lent`, but for optional work: None if no channel is available at
        once, or if it would be the last one for other threads.
        """
        taken = self._take_spare() if os.getpid() == self._pid else None
        if taken is None:
            yield None
            return
        sftp, epoch = taken
        sftp.begin()
        try:
            yield sftp
        finally:
            self._give_back(sftp, epoch)

    def _take_spare(self) -> tuple[Sftp, int] | None:
        with self._changed:
            self._look_at_epoch()
            epoch = self._epoch
            if len(self._idle) > 1:
                return self._idle.pop(), epoch
            if self._count >= self._most - 1:
                return None
            self._count += 1
        try:
            return self._open(), epoch
        except BaseException as error:
            if self._goes_on_without(error, epoch) or (
                isinstance(error, TransportError) and self._connection.is_open
            ):
                return None  # the channel was only optional
            raise

    def close(self) -> None:
        """Close the idle channels."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            idle, self._idle = self._idle, []
            self._count -= len(idle)
        for sftp in idle:
            self._end(sftp)

    def _take(self) -> tuple[Sftp, int]:
        _ = self._connection.carrier  # reconnects if the connection has ended
        with self._changed:
            self._look_at_epoch()
            while True:
                epoch = self._epoch
                if self._idle:
                    return self._idle.pop(), epoch
                if self._count < self._most:
                    self._count += 1
                    break
                self._changed.wait(1.0)
                self._look_at_epoch()
        try:
            return self._open(), epoch
        except BaseException as error:
            if self._goes_on_without(error, epoch):
                return self._take()
            raise

    def _goes_on_without(self, error: BaseException, epoch: int) -> bool:
        """
        :returns: whether the server only refuses a further channel, and there are other channels to
            wait for
        """
        with self._changed:
            if epoch != self._epoch:
                return False
            self._count -= 1
            self._changed.notify()
            if (
                not self._count
                or not self._connection.is_open
                or not isinstance(error, TransportError)
                or not error.transient
            ):
                return False
            self._most = self._count
            return True

    def _look_at_epoch(self) -> None:
        """Drop the channels of an earlier connection."""
        if self._epoch != self._connection.epoch:
            self._epoch = self._connection.epoch
            for sftp in self._idle:
                self._end(sftp)
            self._idle.clear()
            self._count, self._most = 0, MOST
            self._changed.notify_all()

    def _give_back(self, sftp: Sftp, epoch: int) -> None:
        with self._changed:
            current = epoch == self._epoch == self._connection.epoch
            if current and sftp.is_idle and self._connection.is_open:
                self._idle.append(sftp)
                self._changed.notify()
                return
            if epoch == self._epoch:
                self._count -= 1
                self._changed.notify()
        self._end(sftp)

    def _end(self, sftp: Sftp) -> None:
        # Closing tells the other side, if it is still there.
        with suppress(TransportError), self._connection.translating("close a channel to"):
            sftp.close()

    def _open(self) -> Sftp:
        connection = self._connection
        carrier = connection.carrier
        with connection.answering("start SFTP on"):
            stream, reason = None, ""
            try:
                stream = carrier.open()
                stream.settimeout(connection.settings.timeout + GRACE)
                return Sftp(stream, connection.expecting, connection.settings.timeout)
            except BaseException as error:
                if stream is not None:
                    reason = carrier.said(stream) if isinstance(error, EOFError) else ""
                    stream.close()
                if not isinstance(error, EOFError | Garbled) or not connection.is_open:
                    raise
                if isinstance(error, Garbled) and error.text is not None:
                    raise TransportError(
                        f"{connection} writes something where SFTP should begin: {error.text!r}",
                        hint=(
                            "the start-up files of the account's shell there do it, such as"
                            " ~/.bashrc: let them write nothing unless the shell is interactive; or"
                            " its shell says that it lets nobody in"
                        ),
                        pool=str(connection),
                    ) from error
                hint = "a line in sshd_config(5) there makes it: Subsystem sftp internal-sftp"
                raise TransportError(
                    f"{connection} has no SFTP ({reason or said(error)})",
                    hint=hint,
                    pool=str(connection),
                ) from error


def channels_of(connection: Connection) -> Channels:
    """:returns: the channels of a connection, which all pools on that host share"""
    with _lock:
        if connection not in _channels:
            _channels[connection] = Channels(connection)
        return _channels[connection]


_channels: weakref.WeakKeyDictionary[Connection, Channels] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _in_the_child() -> None:
    global _lock  # noqa: PLW0603  a thread that is not there any more may hold the old one
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_in_the_child)
