"""The scanner tells the same of a tar, however its bytes are cut."""

from __future__ import annotations

import os
import subprocess
import tarfile

import blake3
import pytest

from statepool.archive.manifest import Member
from statepool.archive.scan import Scanner
from statepool.errors import IntegrityError

FORMS = {
    "posix": ["--format=posix", "--sparse"],
    "gnu": ["--format=gnu", "--sparse"],
    "levels": ["--format=posix", "--sparse", "--listed-incremental=SNAPSHOT"],
    "levels of gnu": ["--format=gnu", "--listed-incremental=SNAPSHOT"],
}


@pytest.fixture(scope="module", params=FORMS)
def tar(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """:returns: a tar with all that has headers of its own"""
    place = tmp_path_factory.mktemp("scan")
    root = place / "root"
    (root / "directory").mkdir(parents=True)
    (root / "directory" / ("long" * 40)).write_bytes(b"x" * 700)
    (root / "empty").touch()
    (root / "block").write_bytes(bytes(range(256)) * 2)
    os.link(root / "block", root / "again")
    (root / "link").symlink_to("to" * 70)
    with (root / "holes").open("wb") as file:
        for number in range(40):  # more than the first block of a map has room for
            file.seek(number * 100_000)
            file.write(b"y" * 10)
    os.mkfifo(root / "fifo")
    (root / os.fsdecode(b"\xff")).write_bytes(b"z")
    options = [text.replace("SNAPSHOT", str(place / "snapshot")) for text in FORMS[request.param]]
    command = ["tar", "--create", "--file=-", *options, f"--directory={root}", "."]
    return subprocess.run(command, check=True, capture_output=True).stdout


def scanned(tar: bytes, step: int) -> tuple[list[Member], bytes]:
    """:returns: the members, and the bytes that were passed on"""
    members: list[Member] = []
    passed = bytearray()
    scanner = Scanner("the tar", members.append, emit=passed.extend)
    for start in range(0, len(tar), step):
        scanner.feed(tar[start : start + step])
    scanner.finish()
    return members, bytes(passed)


@pytest.mark.parametrize("step", [1, 7, 511, 512, 513, 1536, 5000])
def test_members_are_the_same_however_the_bytes_are_cut(tar: bytes, step: int) -> None:
    """A header, a list of a directory or data may be cut anywhere."""
    members, passed = scanned(tar, len(tar))
    assert scanned(tar, step) == (members, passed)
    assert passed == tar
    assert len(members) == 10
    for member in members:
        content = tar[member.offset : member.offset + member.length]
        assert member.digest.hex == blake3.blake3(content).hexdigest()
    sizes = {member.name.removeprefix("./"): member.size for member in members}
    assert sizes["holes"] == 39 * 100_000 + 10
    assert sizes["directory/" + "long" * 40] == 700


def test_only_wanted_members_are_passed_on(tar: bytes) -> None:
    """A reader that wants one file gets its headers and data, and the end."""
    passed = bytearray()
    members: list[Member] = []
    scanner = Scanner(
        "the tar",
        members.append,
        check=lambda entry: entry.name.endswith(b"block"),
        emit=passed.extend,
    )
    scanner.feed(tar)
    (wanted,) = (member for member in members if member.name.endswith("block"))
    content = tar[wanted.offset : wanted.offset + wanted.length]
    assert bytes(passed).rstrip(b"\0") == content.rstrip(b"\0")


def test_a_cut_is_noticed_wherever_it_is(tar: bytes) -> None:
    """Up to the end of its members and one block of zeros, no tar is complete."""
    members, _ = scanned(tar, len(tar))
    end = max(member.offset + member.length for member in members)
    for length in [*range(0, end, max(509, end // 100)), end, end + 100]:
        with pytest.raises(IntegrityError, match="cut short"):
            scanned(tar[:length], 4096)


def test_a_damaged_header_is_noticed(tar: bytes) -> None:
    """Each header has a checksum."""
    members, _ = scanned(tar, len(tar))
    for member in members:
        damaged = bytearray(tar)
        damaged[member.offset + 20] ^= 1
        with pytest.raises(IntegrityError, match="a header is damaged"):
            scanned(bytes(damaged), 3000)


def test_long_headers_may_come_in_small_steps() -> None:
    """A directory of a million files lists them in one header."""
    info = tarfile.TarInfo("directory")
    info.type, info.pax_headers = tarfile.DIRTYPE, {"GNU.dumpdir": "Yname\0" * (1 << 20)}
    tar = info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)
    (member,) = scanned(tar, 4096)[0]
    assert member.length == len(tar) - 1024
