"""
The client of SFTP against servers that are slow, disorderly, or no servers: what they answer is
made up here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from statepool.errors import IntegrityError
from statepool.model.digest import DEFAULT_ALGORITHM, Digest, new_hasher
from statepool.model.pieces import PIECE, Pieces
from statepool.model.progress import SILENT
from statepool.sources.slow_source import TooSlow, Watch
from statepool.testing.transports import Counter
from statepool.transports.failures import Subject
from statepool.transports.reading import are_in_order
from statepool.transports.ssh import batches
from statepool.transports.ssh import sftp as sftp_module
from statepool.transports.ssh.moving import Download, Job, Upload
from statepool.transports.ssh.packets import (
    Answer,
    Code,
    Garbled,
    Kind,
    Limits,
    Refused,
    attributes,
    attributes_in,
    check,
    extension,
    names_in,
    numbers_in,
    string,
)
from statepool.transports.ssh.server import look_at
from statepool.transports.ssh.sftp import Sftp

Request = tuple[int, int, bytes]
"""Type, number, and the rest."""

CONTENT = b"".join(number.to_bytes(4, "big") for number in range(25_000))
LIMITS = Limits(read=7_000, write=7_000)


class FakeChannel:
    """
    A channel to a server that is a function.

    :param serve: gives the answers to some requests
    :param piece: how many bytes arrive together at most
    """

    def __init__(
        self,
        serve: Callable[[list[Request]], list[bytes]],
        *,
        hello: bytes | None = None,
        piece: int = 1 << 20,
    ) -> None:
        self._serve = serve
        self._piece = piece
        self._out = bytearray()
        self._in = bytearray(
            packet(Kind.VERSION, struct.pack(">I", 3) + string(b"one@example.org") + string(b"1"))
            if hello is None
            else hello
        )

    def send(self, data: bytes) -> int:
        self._out += data[:1000]
        return min(len(data), 1000)

    def recv(self, count: int) -> bytes:
        if not self._in:
            for answer in self._serve(list(self._requests())):
                self._in += answer
        found = bytes(self._in[: min(count, self._piece)])
        del self._in[: len(found)]
        return found

    def send_ready(self) -> bool:
        return True

    def recv_ready(self) -> bool:
        return bool(self._in)

    def close(self) -> None:
        self._in.clear()

    def _requests(self) -> Iterator[Request]:
        while len(self._out) >= 4:
            length = int.from_bytes(self._out[:4], "big")
            body, self._out = bytes(self._out[4 : 4 + length]), self._out[4 + length :]
            if body[0] != Kind.INIT:
                yield body[0], int.from_bytes(body[1:5], "big"), body[5:]


def packet(kind: int, body: bytes) -> bytes:
    return struct.pack(">IB", len(body) + 1, kind) + body


def status(number: int, code: int = Code.OK) -> bytes:
    return packet(Kind.STATUS, struct.pack(">II", number, code) + string(b"") + string(b""))


def data(number: int, content: bytes) -> bytes:
    return packet(Kind.DATA, struct.pack(">I", number) + string(content))


def span(request: Request) -> tuple[int, int]:
    """:returns: offset and length of a READ of the handle ``h``"""
    found: tuple[int, int] = struct.unpack(">QI", request[2][5:17])
    return found


def downloaded(
    serve: Callable[[list[Request]], list[bytes]],
    path: Path,
    *,
    piece: int = 1 << 20,
    done: int = 0,
) -> tuple[bytes, Digest, int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(descriptor, CONTENT[:done], 0)
        job = Job(descriptor, len(CONTENT), new_hasher(), SILENT, Subject("it"), done)
        received = Download(
            Sftp(FakeChannel(serve, piece=piece)), b"h", job, LIMITS, ((0, len(CONTENT)),)
        ).run()
    finally:
        os.close(descriptor)
    return path.read_bytes(), Digest(DEFAULT_ALGORITHM, job.hasher.hexdigest()), received


def whole(request: Request) -> bytes:
    offset, length = span(request)
    return data(request[1], CONTENT[offset : offset + length])


@pytest.mark.parametrize("piece", [1, 13, 5_000, 1 << 20])
def test_answers_may_arrive_in_pieces_of_any_length(tmp_path: Path, piece: int) -> None:
    found = downloaded(
        lambda requests: [whole(request) for request in requests], tmp_path / "copy", piece=piece
    )
    assert found == (CONTENT, Digest.of(CONTENT), len(CONTENT))


def test_answers_may_come_in_another_order_and_be_short(tmp_path: Path) -> None:
    def serve(requests: list[Request]) -> list[bytes]:
        short = [
            data(number, CONTENT[offset : offset + max(length // 3, 1)])
            for _, number, (offset, length) in spans(requests)
        ]
        return list(reversed(short))

    def spans(requests: list[Request]) -> Iterator[tuple[int, int, tuple[int, int]]]:
        for request in requests:
            yield request[0], request[1], span(request)

    assert downloaded(serve, tmp_path / "copy") == (CONTENT, Digest.of(CONTENT), len(CONTENT))


def test_what_is_here_already_is_hashed_and_not_asked_for(tmp_path: Path) -> None:
    found = downloaded(
        lambda requests: [whole(request) for request in requests], tmp_path / "copy", done=60_001
    )
    assert found == (CONTENT, Digest.of(CONTENT), len(CONTENT) - 60_001)


def test_what_an_earlier_attempt_hashed_is_not_read_again(tmp_path: Path) -> None:
    content, pieces, progress = b"0123" * (PIECE // 2) + b"end", Pieces(), Counter()
    expected, done = Digest.of(content), len(content) - 2
    new_hasher(pieces=pieces).update(content[:done])
    with (tmp_path / "copy").open("wb+") as copy:
        # it is not looked at: only what has no digest yet
        copy.write(b"x" * 2 * PIECE + content[2 * PIECE : done])
        copy.flush()
        job = Job(
            copy.fileno(),
            len(content),
            new_hasher(pieces=pieces, done=done),
            progress,
            Subject("it"),
            done,
        )

        def serve(requests: list[Request]) -> list[bytes]:
            return [
                data(number, content[offset : offset + length])
                for _, number, (offset, length) in ((*one[:2], span(one)) for one in requests)
            ]

        assert (
            Download(Sftp(FakeChannel(serve)), b"h", job, LIMITS, ((0, len(content)),)).run() == 2
        )
    assert Digest(DEFAULT_ALGORITHM, job.hasher.hexdigest()) == expected
    assert progress.done == len(content)


def test_a_copy_that_was_interrupted_has_no_gaps(tmp_path: Path) -> None:
    """The first answer is missing: nothing behind it is written, though it is there."""
    with pytest.raises(EOFError):
        downloaded(lambda requests: [whole(request) for request in requests[1:]], tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_file_that_ends_too_soon_or_answers_too_much(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError):
        downloaded(
            lambda requests: [status(request[1], Code.EOF) for request in requests],
            tmp_path / "copy",
        )
    with pytest.raises(IntegrityError):
        downloaded(
            lambda requests: [data(request[1], b"x" * 8_000) for request in requests],
            tmp_path / "copy",
        )


@pytest.mark.parametrize("bad", [0, 3, 14])
def test_each_answer_to_a_write_is_looked_at(tmp_path: Path, bad: int) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    seen = iter(range(1000))

    def serve(requests: list[Request]) -> list[bytes]:
        return [
            status(number, Code.FAILURE if next(seen) == bad else Code.OK)
            for _, number, _ in requests
        ]

    with open(tmp_path / "source", "rb") as source:
        job = Job(source.fileno(), len(CONTENT), new_hasher(), SILENT, Subject("it"))
        sftp = Sftp(FakeChannel(serve))
        with pytest.raises(Refused):
            Upload(sftp, b"h", job, LIMITS).run()
    assert sftp.is_idle, "the channel can be used to find out why"


def test_what_a_server_says_when_it_is_greeted() -> None:
    sftp = Sftp(FakeChannel(lambda requests: []))
    assert sftp.version == 3
    assert sftp.extensions == {b"one@example.org": b"1"}
    for hello in (
        b"Welcome to this host!\n",
        packet(Kind.STATUS, bytes(8)),
        packet(Kind.VERSION, b"\0\0\0\3\0\0\0\xff"),
    ):
        with pytest.raises(Garbled):
            Sftp(FakeChannel(lambda requests: [], hello=hello))
    with pytest.raises(EOFError):
        Sftp(FakeChannel(lambda requests: [], hello=b""))


def test_answers_that_make_no_sense() -> None:
    with pytest.raises(Garbled, match="not asked"):
        Sftp(FakeChannel(lambda requests: [status(99)])).ask(Kind.STAT, string(b"/"))
    sftp = Sftp(
        FakeChannel(
            lambda requests: [
                packet(Kind.ATTRS, struct.pack(">II", number, 1)) for _, number, _ in requests
            ]
        )
    )
    with pytest.raises(Garbled, match="shorter"):
        attributes_in(sftp.ask(Kind.STAT, string(b"/")))
    with pytest.raises(Garbled, match="type"):
        names_in(sftp.ask(Kind.READLINK, string(b"/")))


def test_refusals_carry_what_was_said() -> None:
    sftp = Sftp(
        FakeChannel(
            lambda requests: [status(number, Code.NO_SUCH_FILE) for _, number, _ in requests]
        )
    )
    with pytest.raises(Refused) as caught:
        sftp.extended(b"statvfs@openssh.com", string(b"/"))
    assert caught.value.code == Code.NO_SUCH_FILE
    answers = sftp.ask_all([extension(b"a"), extension(b"b")])
    assert [type(answer) for answer in answers] == [Refused, Refused]


def test_a_server_that_says_too_much_is_cut_short() -> None:
    with pytest.raises(Refused) as caught:
        check(
            Answer(
                Kind.STATUS,
                (
                    memoryview(
                        struct.pack(">I", Code.FAILURE) + string(b"\xe2\x82\xac" * 1_000_000)
                    ),
                ),
            )
        )
    assert 1 < len(caught.value.text) <= 1000


def test_what_is_forgotten_is_not_waited_for() -> None:
    sftp = Sftp(FakeChannel(lambda requests: [status(number) for _, number, _ in requests]))
    sftp.forget(sftp.send((Kind.CLOSE, string(b"h"))))
    assert sftp.is_idle
    sftp.ask(Kind.REMOVE, string(b"/a"))


def test_extents_of_a_manifest_are_believed_if_they_can_be_true() -> None:
    assert are_in_order(((0, 5), (5, 5), (20, 1)))
    assert not are_in_order(((5, 5), (0, 5)))
    assert not are_in_order(((0, 0),))
    assert not are_in_order(((0, 9), (8, 2)))


# -- servers that would never come to an end -------------------------------------------------------


def names(number: int, *found: bytes) -> bytes:
    return packet(
        Kind.NAME,
        struct.pack(">II", number, len(found))
        + b"".join(string(name) + string(b"") + attributes() for name in found),
    )


def serving(**answers: Callable[[int], bytes]) -> Sftp:
    """
    :returns: a client of a server that has these answers, and says of any file that it is one, and
        of any length
    """

    def there(mode: int) -> Callable[[int], bytes]:
        return lambda number: packet(
            Kind.ATTRS, struct.pack(">IIQI", number, 5, (1 << 63) - 1, mode)
        )

    known = {
        Kind.LSTAT: there(0o100644),
        Kind.STAT: there(0o040755),
        Kind.OPEN: lambda number: packet(Kind.HANDLE, struct.pack(">I", number) + string(b"h")),
        Kind.OPENDIR: lambda number: packet(Kind.HANDLE, struct.pack(">I", number) + string(b"h")),
        **{Kind[name]: answer for name, answer in answers.items()},
    }
    return Sftp(
        FakeChannel(
            lambda requests: [known.get(Kind(kind), status)(number) for kind, number, _ in requests]
        )
    )


def test_data_without_a_byte(tmp_path: Path) -> None:
    with pytest.raises(Garbled, match="no byte"):
        downloaded(
            lambda requests: [data(request[1], b"") for request in requests], tmp_path / "copy"
        )
    with pytest.raises(Garbled, match="no byte"):
        batches.read(serving(READ=lambda number: data(number, b"")), [b"/a"], LIMITS)


def test_data_of_one_byte_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(Garbled, match="a few bytes at a time"):
        downloaded(
            lambda requests: [data(request[1], b"x") for request in requests], tmp_path / "copy"
        )
    with pytest.raises(Garbled, match="a few bytes at a time"):
        batches.read(serving(READ=lambda number: data(number, b"x")), [b"/a"], LIMITS)


def test_data_that_nobody_asked_for() -> None:
    with pytest.raises(Garbled, match="more than it was asked for"):
        batches.read(serving(READ=lambda number: data(number, b"x" * 11)), [b"/a"], LIMITS, size=10)


def test_a_file_that_is_shorter_than_can_be_true() -> None:
    """What is asked for ahead does not grow with what a server says of a length."""
    answers = iter([b"x" * 7_000, b"y"])

    def read(number: int) -> bytes:
        content = next(answers, b"")
        return data(number, content) if content else status(number, Code.EOF)

    assert batches.read(serving(READ=read), [b"/a"], LIMITS) == [b"x" * 7_000 + b"y"]


def test_a_listing_without_names() -> None:
    with pytest.raises(Garbled, match="no name"):
        batches.scan(serving(READDIR=names), [b"/"], follow=[True])
    with pytest.raises(Garbled, match="no name"):
        names_in(serving(READLINK=names).ask(Kind.READLINK, string(b"/a")))


def test_a_listing_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_LISTED", 1 << 16)
    with pytest.raises(Garbled, match="does not come to the end"):
        batches.scan(
            serving(READDIR=lambda number: names(number, b"a", b"b")), [b"/"], follow=[True]
        )


def test_answers_that_come_before_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sftp_module, "MOST_KEPT", 1 << 16)
    sftp = Sftp(
        FakeChannel(
            lambda requests: [data(number, b"x" * (1 << 15)) for _, number, _ in reversed(requests)]
        )
    )
    with pytest.raises(Garbled, match="far more"):
        sftp.ask_all([(Kind.READ, b"")] * 4)


@pytest.mark.parametrize("told", [(0, 0), (1, 4095)])
def test_limits_that_are_absurd_are_not_believed(told: tuple[int, int]) -> None:
    answer = struct.pack(">QQQQ", 1 << 18, *told, 10)
    hello = packet(
        Kind.VERSION, struct.pack(">I", 3) + string(b"limits@openssh.com") + string(b"1")
    )

    def serve(requests: list[Request]) -> list[bytes]:
        known = {
            Kind.EXTENDED: lambda number: packet(
                Kind.EXTENDED_REPLY, struct.pack(">I", number) + answer
            ),
            Kind.STAT: lambda number: packet(Kind.ATTRS, struct.pack(">II", number, 0)),
        }
        return [known.get(Kind(kind), status)(number) for kind, number, _ in requests]

    assert look_at(Sftp(FakeChannel(serve, hello=hello)), b"/").limits == Limits()


def test_an_extension_that_answers_with_too_few_numbers() -> None:
    sftp = serving(
        EXTENDED=lambda number: packet(Kind.EXTENDED_REPLY, struct.pack(">IQQ", number, 1, 2))
    )
    with pytest.raises(Garbled, match="shorter"):
        numbers_in(sftp.extended(b"statvfs@openssh.com", string(b"/")), 5)


# -- servers that take their time ------------------------------------------------------------------


class SlowChannel(FakeChannel):
    """
    Nothing is there before it is waited for.

    :param seconds: how long each of its pieces takes
    """

    def __init__(
        self,
        serve: Callable[[list[Request]], list[bytes]],
        *,
        piece: int,
        seconds: float,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        super().__init__(serve, piece=piece)
        self.now = 0.0
        self._seconds = 0.0
        monkeypatch.setattr(sftp_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.sftp = Sftp(self, patience=3)
        self._seconds = seconds

    def recv(self, count: int) -> bytes:
        self.now += self._seconds
        return super().recv(count)

    def recv_ready(self) -> bool:
        return False


def long_attributes(requests: list[Request]) -> list[bytes]:
    return [
        packet(Kind.ATTRS, struct.pack(">I", number) + bytes(1 << 20)) for _, number, _ in requests
    ]


def test_an_answer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes within the timeout; a megabyte of them would take twelve days."""
    channel = SlowChannel(long_attributes, piece=1, seconds=1.0, monkeypatch=monkeypatch)
    with pytest.raises(TimeoutError):
        channel.sftp.ask(Kind.STAT, string(b"/"))
    assert channel.now < 10


def test_a_long_answer_over_a_slow_link_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    channel = SlowChannel(long_attributes, piece=6_000, seconds=1.0, monkeypatch=monkeypatch)
    assert channel.sftp.ask(Kind.STAT, string(b"/")).length == 1 << 20


def test_many_answers_that_drip_are_given_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory without end, each part of which comes within the timeout, and is short."""

    def serve(requests: list[Request]) -> list[bytes]:
        return [names(number, b"one") for kind, number, _ in requests]

    channel = SlowChannel(serve, piece=1 << 20, seconds=2.9, monkeypatch=monkeypatch)
    with pytest.raises(TimeoutError):
        while True:
            channel.sftp.ask(Kind.READDIR, string(b"h"))
    assert channel.now < 20
    channel.sftp.begin()
    assert channel.sftp.ask(Kind.READDIR, string(b"h"))


def test_a_transfer_that_drips_is_judged_before_a_piece_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    By whoever knows that it would come faster from elsewhere; the next transfer of the channel is
    not told of.
    """
    channel = SlowChannel(
        lambda requests: [whole(request) for request in requests],
        piece=100,
        seconds=0.01,
        monkeypatch=monkeypatch,
    )
    watch = Watch(SILENT, pace=1e9, clock=lambda: channel.now)
    watch.begin("it", 1 << 40)
    with (tmp_path / "copy").open("w+b") as copy, pytest.raises(TooSlow):
        job = Job(copy.fileno(), len(CONTENT), new_hasher(), watch, Subject("it"))
        Download(channel.sftp, b"h", job, Limits(read=60_000), ((0, len(CONTENT)),)).run()
    assert channel.now < 1


def test_a_store_waits_for_each_answer_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are short, and what was sent before them takes its time over a slow link."""
    channel = SlowChannel(
        lambda requests: [status(number) for _, number, _ in requests],
        piece=28,
        seconds=2.0,
        monkeypatch=monkeypatch,
    )
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with path.open("rb") as file:
        job = Job(file.fileno(), len(CONTENT), new_hasher(), SILENT, Subject("it"))
        assert Upload(channel.sftp, b"h", job, LIMITS).run() == len(CONTENT)
    assert channel.now > 4 * 3
