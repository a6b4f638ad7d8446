"""
Fetch the missing pieces of a file, from one source or from several at once.

The list of the pieces is known, and the digest of the file proves it. So each piece is proven when
it arrives, in whatever order, and from whatever source. A source takes a share at a time: a run of
consecutive missing pieces. Shares get smaller towards the end, and a source that finds none takes a
part of the largest one in progress: so the sources end at about the same time, however different
they are. If a source fails or delivers a wrong piece, the others fetch what it leaves.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from attrs import define, field, frozen

from statepool.errors import DigestMismatch, NoSpace, StatePoolError, TransportError
from statepool.model.digest import Digest
from statepool.model.pieces import PIECE, ZEROS, Pieces, count, hash_zeros
from statepool.pools.pieces import read_list
from statepool.sources.source import Source
from statepool.transports.base import Moved, Transfer
from statepool.transports.failures import Subject, translating
from statepool.transports.reading import SLICE, data_in, hash_part, zeros

MOST_WRONG = 3
"""
Damaged pieces after which a source is not asked any more. Until then it is asked for other pieces:
so a file can be put together from copies that are all damaged, at different places.
"""

LEAST = 2
"""Pieces of the smallest share: each share costs a source two round trips or three."""

Run = tuple[int, int]
"""Consecutive pieces: the index of the first, and the index behind the last."""


@frozen
class Origin:
    """
    A source of some bytes.

    :param path: the file in it
    """

    source: Source
    path: str


@define(eq=False)
class Delivery:
    """
    What one of several sources delivered.

    :param source: the source
    :param bytes: how many bytes came from it
    :param seconds: how long it was busy
    :param error: what was wrong with it, or None
    :param wrong: the pieces that arrived damaged
    """

    source: Source
    bytes: int = 0
    seconds: float = 0.0
    error: StatePoolError | None = None
    wrong: set[int] = field(factory=set)

    @property
    def is_over(self) -> bool:
        """Whether the source is not asked any more."""
        return self.error is not None and not 0 < len(self.wrong) < MOST_WRONG


def missing_runs(descriptor: int, size: int, wanted: Pieces) -> list[Run]:
    """
    Compare what is in a file with the list of its pieces. Missing pieces become zeros, and the file
    gets its whole length.

    :param descriptor: of our own file, which may be shorter than it will be
    :param size: how long it will be, in bytes
    :param wanted: the digests of all pieces
    :returns: the pieces that are missing, in order
    """
    subject = Subject("what an interrupted transfer left")
    missing: list[Run] = []
    with translating("write to", subject, needed=size, descriptor=descriptor):
        left = os.fstat(descriptor).st_size
        os.ftruncate(descriptor, size)
        filled = _filled(descriptor, size, subject)
        for index in range(count(size)):
            start, end = index * PIECE, min((index + 1) * PIECE, size)
            if index not in filled:
                is_right = start < left and wanted[index] == hash_zeros(end - start)
            else:
                digest = hash_part(descriptor, start, end, "blake3")
                is_right = wanted[index] == bytes.fromhex(digest.hex)
                if not is_right:
                    _clear(descriptor, start, end)
            if not is_right:
                missing.append((index, index + 1))
    return joined(missing)


def _filled(descriptor: int, size: int, subject: Subject) -> set[int]:
    """:returns: the pieces in which the file has data"""
    return {
        index
        for offset, length in data_in(descriptor, size, subject)
        for index in range(offset // PIECE, count(offset + length))
    }


def _clear(descriptor: int, start: int, end: int) -> None:
    while start < end:
        start += os.pwrite(descriptor, zeros(min(SLICE, end - start)), start)


def is_torn(missing: Sequence[Run], size: int) -> bool:
    """:returns: whether pieces are there behind missing ones, so that no stream can be resumed"""
    return bool(missing) and (len(missing) > 1 or missing[0][1] < count(size))


def length_of(runs: Sequence[Run], size: int) -> int:
    """:returns: the bytes of these pieces of a file of ``size`` bytes"""
    return sum(min(last * PIECE, size) - first * PIECE for first, last in runs)


def list_of(origins: Sequence[Origin], digest: Digest, size: int) -> Pieces | None:
    """:returns: the list of the pieces of some bytes, or None if no source has it"""
    for origin in origins:
        try:
            found = read_list(origin.source.transport, digest, size)
        except TransportError:
            continue  # its bytes cannot be read either, which is reported then
        if found is not None:
            return found
    return None


def joined(runs: Sequence[Run]) -> list[Run]:
    """:returns: the same pieces in order, in as few runs as possible"""
    found: list[Run] = []
    for first, last in sorted(runs):
        if found and found[-1][1] == first:
            first = found.pop()[0]
        found.append((first, last))
    return found


class PieceFetch:
    """
    A transfer of the missing pieces of a file.

    :param origins: where the bytes are; the errors of the first one are raised if all fail
    :param target: descriptor of our own file, as long as the whole; missing pieces are zeros
    :param transfer: describes the whole file; its progress is told of missing pieces only
    :param wanted: the digests of all pieces
    :param missing: the pieces to fetch
    """

    def __init__(
        self,
        origins: Sequence[Origin],
        target: int,
        transfer: Transfer,
        wanted: Pieces,
        missing: Sequence[Run],
    ) -> None:
        self._origins = origins
        self._target = target
        self._transfer = transfer
        self._wanted = wanted
        self._runs = joined(
            [
                (index, index + 1)
                for first, last in missing
                for index in range(first, last)
                # a hole needs no source
                if wanted[index] != ZEROS
            ]
        )
        self._left = self._again = 0
        self._busy: list[_Share] = []
        self._is_stopped = False
        self._changed = threading.Condition()
        self.deliveries = [Delivery(origin.source) for origin in origins]

    def run(self) -> Moved:
        """
        :returns: what was moved
        :raises StatePoolError: pieces are missing after all sources have failed
        """
        self._left = length_of(self._runs, self._transfer.size)
        self._transfer.progress.advance(self._transfer.size - self._left)
        ended: list[Future[None]] = [Future() for _ in self._origins]
        if len(ended) == 1:
            self._work(0, ended[0])
        else:
            self._work_together(ended)
        for one in ended:
            one.result()
        if self._runs:
            raise next(one.error for one in self.deliveries if one.error is not None)
        self._transfer.pieces.become(bytes(self._wanted))
        return Moved(
            Digest.of_pieces(self._wanted, self._transfer.size),
            "stream",
            sum(one.bytes for one in self.deliveries),
            self._again,
        )

    def _work_together(self, ended: Sequence[Future[None]]) -> None:
        # Daemon threads, so that the process does not wait for them at its end: they may hang in a
        # connection for long.
        threads = [
            threading.Thread(target=self._work, args=(number, one), daemon=True)
            for number, one in enumerate(ended)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            self._stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()  # none may write to the file after this
            raise

    # -- one source --------------------------------------------------------------------------------

    def _work(self, number: int, ended: Future[None]) -> None:
        origin, delivery = self._origins[number], self.deliveries[number]
        try:
            while not delivery.is_over and (share := self._take(delivery.wrong)) is not None:
                begun = time.monotonic()
                try:
                    self._fetch(origin, share, delivery)
                finally:
                    delivery.seconds += time.monotonic() - begun
                    self._give_back(share)
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            self._stop()
            ended.set_exception(error)
        else:
            ended.set_result(None)

    def _fetch(self, origin: Origin, share: _Share, delivery: Delivery) -> None:
        """Fetch a share as far as possible, and check what arrived."""
        start, end = share.first * PIECE, min(share.last * PIECE, self._transfer.size)
        try:
            moved = origin.source.transport.fetch_part(
                origin.path, self._target, share.transfer, (start, end - start)
            )
            share.done = moved.sent
        except _Enough:
            pass  # another source takes the rest
        except NoSpace:
            raise  # here, so no other source helps
        except StatePoolError as error:
            delivery.error = error
            delivery.wrong.clear()
        delivery.bytes += share.done
        for index in range(share.first, share.first + len(share.pieces)):
            if share.pieces[index - share.first] != self._wanted[index]:
                delivery.error = delivery.error or self._wrong(origin, index)
                delivery.wrong.add(index)
                # zeros are not written again
                _clear(self._target, index * PIECE, min((index + 1) * PIECE, end))
                break
            share.first_missing = index + 1

    def _wrong(self, origin: Origin, index: int) -> DigestMismatch:
        start = index * PIECE
        return DigestMismatch(
            f"the bytes {start} to {min(start + PIECE, self._transfer.size) - 1} of {origin.path!r}"
            f" in {origin.source} are damaged",
            expected=self._wanted[index].hex(),
            pool=str(origin.source),
            path=origin.path,
            hint=f"look at the pool with: statepool --source {origin.source} verify",
        )

    # -- dividing the work -------------------------------------------------------------------------

    def _take(self, wrong: set[int]) -> _Share | None:
        """
        :param wrong: pieces that this source does not have
        :returns: the next share of it, or None if nothing is left to do for it
        """
        with self._changed:
            while (found := self._next(wrong)) is None and self._busy and not self._is_stopped:
                largest = max(self._busy, key=lambda share: share.left)
                if largest.left > 2 * LEAST:
                    largest.is_enough = True
                self._changed.wait()
            if found is None or self._is_stopped:
                return None
            first, last = found
            left, several = sum(end - begin for begin, end in self._runs), len(self._origins)
            if several > 1:
                last = min(last, first + max(LEAST, left // (2 * several)))
            self._runs = [
                rest
                for begin, end in self._runs
                for rest in ((begin, min(end, first)), (max(begin, last), end))
                if rest[0] < rest[1]
            ]
            share = _Share(self._transfer, self._advance, first, last)
            self._busy.append(share)
            return share

    def _next(self, wrong: set[int]) -> Run | None:
        """:returns: the first missing pieces that are not among the wrong ones"""
        for begin, end in self._runs:
            first = next((index for index in range(begin, end) if index not in wrong), None)
            if first is not None:
                return first, min((index for index in wrong if first < index < end), default=end)
        return None

    def _give_back(self, share: _Share) -> None:
        """Let other sources fetch what is missing of a share."""
        with self._changed:
            self._busy.remove(share)
            if share.first_missing < share.last:
                self._runs = joined([*self._runs, (share.first_missing, share.last)])
                proven = (share.first_missing - share.first) * PIECE
                self._again += max(share.done - proven, 0)
            self._changed.notify_all()

    def _advance(self, count: int) -> None:
        """Report bytes that have arrived, each once."""
        with self._changed:
            count = min(count, self._left)
            self._left -= count
            self._transfer.progress.advance(count)

    def _stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            for share in self._busy:
                share.is_enough = True
            self._changed.notify_all()


class _Enough(Exception):
    """The error that ends the fetch of a share."""


@define(eq=False)
class _Share:
    """
    A run of pieces that one source fetches, and the progress of that.

    :param whole: the transfer of the whole file
    :param report: is told how many bytes have arrived
    :param first: index of the first piece
    :param last: index behind the last piece
    """

    whole: Transfer
    report: Callable[[int], object]
    first: int
    last: int
    pieces: Pieces = field(factory=Pieces)
    done: int = 0
    first_missing: int = field(init=False)
    is_enough: bool = False

    def __attrs_post_init__(self) -> None:
        self.first_missing = self.first

    @property
    def left(self) -> int:
        """The number of pieces that have not arrived."""
        return self.last - self.first - len(self.pieces)

    @property
    def transfer(self) -> Transfer:
        """The transfer for the transport."""
        whole = self.whole
        return Transfer(whole.size, whole.algorithm, whole.extents, self, 0, self.pieces)

    def begin(self, what: str, total: int) -> None:
        """Report nothing: the whole is one transfer."""

    def end(self) -> None:
        """Report nothing."""

    def advance(self, count: int) -> None:
        """
        Note that bytes have arrived.

        :raises _Enough: another source takes the rest
        """
        if self.is_enough:
            raise _Enough
        self.done += count
        self.report(count)
