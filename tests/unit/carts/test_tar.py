"""The table of a tar is what others read, in whatever parts it is sent; sinks take all bytes."""

from __future__ import annotations

import contextlib
import io
import os
import random
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statepool import DigestMismatch, IntegrityError
from statepool.carts.bundle import open_file
from statepool.carts.sinks import Sink
from statepool.carts.spans import Body, Span
from statepool.carts.tar import Member, Table

SIZES = (0, 1, 511, 512, 513, 65_535, 65_536, 70_000, 1 << 20)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Table, Callable[[int], contextlib.AbstractContextManager[int]]]:
    members, files = [], {}
    for number, size in enumerate(SIZES):
        path = tmp_path / str(number)
        path.write_bytes(random.Random(number).randbytes(size))
        members.append(Member(f"uid/{'d' * number * 25}/é{number}", size, 1_700_000_000 + number))
        files[members[-1].name] = path
    table = Table(reversed(members))
    return table, lambda number: open_file(files[table.members[number].name])


def joined(parts: Iterator[bytes | Span]) -> bytes:
    return b"".join(Body(parts, lambda: None))


def test_it_is_read_by_others(made: tuple, tmp_path: Path) -> None:
    table, opened = made
    whole = joined(table.read(0, table.length, opened, 10_000))
    assert len(whole) == table.length
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        found = {member.name: member for member in tar}
        for number, member in enumerate(table.members):
            with opened(number) as descriptor:
                data = os.pread(descriptor, member.size, 0)
            assert tar.extractfile(found[member.name]).read() == data  # type: ignore[union-attr]
            assert found[member.name].mtime == member.mtime
            assert found[member.name].offset_data == table.place(number)
            if member.size >= 65_536:
                assert table.place(number) % 4096 == 0
    listed = subprocess.run(["tar", "-t"], input=whole, capture_output=True, check=True)
    assert len(listed.stdout.splitlines()) == len(SIZES)
    assert listed.stderr == b""


def test_any_part_of_it_is_right(made: tuple) -> None:
    table, opened = made
    whole = joined(table.read(0, table.length, opened, 1 << 20))
    chosen = random.Random(7)
    for _ in range(500):
        start = chosen.randrange(table.length)
        stop = chosen.randrange(start, table.length + 1)
        assert joined(table.read(start, stop, opened, 7000)) == whole[start:stop]


def test_a_file_that_became_shorter_is_noticed(made: tuple, tmp_path: Path) -> None:
    table, opened = made
    os.truncate(tmp_path / "8", 100)
    with pytest.raises(IntegrityError, match="became shorter"):
        joined(table.read(0, table.length, opened, 10_000))


def test_digests_tell_tars_apart(made: tuple) -> None:
    table, _ = made
    same = [f"blake3:{number}" for number in range(len(SIZES))]
    assert table.digest(same) == table.digest(list(same))
    assert table.digest(same) != table.digest([*same[1:], same[0]])


# -- sinks -----------------------------------------------------------------------------------------


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Callable[..., Sink]]:
    with contextlib.ExitStack() as stack:

        def make(size: int, **more: object) -> Sink:
            file = stack.enter_context(open(tmp_path / "target", "w+b"))
            how: dict = {"what": "x", "advance": lambda count: None, "step": 4096, **more}
            return Sink(file.fileno(), 0, size, **how)

        yield make


def sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.write(b"begin")
        file.seek(1 << 20)
        file.write(b"middle")
        file.truncate(3 << 20)
    return path


def test_holes_stay_holes(sink: Callable[..., Sink], tmp_path: Path) -> None:
    source = sparse(tmp_path / "source")
    with source.open("rb") as file:
        taken = sink(3 << 20)
        taken.take(file.fileno())
        whole = taken.finish()
    assert (tmp_path / "target").stat().st_blocks <= source.stat().st_blocks + 16
    written = sink(3 << 20)
    with source.open("rb") as file:
        while data := file.read(4096):
            written.write(data)
    assert written.finish() == whole
    assert (tmp_path / "target").stat().st_blocks <= source.stat().st_blocks + 16


def test_what_was_there_before_is_overwritten(sink: Callable[..., Sink], tmp_path: Path) -> None:
    source = sparse(tmp_path / "source")
    for way in ("take", "write"):
        taken = sink(3 << 20, fresh=False)
        (tmp_path / "target").write_bytes(b"x" * (3 << 20))
        with source.open("rb") as file:
            if way == "take":
                taken.take(file.fileno())
            else:
                taken.write(file.read())
        taken.finish()
        assert (tmp_path / "target").read_bytes() == source.read_bytes()


def test_a_sum_that_does_not_match(sink: Callable[..., Sink]) -> None:
    wrong = sink(3, hash_type="sha1", hash_sum="0" * 40)
    wrong.write(b"abc")
    with pytest.raises(DigestMismatch) as caught:
        wrong.finish()
    assert caught.value.actual == "a9993e364706816aba3e25717850c26c9cd0d89d"
