"""Which cached files need not be read again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from attrs import evolve

from statepool.beneath import Tree
from statepool.cache.trust import FileStatus, Trust
from statepool.model.digest import Digest
from statepool.pools.json_files import Notes
from statepool.pools.writer import Writer

CONTENT = b"what was hashed"
DIGEST = Digest.of(CONTENT)


def status(path: Path) -> os.stat_result | None:
    return path.stat() if path.exists() else None


def record(
    trust: Trust,
    path: Path,
    hashed: os.stat_result | None = None,
    *,
    flushed: bool,
    source: str | None,
) -> None:
    with open(path, "rb") as file:
        trust.record(
            DIGEST,
            file.fileno(),
            hashed or os.fstat(file.fileno()),
            flushed=flushed,
            source=source,
            ours=not path.is_symlink(),
        )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "bytes").write_bytes(CONTENT)
    return tmp_path / "bytes"


@pytest.fixture
def trust(tmp_path: Path, file: Path) -> Trust:
    (tmp_path / ".statepool").mkdir()
    trust = Trust(Notes(Tree(tmp_path), ("trust",)))
    record(trust, file, flushed=False, source="file:///pool")
    return trust


def test_what_was_hashed_is_trusted(trust: Trust, file: Path) -> None:
    assert trust.file_status(DIGEST, status(file)) is FileStatus.TRUSTED


def test_what_was_not_hashed_is_not(trust: Trust, file: Path) -> None:
    assert trust.file_status(Digest.of(b"other"), status(file)) is FileStatus.DOUBTFUL


def test_a_write_shows(trust: Trust, file: Path) -> None:
    """Also at once, in place, and of the same length."""
    with open(file, "r+b") as opened:
        opened.write(b"W")
    assert trust.file_status(DIGEST, status(file)) is FileStatus.DOUBTFUL


def test_a_write_shows_though_its_time_was_put_back(trust: Trust, file: Path) -> None:
    before = file.stat()
    file.write_bytes(CONTENT.swapcase())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert trust.file_status(DIGEST, status(file)) is FileStatus.DOUBTFUL


def test_another_file_in_its_place_shows(trust: Trust, file: Path, tmp_path: Path) -> None:
    before = file.stat()
    (tmp_path / "other").write_bytes(CONTENT.swapcase())
    os.utime(tmp_path / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(tmp_path / "other", file)
    assert trust.file_status(DIGEST, status(file)) is FileStatus.DOUBTFUL


def test_a_change_of_name_or_mode_shows(trust: Trust, file: Path, tmp_path: Path) -> None:
    os.link(file, tmp_path / "second")
    assert trust.file_status(DIGEST, status(file)) is FileStatus.DOUBTFUL
    record(trust, file, flushed=False, source=None)
    assert trust.file_status(DIGEST, status(file)) is FileStatus.TRUSTED
    file.chmod(0o600)
    assert trust.file_status(DIGEST, status(file)) is FileStatus.DOUBTFUL


def test_reading_shows_nothing(trust: Trust, file: Path) -> None:
    file.read_bytes()
    assert trust.file_status(DIGEST, status(file)) is FileStatus.TRUSTED


@pytest.mark.parametrize(
    ("flushed", "expected"), [(True, FileStatus.TRUSTED), (False, FileStatus.DOUBTFUL)]
)
def test_after_a_reboot(
    trust: Trust, file: Path, monkeypatch: pytest.MonkeyPatch, flushed: bool, expected: FileStatus
) -> None:
    record(trust, file, flushed=flushed, source=None)
    rebooted = evolve(Writer.current(), boot="another boot")
    monkeypatch.setattr(Writer, "current", classmethod(lambda cls: rebooted))
    assert trust.file_status(DIGEST, status(file)) is expected


def test_a_file_that_is_gone(trust: Trust, file: Path) -> None:
    file.unlink()
    assert trust.file_status(DIGEST, status(file)) is FileStatus.MISSING
    file.symlink_to("nowhere")
    assert trust.file_status(DIGEST, status(file)) is FileStatus.MISSING


def test_a_link_to_an_old_file(trust: Trust, file: Path, tmp_path: Path) -> None:
    long_ago = time.time_ns() - 3600 * 10**9
    os.utime(file, ns=(long_ago, long_ago))
    link = tmp_path / "link"
    link.symlink_to(file)
    record(trust, link, flushed=False, source="link:///pool")
    assert trust.file_status(DIGEST, status(link)) is FileStatus.TRUSTED
    file.write_bytes(CONTENT.swapcase())
    assert trust.file_status(DIGEST, status(link)) is FileStatus.DOUBTFUL


def test_a_link_to_a_file_that_was_just_written(trust: Trust, file: Path, tmp_path: Path) -> None:
    """
    It is another pool's: its times are not changed, and so it is not trusted; but where it came
    from is known.
    """
    link = tmp_path / "link"
    link.symlink_to(file)
    file.write_bytes(CONTENT)
    before = file.stat()
    record(trust, link, flushed=False, source="link:///pool")
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert trust.file_status(DIGEST, status(link)) is FileStatus.DOUBTFUL
    assert trust.source(DIGEST) == "link:///pool"


def test_a_file_of_another_account_from_the_future(
    trust: Trust, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    In a cache that accounts share, after a clock was set back: its time is its owner's to set.
    """
    os.utime(file, (time.time() + 3600,) * 2)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        record(trust, file, flushed=False, source="file:///pool")
    assert trust.file_status(DIGEST, status(file)) is FileStatus.DOUBTFUL
    assert trust.source(DIGEST) == "file:///pool"
    record(trust, file, flushed=False, source="file:///pool")
    assert trust.file_status(DIGEST, status(file)) is FileStatus.TRUSTED


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b'{"signature": 7}'])
def test_a_note_that_was_torn(trust: Trust, file: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".statepool/trust" / f"{DIGEST.file_name}.json").write_bytes(content)
    assert trust.file_status(DIGEST, status(file)) is FileStatus.DOUBTFUL
    assert trust.source(DIGEST) is None


def test_where_else_the_bytes_are(trust: Trust, file: Path) -> None:
    assert trust.source(DIGEST) == "file:///pool"
    trust.note_source(DIGEST, "file:///other")
    assert trust.source(DIGEST) == "file:///pool"
    record(trust, file, flushed=False, source=None)
    assert trust.source(DIGEST) is None
    trust.note_source(DIGEST, "file:///other")
    assert trust.source(DIGEST) == "file:///other"
    assert trust.file_status(DIGEST, status(file)) is FileStatus.TRUSTED


def test_when_the_bytes_were_used(trust: Trust, tmp_path: Path) -> None:
    note = tmp_path / ".statepool/trust" / f"{DIGEST.file_name}.json"
    os.utime(note, (1000, 1000))
    assert trust.last_used(DIGEST) == 1000
    trust.touch([DIGEST])
    assert trust.last_used(DIGEST) > 1000
    assert trust.last_used(Digest.of(b"never")) == 0
    trust.touch([Digest.of(b"never")])
    assert trust.last_used(Digest.of(b"never")) == 0


def test_forgotten(trust: Trust, file: Path, tmp_path: Path) -> None:
    trust.forget(DIGEST)
    trust.forget(DIGEST)
    assert trust.file_status(DIGEST, status(file)) is FileStatus.DOUBTFUL
    assert list((tmp_path / ".statepool/trust").iterdir()) == []
