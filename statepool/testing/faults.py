"""
A transport around another one, which injects faults.

::

    # The first fetch breaks after 1 MiB, later ones do not.
    cut = Stop(matches=on("fetch", path="*/data/*"), after=1 << 20, times=1)
    # Every fetch brings one wrong byte.
    rotten = Flip(matches=on("fetch"), offset=70_000)
    transport = FaultyTransport(LocalTransport(location), cut, rotten)

A fault is a value. It says which calls it affects, and how. Several faults apply in their order. A
new kind is a class with one or two of the methods of :class:`Fault`.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from attrs import define, evolve, frozen

from statepool.beneath import Beneath
from statepool.errors import NoSpace, TransportError
from statepool.model.digest import Digest
from statepool.model.progress import SILENT, Progress
from statepool.transports import copying
from statepool.transports.base import Capabilities, Moved, Transfer, Transport


@frozen
class Call:
    """
    A call of a method of a transport.

    :param operation: the name of the method
    :param path: the path concerned: the directory, the file, or the *target* of a link or a rename
    :param number: the number among all calls of this transport, from one
    """

    operation: str
    path: str
    number: int


def on(*operations: str, path: str = "*") -> Callable[[Call], bool]:
    """
    :param operations: names of methods; none: all
    :param path: a pattern as in a shell, in which ``*`` also stands for slashes
    :returns: a predicate for :attr:`Fault.matches`
    """
    return lambda call: (
        (not operations or call.operation in operations) and fnmatchcase(call.path, path)
    )


ALWAYS = on()
"""Every call."""


@frozen(kw_only=True)
class Fault:
    """
    A fault. This base class does nothing.

    :param matches: which calls it may affect
    :param first: the first of those that it does affect, counted from one
    :param times: how many it affects from then on, or None for all
    """

    matches: Callable[[Call], bool] = ALWAYS
    first: int = 1
    times: int | None = None

    def before(self, call: Call) -> None:
        """Act before the call is made; an exception is raised by the call."""
        return None

    def answered(self, call: Call) -> None:
        """Act after the call has done its work; an exception is raised by the call all the same."""
        return None

    def advance(self, call: Call, count: int, done: int) -> None:
        """
        Act while bytes move; an exception ends the transfer as a broken connection would.

        :param count: how many have moved since the last call
        :param done: how many have moved in all calls that this fault affects
        """
        return None

    def spoil(self, fd: int) -> None:
        """
        Change what was read or fetched, or what is about to be stored or created.

        :param fd: an open file with all of it, to be changed in place
        """
        return None


@frozen(kw_only=True)
class Truncate(Fault):
    """
    A fault: only the first bytes arrive, without an error.

    :param keep: how many
    """

    keep: int

    def spoil(self, fd: int) -> None:
        """Cut the file."""
        if os.fstat(fd).st_size > self.keep:
            os.ftruncate(fd, self.keep)


@frozen(kw_only=True)
class Flip(Fault):
    """
    A fault: one byte arrives wrong. A shorter file is left as it is.

    :param offset: its offset
    :param mask: which of its bits are flipped
    """

    offset: int
    mask: int = 0xFF

    def spoil(self, fd: int) -> None:
        """Change the byte."""
        for byte in os.pread(fd, 1, self.offset):
            os.pwrite(fd, bytes([byte ^ self.mask]), self.offset)


def _broken(call: Call) -> BaseException:
    return TransportError(
        f"the connection broke in call {call.number}, {call.operation} {call.path!r}",
        path=call.path,
        transient=True,
    )


@frozen(kw_only=True)
class Stop(Fault):
    """
    A fault: the call fails.

    :param after: once this many bytes have moved in the affected calls; None: before anything is
        done
    :param error: makes what is raised
    """

    after: int | None = None
    error: Callable[[Call], BaseException] = _broken

    def before(self, call: Call) -> None:
        """Fail at once, unless ``after`` is set."""
        if self.after is None:
            raise self.error(call)

    def advance(self, call: Call, count: int, done: int) -> None:
        """Fail if enough bytes have moved."""
        if self.after is not None and done > self.after:
            raise self.error(call)


@frozen(kw_only=True)
class Lose(Fault):
    """
    A fault: the server executes the call, and the connection breaks before its answer arrives.
    """

    def answered(self, call: Call) -> None:
        """Fail now."""
        raise _broken(call)


@frozen(kw_only=True)
class Slow(Fault):
    """
    A fault: the throughput is limited.

    :param rate: bytes per second
    :param sleep: waits for some seconds; tests give one that only counts them
    """

    rate: float
    sleep: Callable[[float], object] = time.sleep

    def advance(self, call: Call, count: int, done: int) -> None:
        """Wait."""
        self.sleep(count / self.rate)


@frozen(kw_only=True)
class Full(Fault):
    """
    A fault: the far side is full.

    :param after: bytes that still fit, in all affected calls
    """

    after: int = 0

    def advance(self, call: Call, count: int, done: int) -> None:
        """Refuse what does not fit."""
        if done > self.after:
            raise NoSpace(
                f"no space is left for {call.path!r}",
                needed=done,
                available=self.after,
                path=call.path,
            )


@define(eq=False)
class _Counted:
    """A fault, and its counts."""

    fault: Fault
    calls: int = 0
    bytes: int = 0

    def strikes(self, call: Call) -> bool:
        if not self.fault.matches(call):
            return False
        self.calls += 1
        late = self.calls - self.fault.first
        return late >= 0 and (self.fault.times is None or late < self.fault.times)


@frozen
class _Struck:
    """A call, and the faults that affect it. It is the progress of its bytes."""

    call: Call
    faults: list[_Counted]
    progress: Progress = SILENT

    def begin(self, what: str, total: int) -> None:
        self.progress.begin(what, total)

    def advance(self, count: int) -> None:
        for counted in self.faults:
            counted.bytes += count
            counted.fault.advance(self.call, count, counted.bytes)
        self.progress.advance(count)

    def end(self) -> None:
        self.progress.end()

    @property
    def spoils(self) -> bool:
        return any(type(counted.fault).spoil is not Fault.spoil for counted in self.faults)

    def spoil(self, fd: int) -> None:
        for counted in self.faults:
            counted.fault.spoil(fd)

    def spoilt(self, data: bytes) -> bytes:
        if not self.spoils:
            return data
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            self.spoil(file.fileno())
            file.seek(0)
            return file.read()


def _passed_on(operation: str, *, about: int = 0) -> Any:
    """
    :param operation: the name of a method of transports
    :param about: which of its arguments a fault is told of
    :returns: that method, executed by the inner transport unless a fault prevents it
    """

    def method(transport: FaultyTransport, *arguments: Any) -> Any:
        with transport._call(operation, arguments[about]):
            return getattr(transport.inner, operation)(*arguments)

    return method


class FaultyTransport(Transport):
    """
    A transport with injected faults. Access through the result of :meth:`local_path` is not
    affected.

    :param inner: the transport that does the work
    :param faults: the faults
    """

    def __init__(self, inner: Transport, *faults: Fault) -> None:
        super().__init__(inner.location)
        self.inner = inner
        self.calls: list[Call] = []
        """All calls so far."""
        self._faults = [_Counted(fault) for fault in faults]
        self._lock = threading.Lock()

    @contextmanager
    def _call(self, operation: str, path: str, progress: Progress = SILENT) -> Iterator[_Struck]:
        with self._lock:
            call = Call(operation, path, len(self.calls) + 1)
            self.calls.append(call)
            struck = _Struck(
                call, [counted for counted in self._faults if counted.strikes(call)], progress
            )
        for counted in struck.faults:
            counted.fault.before(call)
        yield struck
        for counted in struck.faults:
            counted.fault.answered(call)

    @property
    def capabilities(self) -> Capabilities:
        return self.inner.capabilities

    @property
    def identity(self) -> str:
        return self.inner.identity

    scan = _passed_on("scan")
    stat = _passed_on("stat")
    readlink = _passed_on("readlink")
    link = _passed_on("link", about=1)
    rename = _passed_on("rename", about=1)
    remove = _passed_on("remove")
    symlink = _passed_on("symlink", about=1)
    make_directory = _passed_on("make_directory")
    remove_directory = _passed_on("remove_directory")
    flush = _passed_on("flush")
    hold = _passed_on("hold")

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        """Read a part of a file; offsets of faults are those of the file."""
        with self._call("read", path) as struck:
            if struck.spoils:
                data = struck.spoilt(self.inner.read(path))[
                    offset : None if size is None else offset + size
                ]
            else:
                data = self.inner.read(path, offset, size)
            struck.advance(len(data))
            return data

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        with self._call("create", path) as struck:
            struck.advance(len(data))
            self.inner.create(path, struck.spoilt(data), flush=flush)

    def fetch(self, path: str, target: int, transfer: Transfer) -> Moved:
        """Fetch a file; the digest is that of the bytes that have arrived."""
        with self._call("fetch", path, transfer.progress) as struck:
            moved = self.inner.fetch(path, target, evolve(transfer, progress=struck))
            if not struck.spoils:
                return moved
            struck.spoil(target)
            return evolve(
                moved,
                digest=copying.hash_file(
                    target, os.fstat(target).st_size, algorithm=moved.digest.algorithm
                ),
            )

    def store(self, source: int, path: str, transfer: Transfer) -> Moved:
        """Store a file; the digest is that of the bytes that have arrived at the other end."""
        with self._call("store", path, transfer.progress) as struck:
            if not struck.spoils:
                return self.inner.store(source, path, evolve(transfer, progress=struck))
            with tempfile.TemporaryFile() as file:
                copying.copy(source, file.fileno(), Transfer(transfer.size))
                struck.spoil(file.fileno())
                left = os.fstat(file.fileno()).st_size
                return self.inner.store(
                    file.fileno(), path, Transfer(left, transfer.algorithm, progress=struck)
                )

    def digest(self, path: str, transfer: Transfer) -> Digest:
        with self._call("digest", path, transfer.progress) as struck:
            return self.inner.digest(path, evolve(transfer, progress=struck))

    def free_space(self) -> int | None:
        with self._call("free_space", ""):
            return self.inner.free_space()

    def local_path(self, path: str) -> Path | None:
        return self.inner.local_path(path)

    def beneath(self, path: str) -> Beneath | None:
        return self.inner.beneath(path)

    def is_transient(self, error: BaseException) -> bool:
        """Return what the inner transport says, or what the fault says."""
        return super().is_transient(error) or self.inner.is_transient(error)

    def close(self) -> None:
        self.inner.close()
