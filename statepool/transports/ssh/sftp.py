"""
SFTP on one channel: requests are pipelined, and every answer is checked.

A carrier opens the channel; the protocol is implemented here. paramiko's own client drops the list
of extensions, does not collect all the answers to writes, and cannot send a second request before
the first is answered.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from statepool.transports.ssh.packets import (
    VERSION,
    Answer,
    Garbled,
    Kind,
    Reader,
    Refused,
    check,
    checked,
    extension,
    extensions_in,
    split,
)
from statepool.transports.ssh.wire import Pace

SENT_AT_ONCE = 32 << 10
"""The most bytes of one packet that we send: OpenSSH does not accept more on one channel."""

RECEIVED_AT_ONCE = 4 << 20
"""
The most bytes of one read from the channel. Reading all that is there is best: the channel would
move the remaining bytes to the front of its buffer.
"""

LONGEST_ANSWER = 16 << 20
"""
The most bytes of one answer. A peer that announces more does not speak SFTP: it may be a shell that
prints a greeting.
"""

OPERATION = 4
"""
The timeout for all answers of one operation, as a multiple of that for one answer. The time that
their length takes at the least rate is added.
"""

MOST_KEPT = 256 << 20
"""
The most bytes of answers that arrive out of order: from a correct server, 64 answers of 255 KiB can
be under way.
"""


class Channel(Protocol):
    """The methods of a carrier's stream that are used here."""

    def send(self, data: bytes, /) -> int: ...

    def recv(self, count: int, /) -> bytes: ...

    def send_ready(self) -> bool: ...

    def recv_ready(self) -> bool: ...

    def close(self) -> object: ...


Expecting = Callable[[], AbstractContextManager[None]]
"""Makes a block in which the watch over the connection knows that an answer is awaited."""

_SHOWN = 200
"""The most bytes that messages show of text that arrived instead of SFTP."""


class _Input:
    """The packets that arrive on a channel, without copying long ones."""

    def __init__(self, channel: Channel, expecting: Expecting, patience: float) -> None:
        self._channel = channel
        self._expecting = expecting
        self._patience = patience
        self._chunk = memoryview(b"")
        self._pace = Pace(patience)
        self.heard: Callable[[], object] = lambda: None
        self.begin()

    def begin(self) -> None:
        """Begin to measure the rate of what arrives, up to the next call."""
        self._together = Pace(OPERATION * self._patience)

    @property
    def is_ready(self) -> bool:
        """Return whether there is unread data."""
        return bool(self._chunk) or self._channel.recv_ready()

    def packet(self) -> tuple[int, list[memoryview]]:
        """:returns: the type and content of the next packet"""
        self._pace = Pace(self._patience)
        head = b"".join(self._take(5))
        length = int.from_bytes(head[:4], "big") - 1
        if not 0 <= length <= LONGEST_ANSWER:
            begin = (head + bytes(self._chunk))[:_SHOWN].partition(b"\0")[0]
            text = begin.decode(errors="replace").strip()
            raise Garbled(
                f"the server does not speak SFTP: it begins with {begin!r}",
                text if begin.isascii() else None,
            )
        return head[4], self._take(length)

    def _take(self, count: int) -> list[memoryview]:
        parts = []
        while count:
            if not self._chunk:
                self._chunk = memoryview(self._receive())
            part = self._chunk[:count]
            self._chunk = self._chunk[len(part) :]
            count -= len(part)
            parts.append(part)
        return parts

    def _receive(self) -> bytes:
        if self._channel.recv_ready():
            data = self._channel.recv(RECEIVED_AT_ONCE)
        else:
            begun = time.monotonic()
            with self._expecting():
                data = self._channel.recv(RECEIVED_AT_ONCE)
            waited = time.monotonic() - begun
            self._pace.note(waited, len(data))
            self._together.note(waited, len(data))
        if not data:
            raise EOFError("the server has closed the channel")
        self.heard()
        return data


class Sftp:
    """
    A client on one channel. One thread at a time may use it.

    :param channel: on which the subsystem ``sftp`` has been started
    :param expecting: called for every wait
    :param patience: how long an answer may take, in seconds; the time that its length takes at the
        least rate is added
    :raises Garbled: the other end does not speak SFTP
    :raises EOFError: the connection is lost; all methods may raise this
    :raises TimeoutError: nothing arrived for too long; all methods may raise this
    """

    def __init__(
        self, channel: Channel, expecting: Expecting = nullcontext, patience: float = math.inf
    ) -> None:
        self._channel = channel
        self._expecting = expecting
        self._input = _Input(channel, expecting, patience)
        self._last = 0
        self._waiting: dict[int, Answer | None] = {}
        self._kept = 0
        self._ignored: set[int] = set()
        self._write(struct.pack(">IBI", 5, Kind.INIT, VERSION))
        kind, parts = self._input.packet()
        if kind != Kind.VERSION:
            raise Garbled(
                f"the server does not speak SFTP: it answers with a packet of type {kind}"
            )
        reader = Reader(b"".join(parts))
        self.version = reader.number()
        self.extensions: Mapping[bytes, bytes] = extensions_in(reader)
        """The extensions of the server, by name, and what it says of them."""

    @property
    def is_idle(self) -> bool:
        """Whether every request has been answered."""
        return not self._waiting

    def begin(self) -> None:
        """Begin a new operation: its timeout is counted from now on."""
        self._input.begin()

    @contextmanager
    def heard(self, told: Callable[[], object]) -> Iterator[None]:
        """
        :param told: called whenever something has arrived, for the duration of a ``with`` block; if
            it raises, the wait and the channel end
        """
        self._input.heard = told
        try:
            yield
        finally:
            self._input.heard = lambda: None

    def close(self) -> None:
        """Close the channel without waiting."""
        self._channel.close()

    # -- questions and answers ---------------------------------------------------------------------

    def send(self, *requests: tuple[int, bytes]) -> list[int]:
        """
        Send requests, and wait for no answer.

        :param requests: the type of each packet, and its content after the request number
        :returns: the number of each request
        """
        out, numbers = [], []
        for kind, body in requests:
            self._last += 1
            numbers.append(self._last)
            self._waiting[self._last] = None
            out.append(struct.pack(">IBI", len(body) + 5, kind, self._last) + body)
        self._write(b"".join(out))
        return numbers

    def send_data(self, kind: int, head: bytes, data: memoryview) -> int:
        """Send one request that ends with much data; see :meth:`send`."""
        self._last += 1
        self._waiting[self._last] = None
        first = (
            struct.pack(">IBI", len(head) + 4 + len(data) + 5, kind, self._last)
            + head
            + struct.pack(">I", len(data))
        )
        begin = min(SENT_AT_ONCE - len(first), len(data))
        self._write(first + bytes(data[:begin]))
        for offset in range(begin, len(data), SENT_AT_ONCE):
            self._write(bytes(data[offset : offset + SENT_AT_ONCE]))
        return self._last

    def answer(self, number: int) -> Answer:
        """:returns: the answer to a request, which may be a refusal"""
        while (found := self._waiting[number]) is None:
            self._receive()
        self._kept -= found.length
        del self._waiting[number]
        return found

    def next_answer(self, numbers: Mapping[int, object]) -> tuple[int, Answer]:
        """:returns: the number of the request among these that is answered first, and its answer"""
        while True:
            number = self._receive()
            if number in numbers:
                answer = self._waiting.pop(number)
                assert answer is not None
                self._kept -= answer.length
                return number, answer

    @property
    def is_ready(self) -> bool:
        """Return whether an answer, or a part of one, has arrived."""
        return self._input.is_ready

    def forget(self, numbers: Iterable[int]) -> None:
        """Discard the answers to these requests when they arrive."""
        for number in numbers:
            answer = self._waiting.pop(number, None)
            if answer is None:
                self._ignored.add(number)
            else:
                self._kept -= answer.length

    def ask(self, kind: int, body: bytes) -> Answer:
        """
        :returns: the answer to one request
        :raises Refused: it is a status other than success
        """
        return check(self.answer(self.send((kind, body))[0]))

    def ask_all(self, requests: Sequence[tuple[int, bytes]]) -> list[Answer | Refused]:
        """:returns: the answers to many requests that are sent at once"""
        return list(self.each_answer(requests))

    def each_answer(self, requests: Sequence[tuple[int, bytes]]) -> Iterator[Answer | Refused]:
        """
        Yield the answers of :meth:`ask_all` one after the other, for answers that can be long. A
        caller that stops early abandons the channel.
        """
        for number in self.send(*requests):
            yield checked(self.answer(number))

    def extended(self, name: bytes, *arguments: bytes) -> Answer:
        """Return the answer to a request of an extension; see :meth:`ask`."""
        return self.ask(*extension(name, *arguments))

    def _receive(self) -> int:
        """:returns: the number of a request whose answer has arrived"""
        kind, parts = self._input.packet()
        head, parts = split(parts, 4)
        number = int.from_bytes(head, "big")
        if number in self._ignored:
            self._ignored.discard(number)
        elif self._waiting.get(number, parts) is None:
            self._waiting[number] = answer = Answer(kind, tuple(parts))
            self._kept += answer.length
            if self._kept > MOST_KEPT:
                raise Garbled("the server answers with far more than it was asked for")
        else:
            raise Garbled(f"the server answers a question that was not asked: {number}")
        return number

    def _write(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            part = data[done : done + SENT_AT_ONCE] if len(data) > SENT_AT_ONCE else data
            if self._channel.send_ready():
                sent = self._channel.send(part)
            else:
                with self._expecting():
                    sent = self._channel.send(part)
            if not sent:
                raise EOFError("the channel is closed")
            done += sent
            if sent < len(part) and len(data) <= SENT_AT_ONCE:
                data, done = data[sent:], 0
