"""What only a file system of this host has: modes, leases, limits, errors with numbers."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from statepool.beneath import Descriptor, Tree
from statepool.errors import (
    AccessDenied,
    FileExists,
    MissingFile,
    NoSpace,
    StatePoolError,
    TransportError,
)
from statepool.model.location import Location
from statepool.transports.base import Entry, FileKind, Transfer
from statepool.transports.failures import A_FILE, Subject, translate_os_errors, translated
from statepool.transports.link import LinkTransport
from statepool.transports.local import INCOMING, LocalTransport


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    (tmp_path / "pool").mkdir()
    return tmp_path / "pool"


@pytest.fixture(params=["without a name", "with a private name"])
def transport(request: pytest.FixtureRequest, pool: Path) -> LocalTransport:
    """With files that have no name until they are complete, and as where there are none."""
    transport = LocalTransport(Location("file", str(pool)))
    if request.param == "with a private name":
        transport._anonymous = False
    return transport


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- modes -----------------------------------------------------------------------------------------


def test_a_pool_of_a_group_stays_one(
    transport: LocalTransport, pool: Path, umask: Callable[[int], int]
) -> None:
    """Whatever the umask of whoever writes."""
    pool.chmod(0o2770)
    umask(0o077)
    transport.make_directory("a/b")
    transport.create("a/b/c", b"1")
    assert [mode(pool / name) for name in ("a", "a/b", "a/b/c")] == [0o2770, 0o2770, 0o664]


@pytest.mark.parametrize(
    ("directory", "file"), [(0o755, 0o644), (0o2750, 0o640), (0o711, 0o600), (0o700, 0o600)]
)
def test_who_may_look_into_a_pool_may_read_its_records(
    transport: LocalTransport, pool: Path, umask: Callable[[int], int], directory: int, file: int
) -> None:
    """Whatever the umask of whoever writes, as it is with directories."""
    pool.chmod(directory)
    umask(0o077)
    transport.create("a", b"1")
    with transport.draft("", b"2") as name:
        name("b")
    assert [mode(pool / name) for name in ("a", "b")] == [file, file]


def test_a_pool_of_one_user_is_as_the_umask_has_it(
    transport: LocalTransport, pool: Path, umask: Callable[[int], int]
) -> None:
    umask(0o027)
    pool.chmod(0o750)
    transport.make_directory("a")
    transport.create("a/b", b"1")
    assert (mode(pool / "a"), mode(pool / "a/b")) == (0o750, 0o640)


def test_the_directory_of_the_pool_itself_is_made(
    tmp_path: Path, umask: Callable[[int], int]
) -> None:
    transport = LocalTransport(Location("file", str(tmp_path / "not/yet")))
    assert transport.stat("") is None
    assert transport.identity == str(transport.location)
    transport.make_directory("")
    assert mode(tmp_path / "not/yet") == 0o755
    assert transport.scan("") == []


# -- names -----------------------------------------------------------------------------------------


def test_nothing_private_is_left(transport: LocalTransport, pool: Path) -> None:
    transport.make_directory(INCOMING)
    transport.create("a", b"1")
    transport.symlink("a", "l")
    with pytest.raises(FileExists):
        transport.create("a", b"2")
    transport.make_directory("d")
    with pytest.raises(TransportError):
        transport.symlink("a", "d")
    assert sorted(path.name for path in pool.rglob("*")) == [
        ".statepool",
        "a",
        "d",
        "incoming",
        "l",
    ]


def test_what_is_private_is_where_collectors_look(
    transport: LocalTransport, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport.make_directory(INCOMING)
    seen: list[Path] = []
    for name in ("rename", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os,
            name,
            lambda *a, real=real, **k: (
                seen.extend(path for path in pool.rglob(".tmp-*")),
                real(*a, **k),
            )[1],
        )
    transport.symlink("b", "a")
    assert [path.parent for path in seen] == [pool / INCOMING]
    seen.clear()
    transport.create("c", b"")
    assert [path.parent for path in seen] == ([] if transport._anonymous else [pool / INCOMING])


def test_a_private_name_is_no_name_of_a_state(
    transport: LocalTransport, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Where there is no directory for what is not finished, it lies beside what it becomes; which is
    there until then.
    """
    transport.symlink("first", "a")
    seen: list[str] = []
    real = os.replace
    monkeypatch.setattr(
        os,
        "rename",
        lambda *paths, **places: (seen.extend(sorted(os.listdir(pool))), real(*paths, **places))[1],
    )
    transport.symlink("second", "a")
    assert len(seen) == 2
    assert seen[0].startswith(".")
    assert seen[1] == "a"
    assert transport.readlink("a") == "second"


def test_a_file_system_without_anonymous_files_is_noticed(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = LocalTransport(Location("file", str(pool)))
    real, tries = Tree.open, []

    def refuse(tree: Tree, path: str, flags: int, *rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            tries.append(path)
            raise OSError(errno.EOPNOTSUPP, "in a test")
        return real(tree, path, flags, *rest)

    monkeypatch.setattr(Tree, "open", refuse)
    transport.create("a", b"1")
    transport.create("b", b"2")
    assert (transport.read("a"), transport.read("b"), len(tries)) == (b"1", b"2", 1)


def test_the_pool_may_be_behind_a_link_but_nothing_in_it(
    transport: LocalTransport, pool: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").symlink_to(pool)
    other = LocalTransport(Location("file", str(tmp_path / "other")))
    transport.make_directory("d")
    transport.symlink("d", "l")
    assert set(other.scan("")) == {Entry("d", FileKind.DIRECTORY), Entry("l", FileKind.LINK)}
    with pytest.raises(TransportError):
        other.scan("l")
    with pytest.raises(FileExists):
        other.make_directory("l")
    assert other.identity == transport.identity


def test_different_pools_have_different_identities(
    transport: LocalTransport, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    assert LocalTransport(Location("file", str(tmp_path / "other"))).identity != transport.identity
    assert LinkTransport(transport.location).identity == transport.identity


# -- reading while others ask whether the file is in use -------------------------------------------

_HOLD = """
import fcntl, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDWR)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
signal.sigwait({signal.SIGIO})
print("asked", flush=True)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
"""


def test_a_lease_is_waited_for(transport: LocalTransport, pool: Path) -> None:
    transport.create("a", b"1")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, pool / "a"], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert transport.read("a") == b"1"
        assert holder.stdout.readline() == "asked\n"


def test_a_fifo_with_a_writer_is_refused_too(transport: LocalTransport, pool: Path) -> None:
    os.mkfifo(pool / "f")
    fd = os.open(pool / "f", os.O_RDWR)
    try:
        os.write(fd, b"bait")
        with pytest.raises(StatePoolError, match="regular file"):
            transport.read("f")
        assert select.select([fd], [], [], 0)[0], "nothing of it was read"
    finally:
        os.close(fd)


# -- errors ----------------------------------------------------------------------------------------


def test_no_space_for_a_record_or_for_bytes(small: Path, opened: Callable[..., int]) -> None:
    transport = LocalTransport(Location("file", str(small)))
    with pytest.raises(NoSpace) as caught:
        transport.create("a", b"x" * (9 << 20))
    assert caught.value.needed == 9 << 20
    with pytest.raises(NoSpace):
        transport.store(opened("source", b"x" * (9 << 20)), "b", Transfer(9 << 20))
    assert transport.scan("") == []
    assert transport.free_space() == 8 << 20


def test_a_file_beyond_the_limit_of_the_process(pool: Path) -> None:
    code = """
import resource, sys
from statepool.errors import NoSpace
from statepool.model.location import Location
from statepool.transports.local import LocalTransport
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    LocalTransport(Location("file", sys.argv[1])).create("a", bytes(2000))
except NoSpace as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, pool], capture_output=True, text=True, check=True
    )
    assert "ulimit -f" in done.stdout
    assert list(pool.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, MissingFile),
        (errno.EEXIST, FileExists),
        (errno.EACCES, AccessDenied),
        (errno.EPERM, AccessDenied),
        (errno.EROFS, AccessDenied),
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EFBIG, NoSpace),
        (errno.EIO, TransportError),
        (errno.ENAMETOOLONG, TransportError),
    ],
)
def test_every_number_has_a_meaning(number: int, kind: type[StatePoolError]) -> None:
    error = translated(
        OSError(number, "text"), "read", Subject("'a' in file:///pool", "file:///pool", "a")
    )
    assert type(error) is kind
    assert "cannot read 'a' in file:///pool: " + os.strerror(number) in str(error)
    assert (error.pool, error.path) == ("file:///pool", "a")


def test_the_original_error_is_kept(transport: LocalTransport) -> None:
    with pytest.raises(MissingFile) as caught:
        transport.read("a")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_pool_on_two_file_systems(
    transport: LocalTransport, pool: Path, small: Path, request: pytest.FixtureRequest
) -> None:
    transport.create("a", b"1")
    (pool / "other").mkdir()
    subprocess.run(["mount", "--bind", small, pool / "other"], check=True)
    request.addfinalizer(lambda: subprocess.run(["umount", pool / "other"], check=True))
    with pytest.raises(TransportError, match="different file systems"):
        transport.link("a", "other/a")
    with pytest.raises(TransportError, match="different file systems"):
        transport.rename("a", "other/a")
    assert transport.read("a") == b"1"


def test_no_descriptor_is_left_open(transport: LocalTransport, opened: Callable[..., int]) -> None:
    source, target = opened("source", b"12345"), opened("target")
    transport.create("a", b"12345")
    transport.symlink("a", "l")
    transport.make_directory("d")
    before = os.listdir("/proc/self/fd")
    for use in (
        lambda: transport.scan(""),
        lambda: transport.scan("a"),
        lambda: transport.read("a"),
        lambda: transport.read("l"),
        lambda: transport.read("d"),
        lambda: transport.create("b", b"1"),
        lambda: transport.create("b", b"1"),
        lambda: transport.flush("d"),
        lambda: transport.flush("a"),
        lambda: transport.fetch("a", target, Transfer(5)),
        lambda: transport.fetch("a", target, Transfer(6)),
        lambda: transport.store(source, "s", Transfer(5)),
        lambda: transport.store(source, "s", Transfer(6)),
        lambda: transport.digest("a", Transfer(5)),
        lambda: transport.digest("a", Transfer(6)),
    ):
        try:
            use()
        except StatePoolError:
            pass
        assert os.listdir("/proc/self/fd") == before


def test_data_is_made_durable_before_it_is_named(
    transport: LocalTransport, opened: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, real=real, **k: (done.append(name), real(*a, **k))[1]
        )
    transport.create("a", b"1")
    assert done == ["fsync", "link"]
    done.clear()
    transport.create("b", b"1", flush=False)
    assert done == ["link"]
    done.clear()
    transport.store(opened("source", b"1"), "c", Transfer(1))
    transport.flush("")
    assert done == ["fsync", "fsync"]


def test_a_lease_refused_to_others_is_still_granted(
    transport: LocalTransport, pool: Path, opened: Callable[..., int]
) -> None:
    """After a read nobody of ours has the file open: whoever asks may have it."""
    transport.create("a", b"1")
    transport.read("a")
    fd = os.open(pool / "a", os.O_RDWR)
    try:
        assert fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK) == 0
    finally:
        os.close(fd)


def test_what_was_done_and_to_which_file_are_told_apart() -> None:
    error = PermissionError(errno.EACCES, "text", "/closed/file")
    with (
        pytest.raises(
            AccessDenied, match=r"^cannot get vm1/disk install: /closed/file: Permission denied"
        ),
        translate_os_errors("get vm1/disk install", A_FILE),
    ):
        raise error


def test_what_is_not_permitted_is_not_called_a_matter_of_the_mode() -> None:
    """
    EPERM is also what an immutable file says, a sandbox, and a file system that does not have what
    was asked for.
    """
    subject = Subject("'a' in file:///pool")
    hints = {
        number: translated(OSError(number, "text"), "write to", subject).hint or ""
        for number in (errno.EPERM, errno.EACCES)
    }
    assert "lsattr" in hints[errno.EPERM]
    assert "the mode of the file" not in hints[errno.EPERM]
    assert "the mode of the file" in hints[errno.EACCES]
    for number in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
        assert "no wings" in (
            translated(OSError(number, "text"), "fly over", subject, lacks="wings").hint or ""
        )


def test_an_immutable_pool(pool: Path, transport: LocalTransport) -> None:
    transport.create("a", b"text")
    immutable, mutable = (struct.pack("l", flags) for flags in (0x10, 0))
    with Descriptor(os.open, pool / "a", os.O_RDONLY) as file:
        try:
            # This is FS_IOC_SETFLAGS with FS_IMMUTABLE_FL, of linux/fs.h.
            fcntl.ioctl(file, 0x40086602, immutable)
        except OSError as error:
            pytest.skip(f"no file can be made immutable here: {error.strerror}")
        try:
            with pytest.raises(AccessDenied) as caught:
                transport.remove("a")
        finally:
            fcntl.ioctl(file, 0x40086602, mutable)
    assert "immutable" in (caught.value.hint or "")


def test_directories_that_cannot_be_flushed(
    transport: LocalTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    assert transport.capabilities.durable
    transport.flush("")
    assert not transport.capabilities.durable


def test_a_file_system_that_does_not_know_its_room(
    transport: LocalTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert transport.free_space()
    monkeypatch.setattr(
        os, "fstatvfs", lambda descriptor: os.statvfs_result([4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255])
    )
    assert transport.free_space() is None
