"""
The part of the contract of transports that is about names: looking, making, linking, renaming and
removing.

It is not used by itself: see :mod:`statepool.testing.transports`.
"""

from __future__ import annotations

import os
import stat
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from statepool.errors import FileExists, IntegrityError, MissingFile, TransportError
from statepool.model.digest import Digest
from statepool.testing.contracts import Contract, only_if
from statepool.transports.base import Entry, FileKind, Transfer, Transport

RACERS = 8
"""Threads that race for one name."""

REFUSED = (IntegrityError, TransportError)
"""The errors for a link where none is allowed."""

MIB = 1 << 20


def winners(race: Callable[[int], object]) -> list[int]:
    """:returns: which of :data:`RACERS` racers got no :class:`~statepool.errors.FileExists`"""
    start = threading.Barrier(RACERS)

    def run(number: int) -> bool:
        start.wait()
        try:
            race(number)
        except FileExists:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        return [number for number, won in enumerate(pool.map(run, range(RACERS))) if won]


@contextmanager
def watching(look: Callable[[], object]) -> Iterator[None]:
    """
    Call a function repeatedly in another thread, for the duration of a ``with`` block; its
    exception is raised at the end of the block.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            look()

    with ThreadPoolExecutor(1) as pool:
        watcher = pool.submit(watch)
        try:
            yield
        finally:
            done.set()
        watcher.result()


def pattern(size: int) -> bytes:
    """:returns: ``size`` bytes, of which no two blocks are equal"""
    return array("Q", range(1, size // 8 + 2)).tobytes()[:size]


def names(transport: Transport, directory: str = "") -> set[str]:
    """:returns: the names in a directory"""
    return {entry.name for entry in transport.scan(directory)}


def local(transport: Transport, path: str) -> Path:
    """:returns: the path at which a file of the pool can be prepared"""
    found = transport.local_path(path)
    assert found is not None, (
        "this transport's files are not in a directory of this host: in_directory is False"
    )
    return found


class NamesContract(Contract):
    """
    The contract tests of names. They need the fixture ``transport``, and ``target``, an empty local
    file.
    """

    in_directory = False
    """Whether the files are in a directory of this host, so that special files can be put there."""

    writes = True
    """Whether files can be made there; if not, :meth:`put` has to be overridden."""

    renames = True
    """Whether a file can be given another name."""

    symlinks = True
    """Whether there are symbolic links."""

    directories = True
    """Whether there are directories, which are made before a file is put into one."""

    def put(self, transport: Transport, path: str, data: bytes) -> None:
        """Put a file there that the test only reads, in a directory that may not exist yet."""
        above = path.rpartition("/")[0]
        if above:
            transport.make_directory(above)
        transport.create(path, data, flush=False)

    # -- looking -----------------------------------------------------------------------------------

    def test_the_empty_directory_has_nothing_in_it(self, transport: Transport) -> None:
        assert transport.scan("") == []

    def test_a_directory_that_is_not_there_has_nothing_in_it(self, transport: Transport) -> None:
        assert transport.scan("nowhere") == []
        assert transport.scan("nowhere/at/all") == []

    @only_if("writes", "directories")
    def test_scan_tells_files_links_and_directories_apart(self, transport: Transport) -> None:
        transport.create("a", b"1")
        transport.make_directory("b/c")
        expected = {Entry("a", FileKind.FILE), Entry("b", FileKind.DIRECTORY)}
        if transport.capabilities.symlinks:
            transport.symlink("b", "l")
            expected.add(Entry("l", FileKind.LINK))
        assert set(transport.scan("")) == expected
        assert transport.scan("b") == [Entry("c", FileKind.DIRECTORY)]

    def test_scan_finds_many(self, transport: Transport) -> None:
        wanted = {f"{number:05}.json" for number in range(300)}
        for name in wanted:
            self.put(transport, name, b"")
        assert names(transport) == wanted

    @only_if("in_directory")
    def test_names_that_are_not_utf8_are_left_out(self, transport: Transport) -> None:
        here = local(transport, "")
        (here / "seen").write_bytes(b"")
        Path(os.fsdecode(os.fsencode(here) + b"/\xff\xfe")).write_bytes(b"")
        assert transport.scan("") == [Entry("seen", FileKind.FILE)]

    @only_if("directories")
    def test_scan_of_a_file_is_an_error(self, transport: Transport) -> None:
        self.put(transport, "a", b"1")
        with pytest.raises(TransportError):
            transport.scan("a")

    def test_stat_of_what_is_not_there(self, transport: Transport) -> None:
        self.put(transport, "file", b"")
        assert transport.stat("nothing") is None
        assert transport.stat("no/where") is None
        assert transport.stat("file/below") is None

    @only_if("writes")
    def test_stat_of_a_file(self, transport: Transport) -> None:
        transport.create("a", b"12345")
        transport.create("b", b"12345")
        transport.link("a", "c")
        stats = [transport.stat(name) for name in "abc"]
        assert [(stat.kind, stat.size) for stat in stats if stat] == [(FileKind.FILE, 5)] * 3
        assert all(stat.mtime_ns > 0 for stat in stats if stat)
        identities = [stat.identity for stat in stats if stat]
        assert identities[0] == identities[2] or transport.capabilities.copies
        assert identities[0] is None or identities[0] != identities[1]

    def test_a_file_in_a_directory(self, transport: Transport) -> None:
        self.put(transport, "d/e/a", b"12345")
        assert transport.scan("") == [Entry("d", FileKind.DIRECTORY)]
        assert transport.scan("d") == [Entry("e", FileKind.DIRECTORY)]
        assert transport.scan("d/e") == [Entry("a", FileKind.FILE)]
        stat = transport.stat("d/e/a")
        assert stat is not None
        assert (stat.kind, stat.size) == (FileKind.FILE, 5)

    @only_if("writes", "directories")
    def test_stat_of_a_directory(self, transport: Transport) -> None:
        transport.make_directory("d")
        stat = transport.stat("d")
        assert stat is not None
        assert stat.kind is FileKind.DIRECTORY

    @only_if("writes", "symlinks")
    def test_stat_is_of_a_link_itself(self, transport: Transport) -> None:
        transport.symlink("nowhere", "l")
        stat = transport.stat("l")
        assert stat is not None
        assert stat.kind is FileKind.LINK

    def test_read_from_an_offset(self, transport: Transport) -> None:
        self.put(transport, "a", b"0123456789")
        assert transport.read("a") == b"0123456789"
        assert transport.read("a", 4) == b"456789"
        assert transport.read("a", 4, 3) == b"456"
        assert transport.read("a", 0, 0) == b""
        assert transport.read("a", 8, 100) == b"89"
        assert transport.read("a", 10) == b""
        assert transport.read("a", 99, 5) == b""

    def test_read_of_an_empty_file(self, transport: Transport) -> None:
        self.put(transport, "a", b"")
        assert transport.read("a") == b""

    def test_read_of_what_is_not_there(self, transport: Transport) -> None:
        with pytest.raises(MissingFile) as caught:
            transport.read("data/nothing")
        assert caught.value.path == "data/nothing"
        assert "data/nothing" in str(caught.value)
        assert str(transport.location) in str(caught.value)

    @only_if("writes", "directories")
    def test_read_of_a_directory_is_an_error(self, transport: Transport) -> None:
        transport.make_directory("d")
        with pytest.raises(REFUSED):
            transport.read("d")

    @only_if("writes", "symlinks")
    def test_a_link_is_not_read(self, transport: Transport) -> None:
        transport.make_directory("data")
        transport.make_directory("view")
        transport.create("data/bytes", b"content")
        transport.symlink("../data/bytes", "view/name")
        assert transport.readlink("view/name") == "../data/bytes"
        with pytest.raises(REFUSED):
            transport.read("view/name")

    @only_if("writes", "symlinks")
    def test_a_link_that_leads_nowhere(self, transport: Transport) -> None:
        transport.symlink("nothing", "l")
        with pytest.raises(REFUSED):
            transport.read("l")

    @only_if("writes", "symlinks")
    def test_a_link_that_leads_to_itself(self, transport: Transport) -> None:
        transport.symlink("l", "l")
        with pytest.raises(REFUSED):
            transport.read("l")

    @only_if("writes", "symlinks")
    def test_no_link_on_the_way_is_followed(self, transport: Transport, target: int) -> None:
        """
        Test that nothing behind a link is looked at, created, renamed or removed: another account
        that may write to a pool could make a link that leads out of it.
        """
        transport.make_directory("real")
        transport.create("real/a", b"12345")
        transport.create("b", b"12345")
        transport.symlink("real", "way")
        digest = Digest.of(b"12345")
        for operation, *arguments in (
            ("read", "way/a"),
            ("scan", "way"),
            ("scan_many", ["real", "way"]),
            ("stat", "way/a"),
            ("stat_many", ["b", "way/a"]),
            ("read_many", ["b", "way/a"], 10),
            ("readlink", "way/a"),
            ("create", "way/new", b"x"),
            ("link", "b", "way/new"),
            ("link", "way/a", "new"),
            ("rename", "b", "way/new"),
            ("rename", "way/a", "new"),
            ("remove", "way/a"),
            ("symlink", "b", "way/new"),
            ("make_directory", "way/new"),
            ("make_directory", "way"),
            ("remove_directory", "way"),
            ("flush", "way"),
            ("fetch", "way/a", target, Transfer(5)),
            ("store", target, "way/new", Transfer(0)),
            ("digest", "way/a", Transfer(5)),
        ):
            with pytest.raises(REFUSED):
                getattr(transport, operation)(*arguments)
        assert names(transport, "real") == {"a"}
        assert names(transport) == {"real", "b", "way"}
        assert transport.digest("real/a", Transfer(5)) == digest

    @only_if("writes", "symlinks")
    def test_links_are_not_fetched_or_hashed(self, transport: Transport, target: int) -> None:
        transport.create("a", b"12345")
        transport.symlink("a", "l")
        with pytest.raises(REFUSED):
            transport.fetch("l", target, Transfer(5))
        with pytest.raises(REFUSED):
            transport.digest("l", Transfer(5))

    @only_if("writes", "symlinks")
    def test_readlink_of_what_is_no_link(self, transport: Transport) -> None:
        transport.create("a", b"1")
        with pytest.raises(MissingFile):
            transport.readlink("nothing")
        with pytest.raises(TransportError):
            transport.readlink("a")

    @only_if("in_directory")
    @pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK], ids=["fifo", "socket"])
    def test_what_is_no_file_is_refused_and_does_not_hang(
        self, transport: Transport, target: int, kind: int
    ) -> None:
        os.mknod(local(transport, "") / "odd", kind | 0o600)
        assert transport.scan("") == [Entry("odd", FileKind.OTHER)]
        for use in (
            lambda: transport.read("odd"),
            lambda: transport.fetch("odd", target, Transfer(0)),
            lambda: transport.digest("odd", Transfer(0)),
        ):
            with pytest.raises(IntegrityError, match="regular file"):
                use()

    # -- names -------------------------------------------------------------------------------------

    @only_if("writes")
    def test_create_makes_a_file_once(self, transport: Transport) -> None:
        transport.create("a", b"first")
        with pytest.raises(FileExists) as caught:
            transport.create("a", b"second")
        assert caught.value.path == "a"
        assert transport.read("a") == b"first"
        assert transport.scan("") == [Entry("a", FileKind.FILE)]

    @only_if("writes", "directories")
    def test_create_does_not_replace_a_directory_or_a_link(self, transport: Transport) -> None:
        transport.make_directory("d")
        with pytest.raises(FileExists):
            transport.create("d", b"")
        if transport.capabilities.symlinks:
            transport.symlink("nowhere", "l")
            with pytest.raises(FileExists):
                transport.create("l", b"")
            assert transport.readlink("l") == "nowhere"

    @only_if("writes", "directories")
    def test_create_needs_the_directory(self, transport: Transport) -> None:
        with pytest.raises(MissingFile):
            transport.create("no/where", b"")

    @only_if("writes")
    def test_one_of_many_creates(self, transport: Transport) -> None:
        for turn in range(20):
            name = f"record-{turn}"

            def create(number: int, name: str = name) -> None:
                transport.create(name, b"%d" % number, flush=False)

            won = winners(create)
            assert [transport.read(name)] == [b"%d" % number for number in won]
        assert len(transport.scan("")) == 20

    @only_if("writes")
    def test_a_file_that_is_created_is_never_seen_in_part(self, transport: Transport) -> None:
        content = pattern(MIB)
        seen: list[bytes] = []

        def look() -> None:
            if transport.stat("a") is not None:
                seen.append(transport.read("a"))
                transport.remove("a")

        made = 0
        with watching(look):
            while made < 30:
                try:
                    transport.create("a", content, flush=False)
                    made += 1
                except FileExists:
                    continue
        assert all(data == content for data in seen)

    @only_if("writes")
    def test_link_gives_a_second_name(self, transport: Transport) -> None:
        transport.create("a", b"1")
        transport.link("a", "b")
        transport.remove("a")
        assert transport.read("b") == b"1"

    @only_if("writes")
    def test_link_does_not_replace(self, transport: Transport) -> None:
        transport.create("a", b"1")
        transport.create("b", b"2")
        with pytest.raises(FileExists):
            transport.link("a", "b")
        assert transport.read("b") == b"2"

    @only_if("writes")
    def test_link_of_what_is_not_there(self, transport: Transport) -> None:
        with pytest.raises(MissingFile):
            transport.link("a", "b")

    @only_if("writes")
    def test_one_of_many_links(self, transport: Transport) -> None:
        for number in range(RACERS):
            transport.create(f"from-{number}", b"%d" % number, flush=False)
        won = winners(lambda number: transport.link(f"from-{number}", "to"))
        assert [transport.read("to")] == [b"%d" % number for number in won]

    @only_if("writes", "renames")
    def test_rename_replaces(self, transport: Transport) -> None:
        transport.make_directory("d")
        transport.create("a", b"new")
        transport.create("d/b", b"old")
        transport.rename("a", "d/b")
        assert transport.read("d/b") == b"new"
        assert transport.stat("a") is None

    @only_if("writes", "renames")
    def test_rename_of_what_is_not_there(self, transport: Transport) -> None:
        transport.create("b", b"old")
        with pytest.raises(MissingFile):
            transport.rename("a", "b")
        assert transport.read("b") == b"old"

    @only_if("writes", "renames")
    def test_rename_between_two_names_of_one_file(self, transport: Transport) -> None:
        transport.create("a", b"1")
        transport.link("a", "b")
        transport.rename("a", "b")
        assert transport.scan("") == [Entry("b", FileKind.FILE)]

    @only_if("writes", "renames")
    def test_one_of_many_renames_away(self, transport: Transport) -> None:
        transport.create("a", b"1")

        def rename(number: int) -> None:
            try:
                transport.rename("a", f"to-{number}")
            except MissingFile as error:
                raise FileExists("somebody else was first") from error

        won = winners(rename)
        assert names(transport) == {f"to-{number}" for number in won}
        assert len(won) == 1

    @only_if("writes")
    def test_remove_says_whether_it_did(self, transport: Transport) -> None:
        transport.create("a", b"1")
        assert transport.remove("a") is True
        assert transport.remove("a") is False
        assert transport.remove("no/where") is False

    @only_if("writes", "symlinks")
    def test_remove_takes_a_link_not_what_it_leads_to(self, transport: Transport) -> None:
        transport.create("a", b"1")
        transport.symlink("a", "l")
        assert transport.remove("l") is True
        assert transport.read("a") == b"1"

    @only_if("writes", "directories")
    def test_remove_of_a_directory_is_an_error(self, transport: Transport) -> None:
        transport.make_directory("d")
        with pytest.raises(TransportError):
            transport.remove("d")
        assert transport.scan("") == [Entry("d", FileKind.DIRECTORY)]

    @only_if("writes", "symlinks")
    def test_a_symbolic_link_gives_way_in_one_step(self, transport: Transport) -> None:
        transport.symlink("0", "l")
        seen: set[str] = set()
        # which raises MissingFile if the name is ever missing
        with watching(lambda: seen.add(transport.readlink("l"))):
            for number in range(1, 100):
                transport.symlink(str(number), "l")
        assert seen <= {str(number) for number in range(100)}
        assert transport.scan("") == [Entry("l", FileKind.LINK)]

    @only_if("writes", "symlinks")
    def test_a_symbolic_link_replaces_a_file_but_no_directory(self, transport: Transport) -> None:
        transport.create("a", b"1")
        transport.symlink("b", "a")
        assert transport.readlink("a") == "b"
        transport.make_directory("d")
        with pytest.raises(TransportError):
            transport.symlink("b", "d")
        assert names(transport) == {"a", "d"}

    @only_if("writes", "directories")
    def test_make_directory_makes_those_above_and_can_be_repeated(
        self, transport: Transport
    ) -> None:
        transport.make_directory("a/b/c")
        transport.make_directory("a/b/c")
        transport.make_directory("a")
        transport.make_directory("")
        assert transport.scan("a/b") == [Entry("c", FileKind.DIRECTORY)]

    @only_if("writes", "directories")
    def test_make_directory_where_a_file_is(self, transport: Transport) -> None:
        transport.create("a", b"1")
        with pytest.raises(TransportError):
            transport.make_directory("a")
        assert transport.read("a") == b"1"

    @only_if("writes", "directories")
    def test_many_make_one_directory(self, transport: Transport) -> None:
        assert winners(lambda _: transport.make_directory("a/b/c")) == list(range(RACERS))

    @only_if("writes", "directories")
    def test_remove_directory_only_if_it_is_empty(self, transport: Transport) -> None:
        transport.make_directory("d")
        transport.create("d/a", b"")
        assert transport.remove_directory("d") is False
        assert transport.remove("d/a")
        assert transport.remove_directory("d") is True
        assert transport.remove_directory("d") is False
        assert transport.scan("") == []

    @only_if("writes")
    def test_flush(self, transport: Transport) -> None:
        transport.make_directory("d")
        transport.create("d/a", b"1")
        transport.flush("d")
        transport.flush("")
        assert transport.read("d/a") == b"1"
