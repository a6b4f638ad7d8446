"""
A transport around another one, which retries what failed for a transient reason.

The inner transport knows which errors are transient
(:meth:`~statepool.transports.base.Transport.is_transient`); settings tell how often to retry, and
after which pauses. The pauses grow and have random jitter, so that many clients that lost one
server do not come back to it all at the same moment.

Not every operation can just be repeated. If the answer to an exclusive create was lost, the second
attempt finds the name taken, perhaps by the first attempt. So what a retry finds is compared with
what the first attempt may have done.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from attrs import define, evolve

from statepool.beneath import Beneath
from statepool.errors import FileExists, IntegrityError, MissingFile, StatePoolError
from statepool.model.digest import Digest
from statepool.model.outcomes import Finding
from statepool.transports.base import (
    Capabilities,
    Entry,
    FileKind,
    Moved,
    Stat,
    Transfer,
    Transport,
)
from statepool.transports.reading import Extent
from statepool.transports.resuming import same_beginning

LONGEST_PAUSE = 30.0
"""The longest pause between two attempts, in seconds."""

COMPARED = 64 << 10
"""Bytes of two files that are compared where nothing tells whether they are the same file."""

T = TypeVar("T")


class Retrying(Transport):
    """
    A transport that retries transient failures.

    :param inner: the transport that does the work
    :param retries: the most retries of one operation
    :param pause: before the first retry, in seconds; it doubles before each further one
    :param sleep: waits for some seconds
    :param jitter: returns an unpredictable number from 0 to 1
    """

    def __init__(
        self,
        inner: Transport,
        *,
        retries: int,
        pause: float,
        sleep: Callable[[float], object] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(inner.location)
        self.inner = inner
        self._retries = retries
        self._pause = pause
        self._sleep = sleep
        self._jitter = jitter

    def _again(self, work: Callable[[bool], T]) -> T:
        """
        Call ``work`` until it succeeds, fails for good, or has been retried often enough.

        :param work: is told whether an earlier attempt may have done it already
        """
        for attempt in range(self._retries):
            try:
                return work(attempt > 0)
            except StatePoolError as error:
                if not self.inner.is_transient(error):
                    raise
            self._sleep(min(self._pause * 2**attempt, LONGEST_PAUSE) * (0.5 + self._jitter()))
        return work(self._retries > 0)

    @property
    def capabilities(self) -> Capabilities:
        return self._again(lambda again: self.inner.capabilities)

    @property
    def identity(self) -> str:
        return self._again(lambda again: self.inner.identity)

    # -- looking changes nothing -------------------------------------------------------------------

    def scan(self, directory: str) -> list[Entry]:
        return self._again(lambda again: self.inner.scan(directory))

    def stat(self, path: str) -> Stat | None:
        return self._again(lambda again: self.inner.stat(path))

    def read(self, path: str, offset: int = 0, size: int | None = None) -> bytes:
        return self._again(lambda again: self.inner.read(path, offset, size))

    def readlink(self, path: str) -> str:
        return self._again(lambda again: self.inner.readlink(path))

    def scan_many(self, directories: Sequence[str]) -> list[list[Entry]]:
        return self._again(lambda again: self.inner.scan_many(directories))

    def stat_many(self, paths: Sequence[str]) -> list[Stat | None]:
        return self._again(lambda again: self.inner.stat_many(paths))

    def read_many(self, paths: Sequence[str], size: int) -> list[bytes | None]:
        return self._again(lambda again: self.inner.read_many(paths, size))

    # -- names -------------------------------------------------------------------------------------

    def create(self, path: str, data: bytes, *, flush: bool = True) -> None:
        """
        Create a file. If an earlier attempt may have made it, a file with exactly the same content
        counts as ours: files that must be told apart contain a nonce.
        """

        def work(again: bool) -> None:
            try:
                self.inner.create(path, data, flush=flush)
            except FileExists:
                if not again or not self._holds(path, data):
                    raise

        self._again(work)

    def _holds(self, path: str, data: bytes) -> bool:
        found = self.inner.stat(path)
        return (
            found is not None
            and found.kind is FileKind.FILE
            and found.size == len(data)
            and self.inner.read(path, 0, len(data) + 1) == data
        )

    def link(self, source: str, target: str) -> None:
        """
        Give a file a second name. A target that is the same file, or has the same facts and
        content, counts as made by an earlier attempt.
        """

        def work(again: bool) -> None:
            try:
                self.inner.link(source, target)
            except FileExists:
                if not again or not self._are_one(source, target):
                    raise

        self._again(work)

    def _are_one(self, source: str, target: str) -> bool:
        one, other = self.inner.stat_many([source, target])
        if one is None or other is None or one.kind is not FileKind.FILE:
            return False
        if self.inner.capabilities.copies:
            if other.kind is not FileKind.FILE or one.size != other.size:
                return False
            return self.inner.digest(source, Transfer(one.size)) == self.inner.digest(
                target, Transfer(one.size)
            )
        if one.identity is not None and other.identity is not None:
            return one.identity == other.identity
        if one != other:
            return False
        return self.inner.read(source, 0, COMPARED) == self.inner.read(target, 0, COMPARED)

    def rename(self, source: str, target: str) -> None:
        """
        Rename a file. If a retry finds the target but not the source, an earlier attempt succeeded.
        """

        def work(again: bool) -> None:
            try:
                self.inner.rename(source, target)
            except MissingFile:
                if not again or self.inner.stat(target) is None:
                    raise

        self._again(work)

    def remove(self, path: str) -> bool:
        """
        Remove a file or directory. If a retry finds nothing, it counts as removed by an earlier
        attempt.
        """
        return self._again(lambda again: self.inner.remove(path) or again)

    def symlink(self, target: str, path: str) -> None:
        self._again(lambda again: self.inner.symlink(target, path))

    def make_directory(self, path: str) -> None:
        self._again(lambda again: self.inner.make_directory(path))

    def remove_directory(self, path: str) -> bool:
        """
        Remove a file or directory. If a retry finds nothing, it counts as removed by an earlier
        attempt.
        """
        return self._again(
            lambda again: (
                self.inner.remove_directory(path) or (again and self.inner.stat(path) is None)
            )
        )

    def flush(self, directory: str) -> None:
        self._again(lambda again: self.inner.flush(directory))

    # -- bytes -------------------------------------------------------------------------------------

    def fetch(self, path: str, target: int, transfer: Transfer) -> Moved:
        """
        Fetch a file. A retry resumes where the attempt before it stopped: the length of our copy
        tells.
        """
        return self._moved(
            transfer,
            partial(self.inner.fetch, path, target),
            lambda: min(os.fstat(target).st_size, transfer.size),
        )

    def fetch_part(self, path: str, target: int, transfer: Transfer, part: Extent) -> Moved:
        """Fetch a part of a file. A retry fetches all of the part again."""
        return self._moved(
            evolve(transfer, done=0),
            lambda attempt: self.inner.fetch_part(path, target, attempt, part),
            lambda: 0,
        )

    def store(self, source: int, path: str, transfer: Transfer) -> Moved:
        """
        Store a file. A retry resumes where the attempt before it stopped, if the bytes there are
        ours.
        """
        return self._moved(
            transfer,
            partial(self.inner.store, source, path),
            lambda: self._stored(source, path, transfer),
        )

    def _moved(
        self, transfer: Transfer, move: Callable[[Transfer], Moved], reached: Callable[[], int]
    ) -> Moved:
        """
        :param move: one attempt
        :param reached: tells, after a failed attempt, how many bytes need not be moved again
        """
        attempts = _Attempts(transfer)

        def work(again: bool) -> Moved:
            attempts.go_on(
                reached() if again and self.inner.capabilities.resumes else transfer.done
            )
            return attempts.all_of(move(evolve(transfer, progress=attempts, done=attempts.done)))

        return self._again(work)

    def _stored(self, source: int, path: str, transfer: Transfer) -> int:
        """
        :returns: how many bytes of the source are really there: a host that was restarted in
            between may have kept the length of the file, but not its bytes
        """
        found = self.inner.stat(path)
        if found is None or found.kind is not FileKind.FILE or not 0 < found.size <= transfer.size:
            return 0
        there = Transfer(found.size, transfer.algorithm)
        try:
            digest = self.inner.digest(path, there)
        except IntegrityError:
            return 0  # the file is still growing
        return same_beginning(source, there, digest, transfer.pieces)

    def digest(self, path: str, transfer: Transfer) -> Digest:
        attempts = _Attempts(transfer)

        def work() -> Digest:
            attempts.go_on(0)
            return self.inner.digest(path, evolve(transfer, progress=attempts))

        return self._again(lambda again: work())

    # -- the rest ----------------------------------------------------------------------------------

    @property
    def far_algorithm(self) -> str | None:
        return self._again(lambda again: self.inner.far_algorithm)

    def far_digests(self, files: Mapping[str, int]) -> list[Digest | None]:
        return self._again(lambda again: self.inner.far_digests(files))

    def free_space(self) -> int | None:
        return self._again(lambda again: self.inner.free_space())

    def survey(self) -> list[Finding]:
        return self._again(lambda again: self.inner.survey())

    def local_path(self, path: str) -> Path | None:
        return self.inner.local_path(path)

    def beneath(self, path: str) -> Beneath | None:
        return self.inner.beneath(path)

    def hold(self, path: str, timeout: float) -> AbstractContextManager[None] | None:
        """Hold a lock. Taking the lock is retried; errors while it is held are the caller's."""
        lock = self._again(lambda again: self.inner.hold(path, timeout))
        return None if lock is None else self._held(lock, path, timeout)

    @contextmanager
    def _held(
        self, first: AbstractContextManager[None], path: str, timeout: float
    ) -> Iterator[None]:
        def take(again: bool) -> None:
            lock = self.inner.hold(path, timeout) if again else first
            if lock is not None:
                stack.enter_context(lock)

        with ExitStack() as stack:
            self._again(take)
            yield

    def is_transient(self, error: BaseException) -> bool:
        """
        Return what the inner transport says: an error of this transport was retried often enough,
        but the operation may still succeed later.
        """
        return self.inner.is_transient(error)

    def close(self) -> None:
        self.inner.close()


@define
class _Attempts:
    """
    The progress of all attempts, which reports each byte once, and what the attempts moved.

    :param transfer: its progress is advanced, and its extents say where the source has data
    """

    transfer: Transfer
    begun: bool = False
    done: int = 0
    """The offset at which the present attempt began."""
    now: int = 0
    told: int = 0
    sent: int = 0
    again: int = 0

    def go_on(self, done: int) -> None:
        """
        Begin the next attempt.

        :param done: bytes that need not be moved
        """
        if self.begun:
            # What is there was moved, also if the progress of its last bytes was not reported any
            # more.
            reached = max(self.now, done)
            self.sent += self._data(self.done, reached)
            self.again += self._data(done, reached)
        self.begun, self.done, self.now = True, done, 0

    def begin(self, what: str, total: int) -> None:
        self.transfer.progress.begin(what, total)

    def end(self) -> None:
        self.transfer.progress.end()

    def advance(self, count: int) -> None:
        """
        Advance the outer progress. The inner transport reports every byte from the beginning of the
        file, including bytes that were there already.
        """
        self.now += count
        if self.now > self.told:
            new, self.told = self.now - self.told, self.now
            self.transfer.progress.advance(new)

    def all_of(self, moved: Moved) -> Moved:
        """:returns: what the last attempt did, together with the attempts before it"""
        return evolve(moved, sent=moved.sent + self.sent, again=moved.again + self.again)

    def _data(self, begin: int, end: int) -> int:
        """:returns: how many bytes of data there are between two offsets"""
        extents = self.transfer.extents or ((0, end),)
        return sum(
            max(min(offset + length, end) - max(offset, begin), 0) for offset, length in extents
        )
